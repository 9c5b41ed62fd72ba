// What the fused kernels share: their arguments, where a patch's pixels are, and the layers that
// several of them compute on a map in shared memory.
#pragma once

#include "fused_shapes.h"
#if defined(__CUDACC__)
#include "fused_machine.cuh"
#else
#include "fused_machine.h"  // Of tests/emulation.
#endif

namespace fastalps::cuda::fused {

enum class Bound : int32_t { kNone, kTanh, kNorm };

// Frames, and the patches of them that are scored.
struct Source {
  const void* pixels;
  bool bytes;  // uint8, 0 to 255; else float32, 0 to 1.
  int64_t frame_stride, row_stride, column_stride;
  Divisor patches_per_frame, columns;
  int64_t stride_height, stride_width, last_row, last_column;
  int64_t total;         // Patches of all frames.
  const int64_t* index;  // Pairs of frame and patch, on the device; null: all patches in order.
  const int64_t* count;  // How many pairs, on the device; null: all.
};

struct alignas(16) Patch {
  int64_t origin;  // Of its first pixel, in elements.
  uint32_t place;  // Among all patches.
};

// One launch of the five kernels: patches `begin` to `begin` + `size` of the list.
struct Work {
  Source source;
  int64_t begin;
  int32_t size;
  int32_t networks;  // 1: the encoder; 2: the distorter, too.
  int32_t passes;    // Decoder passes a patch.
  bool first_perturbed;
  Bound bound;
  float slope, strength;
  int32_t reach;  // Pixels to each side that a residual is averaged over; 0: none.
  const uint2* weights;
  const float* biases;
  unsigned char* maps;  // Scratch, see Shape.
  Patch* patches;       // Those of the launch: found by E, read by D.
  float* latents;       // Outputs of the networks: (size, networks, latent).
  float* errors;        // (passes, total).
};

// How many of the launch's patches there are: the list's length is known to the device only.
FASTALPS_DEVICE int patches_of(const Work& work) {
  const int64_t count =
      work.source.count == nullptr ? work.source.total : read_only(work.source.count);
  const int64_t left = count - work.begin;
  return left <= 0 ? 0 : left < work.size ? static_cast<int>(left) : work.size;
}

FASTALPS_DEVICE Patch find_patch(const Work& work, int number) {
  const Source& source = work.source;
  const int64_t item = work.begin + number;
  uint32_t frame, patch;
  if (source.index != nullptr) {
    frame = static_cast<uint32_t>(read_only(source.index + 2 * item));
    patch = static_cast<uint32_t>(read_only(source.index + 2 * item + 1));
  } else {
    frame = source.patches_per_frame.quotient(static_cast<uint32_t>(item));
    patch = static_cast<uint32_t>(item) - frame * source.patches_per_frame.divisor;
  }
  const uint32_t grid_row = source.columns.quotient(patch);
  const uint32_t grid_column = patch - grid_row * source.columns.divisor;
  int64_t row = grid_row * source.stride_height, column = grid_column * source.stride_width;
  row = row < source.last_row ? row : source.last_row;
  column = column < source.last_column ? column : source.last_column;
  return {frame * source.frame_stride + row * source.row_stride + column * source.column_stride,
          frame * source.patches_per_frame.divisor + patch};
}

// What E found, for kernels after it.
FASTALPS_DEVICE Patch read_patch(const Work& work, int number) {
  const Patch* const found = work.patches + number;
  return {read_written(&found->origin), read_written(&found->place)};
}

// Which pixels of a patch a thread has: a warp every eighth row, of which a lane has a column,
template <int kSize_>
struct Lines {
  static constexpr int kSize = kSize_, kCount = divide_up(kSize, kWarps);
  static constexpr int kDown = kWarps, kRight = 0;  // From one to the next.
  static_assert(kSize <= kLanes);
  FASTALPS_DEVICE static int row(const Lane& lane) { return lane.warp; }
  FASTALPS_DEVICE static int column(const Lane& lane) { return lane.index; }
};

// or four neighbours in a row.
template <int kSize_>
struct Fours {
  static constexpr int kSize = kSize_, kCount = 4;
  static constexpr int kDown = 0, kRight = 1;
  static_assert(kSize * divide_up(kSize, 4) <= kBlock && kSize <= kLanes);
  FASTALPS_DEVICE static int row(const Lane& lane) { return 4 * lane.warp + lane.index / 8; }
  FASTALPS_DEVICE static int column(const Lane& lane) { return 4 * (lane.index % 8); }
};

// A thread's pixels as they were read, until they are used, as nothing waits for them before.
template <class Places>
struct Pixels {
  static constexpr int kCount = Places::kCount;
  uint32_t raw[kCount];

  FASTALPS_DEVICE Pixels(const Source& source, const Lane& lane, const Patch& patch) {
    const int64_t first = patch.origin + Places::row(lane) * source.row_stride +
                          Places::column(lane) * source.column_stride;
    const int64_t step = Places::kDown * source.row_stride + Places::kRight * source.column_stride;
    if (source.bytes) {
      read(static_cast<const uint8_t*>(source.pixels) + first, step, lane);
    } else {
      read(static_cast<const uint32_t*>(source.pixels) + first, step, lane);
    }
  }

  template <typename T>
  FASTALPS_DEVICE void read(const T* place, int64_t step, const Lane& lane) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      raw[i] = inside(lane, i) ? read_only(place) : 0;
      place += step;
    }
  }

  FASTALPS_DEVICE static int row(const Lane& lane, int i) {
    return Places::row(lane) + i * Places::kDown;
  }
  FASTALPS_DEVICE static int column(const Lane& lane, int i) {
    return Places::column(lane) + i * Places::kRight;
  }
  FASTALPS_DEVICE static bool inside(const Lane& lane, int i) {
    return row(lane, i) < Places::kSize && column(lane, i) < Places::kSize;
  }
  // In [0, 1].
  FASTALPS_DEVICE float unit(const Source& source, int i) const {
    return source.bytes ? raw[i] * (1.0f / 255.0f) : float_of(raw[i]);
  }
  // In gray levels, which bf16 holds exactly where they are whole; the first convolution's weights
  // are packed divided by 255.
  FASTALPS_DEVICE float level(const Source& source, int i) const {
    return source.bytes ? static_cast<float>(raw[i]) : 255.0f * float_of(raw[i]);
  }
};

// Slopes are from 0 to below 1 (`ModelConfig`).
FASTALPS_DEVICE uint32_t leaky_pair(float first, float second, float slope) {
  return leaky_words(round_pair(first, second), round_pair(slope, slope));
}

// sums += A * B.
FASTALPS_DEVICE void multiply_add(float (&sums)[4], const Operand& a, uint2 b) {
  multiply_add(sums, a, b, sums);
}

// The last step of a layer may have the first 8 of its 16 terms only.
FASTALPS_DEVICE Operand load_terms(const unsigned char* chunk, bool half) {
  return half ? load_half_operand(chunk) : load_operand(chunk);
}

FASTALPS_DEVICE void add_terms(float (&sums)[4], const Operand& a, uint2 b, const float (&start)[4],
                               bool half) {
  if (half) {
    multiply_add_half(sums, a, b, start);
  } else {
    multiply_add(sums, a, b, start);
  }
}

// Reads a lane's values of fragments in twins from shared memory.
template <int kCount>
FASTALPS_DEVICE void read_twins(const uint4* place, uint2 (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i += 2) {
    const uint4 two = place[i / 2 * kLanes];
    values[i] = uint2{two.x, two.y};
    if (i + 1 < kCount) values[i + 1] = uint2{two.z, two.w};
  }
}

// Reads a lane's values of kCount fragments, each kStride'th of a step, from weights in parts, see
// `kPartBytes`; `place` with the offset of `part_of`, where a step has `parts` for each 8 terms.
template <int kStride, int kCount>
FASTALPS_DEVICE void read_parts(const unsigned char* place, uint2 (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i += 2) {
    const bool two = i + 1 < kCount;
    const unsigned char* const chunk = place + i * kStride * kPartBytes;
    const Operand found = two ? load_operand(chunk) : load_half_operand(chunk);
    values[i] = uint2{found.word[0], found.word[1]};
    if (two) values[i + 1] = uint2{found.word[2], found.word[3]};
  }
}
template <int kStride>
FASTALPS_DEVICE int part_of(const Lane& lane, int parts) {
  const int matrix = lane.index / 8;
  return (matrix % 2 * parts + matrix / 2 * kStride) * kPartBytes + lane.index % 8 * kChunkBytes;
}

FASTALPS_DEVICE void put(unsigned char* place, uint32_t pair) {
  *reinterpret_cast<uint32_t*>(place) = pair;
}

// Four tiles' results of 8 pixels and 8 channels, a pair a lane; the pixels are neighbours, tile
// i's begin at offset(i). All lanes store or none.
template <class Offset>
FASTALPS_DEVICE void put_tiles(const Lane& lane, const uint32_t (&pairs)[4], bool stored,
                               unsigned char* first, const Offset& offset) {
  if (stores_matrices()) {
    const int tile = lane.index / 8, pixel = lane.index % 8;
    store_matrices(stored, first + (offset(tile) + pixel * kChunkBytes), pairs);
  } else if (stored) {
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) put(first + offset(tile) + lane.index * 4, pairs[tile]);
  }
}

template <int kDown, int kAcross>
FASTALPS_DEVICE void clear(float (&sums)[kDown][kAcross][4]) {
#pragma unroll
  for (int down = 0; down < kDown; ++down) {
#pragma unroll
    for (int across = 0; across < kAcross; ++across) {
#pragma unroll
      for (int part = 0; part < 4; ++part) sums[down][across][part] = 0.0f;
    }
  }
}

// 16 bytes at a time, by all threads of the block; see `await_copies`.
FASTALPS_DEVICE void copy_chunks(unsigned char* target, const void* source, int bytes) {
  for (int chunk = thread_index(); chunk < bytes / kChunkBytes; chunk += kBlock) {
    copy_async(target + chunk * kChunkBytes, static_cast<const uint4*>(source) + chunk);
  }
}

FASTALPS_DEVICE void clear_chunks(unsigned char* target, int bytes) {
  for (int chunk = thread_index(); chunk < bytes / kChunkBytes; chunk += kBlock) {
    reinterpret_cast<uint4*>(target)[chunk] = uint4{};
  }
}

// Sums of tiles packed for `joint_channel` begin with the biases of their channels, in pairs.
template <int kDown, int kAcross, class Pair>
FASTALPS_DEVICE void start_pairs(float (&sums)[kDown][kAcross][4], const Pair& pair) {
#pragma unroll
  for (int across = 0; across < kAcross; ++across) {
    const float2 bias = pair(across);
#pragma unroll
    for (int part = 0; part < 4 * kDown; ++part) {
      sums[part / 4][across][part % 4] = part % 2 == 0 ? bias.x : bias.y;
    }
  }
}

template <int kDown, int kAcross>
FASTALPS_DEVICE void start_joint(const Lane& lane, const float* biases,
                                 float (&sums)[kDown][kAcross][4]) {
  const float* const mine = biases + joint_channel<kAcross>(lane.quad);
  start_pairs(sums, [&](int across) {
    return float2{read_only(mine + 2 * across), read_only(mine + 2 * across + 1)};
  });
}

// The same of biases in shared memory.
template <int kDown, int kAcross>
FASTALPS_DEVICE void start_joint(const Lane& lane, const float2* biases,
                                 float (&sums)[kDown][kAcross][4]) {
  const float2* const mine = biases + joint_channel<kAcross>(lane.quad) / 2;
  start_pairs(sums, [&](int across) { return mine[across]; });
}

// One row's results of kAcross tiles, packed for `joint_channel`: 4 * kAcross bytes a lane. They
// are finished in any case: a store is cheaper skipped by itself than behind a branch.
template <int kAcross>
FASTALPS_DEVICE void put_joint(unsigned char* pixel, const Lane& lane, int lower, float slope,
                               bool stored, const float (&sums)[kAcross][4]) {
  static_assert(kAcross == 1 || kAcross == 2 || kAcross == 4, "no store of so many bytes");
  uint32_t pairs[kAcross];
#pragma unroll
  for (int across = 0; across < kAcross; ++across) {
    pairs[across] = leaky_pair(sums[across][2 * lower], sums[across][2 * lower + 1], slope);
  }
  unsigned char* const place = pixel + 2 * joint_channel<kAcross>(lane.quad);
  if (!stored) return;
  if constexpr (kAcross == 4) {
    *reinterpret_cast<uint4*>(place) = uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
  } else if constexpr (kAcross == 2) {
    *reinterpret_cast<uint2*>(place) = uint2{pairs[0], pairs[1]};
  } else {
    put(place, pairs[0]);
  }
}

// A lane's four results of each column's biases, which its sums begin with.
template <int kAcross>
struct Biases {
  float four[kAcross][4];

  FASTALPS_DEVICE Biases(const Lane& lane, const float* biases, int first_column) {
#pragma unroll
    for (int across = 0; across < kAcross; ++across) {
      const int channel = (first_column + across) * kTileColumns + 2 * lane.quad;
      four[across][0] = four[across][2] = read_only(biases + channel);
      four[across][1] = four[across][3] = read_only(biases + channel + 1);
    }
  }

  // Of those that `keep_biases` has stored.
  FASTALPS_DEVICE Biases(const Lane& lane, const float4* kept, int first_column) {
#pragma unroll
    for (int across = 0; across < kAcross; ++across) {
      const float4 mine = kept[(first_column + across) * 4 + lane.quad];
      four[across][0] = mine.x;
      four[across][1] = mine.y;
      four[across][2] = mine.z;
      four[across][3] = mine.w;
    }
  }
};

// Biases in shared memory, each pair of them twice: as the four registers that a product begins
// with. Where the compiler knows two of these to be equal, it copies them before each product.
FASTALPS_DEVICE void keep_biases(float4* kept, const float* biases, int columns) {
#pragma unroll 1
  for (int item = thread_index(); item < columns * 4; item += kBlock) {
    const float first = read_only(biases + 2 * item), second = read_only(biases + 2 * item + 1);
    kept[item] = float4{first, second, first, second};
  }
}

template <int kAcross>
FASTALPS_DEVICE void start_sums(float (&sums)[kAcross][4], const Biases<kAcross>& biases) {
#pragma unroll
  for (int across = 0; across < kAcross; ++across) {
#pragma unroll
    for (int part = 0; part < 4; ++part) sums[across][part] = biases.four[across][part];
  }
}

// Weights on their way from L2, which takes longer to answer than a step takes to multiply: while
// kDepth steps of kAcross fragments are used, so many others are read. Loops that `advance` are
// unrolled by two, so that the two sets trade places without copies.
template <int kDepth_, int kAcross>
struct Stream {
  static constexpr int kDepth = kDepth_;
  const uint2* next;
  int stride;  // From step to step.
  uint2 current[kDepth][kAcross], following[kDepth][kAcross];

  FASTALPS_DEVICE Stream(const uint2* weights, int stride_) : next(weights), stride(stride_) {
    read();
    advance();
  }

  FASTALPS_DEVICE void read() {
#pragma unroll
    for (int step = 0; step < kDepth; ++step) {
#pragma unroll
      for (int across = 0; across < kAcross; ++across) {
        following[step][across] = read_only(next + step * stride + across * kLanes);
      }
    }
    next += kDepth * stride;
  }

  FASTALPS_DEVICE void advance() {
#pragma unroll
    for (int i = 0; i < kDepth * kAcross; ++i) {
      current[i / kAcross][i % kAcross] = following[i / kAcross][i % kAcross];
    }
  }
};

}  // namespace fastalps::cuda::fused
