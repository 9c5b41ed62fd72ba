// The second half of kernel M: from latents to the maps that D reads. A row is one decoder pass of
// a patch.
#pragma once

#include "fused_layers.cuh"

namespace fastalps::cuda::fused {

template <class S>
using DenseStream = Stream<S::kLatent / kTileTerms < 8 ? S::kLatent / kTileTerms : 8,
                           S::kDenseAcross>;

// The dense layer: 16 rows by all outputs, into the start map (pixel, row, channel).
template <class S>
FASTALPS_DEVICE void dense(const Lane& lane, const unsigned char* latents, unsigned char* start,
                           const uint2* weights, DenseStream<S>& stream, const float* biases,
                           float slope) {
  constexpr int kColumns = S::kDense / kTileColumns;
  constexpr int kAcross = S::kDenseAcross;
  constexpr int kSteps = S::kLatent / kTileTerms, kDepth = DenseStream<S>::kSteps;
  static_assert(kSteps % kDepth == 0);
  for (int first_column = lane.warp * kAcross; first_column < kColumns;
       first_column += kWarps * kAcross) {
    float sums[1][kAcross][4];
    clear(sums);
    // Behind the last step come the first ones of the next columns.
    const int next_column = first_column + kWarps * kAcross;
    const uint2* const following =
        weights + (next_column < kColumns ? next_column : first_column) * kLanes + lane.index;
#pragma unroll 1
    for (int first = 0; first < kSteps; first += kDepth) {
      if (first + kDepth == kSteps) stream.next = following;
#pragma unroll
      for (int at = 0; at < kDepth; ++at) {
        const int chunk = 2 * (first + at) + lane.half;
        const Operand a = load_operand(latents + S::LatentMap::chunk(lane.row, chunk));
#pragma unroll
        for (int across = 0; across < kAcross; ++across)
          multiply_add(sums[0][across], a, stream.at(at)[across]);
        stream.refill(at);
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
template <int kSteps, int kColumns, int kAcross>
struct TapStream {
  const uint2* next;
  uint2 ahead[9][kAcross];

  FASTALPS_DEVICE explicit TapStream(const uint2* weights) { start(weights); }

  // From a warp's first fragment on.
  FASTALPS_DEVICE void start(const uint2* weights) {
    next = weights;
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) {
#pragma unroll
      for (int across = 0; across < kAcross; ++across) refill(tap, across);
    }
    advance();
  }

  FASTALPS_DEVICE void advance() { next += kColumns * kLanes; }

  // After the last use of this step's fragment the next one's takes its registers.
  FASTALPS_DEVICE void refill(int tap, int across) {
    ahead[tap][across] = read_only(next + (tap * kSteps * kColumns + across) * kLanes);
  }
};

template <class S>
using FirstStream = TapStream<S::kStart / kTileTerms, S::kFirst / kTileColumns, S::kFirstAcross>;
template <class S>
using SecondStream = TapStream<S::kFirst / kTileTerms, S::kSecond / kTileColumns, S::kSecondAcross>;

// The first transposed convolution, 2x2 to 4x4: a warp holds the sums of all 16 results, so that
// each weight is read once, and does the 25 products of 36 that do not fall on the border.
template <class S>
FASTALPS_DEVICE void expand_first(const Lane& lane, const unsigned char* start,
                                  unsigned char* output, FirstStream<S>& stream,
                                  const float* biases, float slope) {
  constexpr int kSteps = S::kStart / kTileTerms;
  constexpr int kCells = S::kHalf * S::kHalf;
  const int first_column = lane.warp * S::kFirstAcross;
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
#pragma unroll
        for (int pixel = 0; pixel < 4; ++pixel) {
          const int row = 2 * (pixel / 2) - 1 + tap / 3, column = 2 * (pixel % 2) - 1 + tap % 3;
          if (row < 0 || column < 0 || row >= S::kHalf || column >= S::kHalf) continue;
          multiply_add(sums[row * S::kHalf + column][across], a[pixel], stream.ahead[tap][across]);
        }
        if (more) stream.refill(tap, across);
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
// `following`: the fragments that it starts with next.
template <class S>
FASTALPS_DEVICE void expand_second(const Lane& lane, const unsigned char* input,
                                   SecondStream<S>& stream, const uint2* following,
                                   const float* biases, float slope, int first_column,
                                   int anchor_row, unsigned char* output, int rows) {
  constexpr int kAcross = S::kSecondAcross;
  constexpr int kSteps = S::kFirst / kTileTerms;
  const bool below = anchor_row + 1 < S::kHalf;
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
#pragma unroll
          for (int pixel = 0; pixel < S::kHalf; ++pixel) {
            const int column = 2 * pixel - 1 + tap % 3;
            if (column < 0 || column >= S::kSide) continue;
            multiply_add(sums[tap_phase(tap / 3) * S::kSide + column][across], a[pixel],
                         stream.ahead[tap][across]);
          }
          if (more) stream.refill(tap, across);
        }
      }
    }
    stream.advance();
  }
  stream.start(following);
#pragma unroll
  for (int cell = 0; cell < 2 * S::kSide; ++cell) {
    const int row = 2 * anchor_row + cell / S::kSide, column = cell % S::kSide;
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      const int pass = lane.group + 8 * lower;
      put_joint(output + static_cast<int64_t>(pass) * S::kOutputs * 2 +
                    ((row * S::kSide + column) * S::kSecond + first_column * kTileColumns) * 2,
                lane, lower, slope, row < S::kSide && pass < rows, sums[cell]);
    }
  }
}

// Second half of kernel M: 16 rows a block, weights streamed from L2.
template <class S>
FASTALPS_DEVICE void expand(const Work& work, const uint2* weights, const float* biases,
                            unsigned char* shared) {
  using Latent = typename S::LatentMap;
  const Lane lane(thread_index());
  constexpr int kGroups = S::kSecond / kTileColumns / S::kSecondAcross;
  constexpr int kItems = kGroups * S::kHalf;
  const uint2* const first_weights = weights + S::kDenseFragments * kLanes;
  const uint2* const second_weights = first_weights + S::kFirstFragments * kLanes;
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
    DenseStream<S> dense_stream(weights + lane.warp * S::kDenseAcross * kLanes + lane.index,
                                S::kDense / kTileColumns * kLanes);
    await_copies();
    barrier();
    dense<S>(lane, shared, start, weights, dense_stream, biases, work.slope);
    // A layer's first weights are on their way while warps wait for each other.
    FirstStream<S> first_stream(first_weights + lane.warp * S::kFirstAcross * kLanes + lane.index);
    barrier();
    expand_first<S>(lane, start, map, first_stream, biases + S::kDense, work.slope);
    const auto second_weights_of = [&](int item) {
      return second_weights + item % kGroups * S::kSecondAcross * kLanes + lane.index;
    };
    SecondStream<S> second_stream(second_weights_of(lane.warp));
    barrier();
    for (int item = lane.warp; item < kItems; item += kWarps) {
      const int next = item + kWarps < kItems ? item + kWarps : item;
      expand_second<S>(lane, map, second_stream, second_weights_of(next),
                       biases + S::kDense + S::kFirst, work.slope,
                       item % kGroups * S::kSecondAcross, item / kGroups,
                       work.maps + static_cast<int64_t>(first) * S::kOutputs * 2, rows - first);
    }
    // The latents are read only before the second barrier, so the next ones may overwrite them.
  }
}

}  // namespace fastalps::cuda::fused
