// What the fused scoring kernels number by: lanes, fragments, pixels and chunks of maps, taps.
//
// Plain C++ without a device: the kernels and the emulator of the tests compile this same header.
// A map in shared memory is bf16, its channels in chunks of 8 (16 bytes, what one lane addresses
// for ldmatrix): pixel by pixel, or a plane of pixels for each chunk (Planes).
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTALPS_INDEX __host__ __device__ constexpr
#else
#define FASTALPS_INDEX constexpr
#endif

namespace fastalps::cuda::fused {

constexpr int kLanes = 32;
constexpr int kWarps = 8;
constexpr int kBlock = kLanes * kWarps;
constexpr int kGroupWarps = 4;  // That multiply together, where they can.

// Of mma.sync m16n8k16: 16 rows of A, 8 columns of B, 16 terms.
constexpr int kTileRows = 16;
constexpr int kTileColumns = 8;
constexpr int kTileTerms = 16;

constexpr int kChunkBytes = 16;
constexpr int kChunkChannels = 8;

FASTALPS_INDEX int divide_up(int value, int divisor) { return (value + divisor - 1) / divisor; }
FASTALPS_INDEX int align_up(int value, int unit) { return divide_up(value, unit) * unit; }
// The largest power of two up to both.
FASTALPS_INDEX int largest_power(int value, int most) {
  int power = 1;
  while (2 * power <= value && 2 * power <= most) power *= 2;
  return power;
}

// Division of numbers below 2^31 by one that only a launch knows: with m = ceil(2^(31 + l) / d) and
// 2^l >= d, floor(n m / 2^(31 + l)) is floor(n / d).
struct Divisor {
  uint32_t divisor, multiplier;
  int shift;

  FASTALPS_INDEX explicit Divisor(uint32_t divisor_ = 1)
      : divisor(divisor_), multiplier(0), shift(31) {
    while ((uint64_t{1} << (shift - 31)) < divisor) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << shift) + divisor - 1) / divisor);
  }
  FASTALPS_INDEX uint32_t quotient(uint32_t number) const {
    return static_cast<uint32_t>((static_cast<uint64_t>(number) * multiplier) >> shift);
  }
};

// Fragments of B (16 terms, 8 columns, 8 bytes a lane) of a layer's weights, in the order
// [step of 16 terms][8 outputs][lane]; terms are tap by tap, inputs innermost.
FASTALPS_INDEX int fragments(int taps, int inputs, int outputs) {
  return divide_up(taps * inputs, kTileTerms) * divide_up(outputs, kTileColumns);
}

// Fragments in shared memory come in twins, of which a lane's values lie side by side, 16 bytes:
// one read brings two. How many fit `count` of them, with zeros for the last one's twin.
FASTALPS_INDEX int twins(int count) { return align_up(count, 2); }

// Weights that groups of warps multiply by as they lie in shared memory come as `Matrix` has them:
// of each step of 16 terms first all parts of the first 8 terms, 8 outputs a part, then the others.
constexpr int kPartBytes = 128;

// One lane's part in an mma (PTX ISA, "Matrix Fragments for mma.m16n8k16"): of the result, rows
// `group` and `group` + 8, columns 2 * `quad` and the next; of A, by ldmatrix, the address of 8
// terms, the first or the second `half` of 16, of row `row`.
struct Lane {
  int warp, index, group, quad, row, half;

  FASTALPS_INDEX explicit Lane(int thread)
      : warp(thread / kLanes),
        index(thread % kLanes),
        group(index / 4),
        quad(index % 4),
        row(index % 16),
        half(index / 16) {}
};

// Byte offsets within a map of kChannels. The chunks of a pixel are permuted so that 8 pixels
// in a row meet all 32 banks of shared memory.
template <int kChannels>
struct Map {
  static constexpr int kChunks = kChannels / kChunkChannels;
  static_assert(kChannels % kChunkChannels == 0);

  FASTALPS_INDEX static int twist(int pixel) {
    if (kChunks % 8 == 0) return pixel & 7;
    if (kChunks % 4 == 0) return (pixel >> 1) & 3;
    if (kChunks % 2 == 0) return (pixel >> 2) & 1;
    return 0;
  }
  FASTALPS_INDEX static int chunk(int pixel, int chunk) {
    return (pixel * kChunks + (chunk ^ twist(pixel))) * kChunkBytes;
  }
  FASTALPS_INDEX static int channel(int pixel, int channel) {
    return chunk(pixel, channel / kChunkChannels) + channel % kChunkChannels * 2;
  }
  FASTALPS_INDEX static int bytes(int pixels) { return pixels * kChannels * 2; }
};

// The taps of a 3x3 transposed convolution of stride 2, padding 1, along one axis: input i meets
// output 2 * i - 1 + tap. So output 2 * a of an anchor a takes tap 1 of input a, and output
// 2 * a + 1 takes tap 2 of input a and tap 0 of input a + 1.
FASTALPS_INDEX int tap_phase(int tap) { return tap == 1 ? 0 : 1; }
FASTALPS_INDEX int tap_neighbour(int tap) { return tap == 0 ? 1 : 0; }

// The taps in the order in which groups of warps multiply by them: by the input that they meet, of
// an anchor that itself, the one to its right, the one below, the one below that. The phases that
// an input's taps belong to are neighbours among 00, 01, 11, 10.
FASTALPS_INDEX int ordered_tap(int place) {
  constexpr int kTaps[9] = {4, 5, 8, 7, 3, 6, 2, 1, 0};
  return kTaps[place];
}
FASTALPS_INDEX int ordered_phase(int phase) { return phase < 2 ? phase : 5 - phase; }
FASTALPS_INDEX int first_tap_of_input(int input) { return input == 0 ? 0 : 2 * input + 2; }
FASTALPS_INDEX int first_phase_of_input(int input) { return input < 2 ? input : 2; }

// A map in planes of 8 channels, a chunk a pixel: 8 pixels in a row meet all 32 banks, and a
// neighbour is a constant distance away, so that a layer's loop computes no addresses. What lies
// outside an image are cells of the map that hold zeros.
template <int kPixels>
struct Planes {
  static constexpr int kPlaneBytes = kPixels * kChunkBytes;
  FASTALPS_INDEX static int chunk(int plane, int pixel) {
    return plane * kPlaneBytes + pixel * kChunkBytes;
  }
};

// Channels that a lane holds of kAcross tiles: packed so that they are neighbours, which it stores
// at once. Its two columns of tile t are channels 2 * kAcross * quad + 2 * t and the next.
template <int kAcross>
FASTALPS_INDEX int joint_channel(int quad) {
  return 2 * kAcross * quad;
}

}  // namespace fastalps::cuda::fused
