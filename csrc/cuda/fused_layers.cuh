// What the fused kernels share: their arguments, where a patch's pixels are, and the layers that
// several of them compute on a map in shared memory.
#pragma once

#include "fused_index.h"
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
  uint32_t patches_per_frame, columns;
  int64_t stride_height, stride_width, last_row, last_column;
  int64_t total;         // Patches of all frames.
  const int64_t* index;  // Pairs of frame and patch, on the device; null: all patches in order.
  const int64_t* count;  // How many pairs, on the device; null: all.
};

// One launch of the four kernels: patches `begin` to `begin` + `size` of the list.
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
  unsigned char* maps;     // Scratch, see Shape.
  unsigned char* latents;  // (size * passes, latent) bf16.
  float* errors;           // (passes, total).
};

struct Patch {
  int64_t origin;  // Of its first pixel, in elements.
  int64_t place;   // Among all patches.
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
    // Fewer than 2^31 patches; a division of 64 bits would be a call.
    frame = static_cast<uint32_t>(item) / source.patches_per_frame;
    patch = static_cast<uint32_t>(item) - frame * source.patches_per_frame;
  }
  const uint32_t grid_row = patch / source.columns;
  const uint32_t grid_column = patch - grid_row * source.columns;
  int64_t row = grid_row * source.stride_height, column = grid_column * source.stride_width;
  row = row < source.last_row ? row : source.last_row;
  column = column < source.last_column ? column : source.last_column;
  return {frame * source.frame_stride + row * source.row_stride + column * source.column_stride,
          static_cast<int64_t>(frame) * source.patches_per_frame + patch};
}

// A pixel in [0, 1].
FASTALPS_DEVICE float unit_pixel(const Source& source, const Patch& patch, int row, int column) {
  const int64_t place = patch.origin + row * source.row_stride + column * source.column_stride;
  if (!source.bytes) return read_only(static_cast<const float*>(source.pixels) + place);
  return read_only(static_cast<const uint8_t*>(source.pixels) + place) / 255.0f;
}

// A pixel in gray levels, which bf16 holds exactly where they are whole; the first convolution's
// weights are packed divided by 255.
FASTALPS_DEVICE float level_pixel(const Source& source, const Patch& patch, int row, int column) {
  const int64_t place = patch.origin + row * source.row_stride + column * source.column_stride;
  if (!source.bytes) return 255.0f * read_only(static_cast<const float*>(source.pixels) + place);
  return read_only(static_cast<const uint8_t*>(source.pixels) + place);
}

FASTALPS_DEVICE float leaky(float value, float slope) {
  return value > 0.0f ? value : slope * value;
}

// A lane's two neighbouring results of one row, with bias and leaky ReLU.
FASTALPS_DEVICE uint32_t finish_pair(float first, float second, const float* biases, int column,
                                     float slope) {
  return round_pair(leaky(first + read_only(biases + column), slope),
                    leaky(second + read_only(biases + column + 1), slope));
}

FASTALPS_DEVICE void put(unsigned char* place, uint32_t pair) {
  *reinterpret_cast<uint32_t*>(place) = pair;
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

// 16 bytes at a time, by all threads of the block.
FASTALPS_DEVICE void copy_chunks(unsigned char* target, const void* source, int bytes) {
  for (int chunk = thread_index(); chunk < bytes / kChunkBytes; chunk += kBlock) {
    reinterpret_cast<uint4*>(target)[chunk] = read_only(static_cast<const uint4*>(source) + chunk);
  }
}

// Eight terms of a tap at a place in a map, or zeros where the tap falls outside: those of the
// banks that the place would have, so that they conflict with no other row's.
FASTALPS_DEVICE Operand load_tap(const unsigned char* map, const unsigned char* zero, int place,
                                 bool inside) {
  return load_operand(inside ? map + place : zero + (place & (kBankBytes - kChunkBytes)));
}

// A 3x3 convolution of a square map with zero borders, padding 1: kDown x kAcross tiles of results,
// the rows of a tile being consecutive pixels from `first_pixel` on. `weights` begin at the first
// of the columns; a step of 16 terms has `columns` fragments.
template <class In, int kInSide, int kOutSide, int kStride, int kInputs, int kDown, int kAcross>
FASTALPS_DEVICE void convolve(const Lane& lane, const unsigned char* map, int first_chunk,
                              const unsigned char* zero, const uint2* weights, int columns,
                              int first_pixel, float (&sums)[kDown][kAcross][4]) {
  // With 8 inputs, the two halves of a step are two taps.
  constexpr bool kPaired = kInputs == kChunkChannels;
  constexpr int kInner = kPaired ? 1 : kInputs / kTileTerms;
  clear(sums);
  int rows[kDown], cells[kDown];
#pragma unroll
  for (int down = 0; down < kDown; ++down) {
    const int pixel = first_pixel + down * kTileRows + lane.row;
    // Rows past the last pixel lie outside for every tap.
    const int row = pixel / kOutSide;
    rows[down] = pixel < kOutSide * kOutSide ? kStride * row - 1 : -kInSide - 3;
    cells[down] = kStride * (pixel - row * kOutSide) - 1;
  }
#pragma unroll 1
  for (int outer = 0; outer < (kPaired ? 5 : 9); ++outer) {
    const int tap = kPaired ? 2 * outer + lane.half : outer;
    const int tap_row = tap / 3, tap_column = tap - 3 * tap_row;
    int pixels[kDown];
    bool inside[kDown];
#pragma unroll
    for (int down = 0; down < kDown; ++down) {
      const int row = rows[down] + tap_row, column = cells[down] + tap_column;
      pixels[down] = row * kInSide + column;
      inside[down] = tap < 9 && row >= 0 && row < kInSide && column >= 0 && column < kInSide;
    }
#pragma unroll
    for (int inner = 0; inner < kInner; ++inner) {
      const int chunk = first_chunk + (kPaired ? 0 : 2 * inner + lane.half);
      Operand a[kDown];
#pragma unroll
      for (int down = 0; down < kDown; ++down) {
        a[down] = load_tap(map, zero, In::chunk(pixels[down], chunk), inside[down]);
      }
      const uint2* step = weights + (outer * kInner + inner) * columns * kLanes + lane.index;
#pragma unroll
      for (int across = 0; across < kAcross; ++across) {
        const uint2 b = step[across * kLanes];
#pragma unroll
        for (int down = 0; down < kDown; ++down) multiply_add(sums[down][across], a[down], b);
      }
    }
  }
}

// A 3x3 transposed convolution of stride 2, padding 1. The rows of a tile are consecutive anchors
// (input pixels) from `first_pixel` on; their four phases of outputs, sums[2 * y + x], share the
// four inputs at and after the anchor: 9 products for 4 x 4 that a convolution of zeros would do.
template <class In, int kInSide, int kInputs, int kAcross>
FASTALPS_DEVICE void transpose(const Lane& lane, const unsigned char* map,
                               const unsigned char* zero, const uint2* weights, int columns,
                               int first_pixel, float (&sums)[4][kAcross][4]) {
  constexpr int kSteps = kInputs / kTileTerms;
  clear(sums);
  const int anchor = first_pixel + lane.row;
  const int row = anchor / kInSide, column = anchor - row * kInSide;
#pragma unroll 1
  for (int step = 0; step < kSteps; ++step) {
    Operand a[4];
#pragma unroll
    for (int neighbour = 0; neighbour < 4; ++neighbour) {
      const int y = row + neighbour / 2, x = column + neighbour % 2;
      const bool inside = y < kInSide && x < kInSide;
      a[neighbour] = load_tap(map, zero, In::chunk(y * kInSide + x, 2 * step + lane.half), inside);
    }
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) {
      const int phase = 2 * tap_phase(tap / 3) + tap_phase(tap % 3);
      const int neighbour = 2 * tap_neighbour(tap / 3) + tap_neighbour(tap % 3);
      const uint2* fragment = weights + (tap * kSteps + step) * columns * kLanes + lane.index;
#pragma unroll
      for (int across = 0; across < kAcross; ++across) {
        multiply_add(sums[phase][across], a[neighbour], fragment[across * kLanes]);
      }
    }
  }
}

// Stores the phases of `transpose` into a map of kOutSide, which may lack the last odd row.
template <class Out, int kInSide, int kOutSide, int kAcross>
FASTALPS_DEVICE void put_phases(const Lane& lane, unsigned char* map, const float* biases,
                                float slope, int first_pixel, int first_column,
                                const float (&sums)[4][kAcross][4]) {
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
    const int anchor = first_pixel + lane.group + 8 * lower;
    if (anchor >= kInSide * kInSide) continue;
    const int row = 2 * (anchor / kInSide), column = 2 * (anchor % kInSide);
#pragma unroll
    for (int phase = 0; phase < 4; ++phase) {
      const int y = row + phase / 2, x = column + phase % 2;
      if (y >= kOutSide || x >= kOutSide) continue;
#pragma unroll
      for (int across = 0; across < kAcross; ++across) {
        const int channel = (first_column + across) * kTileColumns + 2 * lane.quad;
        const float* mine = sums[phase][across] + 2 * lower;
        put(map + Out::channel(y * kOutSide + x, channel),
            finish_pair(mine[0], mine[1], biases, channel, slope));
      }
    }
  }
}

}  // namespace fastalps::cuda::fused
