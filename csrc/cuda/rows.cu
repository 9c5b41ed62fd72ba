// Sharing rows out among blocks, and the second stage of split sums.
#include "common.cuh"

namespace fastalps::cuda {

PatchGrid make_patch_grid(int64_t height, int64_t width, int64_t patch_height, int64_t patch_width,
                          int64_t stride_height, int64_t stride_width, bool cover) {
  const auto count = [cover](int64_t size, int64_t patch, int64_t stride) {
    const int64_t room = size - patch;
    return (cover ? ceil_divide(room, stride) : room / stride) + 1;
  };
  return PatchGrid{height,
                   width,
                   patch_height,
                   patch_width,
                   stride_height,
                   stride_width,
                   count(height, patch_height, stride_height),
                   count(width, patch_width, stride_width)};
}

RowPlan plan_rows(int64_t n, int64_t m) {
  // Up to here one warp covers a row in a few dozen wide loads, and needs no barrier.
  constexpr int64_t kWarpRow = 2048;
  // The least work that pays for a block of its own, and the most that keeps each thread's float32
  // sum short enough to be accurate.
  constexpr int64_t kSmallestChunk = 16384, kLargestChunk = int64_t{1} << 20;
  constexpr int64_t kMostSplits = 65535;
  RowPlan plan{n, m, std::max<int64_t>(m, 1), 1, 1, 32, kThreads / 32};
  if (m <= kWarpRow) {
    plan.blocks = grid_blocks(ceil_divide(n, plan.rows_per_block));
    return plan;
  }
  plan.threads_per_row = kThreads;
  plan.rows_per_block = 1;
  const int64_t wanted = int64_t{8} * multiprocessors();
  int64_t splits = std::min(ceil_divide(m, kLargestChunk), kMostSplits);
  if (n > 0 && n < wanted) {
    splits = std::max(splits, std::min(ceil_divide(wanted, n), ceil_divide(m, kSmallestChunk)));
  }
  plan.chunk = ceil_divide(ceil_divide(m, splits), 8) * 8;
  plan.splits = static_cast<int32_t>(ceil_divide(m, plan.chunk));
  plan.blocks = grid_blocks(n);
  return plan;
}

namespace {

// One warp for each result; lanes take splits in turn, then a shuffle tree: a fixed order.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    reduce_partials_kernel(const T* __restrict__ partials, int32_t splits, int64_t rows,
                           double inverse, float* __restrict__ means) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < rows;
       row += step) {
    T sum = 0;
    for (int32_t split = static_cast<int32_t>(threadIdx.x); split < splits; split += 32) {
      sum += partials[split * rows + row];
    }
    sum = row_sum(sum);
    if (threadIdx.x == 0) means[row] = static_cast<float>(sum * static_cast<T>(inverse));
  }
}

}  // namespace

cudaError_t reduce_partials(const void* partials, bool is_double, int32_t splits, int64_t rows,
                            int64_t m, float* means, cudaStream_t stream) {
  const dim3 block(32, kThreads / 32);
  const int blocks = grid_blocks(ceil_divide(rows, block.y));
  if (is_double) {
    reduce_partials_kernel<double><<<blocks, block, 0, stream>>>(
        static_cast<const double*>(partials), splits, rows, 1.0 / static_cast<double>(m), means);
  } else {
    reduce_partials_kernel<float><<<blocks, block, 0, stream>>>(
        static_cast<const float*>(partials), splits, rows, 1.0 / static_cast<double>(m), means);
  }
  return cudaGetLastError();
}

}  // namespace fastalps::cuda
