// The second half of kernel M: from latents to the maps that D reads. A row is one decoder pass of
// a patch.
#pragma once

#include "fused_layers.cuh"

namespace fastalps::cuda::fused {

// The dense layer: 16 rows by all outputs, into the start map (pixel, row, channel).
template <class S>
FASTALPS_DEVICE void dense(const Lane& lane, const unsigned char* latents, unsigned char* start,
                           const uint2* weights, const float* biases, float slope) {
  constexpr int kColumns = S::kDense / kTileColumns;
  constexpr int kAcross = S::kDenseAcross;
  constexpr int kSteps = S::kLatent / kTileTerms;
  constexpr int kDepth = kSteps < 8 ? kSteps : 8;
  static_assert(kSteps % kDepth == 0);
  for (int first_column = lane.warp * kAcross; first_column < kColumns;
       first_column += kWarps * kAcross) {
    float sums[1][kAcross][4];
    clear(sums);
    Stream<kDepth, kAcross> stream(weights + first_column * kLanes + lane.index, kColumns * kLanes);
#pragma unroll 1
    for (int first = 0; first < kSteps; first += kDepth) {
#pragma unroll
      for (int at = 0; at < kDepth; ++at) {
        uint2 b[kAcross];
        stream.take(at, b);
        const int chunk = 2 * (first + at) + lane.half;
        const Operand a = load_operand(latents + S::LatentMap::chunk(lane.row, chunk));
#pragma unroll
        for (int across = 0; across < kAcross; ++across)
          multiply_add(sums[0][across], a, b[across]);
      }
      stream.advance(kDepth);
    }
#pragma unroll
    for (int across = 0; across < kAcross; ++across) {
      const int output = (first_column + across) * kTileColumns + 2 * lane.quad;
      const int pixel = output / S::kStart, channel = output % S::kStart;
#pragma unroll
      for (int lower = 0; lower < 2; ++lower) {
        const float* const found = sums[0][across] + 2 * lower;
        put(start + S::StartMap::channel(pixel * kTileRows + lane.group + 8 * lower, channel),
            finish_pair(found[0], found[1], biases, output, slope));
      }
    }
  }
}

// A transposed convolution's weights from L2: kAcross fragments of each tap, read a whole step of
// terms before they are used.
template <int kAcross>
struct TapStream {
  const uint2* next;
  int tap_stride, step_stride;
  uint2 ahead[9][kAcross];

  FASTALPS_DEVICE TapStream(const uint2* weights, int tap_stride_, int step_stride_)
      : next(weights), tap_stride(tap_stride_), step_stride(step_stride_) {
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) {
#pragma unroll
      for (int across = 0; across < kAcross; ++across) {
        ahead[tap][across] = read_only(next + tap * tap_stride + across * kLanes);
      }
    }
    advance();
  }

  FASTALPS_DEVICE void advance() { next += step_stride; }

  // This step's fragment; with `more` steps the next one's is on its way.
  FASTALPS_DEVICE uint2 take(int tap, int across, bool more) {
    const uint2 found = ahead[tap][across];
    if (more) ahead[tap][across] = read_only(next + tap * tap_stride + across * kLanes);
    return found;
  }
};

// The first transposed convolution, 2x2 to 4x4: a warp holds the sums of all 16 results, so that
// each weight is read once, and does the 25 products of 36 that do not fall on the border.
template <class S>
FASTALPS_DEVICE void expand_first(const Lane& lane, const unsigned char* start,
                                  unsigned char* output, const uint2* weights, const float* biases,
                                  float slope) {
  constexpr int kColumns = S::kFirst / kTileColumns;
  constexpr int kSteps = S::kStart / kTileTerms;
  constexpr int kCells = S::kHalf * S::kHalf;
  const int first_column = lane.warp * S::kFirstAcross;
  TapStream<S::kFirstAcross> stream(weights + first_column * kLanes + lane.index,
                                    kSteps * kColumns * kLanes, kColumns * kLanes);
  float sums[kCells][S::kFirstAcross][4];
  clear(sums);
#pragma unroll 1
  for (int step = 0; step < kSteps; ++step) {
    const bool more = step + 1 < kSteps;
    Operand a[4];
#pragma unroll
    for (int pixel = 0; pixel < 4; ++pixel) {
      a[pixel] = load_operand(
          start + S::StartMap::chunk(pixel * kTileRows + lane.row, 2 * step + lane.half));
    }
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) {
#pragma unroll
      for (int across = 0; across < S::kFirstAcross; ++across) {
        const uint2 b = stream.take(tap, across, more);
#pragma unroll
        for (int pixel = 0; pixel < 4; ++pixel) {
          const int row = 2 * (pixel / 2) - 1 + tap / 3, column = 2 * (pixel % 2) - 1 + tap % 3;
          if (row < 0 || column < 0 || row >= S::kHalf || column >= S::kHalf) continue;
          multiply_add(sums[row * S::kHalf + column][across], a[pixel], b);
        }
      }
    }
    stream.advance();
  }
#pragma unroll
  for (int cell = 0; cell < kCells; ++cell) {
#pragma unroll
    for (int across = 0; across < S::kFirstAcross; ++across) {
      const int channel = (first_column + across) * kTileColumns + 2 * lane.quad;
#pragma unroll
      for (int lower = 0; lower < 2; ++lower) {
        const float* const found = sums[cell][across] + 2 * lower;
        put(output + S::FirstMap::channel(cell * kTileRows + lane.group + 8 * lower, channel),
            finish_pair(found[0], found[1], biases, channel, slope));
      }
    }
  }
}

// The second, 4x4 to 8x8 (or 7x7): a warp holds the two rows of results of one row of anchors.
template <class S>
FASTALPS_DEVICE void expand_second(const Lane& lane, const unsigned char* input,
                                   const uint2* weights, const float* biases, float slope,
                                   int first_column, int anchor_row, unsigned char* output,
                                   int rows) {
  constexpr int kColumns = S::kSecond / kTileColumns;
  constexpr int kAcross = S::kSecondAcross;
  constexpr int kSteps = S::kFirst / kTileTerms;
  const bool below = anchor_row + 1 < S::kHalf;
  TapStream<kAcross> stream(weights + first_column * kLanes + lane.index,
                            kSteps * kColumns * kLanes, kColumns * kLanes);
  float sums[2 * S::kSide][kAcross][4];
  start_joint(lane, biases + first_column * kTileColumns, sums);
#pragma unroll 1
  for (int step = 0; step < kSteps; ++step) {
    const bool more = step + 1 < kSteps;
#pragma unroll
    for (int neighbour = 0; neighbour < 2; ++neighbour) {
      if (neighbour == 1 && !below) continue;
      Operand a[S::kHalf];
#pragma unroll
      for (int pixel = 0; pixel < S::kHalf; ++pixel) {
        const int cell = (anchor_row + neighbour) * S::kHalf + pixel;
        a[pixel] = load_operand(
            input + S::FirstMap::chunk(cell * kTileRows + lane.row, 2 * step + lane.half));
      }
#pragma unroll
      for (int tap = 0; tap < 9; ++tap) {
        if (tap_neighbour(tap / 3) != neighbour) continue;
#pragma unroll
        for (int across = 0; across < kAcross; ++across) {
          const uint2 b = stream.take(tap, across, more);
#pragma unroll
          for (int pixel = 0; pixel < S::kHalf; ++pixel) {
            const int column = 2 * pixel - 1 + tap % 3;
            if (column < 0 || column >= S::kSide) continue;
            multiply_add(sums[tap_phase(tap / 3) * S::kSide + column][across], a[pixel], b);
          }
        }
      }
    }
    stream.advance();
  }
#pragma unroll
  for (int cell = 0; cell < 2 * S::kSide; ++cell) {
    const int row = 2 * anchor_row + cell / S::kSide, column = cell % S::kSide;
    if (row >= S::kSide) continue;
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      const int pass = lane.group + 8 * lower;
      if (pass >= rows) continue;
      put_joint(output + static_cast<int64_t>(pass) * S::kOutputs * 2 +
                    ((row * S::kSide + column) * S::kSecond + first_column * kTileColumns) * 2,
                lane, lower, slope, sums[cell]);
    }
  }
}

// Second half of kernel M: 16 rows a block, weights streamed from L2.
template <class S>
FASTALPS_DEVICE void expand(const Work& work, const uint2* weights, const float* biases,
                            unsigned char* shared) {
  using Latent = typename S::LatentMap;
  const Lane lane(thread_index());
  unsigned char* const start = shared + S::kStartAt;
  unsigned char* const map = shared + S::kFirstAt;
  allow_next();
  await_previous();
  const int rows = patches_of(work) * work.passes;
  for (int first = block_index() * kTileRows; first < rows; first += block_count() * kTileRows) {
    for (int item = thread_index(); item < kTileRows * Latent::kChunks; item += kBlock) {
      const int row = item / Latent::kChunks, chunk = item % Latent::kChunks;
      unsigned char* const target = shared + Latent::chunk(row, chunk);
      if (first + row < rows) {
        const int64_t place = static_cast<int64_t>(first + row) * Latent::kChunks + chunk;
        copy_async(target, work.latents + place * kChunkBytes);
      } else {
        *reinterpret_cast<uint4*>(target) = uint4{};
      }
    }
    await_copies();
    barrier();
    dense<S>(lane, shared, start, weights, biases, work.slope);
    barrier();
    expand_first<S>(lane, start, map, weights + S::kDenseFragments * kLanes, biases + S::kDense,
                    work.slope);
    barrier();
    constexpr int kGroups = S::kSecond / kTileColumns / S::kSecondAcross;
    for (int item = lane.warp; item < kGroups * S::kHalf; item += kWarps) {
      expand_second<S>(lane, map, weights + (S::kDenseFragments + S::kFirstFragments) * kLanes,
                       biases + S::kDense + S::kFirst, work.slope,
                       item % kGroups * S::kSecondAcross, item / kGroups,
                       work.maps + static_cast<int64_t>(first) * S::kOutputs * 2, rows - first);
    }
    // The latents are read only before the second barrier, so the next ones may overwrite them.
  }
}

}  // namespace fastalps::cuda::fused
