// The CPU kernels: plain arguments in, a half-open range of independent tasks to work on. They know
// nothing of torch or of threads; the bindings cut the ranges and run them in torch's thread pool.
#pragma once

#include <cstdint>

#include "../dtype.h"
#include "engine.h"

namespace fastalps {

// The patches along one axis. With `cover` the last one is moved back to the border.
struct Axis {
  int64_t size, patch, stride;
  int64_t count;

  Axis(int64_t size, int64_t patch, int64_t stride, bool cover)
      : size(size),
        patch(patch),
        stride(stride),
        count((size - patch + (cover ? stride - 1 : 0)) / stride + 1) {}

  int64_t origin(int64_t index) const {
    const int64_t regular = index * stride;
    return regular < size - patch ? regular : size - patch;
  }
  // The patches [first, last) hold a pixel before `at` (or are [0, 0)): moves on to those that hold
  // `at`. No divisions: they would cost more than the work on the pixel.
  void advance(int64_t at, int64_t& first, int64_t& last) const {
    while (first < count && origin(first) + patch <= at) ++first;
    while (last < count && origin(last) <= at) ++last;
  }
};

struct Grid {
  Axis rows, columns;
  int64_t patches() const { return rows.count * columns.count; }
};

// Tasks: n * rows.count, one row of patches each.
struct TileArguments {
  const void* frames;
  DType frames_type;
  int64_t channels;
  int64_t strides[4];  // of frames (N, C, H, W), in elements
  Grid grid;
  void* patches;  // (N, P, C, ph, pw)
  DType patches_type;
  double scale, shift;
  bool stream;  // write past the caches: the result is larger than they are
};

// Tasks: n * channels * height, one row of pixels each.
struct TileBackwardArguments {
  const void* grad;  // (N, P, C, ph, pw)
  DType grad_type;
  int64_t channels;
  Grid grid;
  void* frames;  // (N, C, H, W)
  DType frames_type;
  double scale;
};

// Tasks: n * bands; a band is a run of pixel rows that the same patches cover.
struct FoldArguments {
  const void* scores;  // (N, P)
  DType scores_type;
  Grid grid;
  const int64_t* bands;  // first pixel row of each band, and the height last
  int64_t band_count;
  float* heatmap;  // (N, H, W)
  bool maximum;
  bool stream;
};

// Tasks: n * rows.count, one row of patches each.
struct FoldBackwardArguments {
  const float* grad;   // (N, H, W)
  const void* scores;  // (N, P)
  DType type;
  Grid grid;
  void* result;  // (N, P) of `type`
  bool maximum;
};

// Tasks: n.
struct PerturbArguments {
  const void* latent;
  const void* perturbation;
  DType type;
  int64_t latent_stride, perturbation_stride;  // between samples
  int64_t size;
  double strength;
  void* perturbed;
  float* energy;
  bool stream;
};

// Tasks: n.
struct PerturbBackwardArguments {
  const void* grad_output;
  const float* grad_energy;
  const void* perturbation;
  DType type;
  int64_t grad_stride, perturbation_stride;
  int64_t size;
  double strength;
  void* result;
  bool stream;
};

// Tasks: n * chunks. A chunk of a sample gives one partial sum for each pass.
struct SquaredErrorArguments {
  const void* values;  // (S * N, size)
  const void* target;  // (N, size)
  DType values_type, target_type;
  int64_t values_stride, target_stride;  // between samples
  int64_t n, size, passes;
  int64_t chunk, chunks;
  bool sigmoid;
  double* partial;  // (S, N, chunks)
};

// Tasks: s * n * chunks.
struct SquaredErrorBackwardArguments {
  const float* grad;  // (S * N)
  const void* values;
  const void* target;
  DType values_type, target_type;
  int64_t values_stride, target_stride;
  int64_t n, size;
  int64_t chunk, chunks;
  bool sigmoid;
  void* result;  // (S * N, size) of values_type
  bool stream;
};

// Tasks: n * rows.count, one row of patches each.
struct ActivityArguments {
  const uint8_t* frames;
  int64_t strides[3];
  const uint8_t* background;  // contiguous
  Grid grid;
  int64_t limit;    // a patch is active when its sum of absolute differences exceeds this
  uint8_t* active;  // (N, P)
};

// Tasks: k, one kept patch each.
struct GatherArguments {
  TileArguments tile;    // patches is (K, 1, ph, pw)
  const int64_t* index;  // (K, 2)
};

// A block of patches through the whole network: its first patch, their number, the vectors that
// they fill (1 to kBlockVectors), and scratch of `Network::scratch` words for each lane.
using EngineBlock = void (*)(const EngineArguments&, int64_t, int64_t, int, float*);

struct Kernels {
  const char* name;
  void (*tile_patches)(const TileArguments&, int64_t, int64_t);
  void (*tile_patches_backward)(const TileBackwardArguments&, int64_t, int64_t);
  void (*fold_scores)(const FoldArguments&, int64_t, int64_t);
  void (*fold_scores_backward)(const FoldBackwardArguments&, int64_t, int64_t);
  void (*perturb_latent)(const PerturbArguments&, int64_t, int64_t);
  void (*perturb_latent_backward)(const PerturbBackwardArguments&, int64_t, int64_t);
  void (*squared_error)(const SquaredErrorArguments&, int64_t, int64_t);
  void (*squared_error_backward)(const SquaredErrorBackwardArguments&, int64_t, int64_t);
  void (*activity)(const ActivityArguments&, int64_t, int64_t);
  void (*gather)(const GatherArguments&, int64_t, int64_t);
  int lanes;  // floats in a vector
  EngineBlock engine_fp32, engine_bf16, engine_int8;
};

// The fastest set that this processor runs; FASTALPS_CPU=default|avx2|avx512 asks for a lesser one
// (avx512: without AMX).
const Kernels& kernels();

// The engine in a precision: with its own instructions where the chosen set has 512 bits and the
// processor knows them, else with that set's.
EngineBlock engine_block(Precision precision);
// "avx512 avx512_bf16 avx512_vnni": the set, and the instructions that the engine has besides.
const char* kernels_description();

}  // namespace fastalps
