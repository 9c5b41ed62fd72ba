// The first half of kernel M: from E's maps to the outputs of encoder and distorter.
#pragma once

#include "fused_layers.cuh"

namespace fastalps::cuda::fused {

// The weights of a `Strided` convolution on their way from L2, see `Stream`: of a row of taps all
// three at once, as the columns of inputs that one of them meets are those of the others.
template <class C>
struct RowStream {
  const uint2* next;
  int step_stride, tap_stride;  // From step to step, from tap to tap.
  uint2 current[C::kDepth][3][C::kAcross], following[C::kDepth][3][C::kAcross];

  FASTALPS_DEVICE RowStream(const uint2* weights, int step_stride_, int tap_stride_)
      : next(weights), step_stride(step_stride_), tap_stride(tap_stride_) {
    read();
    advance();
  }

  FASTALPS_DEVICE void read() {
#pragma unroll
    for (int i = 0; i < C::kDepth * 3 * C::kAcross; ++i) {
      const int step = i / (3 * C::kAcross), tap = i / C::kAcross % 3, across = i % C::kAcross;
      following[step][tap][across] =
          read_only(next + step * step_stride + tap * tap_stride + across * kLanes);
    }
    next += C::kDepth * step_stride;
  }

  // From the end of a row of taps' steps, which is that of its first tap's, to the next row.
  FASTALPS_DEVICE void next_row() { next += 2 * tap_stride; }

  FASTALPS_DEVICE void advance() {
#pragma unroll
    for (int i = 0; i < C::kDepth * 3 * C::kAcross; ++i) {
      const int step = i / (3 * C::kAcross), tap = i / C::kAcross % 3, across = i % C::kAcross;
      current[step][tap][across] = following[step][tap][across];
    }
  }
};

// A row of taps, for the rows of results from kFirst on; `input`: the row of inputs that the first
// of all rows of results meets. Results meet an even column by the middle tap, the odd ones by the
// others. No branch is inside, as sums have to be waited for before each; operands are on their way
// while others are multiplied.
template <class C, int kFirst>
FASTALPS_DEVICE void add_row(const unsigned char* input, const int (&terms)[C::kSteps], bool last,
                             RowStream<C>& stream, typename C::Sums& sums) {
  constexpr int kUnits = (C::kRows - kFirst) * C::kTiles, kMost = (C::kSide + 1) / 2;
  Operand next[kMost];
  // The even columns of an item, or the odd ones: of a step, a row and a tile.
  const auto load = [&](int item) {
    const int odd = item % 2, unit = item / 2 % kUnits, step = item / 2 / kUnits;
    const int row = kFirst + unit / C::kTiles, tile = unit % C::kTiles;
    const unsigned char* const first = input + terms[step] + tile * C::kTileBytes;
#pragma unroll
    for (int i = 0; i < kMost - (odd ? C::kSide % 2 : 0); ++i) {
      next[i] = load_operand(first + (2 * row * C::kSide + 2 * i + odd) * C::kPixelBytes);
    }
  };
  load(0);
#pragma unroll
  for (int item = 0; item < 2 * kUnits * C::kSteps; ++item) {
    const int odd = item % 2, unit = item / 2 % kUnits, step = item / 2 / kUnits;
    const int row = kFirst + unit / C::kTiles, tile = unit % C::kTiles;
    if (item % (2 * kUnits * C::kDepth) == 0) {
      if (step + C::kDepth == C::kSteps) stream.next_row();
      if (step + C::kDepth < C::kSteps || !last) stream.read();
    }
    Operand a[kMost];
#pragma unroll
    for (int i = 0; i < kMost; ++i) a[i] = next[i];
    if (item + 1 < 2 * kUnits * C::kSteps) load(item + 1);
#pragma unroll
    for (int tap = odd ? 2 : 1; tap >= 0; tap -= 2) {
#pragma unroll
      for (int i = 0; i < kMost; ++i) {
        // The odd column i is right of cell i and left of the next one.
        const int cell = tap == 0 ? i + 1 : i;
        if (cell >= C::kCells || (odd && 2 * i + 1 >= C::kSide)) continue;
#pragma unroll
        for (int across = 0; across < C::kAcross; ++across) {
          multiply_add(sums[row][tile][cell][across], a[i],
                       stream.current[step % C::kDepth][tap][across]);
        }
      }
    }
    if (item % (2 * kUnits * C::kDepth) == 2 * kUnits * C::kDepth - 1) stream.advance();
  }
}

// Two rows of the third convolution's results, from five staged rows that begin one above the first
// input: a warp has some columns of one of them. Pixels are whole tiles of patches, so that a tap
// is a constant away and outside for all patches or none.
template <class S>
FASTALPS_DEVICE void third_band(const Lane& lane, const unsigned char* staged,
                                unsigned char* hidden, const uint2* weights, const float* biases,
                                float slope, int band) {
  using C = typename S::ThirdConvolution;
  constexpr int kColumns = S::kThird / kTileColumns, kAcross = C::kAcross, kSteps = C::kSteps;
  constexpr int kPixel = S::HiddenMap::bytes(kTileRows);
  const int first_column = lane.warp % S::kThirdGroups * kAcross, row = lane.warp / S::kThirdGroups;
  int terms[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    terms[step] = S::StagedMap::chunk(lane.row, 2 * step + lane.half);
  }
  // Taps whose row of inputs is inside.
  const int top = 2 * (S::kBandRows * band + row) - 1;
  const int first_tap = top < 0 ? 1 : 0, end_tap = top + 2 < S::kSide ? 3 : 2;
  constexpr int kTapStride = kSteps * kColumns * kLanes;
  RowStream<C> stream(weights + first_tap * 3 * kTapStride + first_column * kLanes + lane.index,
                      kColumns * kLanes, kTapStride);
  const Biases<kAcross> bias(lane, biases, first_column);
  typename C::Sums sums;
#pragma unroll
  for (int cell = 0; cell < S::kHalf; ++cell) start_sums(sums[0][0][cell], bias);
#pragma unroll 1
  for (int tap_row = first_tap; tap_row < end_tap; ++tap_row) {
    add_row<C, 0>(staged + (2 * row + tap_row) * S::kSide * C::kPixelBytes, terms,
                  tap_row + 1 == end_tap, stream, sums);
  }
#pragma unroll
  for (int across = 0; across < kAcross; ++across) {
    const int channel = (first_column + across) * kTileColumns + 2 * lane.quad;
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      unsigned char* const place = hidden + S::HiddenMap::channel(lane.group + 8 * lower, channel) +
                                   (S::kBandRows * band + row) * S::kHalf * kPixel;
#pragma unroll
      for (int cell = 0; cell < S::kHalf; ++cell) {
        const float* const found = sums[0][0][cell][across] + 2 * lower;
        put(place + cell * kPixel, leaky_pair(found[0], found[1], slope));
      }
    }
  }
}

// The fourth convolution, summed over its four pixels (the weights are packed divided by four):
// one slice of the terms, all patches by the warp's columns, into `parts` (slice, patch, latent).
template <class S>
FASTALPS_DEVICE void fourth_slice(const Lane& lane, const unsigned char* hidden,
                                  const uint2* weights, float* parts) {
  using C = typename S::FourthConvolution;
  constexpr int kColumns = S::kColumns, kAcross = C::kAcross, kTiles = S::kTiles;
  constexpr int kStepStride = S::kSlices * kColumns * kLanes;  // The slices' steps take turns.
  constexpr int kRow = S::kHalf * C::kPixelBytes;
  const int first_column = lane.warp % S::kGroups * kAcross;
  const int slice = lane.warp / S::kGroups;
  int terms[C::kSteps];
#pragma unroll
  for (int step = 0; step < C::kSteps; ++step) {
    terms[step] = S::HiddenMap::chunk(lane.row, 2 * (step * S::kSlices + slice) + lane.half);
  }
  RowStream<C> stream(weights + (slice * kColumns + first_column) * kLanes + lane.index,
                      kStepStride, C::kSteps * kStepStride);
  typename C::Sums sums;  // Pixels apart: independent sums hide latency.
#pragma unroll
  for (int row = 0; row < S::kQuarter; ++row) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) clear(sums[row][tile]);
  }
  // The row above the first one is outside.
  add_row<C, 1>(hidden - kRow, terms, false, stream, sums);
#pragma unroll 1
  for (int tap_row = 1; tap_row < 3; ++tap_row) {
    add_row<C, 0>(hidden + (tap_row - 1) * kRow, terms, tap_row == 2, stream, sums);
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int across = 0; across < kAcross; ++across) {
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const int patch = tile * kTileRows + lane.group + 8 * (part / 2);
        const int channel = (first_column + across) * kTileColumns + 2 * lane.quad + part % 2;
        float sum = 0.0f;
#pragma unroll
        for (int cell = 0; cell < S::kQuarter * S::kQuarter; ++cell) {
          sum += sums[cell / S::kQuarter][tile][cell % S::kQuarter][across][part];
        }
        parts[(slice * S::kPatches + patch) * S::kLatent + channel] = sum;
      }
    }
  }
}

// The rows of a tile that a band needs, asynchronously; zeros for patches that there are not.
// A thread has a chunk of a column, of every kAtOnce'th patch: so that it counts addresses once.
template <class S>
FASTALPS_DEVICE void stage(const Work& work, int network, int first, int patches, int top,
                           unsigned char* staged) {
  using Staged = typename S::StagedMap;
  constexpr int kMapBytes = S::kSide * S::kSide * S::kSecond * 2;
  constexpr int kRowBytes = S::kSide * S::kSecond * 2;
  constexpr int kStagedRowBytes = Staged::bytes(S::kSide * kTileRows);
  const int thread = thread_index_anew();
  const int patch = thread / S::kRowChunks, item = thread % S::kRowChunks;
  if (patch >= S::kAtOnce) return;
  const int chunk = item % Staged::kChunks, column = item / Staged::kChunks;
  const unsigned char* source =
      work.maps + (static_cast<int64_t>(first + patch) * work.networks + network) * kMapBytes +
      top * kRowBytes + item * kChunkBytes;
#pragma unroll
  for (int i = 0; i < kTileRows; i += S::kAtOnce) {
    unsigned char* const target = staged + Staged::chunk(column * kTileRows + patch + i, chunk);
    const bool there = first + patch + i < patches;
#pragma unroll
    for (int row = 0; row < S::kStagedRows; ++row) {
      if (top + row < 0 || top + row >= S::kSide) continue;
      if (there) {
        copy_async(target + row * kStagedRowBytes, source + row * kRowBytes);
      } else {
        *reinterpret_cast<uint4*>(target + row * kStagedRowBytes) = uint4{};
      }
    }
    source += S::kAtOnce * kMapBytes * work.networks;
  }
}

// First half of kernel M: a network's outputs of kPatches patches a block, weights streamed from
// L2.
template <class S>
FASTALPS_DEVICE void make_latents(const Work& work, const uint2* weights, const float* biases,
                                  unsigned char* shared) {
  const Lane lane(thread_index());
  unsigned char* const staged = shared;
  float* const parts = reinterpret_cast<float*>(shared);
  unsigned char* const hidden = shared + S::kHiddenAt;
  constexpr int kValues = S::kPatches * S::kLatent;
  allow_next();
  await_previous();
  const int patches = patches_of(work);
  const int tasks = divide_up(patches, S::kPatches) * work.networks;

  for (int task = block_index(); task < tasks; task += block_count()) {
    const int network = task & (work.networks - 1);  // There are one or two.
    const int first = (task >> (work.networks - 1)) * S::kPatches;
#pragma unroll 1
    for (int item = 0; item < S::kTiles * S::kBands; ++item) {
      const int tile = item / S::kBands, band = item % S::kBands;
      barrier();  // The last user of `staged`, or of `parts`, is done.
      stage<S>(work, network, first + tile * kTileRows, patches, 2 * S::kBandRows * band - 1,
               staged);
      await_copies();
      barrier();
      third_band<S>(lane, staged, hidden + tile * S::kHiddenBytes,
                    weights + network * S::kThirdFragments * kLanes, biases + network * S::kThird,
                    work.slope, band);
    }
    barrier();
    fourth_slice<S>(lane, hidden,
                    weights + (2 * S::kThirdFragments + network * S::kFourthFragments) * kLanes,
                    parts);
    barrier();
    const float* const bias = biases + 2 * S::kThird + network * S::kLatent;
    for (int i = thread_index(); i < kValues; i += kBlock) {
      const int patch = first + i / S::kLatent, channel = i % S::kLatent;
      float value = read_only(bias + channel);
#pragma unroll
      for (int slice = 0; slice < S::kSlices; ++slice) value += parts[slice * kValues + i];
      if (patch >= patches) continue;
      work.latents[(static_cast<int64_t>(patch) * work.networks + network) * S::kLatent + channel] =
          value;
    }
  }
}

}  // namespace fastalps::cuda::fused
