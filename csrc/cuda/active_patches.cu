// Finding the patches that patch_differences has flagged: a scan that keeps the order, and their
// number told to the host. The patches themselves are then cut by tile_patches.
#include <chrono>

#include "common.cuh"

namespace fastalps::cuda {
namespace {

constexpr int kItemsPerThread = 16;
constexpr int64_t kTile = int64_t{kThreads} * kItemsPerThread;

// So many tiles are indexed by one launch, whose blocks count what comes before them themselves.
// Beyond, the counts would take longer than the two launches that they save.
constexpr int64_t kFewTiles = 64;

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
__device__ __forceinline__ uint32_t flag_bits(const uint8_t* flags, int64_t start, int64_t patches,
                                              bool wide) {
  uint32_t bits = 0;
  if (wide && start + kItemsPerThread <= patches) {
    const uint4 read = *reinterpret_cast<const uint4*>(flags + start);
    const uint32_t words[] = {read.x, read.y, read.z, read.w};
    // Each factor's bit moves one byte's flag to its place in the highest byte; none meet below.
#pragma unroll
    for (int i = 0; i < 4; ++i) bits |= (words[i] * 0x01020408u >> 24) << (4 * i);
    return bits;
  }
#pragma unroll
  for (int k = 0; k < kItemsPerThread; ++k) {
    if (start + k < patches && flags[start + k] != 0) bits |= 1u << k;
  }
  return bits;
}

// Writes the pairs of the patches whose bits are set, from `place` on.
__device__ __forceinline__ void write_pairs(uint32_t bits, int64_t start, int64_t place,
                                            const WideDivider& patches_per_frame,
                                            int64_t* __restrict__ kept) {
  for (; bits != 0; bits &= bits - 1, ++place) {
    int64_t patch = start + __ffs(static_cast<int>(bits)) - 1;
    kept[2 * place] = patches_per_frame.split(patch);
    kept[2 * place + 1] = patch;
  }
}

__global__ void __launch_bounds__(kThreads)
    count_flags_kernel(const uint8_t* __restrict__ flags, int64_t patches, int64_t tiles, bool wide,
                       int64_t* __restrict__ counts) {
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t start = tile * kTile + threadIdx.x * kItemsPerThread;
    int32_t total;
    block_scan(static_cast<int32_t>(__popc(flag_bits(flags, start, patches, wide))), &total);
    if (threadIdx.x == 0) counts[tile] = total;
  }
}

// One block: counts become exclusive offsets in place, with the grand total behind them.
__global__ void __launch_bounds__(kThreads)
    scan_counts_kernel(int64_t* __restrict__ counts, int64_t tiles, int64_t* __restrict__ told) {
  int64_t carry = 0;
  for (int64_t start = 0; start < tiles; start += kThreads) {
    const int64_t tile = start + threadIdx.x;
    int64_t total;
    const int64_t before = block_scan(tile < tiles ? counts[tile] : int64_t{0}, &total);
    if (tile < tiles) counts[tile] = carry + before;
    carry += total;
  }
  if (threadIdx.x == 0) {
    counts[tiles] = carry;
    if (told != nullptr) *told = carry;
  }
}

__global__ void __launch_bounds__(kThreads)
    write_index_kernel(const uint8_t* __restrict__ flags, const int64_t* __restrict__ offsets,
                       int64_t patches, WideDivider patches_per_frame, int64_t tiles, bool wide,
                       int64_t* __restrict__ kept) {
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t start = tile * kTile + threadIdx.x * kItemsPerThread;
    const uint32_t bits = flag_bits(flags, start, patches, wide);
    int32_t total;
    const int32_t before = block_scan(static_cast<int32_t>(__popc(bits)), &total);
    write_pairs(bits, start, offsets[tile] + before, patches_per_frame, kept);
  }
}

// The three of them at once, a block for each of at most kFewTiles tiles of aligned flags. Without
// `kept` only the offsets are wanted.
__global__ void __launch_bounds__(kThreads)
    few_flags_kernel(const uint8_t* __restrict__ flags, int64_t patches,
                     WideDivider patches_per_frame, int64_t* __restrict__ offsets,
                     int64_t* __restrict__ kept, int64_t* __restrict__ told) {
  const uint32_t tile = blockIdx.x;
  const int64_t start = tile * kTile + threadIdx.x * kItemsPerThread;
  // Flags are added up as bytes: four a tile, so that none overflows.
  static_assert(4 * (kFewTiles - 1) < 256);
  const uint4* earlier = reinterpret_cast<const uint4*>(flags) + threadIdx.x;
  uint32_t bytes = 0;
#pragma unroll 8
  for (uint32_t other = 0; other < tile; ++other) {
    const uint4 read = earlier[other * kThreads];
    bytes += read.x + read.y + read.z + read.w;
  }
  const uint32_t bits = flag_bits(flags, start, patches, true);
  int32_t base, total;
  block_scan(static_cast<int32_t>(__vsadu4(bytes, 0u)), &base);
  const int32_t before = block_scan(static_cast<int32_t>(__popc(bits)), &total);
  if (kept != nullptr) write_pairs(bits, start, base + before, patches_per_frame, kept);
  if (threadIdx.x == 0) {
    offsets[tile] = base;
    if (tile + 1 == gridDim.x) {
      offsets[tile + 1] = base + total;
      if (told != nullptr) *told = base + total;
    }
  }
}

// Flags, offsets, and what of the pairs and of their number at `told` is wanted.
cudaError_t find_active(const FrameView& frames, const Matrix& background, const PatchGrid& grid,
                        int64_t limit, uint8_t* flags, int64_t* offsets, int64_t* kept,
                        int64_t* told, cudaStream_t stream) {
  const int64_t patches = frames.frames * grid.count();
  if (patches == 0) return cudaSuccess;
  cudaError_t status = patch_differences(frames, background, grid, limit, flags, stream);
  if (status != cudaSuccess) return status;
  const int64_t tiles = active_tiles(patches);
  const bool wide = aligned(flags, kItemsPerThread);
  if (wide && tiles <= kFewTiles) {
    few_flags_kernel<<<static_cast<unsigned>(tiles), kThreads, 0, stream>>>(
        flags, patches, WideDivider(grid.count()), offsets, kept, told);
    return cudaGetLastError();
  }
  count_flags_kernel<<<grid_blocks(tiles), kThreads, 0, stream>>>(flags, patches, tiles, wide,
                                                                  offsets);
  if ((status = cudaGetLastError()) != cudaSuccess) return status;
  scan_counts_kernel<<<1, kThreads, 0, stream>>>(offsets, tiles, told);
  if ((status = cudaGetLastError()) != cudaSuccess || kept == nullptr) return status;
  return active_index(flags, offsets, patches, grid.count(), kept, stream);
}

// A number in the host's memory that a kernel writes. To look there until it has come takes less
// time than to copy it, or to wait for the stream. Each thread has its own, since it waits for one
// number before it asks for the next.
class ToldNumber {
 public:
  ToldNumber() = default;
  ToldNumber(const ToldNumber&) = delete;
  ToldNumber& operator=(const ToldNumber&) = delete;
  ~ToldNumber() {
    if (place_ != nullptr) cudaFreeHost(place_);
  }

  // Where a kernel is to write a number from 0 up; null where the driver gives no place.
  int64_t* expect() {
    if (place_ == nullptr &&
        cudaHostAlloc(&place_, sizeof(int64_t), cudaHostAllocPortable | cudaHostAllocMapped) !=
            cudaSuccess) {
      place_ = nullptr;
      cudaGetLastError();  // The next launch must not take it for its own.
    }
    if (place_ != nullptr) *number() = -1;
    return static_cast<int64_t*>(place_);
  }

  // Looks for it for about as long as a short call takes, then waits for the stream: that leaves
  // the processor to others where the device was set up so, and tells whether a kernel failed.
  cudaError_t wait(cudaStream_t stream, int64_t* told) const {
    constexpr std::chrono::milliseconds kPatience{1};
    constexpr int kLooks = 256;
    const auto end = std::chrono::steady_clock::now() + kPatience;
    while (*number() < 0 && std::chrono::steady_clock::now() < end) {
      for (int look = 0; look < kLooks && *number() < 0; ++look) {
      }
    }
    if (*number() < 0) {
      const cudaError_t status = cudaStreamSynchronize(stream);
      if (status != cudaSuccess) return status;
    }
    *told = *number();
    return *told < 0 ? cudaErrorUnknown : cudaSuccess;
  }

  // After a failure: a kernel that is still to come may write there, and not what is expected next.
  void abandon() { place_ = nullptr; }

 private:
  volatile int64_t* number() const { return static_cast<volatile int64_t*>(place_); }

  void* place_ = nullptr;
};

}  // namespace

int64_t active_tiles(int64_t patches) { return ceil_divide(patches, kTile); }

cudaError_t active_flags(const FrameView& frames, const Matrix& background, const PatchGrid& grid,
                         int64_t limit, uint8_t* flags, int64_t* offsets, cudaStream_t stream) {
  return find_active(frames, background, grid, limit, flags, offsets, nullptr, nullptr, stream);
}

cudaError_t active_count(const FrameView& frames, const Matrix& background, const PatchGrid& grid,
                         int64_t limit, uint8_t* flags, int64_t* offsets, int64_t* kept,
                         int64_t* kept_count, cudaStream_t stream) {
  *kept_count = 0;
  const int64_t patches = frames.frames * grid.count();
  if (patches == 0) return cudaSuccess;
  thread_local ToldNumber number;
  int64_t* const told = number.expect();
  cudaError_t status =
      find_active(frames, background, grid, limit, flags, offsets, kept, told, stream);
  if (told != nullptr) {
    if (status == cudaSuccess) status = number.wait(stream, kept_count);
    if (status != cudaSuccess) number.abandon();
    return status;
  }
  if (status != cudaSuccess) return status;
  status = cudaMemcpyAsync(kept_count, offsets + active_tiles(patches), sizeof(int64_t),
                           cudaMemcpyDeviceToHost, stream);
  return status == cudaSuccess ? cudaStreamSynchronize(stream) : status;
}

cudaError_t active_index(const uint8_t* flags, const int64_t* offsets, int64_t patches,
                         int64_t patches_per_frame, int64_t* kept, cudaStream_t stream) {
  const int64_t tiles = active_tiles(patches);
  if (tiles == 0) return cudaSuccess;
  write_index_kernel<<<grid_blocks(tiles), kThreads, 0, stream>>>(
      flags, offsets, patches, WideDivider(patches_per_frame), tiles,
      aligned(flags, kItemsPerThread), kept);
  return cudaGetLastError();
}

}  // namespace fastalps::cuda
