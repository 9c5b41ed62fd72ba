// Launchers of the CUDA kernels: raw pointers, sizes, strides in elements and a stream; no torch.
//
// Every launcher returns the error of its launches, and launches nothing for empty outputs. None
// waits except active_count, whose result decides a shape.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../dtype.h"

namespace fastalps::cuda {

// The grid of patches over a frame; `rows * columns` patches, row-major.
struct PatchGrid {
  int64_t height, width;
  int64_t patch_height, patch_width;
  int64_t stride_height, stride_width;
  int64_t rows, columns;

  int64_t count() const { return rows * columns; }
  int64_t patch_pixels() const { return patch_height * patch_width; }
};

PatchGrid make_patch_grid(int64_t height, int64_t width, int64_t patch_height, int64_t patch_width,
                          int64_t stride_height, int64_t stride_width, bool cover);

// A (N, D) matrix with any strides.
struct Matrix {
  const void* data;
  int64_t row_stride, column_stride;
};

// How the rows of an (n, m) problem are shared out: a warp or a block for each row, or, for few
// long rows, several blocks (`splits`) whose partial sums a second kernel adds in a fixed order.
struct RowPlan {
  int64_t n, m;
  int64_t chunk;  // Elements of one split; a multiple of every vector width.
  int32_t splits;
  int32_t blocks;
  int32_t threads_per_row;
  int32_t rows_per_block;
};

RowPlan plan_rows(int64_t n, int64_t m);

struct FrameView {
  const void* data;
  DType dtype;
  int64_t frames, channels;
  int64_t frame_stride, channel_stride, row_stride, column_stride;
};

// frames -> (N, P, C, ph, pw) contiguous. With `kept` (K pairs of frame and patch), the K patches
// named there instead: (K, C, ph, pw).
cudaError_t tile_patches(const FrameView& frames, const PatchGrid& grid, void* patches,
                         DType patch_dtype, double scale, double shift, const int64_t* kept,
                         int64_t kept_count, cudaStream_t stream);

// grad contiguous (N, P, C, ph, pw) -> contiguous (N, C, H, W).
cudaError_t tile_patches_backward(const void* grad, DType grad_dtype, int64_t frames,
                                  int64_t channels, const PatchGrid& grid, void* output,
                                  DType output_dtype, double scale, cudaStream_t stream);

// scores (N, P) -> contiguous (N, H, W) float32.
cudaError_t fold_scores(const Matrix& scores, DType dtype, int64_t frames, const PatchGrid& grid,
                        bool maximum, float* heatmap, cudaStream_t stream);

// grad contiguous (N, H, W) float32 -> contiguous (N, P) of the scores' dtype.
cudaError_t fold_scores_backward(const float* grad, const Matrix& scores, DType dtype,
                                 int64_t frames, const PatchGrid& grid, bool maximum, void* output,
                                 cudaStream_t stream);

// `partials`: plan.splits * n values of float (double for float64), unused where splits is 1.
cudaError_t perturb_latent(const RowPlan& plan, const Matrix& latent, const Matrix& perturbation,
                           DType dtype, double strength, void* output, float* energy,
                           void* partials, cudaStream_t stream);

cudaError_t perturb_latent_backward(const RowPlan& plan, const Matrix& grad_output,
                                    const float* grad_energy, const Matrix& perturbation,
                                    DType dtype, double strength, void* output,
                                    cudaStream_t stream);

// Each sample dense in memory, values and target in the same order; samples at the row strides.
struct ErrorPair {
  Matrix values;  // passes * n rows, passes first
  DType values_dtype;
  Matrix target;  // n rows
  DType target_dtype;
  int32_t passes;
  bool sigmoid;
};

// -> (passes, n) float32. `partials`: plan.splits * passes * n of float (double for float64).
cudaError_t squared_error(const RowPlan& plan, const ErrorPair& pair, float* errors, void* partials,
                          cudaStream_t stream);

// grad (passes * n) float32 -> contiguous (passes * n, m) of the values' dtype.
cudaError_t squared_error_backward(const RowPlan& plan, const ErrorPair& pair, const float* grad,
                                   void* output, cudaStream_t stream);

// Flags (N * P bytes): 1 for each patch of uint8 frames whose sum of absolute differences from the
// background is above `limit`, else 0.
cudaError_t patch_differences(const FrameView& frames, const Matrix& background,
                              const PatchGrid& grid, int64_t limit, uint8_t* flags,
                              cudaStream_t stream);

// Those flags, and the offsets of tiles of them (active_tiles(N * P) + 1 values, the last one the
// number of patches kept).
int64_t active_tiles(int64_t patches);
cudaError_t active_flags(const FrameView& frames, const Matrix& background, const PatchGrid& grid,
                         int64_t limit, uint8_t* flags, int64_t* offsets, cudaStream_t stream);

// The same, and waits until it can tell the host the number of patches kept; the rest of the work
// is done in the stream's order. Where `kept` is not null, that has their pairs, as by
// active_index: room for all patches.
cudaError_t active_count(const FrameView& frames, const Matrix& background, const PatchGrid& grid,
                         int64_t limit, uint8_t* flags, int64_t* offsets, int64_t* kept,
                         int64_t* kept_count, cudaStream_t stream);

// After either: writes the (frame, patch) pairs of the patches kept, in order.
cudaError_t active_index(const uint8_t* flags, const int64_t* offsets, int64_t patches,
                         int64_t patches_per_frame, int64_t* kept, cudaStream_t stream);

}  // namespace fastalps::cuda
