// The second half of kernel M: from the dense layer's results to the maps that D reads. A row is
// one decoder pass of a patch.
#pragma once

#include "fused_layers.cuh"

namespace fastalps::cuda::fused {

// A transposed convolution's weights, as in `Stream`: kAcross fragments of each of its taps (those
// whose rows a phase has, or all), a step of terms ahead.
template <int kSteps, int kColumns, int kAcross, int kPhase = -1>
struct TapStream {
  const uint2* next;
  uint2 current[9][kAcross], following[9][kAcross];

  // From a warp's first fragment on; null: there is nothing to read.
  FASTALPS_DEVICE explicit TapStream(const uint2* weights) { start(weights); }

  FASTALPS_DEVICE static constexpr bool has(int tap) {
    return kPhase < 0 || tap_phase(tap / 3) == kPhase;
  }

  FASTALPS_DEVICE void start(const uint2* weights) {
    if (weights == nullptr) return;
    next = weights;
    read();
    advance();
  }

  FASTALPS_DEVICE void read() {
#pragma unroll
    for (int i = 0; i < 9 * kAcross; ++i) {
      const int tap = i / kAcross, across = i % kAcross;
      if (!has(tap)) continue;
      following[tap][across] = read_only(next + (tap * kSteps * kColumns + across) * kLanes);
    }
    next += kColumns * kLanes;
  }

  FASTALPS_DEVICE void advance() {
#pragma unroll
    for (int i = 0; i < 9 * kAcross; ++i) {
      if (has(i / kAcross)) current[i / kAcross][i % kAcross] = following[i / kAcross][i % kAcross];
    }
  }
};

template <class S>
using FirstStream = TapStream<S::kStart / kTileTerms, S::kFirstColumns, S::kFirstAcross>;
template <class S, int kPhase>
using SecondStream =
    TapStream<S::kFirst / kTileTerms, S::kSecond / kTileColumns, S::kSecondAcross, kPhase>;

// The first transposed convolution, 2x2 to 4x4: a warp holds the sums of all 16 results, so that
// each weight is read once, and does the 25 products of 36 that do not fall on the border.
// `following`: the fragments that it starts with next.
template <class S>
FASTALPS_DEVICE void expand_first(const Lane& lane, const unsigned char* start,
                                  unsigned char* output, FirstStream<S>& stream,
                                  const uint2* following, const float* biases, float slope,
                                  int first_column) {
  constexpr int kSteps = S::kStart / kTileTerms, kTiles = S::kTiles;
  constexpr int kCells = S::kHalf * S::kHalf;
  float sums[kTiles][kCells][S::kFirstAcross][4];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) clear(sums[tile]);
  // A pixel's operands are on their way while those of the one before are multiplied.
  Operand next[kTiles];
  const auto load = [&](int pixel, int step) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int row = pixel * S::kRows + tile * kTileRows + lane.row;
      next[tile] = load_operand(start + S::StartMap::chunk(row, 2 * step + lane.half));
    }
  };
  load(0, 0);
#pragma unroll 2
  for (int step = 0; step < kSteps; ++step) {
    if (step + 1 < kSteps) stream.read();
#pragma unroll
    for (int pixel = 0; pixel < 4; ++pixel) {
      Operand a[kTiles];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) a[tile] = next[tile];
      // Behind the last step those of the first are read once more.
      load((pixel + 1) % 4, pixel < 3 ? step : step + 1 < kSteps ? step + 1 : 0);
#pragma unroll
      for (int tap = 0; tap < 9; ++tap) {
        const int row = 2 * (pixel / 2) - 1 + tap / 3, column = 2 * (pixel % 2) - 1 + tap % 3;
        if (row < 0 || column < 0 || row >= S::kHalf || column >= S::kHalf) continue;
#pragma unroll
        for (int i = 0; i < kTiles * S::kFirstAcross; ++i) {
          const int tile = i % kTiles, across = i / kTiles;
          multiply_add(sums[tile][row * S::kHalf + column][across], a[tile],
                       stream.current[tap][across]);
        }
      }
    }
    stream.advance();
  }
  stream.start(following);
#pragma unroll
  for (int across = 0; across < S::kFirstAcross; ++across) {
    const int channel = (first_column + across) * kTileColumns + 2 * lane.quad;
    const float bias[2] = {read_only(biases + channel), read_only(biases + channel + 1)};
#pragma unroll
    for (int cell = 0; cell < kCells; ++cell) {
#pragma unroll
      for (int half = 0; half < 2 * kTiles; ++half) {
        const float* const found = sums[half / 2][cell][across] + 2 * (half % 2);
        put(output + S::FirstMap::channel(cell * S::kRows + lane.group + 8 * half, channel),
            leaky_pair(found[0] + bias[0], found[1] + bias[1], slope));
      }
    }
  }
}

// The second, 4x4 to 8x8 (or 7x7): a row of results, at the anchors of a row (kPhase 0, of one row
// of taps) or between them and the next ones (1, of two, if there are next ones: kBelow). `next`:
// the other phase's stream, which starts with the weights `following`.
template <class S, int kPhase, bool kBelow>
FASTALPS_DEVICE void expand_second(const Lane& lane, const unsigned char* input,
                                   SecondStream<S, kPhase>& stream,
                                   SecondStream<S, 1 - kPhase>& next, const uint2* following,
                                   const float* biases, float slope, int first_column,
                                   int anchor_row, unsigned char* output, int rows) {
  constexpr int kAcross = S::kSecondAcross, kTiles = S::kTiles;
  constexpr int kSteps = S::kFirst / kTileTerms;
  float sums[kTiles][S::kSide][kAcross][4];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    start_joint(lane, biases + first_column * kTileColumns, sums[tile]);
  }
  // An input's operands are on their way while those of the one before are multiplied.
  constexpr int kInputs = (kPhase == 1 && kBelow ? 2 : 1) * S::kHalf;
  Operand coming[kTiles];
  const auto load = [&](int pixel, int step) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int row = (anchor_row * S::kHalf + pixel) * S::kRows + tile * kTileRows + lane.row;
      coming[tile] = load_operand(input + S::FirstMap::chunk(row, 2 * step + lane.half));
    }
  };
  load(0, 0);
#pragma unroll 2
  for (int step = 0; step < kSteps; ++step) {
    if (step + 1 < kSteps) stream.read();
#pragma unroll
    for (int pixel = 0; pixel < kInputs; ++pixel) {
      Operand a[kTiles];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) a[tile] = coming[tile];
      // Behind the last step those of the first are read once more.
      load((pixel + 1) % kInputs, pixel + 1 < kInputs ? step : step + 1 < kSteps ? step + 1 : 0);
#pragma unroll
      for (int tap = 0; tap < 9; ++tap) {
        if (!stream.has(tap) || tap_neighbour(tap / 3) != pixel / S::kHalf) continue;
        const int column = 2 * (pixel % S::kHalf) - 1 + tap % 3;
        if (column < 0 || column >= S::kSide) continue;
#pragma unroll
        for (int i = 0; i < kTiles * kAcross; ++i) {
          multiply_add(sums[i % kTiles][column][i / kTiles], a[i % kTiles],
                       stream.current[tap][i / kTiles]);
        }
      }
    }
    stream.advance();
  }
  next.start(following);
  const int row = 2 * anchor_row + kPhase;
#pragma unroll
  for (int column = 0; column < S::kSide; ++column) {
#pragma unroll
    for (int half = 0; half < 2 * kTiles; ++half) {
      const int pass = lane.group + 8 * half;
      put_joint(output + static_cast<int64_t>(pass) * S::kOutputs * 2 +
                    ((row * S::kSide + column) * S::kSecond + first_column * kTileColumns) * 2,
                lane, half % 2, slope, row < S::kSide && pass < rows, sums[half / 2][column]);
    }
  }
}

// The dense layer's results of kRows rows, asynchronously; zeros for rows that there are not.
template <class S>
FASTALPS_DEVICE void fetch_starts(const Work& work, int first, int rows, unsigned char* start) {
  using Start = typename S::StartMap;
  constexpr int kChunks = S::kInputs / kChunkChannels;  // Of a row.
  for (int item = thread_index(); item < S::kRows * kChunks; item += kBlock) {
    const int row = item / kChunks, pixel = item % kChunks / Start::kChunks;
    unsigned char* const target =
        start + Start::chunk(pixel * S::kRows + row, item % Start::kChunks);
    if (first + row < rows) {
      copy_async(target, work.maps + static_cast<int64_t>(first + row) * S::kOutputs * 2 +
                             item % kChunks * kChunkBytes);
    } else {
      *reinterpret_cast<uint4*>(target) = uint4{};
    }
  }
}

// Second half of kernel M: kRows rows a block, weights streamed from L2.
template <class S>
FASTALPS_DEVICE void expand(const Work& work, const uint2* weights, const float* biases,
                            unsigned char* shared) {
  const Lane lane(thread_index());
  // A warp's items of the second layer: some columns, one half of the rows of anchors.
  constexpr int kItems = S::kSecondGroups * 2, kHalfRows = S::kHalf / 2;
  const uint2* const first_weights = weights + lane.index;
  const uint2* const second_weights = weights + S::kFirstFragments * kLanes + lane.index;
  unsigned char* const start = shared;
  unsigned char* const map = shared + S::kFirstAt;
  allow_next();
  await_previous();
  const int rows = patches_of(work) * work.passes;
  for (int first = block_index() * S::kRows; first < rows; first += block_count() * S::kRows) {
    fetch_starts<S>(work, first, rows, start);
    const auto first_at = [&](int column) {
      return column < S::kFirstColumns ? first_weights + column * kLanes : nullptr;
    };
    // A layer's first weights are on their way while warps wait for each other.
    FirstStream<S> first_stream(first_at(lane.warp * S::kFirstAcross));
    await_copies();
    barrier();
    for (int column = lane.warp * S::kFirstAcross; column < S::kFirstColumns;
         column += kWarps * S::kFirstAcross) {
      expand_first<S>(lane, start, map, first_stream, first_at(column + kWarps * S::kFirstAcross),
                      biases, work.slope, column);
    }
    const auto second_at = [&](int item) {
      const int column = item % S::kSecondGroups * S::kSecondAcross;
      return item < kItems ? second_weights + column * kLanes : nullptr;
    };
    SecondStream<S, 0> even(second_at(lane.warp));
    SecondStream<S, 1> odd(nullptr);
    barrier();
    for (int item = lane.warp; item < kItems; item += kWarps) {
      const int first_column = item % S::kSecondGroups * S::kSecondAcross;
#pragma unroll 1
      for (int i = 0; i < kHalfRows; ++i) {
        const int row = item / S::kSecondGroups * kHalfRows + i;
        const uint2* const again = second_at(item);
        const uint2* const next = second_at(i + 1 < kHalfRows ? item : item + kWarps);
        unsigned char* const output = work.maps + static_cast<int64_t>(first) * S::kOutputs * 2;
        const float* const bias = biases + S::kFirst;
        expand_second<S, 0, false>(lane, map, even, odd, again, bias, work.slope, first_column, row,
                                   output, rows - first);
        if (row + 1 < S::kHalf) {
          expand_second<S, 1, true>(lane, map, odd, even, next, bias, work.slope, first_column, row,
                                    output, rows - first);
        } else {
          expand_second<S, 1, false>(lane, map, odd, even, next, bias, work.slope, first_column,
                                     row, output, rows - first);
        }
      }
    }
    // The dense layer's map is read only before the second barrier, so the next may overwrite it.
  }
}

}  // namespace fastalps::cuda::fused
