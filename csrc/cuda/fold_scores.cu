// Heatmaps from patch scores: every pixel gathers the patches that cover it; and the gradient.
#include "common.cuh"

namespace fastalps::cuda {
namespace {

struct FoldArguments {
  Matrix scores;
  int64_t frames;
  Axis vertical, horizontal;
  WideDivider lines, patches;  // In a frame.
  bool maximum;
};

FoldArguments fold_arguments(const Matrix& scores, int64_t frames, const PatchGrid& grid,
                             bool maximum) {
  return FoldArguments{scores,
                       frames,
                       Axis(grid.height, grid.patch_height, grid.stride_height, grid.rows),
                       Axis(grid.width, grid.patch_width, grid.stride_width, grid.columns),
                       WideDivider(grid.height),
                       WideDivider(grid.count()),
                       maximum};
}

template <typename T>
__device__ __forceinline__ Compute<T> score_at(const FoldArguments& arguments, int64_t frame,
                                               int32_t row, int32_t column) {
  const int64_t patch = static_cast<int64_t>(row) * arguments.horizontal.count + column;
  return widen(static_cast<const T*>(
      arguments.scores
          .data)[frame * arguments.scores.row_stride + patch * arguments.scores.column_stride]);
}

// A warp for each row of pixels: what depends on the row alone is computed once.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    fold_scores_kernel(FoldArguments arguments, float* __restrict__ heatmap) {
  using Value = Compute<T>;
  const Axis& vertical = arguments.vertical;
  const Axis& horizontal = arguments.horizontal;
  const int64_t lines = arguments.frames * vertical.size;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t line = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; line < lines;
       line += step) {
    int64_t inside = line;
    const int64_t frame = arguments.lines.split(inside);
    const int32_t y = static_cast<int32_t>(inside);
    const int32_t first_row = vertical.first(y), last_row = vertical.last(y);
    for (int32_t x = static_cast<int32_t>(threadIdx.x); x < horizontal.size; x += 32) {
      const int32_t first_column = horizontal.first(x), last_column = horizontal.last(x);
      Value result = 0;
      bool any = false;
      for (int32_t row = first_row; row <= last_row; ++row) {
        for (int32_t column = first_column; column <= last_column; ++column) {
          const Value score = score_at<T>(arguments, frame, row, column);
          if (!arguments.maximum) {
            result += score;
          } else if (!any || score > result || score != score) {
            // A NaN, once taken, stays: no comparison with it holds but that of the next NaN.
            result = score;
          }
          any = true;
        }
      }
      if (any && !arguments.maximum) {
        const int64_t count =
            static_cast<int64_t>(last_row - first_row + 1) * (last_column - first_column + 1);
        result = quotient(result, static_cast<Value>(count));
      }
      heatmap[line * horizontal.size + x] = static_cast<float>(result);
    }
  }
}

// Whether patch (row, column) is the first that attains the maximum at a pixel. The heatmap is
// float32, so what ties there ties here. Where a NaN is the maximum, no patch attains it.
template <typename T>
__device__ __forceinline__ bool owns(const FoldArguments& arguments, int64_t frame, int32_t row,
                                     int32_t column, float own, int2 rows, int2 columns) {
  for (int32_t r = rows.x; r <= rows.y; ++r) {
    for (int32_t c = columns.x; c <= columns.y; ++c) {
      const float other = static_cast<float>(score_at<T>(arguments, frame, r, c));
      const bool earlier = r < row || (r == row && c < column);
      if (!(earlier ? other < own : other <= own)) return false;
    }
  }
  return true;
}

// A warp, or a block where patches are large, for each patch: it sums its own pixels, no atomics.
template <typename T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    fold_scores_backward_kernel(FoldArguments arguments, WideDivider by_columns, Divider by_width,
                                const float* __restrict__ grad, T* __restrict__ output) {
  using Value = Compute<T>;
  const Axis& vertical = arguments.vertical;
  const Axis& horizontal = arguments.horizontal;
  const int64_t patches = arguments.frames * arguments.patches.divisor;
  const uint32_t pixels = static_cast<uint32_t>(vertical.patch * horizontal.patch);
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; item < patches;
       item += step) {
    int64_t patch = item;
    const int64_t frame = arguments.patches.split(patch);
    const int32_t row = static_cast<int32_t>(by_columns.split(patch));
    const int32_t column = static_cast<int32_t>(patch);
    const int32_t top = vertical.origin(row), left = horizontal.origin(column);
    const float own = static_cast<float>(score_at<T>(arguments, frame, row, column));
    Value sum = 0;
    for (uint32_t pixel = threadIdx.x; pixel < pixels; pixel += blockDim.x) {
      uint32_t x_inside = pixel;
      const int32_t y = top + static_cast<int32_t>(by_width.split(x_inside));
      const int32_t x = left + static_cast<int32_t>(x_inside);
      const int2 rows = make_int2(vertical.first(y), vertical.last(y));
      const int2 columns = make_int2(horizontal.first(x), horizontal.last(x));
      const Value value = grad[(frame * vertical.size + y) * horizontal.size + x];
      if (!arguments.maximum) {
        const int64_t count =
            static_cast<int64_t>(rows.y - rows.x + 1) * (columns.y - columns.x + 1);
        sum += quotient(value, static_cast<Value>(count));
      } else if (owns<T>(arguments, frame, row, column, own, rows, columns)) {
        sum += value;
      }
    }
    sum = row_sum(sum);
    if (threadIdx.x == 0) output[item] = narrow<T>(sum);
  }
}

}  // namespace

cudaError_t fold_scores(const Matrix& scores, DType dtype, int64_t frames, const PatchGrid& grid,
                        bool maximum, float* heatmap, cudaStream_t stream) {
  if (frames * grid.height * grid.width == 0) return cudaSuccess;
  const auto arguments = fold_arguments(scores, frames, grid, maximum);
  const dim3 block(32, kThreads / 32);
  const int blocks = grid_blocks(ceil_divide(frames * grid.height, block.y));
  return with_floating(dtype, [&](auto tag) {
    fold_scores_kernel<decltype(tag)><<<blocks, block, 0, stream>>>(arguments, heatmap);
    return cudaGetLastError();
  });
}

cudaError_t fold_scores_backward(const float* grad, const Matrix& scores, DType dtype,
                                 int64_t frames, const PatchGrid& grid, bool maximum, void* output,
                                 cudaStream_t stream) {
  const int64_t patches = frames * grid.count();
  if (patches == 0) return cudaSuccess;
  if (grid.patch_pixels() >= int64_t{1} << 31) return cudaErrorInvalidValue;
  const auto arguments = fold_arguments(scores, frames, grid, maximum);
  constexpr int64_t kLargePatch = 4096;
  const bool large = grid.patch_pixels() > kLargePatch;
  const dim3 block = large ? dim3(kThreads) : dim3(32, kThreads / 32);
  const int blocks = grid_blocks(ceil_divide(patches, block.y));
  return with_floating(dtype, [&](auto tag) {
    using T = decltype(tag);
    fold_scores_backward_kernel<T>
        <<<blocks, block, 0, stream>>>(arguments, WideDivider(grid.columns),
                                       Divider(grid.patch_width), grad, static_cast<T*>(output));
    return cudaGetLastError();
  });
}

}  // namespace fastalps::cuda
