// Finding the patches that differ from a background: sums of absolute differences, and a scan that
// keeps the order. The patches themselves are then cut by tile_patches.
#include <chrono>

#include "common.cuh"

namespace fastalps::cuda {
namespace {

constexpr int kItemsPerThread = 16;
constexpr int64_t kTile = int64_t{kThreads} * kItemsPerThread;

// So many tiles are indexed by one launch, whose blocks count what comes before them themselves.
// Beyond, the counts would take longer than the two launches that they save.
constexpr int64_t kFewTiles = 64;

// Rows of a patch that a thread reads before it needs the first of them.
template <int kUnit>
constexpr uint32_t kRows = kUnit == 1 ? 8 : 10;

// Wider units than bytes are for rows of adjacent pixels, and for sizes that fit 32 bits.
template <int kUnit>
struct DifferenceArguments {
  using Index = std::conditional_t<kUnit == 1, int64_t, uint32_t>;
  using Division = std::conditional_t<kUnit == 1, WideDivider, Divider>;

  const uint8_t* frames;
  const uint8_t* background;
  Index patches;
  int64_t frame_stride;
  Index frame_row_stride, frame_column_stride;
  Index background_row_stride, background_column_stride;
  Index stride_height, stride_width, last_row, last_column;
  uint32_t patch_height, patch_width;
  Division rows, columns;  // Of patches in a frame.
  // Threads side by side for the width of a patch, and all of a patch; these share a team of
  // so many warps, a power of two, with the threads of other patches.
  Divider lanes, threads;
  uint32_t warps;
  int64_t limit;
};

// Bytes in words of four, and which of them belong to a patch.
template <int kUnit>
struct Unit {
  using Word = typename WordOf<kUnit>::Type;
  static constexpr int kWords = kUnit < 4 ? 1 : kUnit / 4;

  uint32_t word[kWords] = {};

  Unit() = default;

  __device__ __forceinline__ explicit Unit(const Word& read) {
    if constexpr (kUnit < 4) {
      word[0] = read;
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) word[i] = reinterpret_cast<const uint32_t*>(&read)[i];
    }
  }

  __device__ __forceinline__ static Unit load(const uint8_t* source) {
    return Unit(__ldg(reinterpret_cast<const Word*>(source)));
  }

  // Of pixels that few threads read, which should not drive the background from the cache.
  __device__ __forceinline__ static Unit load_once(const uint8_t* source) {
    return Unit(__ldcs(reinterpret_cast<const Word*>(source)));
  }

  // The bytes [from, to) of the unit, not none and at most 8.
  __device__ __forceinline__ static Unit mask(uint32_t from, uint32_t to) {
    const uint64_t bytes = (~uint64_t{0} << (8 * from)) & (~uint64_t{0} >> (64 - 8 * to));
    Unit unit;
#pragma unroll
    for (int i = 0; i < kWords; ++i) unit.word[i] = static_cast<uint32_t>(bytes >> (32 * i));
    return unit;
  }
};

// The sum of absolute differences where `mask` is set.
template <int kUnit>
__device__ __forceinline__ uint32_t differences(const Unit<kUnit>& a, const Unit<kUnit>& b,
                                                const Unit<kUnit>& mask, uint32_t sum) {
#pragma unroll
  for (int i = 0; i < Unit<kUnit>::kWords; ++i) {
    sum += __vsadu4(a.word[i], (b.word[i] & mask.word[i]) | (a.word[i] & ~mask.word[i]));
  }
  return sum;
}

// A patch has so many threads as lie side by side over its width, times so many that share its
// rows. They read whole units of kUnit bytes: what of a unit lies outside of the patch is masked.
template <int kUnit>
__global__ void __launch_bounds__(kThreads, 3)
    patch_differences_kernel(DifferenceArguments<kUnit> arguments, uint8_t* __restrict__ flags) {
  using Index = typename DifferenceArguments<kUnit>::Index;
  constexpr uint32_t kStep = kRows<kUnit>;
  const uint32_t lanes = arguments.lanes.divisor, threads = arguments.threads.divisor;
  const uint32_t phases = arguments.lanes.divide(threads);
  const uint32_t team = 32 * arguments.warps, together = arguments.threads.divide(team);
  uint32_t thread = threadIdx.x % team;
  const uint32_t place = threadIdx.x / team * together + arguments.threads.split(thread);
  // Threads at the end of a team that are left over, whose sum is 0.
  const bool spare = threadIdx.x % team >= together * threads;
  uint32_t lane = thread;
  const uint32_t phase = arguments.lanes.split(lane);
  const uint32_t patches_per_block = kThreads / team * together;
  const Index step = static_cast<Index>(gridDim.x) * patches_per_block;

  for (Index first = static_cast<Index>(blockIdx.x) * patches_per_block; first < arguments.patches;
       first += step) {
    const Index patch = first + place;
    const bool busy = !spare && patch < arguments.patches;
    unsigned long long sum = 0;
    if (busy) {
      Index column = patch;
      Index row = arguments.columns.split(column);
      const Index frame = arguments.rows.split(row);
      const Index top = min(row * arguments.stride_height, arguments.last_row);
      Index left = min(column * arguments.stride_width, arguments.last_column);
      const uint32_t before = static_cast<uint32_t>(left % kUnit);
      const uint32_t end = before + arguments.patch_width;
      left -= before;
      const uint8_t* const pixels = arguments.frames + frame * arguments.frame_stride +
                                    static_cast<int64_t>(top) * arguments.frame_row_stride;
      const uint8_t* const still =
          arguments.background + static_cast<int64_t>(top) * arguments.background_row_stride;
      for (uint32_t x = lane * kUnit; x < end; x += lanes * kUnit) {
        const auto mask =
            Unit<kUnit>::mask(x == 0 ? before : 0, min(end - x, static_cast<uint32_t>(kUnit)));
        const auto offset = static_cast<int64_t>(left + x);
        const uint8_t* const here =
            pixels + offset * (kUnit == 1 ? arguments.frame_column_stride : 1);
        const uint8_t* const there =
            still + offset * (kUnit == 1 ? arguments.background_column_stride : 1);
        for (uint32_t y = phase; y < arguments.patch_height; y += phases * kStep) {
          Unit<kUnit> a[kStep], b[kStep];
#pragma unroll
          for (uint32_t k = 0; k < kStep; ++k) {
            // Below the patch the last row again, which is not counted.
            const auto line = static_cast<int64_t>(min(y + k * phases, arguments.patch_height - 1));
            a[k] = Unit<kUnit>::load_once(here + line * arguments.frame_row_stride);
            b[k] = Unit<kUnit>::load(there + line * arguments.background_row_stride);
          }
          uint32_t part = 0;
#pragma unroll
          for (uint32_t k = 0; k < kStep; ++k) {
            if (y + k * phases < arguments.patch_height) {
              part = differences(a[k], b[k], mask, part);
            }
          }
          sum += part;
        }
      }
    }
    // Each thread's sum becomes that of so many from it on, of twice as many every time.
    const uint32_t width = min(threads, 32u);
    for (uint32_t offset = 1; offset < width; offset *= 2) {
      const unsigned long long other = __shfl_down_sync(0xffffffffu, sum, offset);
      if (thread % 32 + offset < width) sum += other;
    }
    if (arguments.warps > 1) {
      __shared__ unsigned long long sums[kThreads / 32];
      const uint32_t warp = threadIdx.x / 32;
      if (threadIdx.x % 32 == 0) sums[warp] = sum;
      __syncthreads();
      if (busy && thread == 0) {
        for (uint32_t k = 1; k < arguments.warps; ++k) sum += sums[warp + k];
      }
      __syncthreads();
    }
    if (busy && thread == 0) flags[patch] = static_cast<int64_t>(sum) > arguments.limit;
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

// Whether both can be read in units of so many bytes, none of which leaves its row.
bool reads_units(const FrameView& frames, const Matrix& background, const PatchGrid& grid,
                 int64_t unit) {
  constexpr int64_t kReach = (int64_t{1} << 31) - 1;
  return frames.column_stride == 1 && background.column_stride == 1 && grid.width % unit == 0 &&
         grid.width <= kReach && grid.height <= kReach && frames.frames * grid.count() <= kReach &&
         frames.row_stride % unit == 0 && frames.row_stride <= kReach &&
         background.row_stride % unit == 0 && background.row_stride <= kReach &&
         (frames.frames == 1 || frames.frame_stride % unit == 0) && aligned(frames.data, unit) &&
         aligned(background.data, unit);
}

template <int kUnit>
cudaError_t launch_differences(const FrameView& frames, const Matrix& background,
                               const PatchGrid& grid, int64_t limit, uint8_t* flags,
                               cudaStream_t stream) {
  // Patches start at multiples of `step`, which is the lowest bit set in any of these.
  const int64_t last_column = grid.width - grid.patch_width;
  const int64_t starts = grid.columns == 1 ? kUnit : kUnit | grid.stride_width | last_column;
  const int64_t step = starts & -starts;
  const int64_t lanes = std::min<int64_t>(ceil_divide(kUnit - step + grid.patch_width, kUnit), 32);
  const int64_t patches = frames.frames * grid.count();
  // As many threads a patch as it takes to fill the device twice, in whole warps or parts of one.
  constexpr int64_t kResidentThreads = 768;
  int64_t phases = std::clamp<int64_t>(
      ceil_divide(2 * kResidentThreads * multiprocessors(), patches * lanes), 1,
      std::min<int64_t>(ceil_divide(grid.patch_height, kRows<kUnit>), kThreads / lanes));
  int64_t warps = 1;
  while (32 * warps < lanes * phases) warps *= 2;
  // As many more as leave the number of patches that share a team, which the kernel finds anew.
  const int64_t together = 32 * warps / (lanes * phases);
  phases = 32 * warps / together / lanes;
  const int64_t per_block = kThreads / (32 * warps) * together;
  using Arguments = DifferenceArguments<kUnit>;
  using Index = typename Arguments::Index;
  const Arguments arguments{static_cast<const uint8_t*>(frames.data),
                            static_cast<const uint8_t*>(background.data),
                            static_cast<Index>(patches),
                            frames.frame_stride,
                            static_cast<Index>(frames.row_stride),
                            static_cast<Index>(frames.column_stride),
                            static_cast<Index>(background.row_stride),
                            static_cast<Index>(background.column_stride),
                            static_cast<Index>(std::min(grid.stride_height, grid.height)),
                            static_cast<Index>(std::min(grid.stride_width, grid.width)),
                            static_cast<Index>(grid.height - grid.patch_height),
                            static_cast<Index>(last_column),
                            static_cast<uint32_t>(grid.patch_height),
                            static_cast<uint32_t>(grid.patch_width),
                            typename Arguments::Division(grid.rows),
                            typename Arguments::Division(grid.columns),
                            Divider(lanes),
                            Divider(lanes * phases),
                            static_cast<uint32_t>(warps),
                            limit};
  patch_differences_kernel<kUnit>
      <<<grid_blocks(ceil_divide(patches, per_block)), kThreads, 0, stream>>>(arguments, flags);
  return cudaGetLastError();
}

// Flags, offsets, and what of the pairs and of their number at `told` is wanted.
cudaError_t find_active(const FrameView& frames, const Matrix& background, const PatchGrid& grid,
                        int64_t limit, uint8_t* flags, int64_t* offsets, int64_t* kept,
                        int64_t* told, cudaStream_t stream) {
  const int64_t patches = frames.frames * grid.count();
  if (patches == 0) return cudaSuccess;
  if (grid.patch_pixels() >= int64_t{1} << 31) return cudaErrorInvalidValue;
  const auto reads = [&](int64_t unit) { return reads_units(frames, background, grid, unit); };
  // Units of 16 bytes would save little: of a patch's narrow rows, they cover more of what is not.
  const auto launch = reads(8)   ? launch_differences<8>
                      : reads(4) ? launch_differences<4>
                      : reads(2) ? launch_differences<2>
                                 : launch_differences<1>;
  cudaError_t status = launch(frames, background, grid, limit, flags, stream);
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
