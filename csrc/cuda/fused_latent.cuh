// The first half of kernel M: from E's maps to the outputs of encoder and distorter.
#pragma once

#include "fused_layers.cuh"

namespace fastalps::cuda::fused {

// Two rows of the third convolution's results, from five staged rows that begin one above the first
// input. Pixels are whole tiles of patches, so that a tap is a constant away and outside for all
// patches or none.
template <class S>
FASTALPS_DEVICE void third_band(const Lane& lane, const unsigned char* staged,
                                unsigned char* hidden, const uint2* weights, const float* biases,
                                float slope, int band) {
  constexpr int kColumns = S::kThird / kTileColumns, kAcross = S::kThirdAcross;
  constexpr int kSteps = S::kSecond / kTileTerms;
  constexpr int kCells = S::kBandRows * S::kHalf;
  constexpr int kPixel = S::StagedMap::bytes(kTileRows);
  const int first_column = lane.warp * kAcross;
  const int top = 2 * S::kBandRows * band - 1;
  int terms[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    terms[step] = S::StagedMap::chunk(lane.row, 2 * step + lane.half);
  }
  constexpr int kDepth = round_steps(3 * kSteps), kRounds = 3 * kSteps / kDepth;
  Stream<kDepth, kAcross> stream(weights + first_column * kLanes + lane.index, kColumns * kLanes);
  const Biases<kAcross> bias(lane, biases, first_column);
  float sums[kCells][kAcross][4];
#pragma unroll
  for (int cell = 0; cell < kCells; ++cell) start_sums(sums[cell], bias);
#pragma unroll(kRounds % 2 == 0 ? 1 : 3)
  for (int tap_row = 0; tap_row < 3; ++tap_row) {
#pragma unroll
    for (int at = 0; at < 3 * kSteps; ++at) {
      const int tap_column = at / kSteps;
      if (at % kDepth == 0 && (tap_row < 2 || at / kDepth + 1 < kRounds)) stream.read();
      const unsigned char* const first = staged + tap_row * S::kSide * kPixel + terms[at % kSteps];
#pragma unroll
      for (int row = 0; row < S::kBandRows; ++row) {
        const int local = 2 * row + tap_row;
        if (top + local < 0 || top + local >= S::kSide) continue;
#pragma unroll
        for (int x = 0; x < S::kHalf; ++x) {
          const int column = 2 * x + tap_column - 1;
          if (column < 0 || column >= S::kSide) continue;
          const Operand a = load_operand(first + (2 * row * S::kSide + column) * kPixel);
#pragma unroll
          for (int across = 0; across < kAcross; ++across) {
            multiply_add(sums[row * S::kHalf + x][across], a, stream.current[at % kDepth][across]);
          }
        }
      }
      if (at % kDepth == kDepth - 1) stream.advance();
    }
  }
#pragma unroll
  for (int across = 0; across < kAcross; ++across) {
    const int channel = (first_column + across) * kTileColumns + 2 * lane.quad;
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      unsigned char* const place = hidden + S::HiddenMap::channel(lane.group + 8 * lower, channel) +
                                   band * kCells * S::HiddenMap::bytes(kTileRows);
#pragma unroll
      for (int cell = 0; cell < kCells; ++cell) {
        const float* const found = sums[cell][across] + 2 * lower;
        put(place + cell * S::HiddenMap::bytes(kTileRows), leaky_pair(found[0], found[1], slope));
      }
    }
  }
}

// The fourth convolution, summed over its four pixels (the weights are packed divided by four):
// one slice of the terms, all patches by the warp's columns, into `parts` (slice, patch, latent).
template <class S>
FASTALPS_DEVICE void fourth_slice(const Lane& lane, const unsigned char* hidden,
                                  const uint2* weights, float* parts) {
  constexpr int kColumns = S::kColumns, kAcross = S::kFourthAcross;
  // The slices' steps take turns.
  constexpr int kSteps = S::kThird / kTileTerms / S::kSlices;
  constexpr int kCells = S::kQuarter * S::kQuarter;
  constexpr int kPixel = S::HiddenMap::bytes(kTileRows);
  constexpr int kTiles = S::kTiles;
  const int first_column = lane.warp % S::kGroups * kAcross;
  const int slice = lane.warp / S::kGroups;
  int terms[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    terms[step] = S::HiddenMap::chunk(lane.row, 2 * (step * S::kSlices + slice) + lane.half);
  }
  constexpr int kDepth = kSteps % 4 == 0 ? 4 / kTiles : round_steps(3 * kSteps);
  constexpr int kRounds = 3 * kSteps / kDepth;
  Stream<kDepth, kAcross> stream(weights + (slice * kColumns + first_column) * kLanes + lane.index,
                                 S::kSlices * kColumns * kLanes);
  float sums[kTiles][kCells][kAcross][4];  // Pixels apart: independent sums hide latency.
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) clear(sums[tile]);
#pragma unroll(kRounds % 2 == 0 ? 1 : 3)
  for (int tap_row = 0; tap_row < 3; ++tap_row) {
#pragma unroll
    for (int at = 0; at < 3 * kSteps; ++at) {
      const int tap_column = at / kSteps;
      if (at % kDepth == 0 && (tap_row < 2 || at / kDepth + 1 < kRounds)) stream.read();
      const unsigned char* const first =
          hidden + (tap_row - 1) * S::kHalf * kPixel + terms[at % kSteps];
#pragma unroll
      for (int cell = 0; cell < kCells; ++cell) {
        // Rows and columns past the last do not occur.
        const int row = 2 * (cell / 2) + tap_row - 1, column = 2 * (cell % 2) + tap_column - 1;
        if (row < 0 || column < 0) continue;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const Operand a = load_operand(first + tile * S::kHiddenBytes +
                                         (2 * (cell / 2) * S::kHalf + column) * kPixel);
#pragma unroll
          for (int across = 0; across < kAcross; ++across) {
            multiply_add(sums[tile][cell][across], a, stream.current[at % kDepth][across]);
          }
        }
      }
      if (at % kDepth == kDepth - 1) stream.advance();
    }
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
        for (int cell = 0; cell < kCells; ++cell) sum += sums[tile][cell][across][part];
        parts[(slice * S::kPatches + patch) * S::kLatent + channel] = sum;
      }
    }
  }
}

// The rows of a tile that a band needs, asynchronously; zeros for patches that there are not.
template <class S>
FASTALPS_DEVICE void stage(const Work& work, int network, int first, int patches, int top,
                           unsigned char* staged) {
  using Staged = typename S::StagedMap;
  constexpr int kMapBytes = S::kSide * S::kSide * S::kSecond * 2;
  constexpr int kRowChunks = S::kSide * Staged::kChunks;  // Of one row of one patch.
  for (int item = thread_index(); item < S::kStagedRows * kTileRows * kRowChunks; item += kBlock) {
    const int chunk = item % Staged::kChunks;
    const int column = item / Staged::kChunks % S::kSide;
    const int patch = item / kRowChunks % kTileRows;
    const int local = item / (kRowChunks * kTileRows);
    if (top + local < 0 || top + local >= S::kSide) continue;
    const int pixel = (local * S::kSide + column) * kTileRows + patch;
    unsigned char* const target = staged + Staged::chunk(pixel, chunk);
    if (first + patch < patches) {
      const unsigned char* const source =
          work.maps + (static_cast<int64_t>(first + patch) * work.networks + network) * kMapBytes;
      const int place = ((top + local) * S::kSide + column) * Staged::kChunks + chunk;
      copy_async(target, source + place * kChunkBytes);
    } else {
      *reinterpret_cast<uint4*>(target) = uint4{};
    }
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
