// The second half of kernel M: from latents to the maps that D reads. A row is one decoder pass of
// a patch.
#pragma once

#include "fused_layers.cuh"

namespace fastalps::cuda::fused {

template <class S>
using DenseStream =
    Stream < S::kLatent / kTileTerms<8 ? S::kLatent / kTileTerms : 8, S::kDenseAcross>;

// The perturbations' factors of the block's rows: 1 / their root mean squares.
template <class S>
FASTALPS_DEVICE void find_factors(const Lane& lane, const Work& work, int first, int rows,
                                  float* factors) {
  for (int row = lane.warp; row < S::kRows; row += kWarps) {
    if (first + row >= rows) break;
    const int patch = (first + row) >> (work.passes - 1);
    const float* const perturbation = work.latents + (2 * int64_t{patch} + 1) * S::kLatent;
    float square = 0.0f;
    for (int i = lane.index; i < S::kLatent; i += kLanes) {
      const float value = read_only(perturbation + i);
      square += value * value;
    }
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      square += shuffle_down(square, distance);
    }
    if (lane.index == 0) factors[row] = inverse_root(square / S::kLatent + 1e-12f);
  }
}

// The latents of the block's rows: of a perturbed pass z + strength * bounded(p). Zeros for rows
// that there are not.
template <class S>
FASTALPS_DEVICE void put_latents(const Work& work, int first, int rows, const float* factors,
                                 unsigned char* latents) {
  using Latent = typename S::LatentMap;
  for (int item = thread_index(); item < S::kRows * Latent::kChunks; item += kBlock) {
    const int row = item / Latent::kChunks, chunk = item % Latent::kChunks;
    float values[kChunkChannels] = {};
    if (first + row < rows) {
      const int patch = (first + row) >> (work.passes - 1);
      const bool perturbed = work.first_perturbed || ((first + row) & (work.passes - 1)) != 0;
      const float* const place = work.latents +
                                 static_cast<int64_t>(patch) * work.networks * S::kLatent +
                                 chunk * kChunkChannels;
      const float factor =
          perturbed ? work.strength * (work.bound == Bound::kNorm ? factors[row] : 1.0f) : 0.0f;
#pragma unroll
      for (int i = 0; i < kChunkChannels; ++i) {
        values[i] = read_only(place + i);
        if (!perturbed) continue;
        const float found = read_only(place + S::kLatent + i);
        values[i] += factor * (work.bound == Bound::kTanh ? hyperbolic_tangent(found) : found);
      }
    }
    *reinterpret_cast<uint4*>(latents + Latent::chunk(row, chunk)) =
        uint4{round_pair(values[0], values[1]), round_pair(values[2], values[3]),
              round_pair(values[4], values[5]), round_pair(values[6], values[7])};
  }
}

// The dense layer: all rows by all outputs, into the start map (pixel, row, channel).
template <class S>
FASTALPS_DEVICE void dense(const Lane& lane, const unsigned char* latents, unsigned char* start,
                           const uint2* weights, DenseStream<S>& stream, const float* biases,
                           float slope) {
  constexpr int kColumns = S::kDense / kTileColumns;
  constexpr int kAcross = S::kDenseAcross;
  constexpr int kSteps = S::kLatent / kTileTerms, kDepth = DenseStream<S>::kDepth;
  static_assert(kSteps % kDepth == 0);
  for (int first_column = lane.warp * kAcross; first_column < kColumns;
       first_column += kWarps * kAcross) {
    float sums[S::kTiles][kAcross][4];
    clear(sums);
    // Behind the last step come the first ones of the next columns, if there are any.
    const int next_column = first_column + kWarps * kAcross;
#pragma unroll
    for (int first = 0; first < kSteps; first += kDepth) {
      if (first + kDepth == kSteps) stream.next = weights + next_column * kLanes + lane.index;
      if (first + kDepth < kSteps || next_column < kColumns) stream.read();
#pragma unroll
      for (int at = 0; at < kDepth; ++at) {
        const int chunk = 2 * (first + at) + lane.half;
#pragma unroll
        for (int tile = 0; tile < S::kTiles; ++tile) {
          const Operand a =
              load_operand(latents + S::LatentMap::chunk(tile * kTileRows + lane.row, chunk));
#pragma unroll
          for (int across = 0; across < kAcross; ++across) {
            multiply_add(sums[tile][across], a, stream.current[at][across]);
          }
        }
      }
      stream.advance();
    }
#pragma unroll
    for (int across = 0; across < kAcross; ++across) {
      const int output = (first_column + across) * kTileColumns + 2 * lane.quad;
      const int pixel = output / S::kStart, channel = output % S::kStart;
#pragma unroll
      for (int half = 0; half < 2 * S::kTiles; ++half) {
        const float* const found = sums[half / 2][across] + 2 * (half % 2);
        put(start + S::StartMap::channel(pixel * S::kRows + lane.group + 8 * half, channel),
            finish_pair(found[0], found[1], biases, output, slope));
      }
    }
  }
}

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
#pragma unroll 2
  for (int step = 0; step < kSteps; ++step) {
    if (step + 1 < kSteps) stream.read();
    Operand a[4][kTiles];
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) {
      const int row = i / kTiles * S::kRows + i % kTiles * kTileRows + lane.row;
      a[i / kTiles][i % kTiles] =
          load_operand(start + S::StartMap::chunk(row, 2 * step + lane.half));
    }
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) {
#pragma unroll
      for (int pixel = 0; pixel < 4; ++pixel) {
        const int row = 2 * (pixel / 2) - 1 + tap / 3, column = 2 * (pixel % 2) - 1 + tap % 3;
        if (row < 0 || column < 0 || row >= S::kHalf || column >= S::kHalf) continue;
#pragma unroll
        for (int i = 0; i < kTiles * S::kFirstAcross; ++i) {
          const int tile = i % kTiles, across = i / kTiles;
          multiply_add(sums[tile][row * S::kHalf + column][across], a[pixel][tile],
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

// The second, 4x4 to 8x8 (or 7x7): a row of results, below the anchors of a row (kPhase 0, of one
// row of taps) or between them and the next ones (1, of two).
template <class S, int kPhase>
FASTALPS_DEVICE void expand_second(const Lane& lane, const unsigned char* input,
                                   SecondStream<S, kPhase>& stream, const uint2* following,
                                   const float* biases, float slope, int first_column,
                                   int anchor_row, unsigned char* output, int rows) {
  constexpr int kAcross = S::kSecondAcross, kTiles = S::kTiles;
  constexpr int kSteps = S::kFirst / kTileTerms;
  const bool below = anchor_row + 1 < S::kHalf;
  float sums[kTiles][S::kSide][kAcross][4];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    start_joint(lane, biases + first_column * kTileColumns, sums[tile]);
  }
#pragma unroll 2
  for (int step = 0; step < kSteps; ++step) {
    if (step + 1 < kSteps) stream.read();
#pragma unroll
    for (int neighbour = 0; neighbour <= kPhase; ++neighbour) {
      if (neighbour == 1 && !below) continue;
      Operand a[S::kHalf][kTiles];
#pragma unroll
      for (int i = 0; i < S::kHalf * kTiles; ++i) {
        const int cell = (anchor_row + neighbour) * S::kHalf + i / kTiles;
        const int row = cell * S::kRows + i % kTiles * kTileRows + lane.row;
        a[i / kTiles][i % kTiles] =
            load_operand(input + S::FirstMap::chunk(row, 2 * step + lane.half));
      }
#pragma unroll
      for (int tap = 0; tap < 9; ++tap) {
        if (!stream.has(tap) || tap_neighbour(tap / 3) != neighbour) continue;
#pragma unroll
        for (int pixel = 0; pixel < S::kHalf; ++pixel) {
          const int column = 2 * pixel - 1 + tap % 3;
          if (column < 0 || column >= S::kSide) continue;
#pragma unroll
          for (int i = 0; i < kTiles * kAcross; ++i) {
            multiply_add(sums[i % kTiles][column][i / kTiles], a[pixel][i % kTiles],
                         stream.current[tap][i / kTiles]);
          }
        }
      }
    }
    stream.advance();
  }
  stream.start(following);
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

// Second half of kernel M: kRows rows a block, weights streamed from L2.
template <class S>
FASTALPS_DEVICE void expand(const Work& work, const uint2* weights, const float* biases,
                            unsigned char* shared) {
  const Lane lane(thread_index());
  // A warp's items of the second layer: some columns, one half of the rows of anchors.
  constexpr int kItems = S::kSecondGroups * 2, kHalfRows = S::kHalf / 2;
  const uint2* const first_weights = weights + S::kDenseFragments * kLanes + lane.index;
  const uint2* const second_weights =
      weights + (S::kDenseFragments + S::kFirstFragments) * kLanes + lane.index;
  unsigned char* const start = shared + S::kStartAt;
  unsigned char* const map = shared + S::kFirstAt;
  float* const factors = reinterpret_cast<float*>(shared + S::kFactorsAt);
  allow_next();
  await_previous();
  const int rows = patches_of(work) * work.passes;
  for (int first = block_index() * S::kRows; first < rows; first += block_count() * S::kRows) {
    if (work.bound == Bound::kNorm && work.networks == 2) {
      find_factors<S>(lane, work, first, rows, factors);
      barrier();
    }
    put_latents<S>(work, first, rows, factors, shared);
    // A layer's first weights are on their way while warps wait for each other.
    DenseStream<S> dense_stream(weights + lane.warp * S::kDenseAcross * kLanes + lane.index,
                                S::kDense / kTileColumns * kLanes);
    barrier();
    dense<S>(lane, shared, start, weights, dense_stream, biases, work.slope);
    const auto first_at = [&](int column) {
      return column < S::kFirstColumns ? first_weights + column * kLanes : nullptr;
    };
    FirstStream<S> first_stream(first_at(lane.warp * S::kFirstAcross));
    barrier();
    for (int column = lane.warp * S::kFirstAcross; column < S::kFirstColumns;
         column += kWarps * S::kFirstAcross) {
      expand_first<S>(lane, start, map, first_stream, first_at(column + kWarps * S::kFirstAcross),
                      biases + S::kDense, work.slope, column);
    }
    const auto second_at = [&](int item) {
      const int column = item % S::kSecondGroups * S::kSecondAcross;
      return item < kItems ? second_weights + column * kLanes : nullptr;
    };
    SecondStream<S, 0> even(second_at(lane.warp));
    SecondStream<S, 1> odd(second_at(lane.warp));
    barrier();
    for (int item = lane.warp; item < kItems; item += kWarps) {
      const int first_column = item % S::kSecondGroups * S::kSecondAcross;
#pragma unroll 1
      for (int i = 0; i < kHalfRows; ++i) {
        const int row = item / S::kSecondGroups * kHalfRows + i;
        const uint2* const next = second_at(i + 1 < kHalfRows ? item : item + kWarps);
        unsigned char* const output = work.maps + static_cast<int64_t>(first) * S::kOutputs * 2;
        const float* const bias = biases + S::kDense + S::kFirst;
        expand_second<S, 0>(lane, map, even, next, bias, work.slope, first_column, row, output,
                            rows - first);
        expand_second<S, 1>(lane, map, odd, next, bias, work.slope, first_column, row, output,
                            rows - first);
      }
    }
    // The latents are read only before the second barrier, so the next ones may overwrite them.
  }
}

}  // namespace fastalps::cuda::fused
