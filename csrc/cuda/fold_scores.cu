// Heatmaps from patch scores: every pixel gathers the patches that cover it; and the gradient.
#include "common.cuh"

namespace fastalps::cuda {
namespace {

struct FoldArguments {
  Matrix scores;
  int64_t frames;
  Axis vertical, horizontal;
  WideDivider patches;  // In a frame.
  bool maximum;
};

FoldArguments fold_arguments(const Matrix& scores, int64_t frames, const PatchGrid& grid,
                             bool maximum) {
  return FoldArguments{scores,
                       frames,
                       Axis(grid.height, grid.patch_height, grid.stride_height, grid.rows),
                       Axis(grid.width, grid.patch_width, grid.stride_width, grid.columns),
                       WideDivider(grid.count()),
                       maximum};
}

// How a frame is shared out among threads: vectors of a row, groups of so many rows.
struct FoldRows {
  WideDivider vectors, groups;
  int32_t rows;
};

// Few enough rows a thread that the device is full; more than kMostRows save little.
FoldRows fold_rows(int64_t frames, const PatchGrid& grid, int64_t vector) {
  constexpr int64_t kMostRows = 8, kResidentThreads = 2048;
  const int64_t vectors = grid.width / vector;
  const int64_t wanted = kResidentThreads * multiprocessors();
  const int64_t most = std::clamp<int64_t>(frames * grid.height * vectors / wanted, 1, kMostRows);
  const int64_t groups = ceil_divide(grid.height, most);
  const int64_t rows = ceil_divide(grid.height, groups);
  return FoldRows{WideDivider(vectors), WideDivider(ceil_divide(grid.height, rows)),
                  static_cast<int32_t>(rows)};
}

template <typename T>
__device__ __forceinline__ Compute<T> score_at(const FoldArguments& arguments, int64_t frame,
                                               int32_t row, int32_t column) {
  const int64_t patch = static_cast<int64_t>(row) * arguments.horizontal.count + column;
  return widen(static_cast<const T*>(
      arguments.scores
          .data)[frame * arguments.scores.row_stride + patch * arguments.scores.column_stride]);
}

// The pixel that the patches in `rows` x `columns`, each from its first to its last, cover.
template <typename T>
__device__ __forceinline__ float pixel_of(const FoldArguments& arguments, int64_t frame, int2 rows,
                                          int2 columns) {
  using Value = Compute<T>;
  Value result = 0;
  bool any = false;
  for (int32_t row = rows.x; row <= rows.y; ++row) {
    for (int32_t column = columns.x; column <= columns.y; ++column) {
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
    const int64_t count = static_cast<int64_t>(rows.y - rows.x + 1) * (columns.y - columns.x + 1);
    result = quotient(result, static_cast<Value>(count));
  }
  return static_cast<float>(result);
}

// The first row of pixels below y that other patches may cover. Where a patch ends, first() rises,
// and where one starts, last() does; both bounds are below 2^32, since no stride exceeds the axis.
__device__ __forceinline__ int32_t band_end(const Axis& axis, int32_t y, int2 rows,
                                            int32_t bottom) {
  const uint32_t stride = static_cast<uint32_t>(axis.stride);
  uint32_t end = min(static_cast<uint32_t>(bottom),
                     static_cast<uint32_t>(axis.patch) + static_cast<uint32_t>(rows.x) * stride);
  const int32_t last_origin = axis.size - axis.patch;
  if (y < last_origin) {
    end = min(end,
              min(static_cast<uint32_t>(rows.y + 1) * stride, static_cast<uint32_t>(last_origin)));
  }
  return static_cast<int32_t>(end);
}

// A thread for kVector pixels side by side in each of a few rows. It looks their patches up once
// for every band of rows that the same patches cover; the other rows of a band are stores alone.
template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    fold_scores_kernel(FoldArguments arguments, FoldRows parts, float* __restrict__ heatmap) {
  const Axis& vertical = arguments.vertical;
  const Axis& horizontal = arguments.horizontal;
  const int64_t items = arguments.frames * parts.groups.divisor * parts.vectors.divisor;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; item < items;
       item += step) {
    int64_t vector = item;
    int64_t group = parts.vectors.split(vector);
    const int64_t frame = parts.groups.split(group);
    const int32_t left = static_cast<int32_t>(vector) * kVector;
    int32_t y = static_cast<int32_t>(group) * parts.rows;
    const int32_t bottom = y + min(parts.rows, vertical.size - y);
    float* target = heatmap + (frame * vertical.size + y) * horizontal.size + left;
    int2 columns[kVector];
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      columns[k] = make_int2(horizontal.first(left + k), horizontal.last(left + k));
    }
    while (y < bottom) {
      const int2 rows = make_int2(vertical.first(y), vertical.last(y));
      Pack<float, kVector> pixels;
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        if (k > 0 && columns[k].x == columns[k - 1].x && columns[k].y == columns[k - 1].y) {
          pixels.value[k] = pixels.value[k - 1];
        } else {
          pixels.value[k] = pixel_of<T>(arguments, frame, rows, columns[k]);
        }
      }
      for (const int32_t end = band_end(vertical, y, rows, bottom); y < end; ++y) {
        pixels.store(target);
        target += horizontal.size;
      }
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
  return with_floating(dtype, [&](auto tag) {
    using T = decltype(tag);
    const auto launch = [&](auto kernel, int64_t vector) {
      const FoldRows parts = fold_rows(frames, grid, vector);
      const int64_t items = frames * parts.groups.divisor * parts.vectors.divisor;
      kernel<<<grid_blocks(ceil_divide(items, kThreads)), kThreads, 0, stream>>>(arguments, parts,
                                                                                 heatmap);
      return cudaGetLastError();
    };
    // With a stride below the vector, neighbouring threads would read scores apart.
    const auto fits = [&](int64_t vector) {
      return grid.width % vector == 0 && grid.stride_width >= vector &&
             aligned(heatmap, vector * static_cast<int64_t>(sizeof(float)));
    };
    return fits(4)   ? launch(fold_scores_kernel<T, 4>, 4)
           : fits(2) ? launch(fold_scores_kernel<T, 2>, 2)
                     : launch(fold_scores_kernel<T, 1>, 1);
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
