// Finding the patches that differ from a background: sums of absolute differences, and a scan that
// keeps the order. The patches themselves are then cut by tile_patches.
#include "common.cuh"

namespace fastalps::cuda {
namespace {

constexpr int kItemsPerThread = 16;
constexpr int64_t kTile = int64_t{kThreads} * kItemsPerThread;

struct DifferenceArguments {
  const uint8_t* frames;
  const uint8_t* background;
  int64_t frame_count;
  int64_t frame_stride, frame_row_stride, frame_column_stride;
  int64_t background_row_stride, background_column_stride;
  int64_t stride_height, stride_width, last_row, last_column;
  uint32_t groups;  // Of kUnit pixels in a patch.
  Divider groups_per_row;
  WideDivider columns, count;
  int64_t limit;
};

// A warp for each patch. kUnit bytes of a row are read and compared at once.
template <int kUnit>
__global__ void __launch_bounds__(kThreads)
    patch_differences_kernel(DifferenceArguments arguments, uint8_t* __restrict__ flags) {
  using Word = typename WordOf<kUnit>::Type;
  const int64_t patches = arguments.frame_count * arguments.count.divisor;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; item < patches;
       item += step) {
    int64_t column_index = item;
    const int64_t frame = arguments.count.split(column_index);
    const int64_t row = arguments.columns.split(column_index);
    const int64_t top = min(row * arguments.stride_height, arguments.last_row);
    const int64_t left = min(column_index * arguments.stride_width, arguments.last_column);
    const uint8_t* pixels = arguments.frames + frame * arguments.frame_stride +
                            top * arguments.frame_row_stride + left * arguments.frame_column_stride;
    const uint8_t* still = arguments.background + top * arguments.background_row_stride +
                           left * arguments.background_column_stride;
    unsigned long long sum = 0;
#pragma unroll 4
    for (uint32_t group = threadIdx.x; group < arguments.groups; group += 32) {
      uint32_t x = group;
      const int64_t y = arguments.groups_per_row.split(x);
      const int64_t column = static_cast<int64_t>(x) * kUnit;
      const uint32_t a = __ldg(reinterpret_cast<const Word*>(
          pixels + y * arguments.frame_row_stride + column * arguments.frame_column_stride));
      const uint32_t b =
          __ldg(reinterpret_cast<const Word*>(still + y * arguments.background_row_stride +
                                              column * arguments.background_column_stride));
      sum += __vsadu4(a, b);
    }
    sum = row_sum(sum);
    if (threadIdx.x == 0) flags[item] = static_cast<int64_t>(sum) > arguments.limit;
  }
}

// The exclusive prefix sum of one value a thread over the block, and the block's total.
template <typename T>
__device__ __forceinline__ T block_scan(T value, T* total) {
  __shared__ T warps[kThreads / 32];
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  T inclusive = value;
#pragma unroll
  for (unsigned offset = 1; offset < 32; offset *= 2) {
    const T before = __shfl_up_sync(0xffffffffu, inclusive, offset);
    if (lane >= offset) inclusive += before;
  }
  __syncthreads();
  if (lane == 31) warps[warp] = inclusive;
  __syncthreads();
  T start = 0, sum = 0;
#pragma unroll
  for (unsigned other = 0; other < kThreads / 32; ++other) {
    if (other < warp) start += warps[other];
    sum += warps[other];
  }
  *total = sum;
  return start + inclusive - value;
}

// The flags of one thread's consecutive items, as bits.
__device__ __forceinline__ uint32_t flag_bits(const uint8_t* flags, int64_t start,
                                              int64_t patches) {
  uint32_t bits = 0;
#pragma unroll
  for (int k = 0; k < kItemsPerThread; ++k) {
    if (start + k < patches && flags[start + k] != 0) bits |= 1u << k;
  }
  return bits;
}

__global__ void __launch_bounds__(kThreads)
    count_flags_kernel(const uint8_t* __restrict__ flags, int64_t patches, int64_t tiles,
                       int64_t* __restrict__ counts) {
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t start = tile * kTile + threadIdx.x * kItemsPerThread;
    int32_t total;
    block_scan(static_cast<int32_t>(__popc(flag_bits(flags, start, patches))), &total);
    if (threadIdx.x == 0) counts[tile] = total;
  }
}

// One block: counts become exclusive offsets in place, with the grand total behind them.
__global__ void __launch_bounds__(kThreads)
    scan_counts_kernel(int64_t* __restrict__ counts, int64_t tiles) {
  int64_t carry = 0;
  for (int64_t start = 0; start < tiles; start += kThreads) {
    const int64_t tile = start + threadIdx.x;
    int64_t total;
    const int64_t before = block_scan(tile < tiles ? counts[tile] : int64_t{0}, &total);
    if (tile < tiles) counts[tile] = carry + before;
    carry += total;
  }
  if (threadIdx.x == 0) counts[tiles] = carry;
}

__global__ void __launch_bounds__(kThreads)
    write_index_kernel(const uint8_t* __restrict__ flags, const int64_t* __restrict__ offsets,
                       int64_t patches, WideDivider patches_per_frame, int64_t tiles,
                       int64_t* __restrict__ kept) {
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t start = tile * kTile + threadIdx.x * kItemsPerThread;
    uint32_t bits = flag_bits(flags, start, patches);
    int32_t total;
    int64_t place = offsets[tile] + block_scan(static_cast<int32_t>(__popc(bits)), &total);
    for (; bits != 0; bits &= bits - 1, ++place) {
      int64_t patch = start + __ffs(static_cast<int>(bits)) - 1;
      kept[2 * place] = patches_per_frame.split(patch);
      kept[2 * place + 1] = patch;
    }
  }
}

bool reads_units(const FrameView& frames, const Matrix& background, const PatchGrid& grid,
                 int64_t unit) {
  if (unit == 1) return true;
  const int64_t last_column = grid.width - grid.patch_width;
  const bool moved_back = (grid.columns - 1) * grid.stride_width > last_column;
  return frames.column_stride == 1 && background.column_stride == 1 &&
         grid.patch_width % unit == 0 && (grid.columns == 1 || grid.stride_width % unit == 0) &&
         (!moved_back || last_column % unit == 0) && frames.row_stride % unit == 0 &&
         background.row_stride % unit == 0 &&
         (frames.frames == 1 || frames.frame_stride % unit == 0) && aligned(frames.data, unit) &&
         aligned(background.data, unit);
}

}  // namespace

int64_t active_tiles(int64_t patches) { return ceil_divide(patches, kTile); }

cudaError_t active_flags(const FrameView& frames, const Matrix& background, const PatchGrid& grid,
                         int64_t limit, uint8_t* flags, int64_t* offsets, cudaStream_t stream) {
  const int64_t patches = frames.frames * grid.count();
  if (patches == 0) return cudaSuccess;
  if (grid.patch_pixels() >= int64_t{1} << 31) return cudaErrorInvalidValue;
  const dim3 block(32, kThreads / 32);
  const int blocks = grid_blocks(ceil_divide(patches, block.y));
  const auto launch = [&](auto kernel, int64_t unit) {
    const DifferenceArguments arguments{static_cast<const uint8_t*>(frames.data),
                                        static_cast<const uint8_t*>(background.data),
                                        frames.frames,
                                        frames.frame_stride,
                                        frames.row_stride,
                                        frames.column_stride,
                                        background.row_stride,
                                        background.column_stride,
                                        std::min(grid.stride_height, grid.height),
                                        std::min(grid.stride_width, grid.width),
                                        grid.height - grid.patch_height,
                                        grid.width - grid.patch_width,
                                        static_cast<uint32_t>(grid.patch_pixels() / unit),
                                        Divider(grid.patch_width / unit),
                                        WideDivider(grid.columns),
                                        WideDivider(grid.count()),
                                        limit};
    kernel<<<blocks, block, 0, stream>>>(arguments, flags);
    return cudaGetLastError();
  };
  cudaError_t status =
      reads_units(frames, background, grid, 4)   ? launch(patch_differences_kernel<4>, 4)
      : reads_units(frames, background, grid, 2) ? launch(patch_differences_kernel<2>, 2)
                                                 : launch(patch_differences_kernel<1>, 1);
  if (status != cudaSuccess) return status;
  const int64_t tiles = active_tiles(patches);
  count_flags_kernel<<<grid_blocks(tiles), kThreads, 0, stream>>>(flags, patches, tiles, offsets);
  if ((status = cudaGetLastError()) != cudaSuccess) return status;
  scan_counts_kernel<<<1, kThreads, 0, stream>>>(offsets, tiles);
  return cudaGetLastError();
}

cudaError_t active_count(const FrameView& frames, const Matrix& background, const PatchGrid& grid,
                         int64_t limit, uint8_t* flags, int64_t* offsets, int64_t* kept_count,
                         cudaStream_t stream) {
  *kept_count = 0;
  const int64_t patches = frames.frames * grid.count();
  if (patches == 0) return cudaSuccess;
  cudaError_t status = active_flags(frames, background, grid, limit, flags, offsets, stream);
  if (status != cudaSuccess) return status;
  status = cudaMemcpyAsync(kept_count, offsets + active_tiles(patches), sizeof(int64_t),
                           cudaMemcpyDeviceToHost, stream);
  if (status != cudaSuccess) return status;
  return cudaStreamSynchronize(stream);
}

cudaError_t active_index(const uint8_t* flags, const int64_t* offsets, int64_t patches,
                         int64_t patches_per_frame, int64_t* kept, cudaStream_t stream) {
  const int64_t tiles = active_tiles(patches);
  if (tiles == 0) return cudaSuccess;
  write_index_kernel<<<grid_blocks(tiles), kThreads, 0, stream>>>(
      flags, offsets, patches, WideDivider(patches_per_frame), tiles, kept);
  return cudaGetLastError();
}

}  // namespace fastalps::cuda
