// The launcher of the fused scoring kernels: raw pointers, sizes and a stream; no torch.
#pragma once

#include "launchers.h"

namespace fastalps::cuda {

// What the kernels of one shape take; see fastalps/fused/packing.py for the shapes' numbers.
struct FusedSizes {
  int64_t side;          // Of the square patches, in pixels.
  int64_t fragments;     // Of weights: 128 bf16 each.
  int64_t biases;        // float32.
  int64_t map_bytes;     // Scratch a patch; 16 bytes more say where it is.
  int64_t latent_bytes;  // Scratch a network and patch.
};

// Scratch a patch that is of the same size for all shapes: where the patch is.
constexpr int64_t kPatchBytes = 16;

// Returns whether there is a shape of that number.
bool fused_sizes(int64_t shape, FusedSizes* sizes);

struct FusedCall {
  FrameView frames;  // One channel, uint8 or float32.
  PatchGrid grid;    // Patches of the shape's size; fewer than 2^30 in all frames.
  // On the device: (frame, patch) pairs of the patches to score, and how many there are; the errors
  // of others become 0. Null: all patches.
  const int64_t* index;
  const int64_t* count;
  int64_t shape;
  const void* weights;
  const float* biases;
  int32_t bound;  // On the perturbation: none, tanh, norm.
  float slope, strength;
  int32_t smoothing;  // Side of the neighbourhood that a residual is averaged over, odd; 1: none.
  bool normal, perturbed;  // Which passes; one or both.
  int64_t chunk;           // Patches whose maps are in scratch at once.
  void* maps;              // chunk * map_bytes, aligned to 16 bytes.
  void* latents;           // chunk * networks * latent_bytes, aligned to 16 bytes.
  void* patches;           // chunk * kPatchBytes, aligned to 16 bytes.
  float* errors;           // (passes, frames * patches).
};

// Launches five kernels a chunk; neither allocates nor synchronises.
cudaError_t fused_errors(const FusedCall& call, cudaStream_t stream);

}  // namespace fastalps::cuda
