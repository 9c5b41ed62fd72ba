// Kernel E and the first half of M: from pixels to latents.
#pragma once

#include "fused_layers.cuh"

namespace fastalps::cuda::fused {

// A of the first convolution: its 9 taps on the image are one step of 16 terms, 7 of them zero.
template <class S>
FASTALPS_DEVICE Operand image_operand(const Lane& lane, const uint16_t* image, int first_pixel) {
  Operand a;
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
    int pixel = first_pixel + lane.group + 8 * lower;
    pixel = pixel < S::kHalf * S::kHalf ? pixel : 0;  // Not stored.
    const int row = pixel / S::kHalf;
    const uint16_t* corner = image + 2 * row * S::kBordered + 2 * (pixel - row * S::kHalf);
    const int even = 2 * lane.quad, odd = even + 1;
    const uint32_t first = corner[even / 3 * S::kBordered + even % 3];
    const uint32_t second = corner[odd / 3 * S::kBordered + odd % 3];
    const uint32_t last = corner[2 * S::kBordered + 2];
    a.word[lower] = first | second << 16;
    a.word[2 + lower] = lane.quad == 0 ? last : 0;
  }
  return a;
}

// Kernel E: each block holds all weights and takes patches in turn.
template <class S>
FASTALPS_DEVICE void encode(const Work& work, const uint2* weights, const float* biases,
                            unsigned char* shared) {
  using First = typename S::FirstMap;
  const Lane lane(thread_index());
  unsigned char* const map = shared + S::kMapAt;
  uint16_t* const image = reinterpret_cast<uint16_t*>(shared + S::kImageAt);
  unsigned char* const zero = shared + S::kZeroAt;
  const uint2* const resident = reinterpret_cast<const uint2*>(shared);
  const int patches = patches_of(work);
  if (block_index() >= patches) return;
  copy_chunks(shared, weights, S::kMapAt);
  for (int cell = thread_index(); cell < (S::kSharedBytes - S::kImageAt) / 2; cell += kBlock) {
    image[cell] = 0;  // The image's border and the zeros.
  }
  barrier();

  for (int number = block_index(); number < patches; number += block_count()) {
    // Nobody reads the last patch's image any more: its second layer came after a barrier.
    const Patch patch = find_patch(work, number);
    for (int pixel = thread_index(); pixel < S::kSize * S::kSize; pixel += kBlock) {
      const int row = pixel / S::kSize, column = pixel - row * S::kSize;
      image[(row + 1) * S::kBordered + column + 1] = static_cast<uint16_t>(
          round_pair(level_pixel(work.source, patch, row, column), 0.0f) & 0xffff);
    }
    barrier();

    constexpr int kFirstColumns = 2 * S::kFirst / kTileColumns;
    for (int tile = lane.warp; tile * kTileRows < S::kHalf * S::kHalf; tile += kWarps) {
      const Operand a = image_operand<S>(lane, image, tile * kTileRows);
#pragma unroll 4
      for (int column = 0; column < kFirstColumns; ++column) {
        float sums[4] = {};
        multiply_add(sums, a, resident[column * kLanes + lane.index]);
        const int channel = column * kTileColumns + 2 * lane.quad;
#pragma unroll
        for (int lower = 0; lower < 2; ++lower) {
          const int pixel = tile * kTileRows + lane.group + 8 * lower;
          if (pixel >= S::kHalf * S::kHalf) continue;
          put(map + First::channel(pixel, channel),
              finish_pair(sums[2 * lower], sums[2 * lower + 1], biases, channel, work.slope));
        }
      }
    }
    barrier();

    constexpr int kColumns = S::kSecond / kTileColumns;
    constexpr int kPixels = S::kQuarter * S::kQuarter;
    constexpr int kDownGroups = divide_up(kPixels, S::kTilesDown * kTileRows);
    constexpr int kAcrossGroups = kColumns / S::kTilesAcross;
    for (int item = lane.warp; item < work.networks * kDownGroups * kAcrossGroups; item += kWarps) {
      const int across_group = item % kAcrossGroups;
      const int down_group = item / kAcrossGroups % kDownGroups;
      const int network = item / (kAcrossGroups * kDownGroups);
      const int first_pixel = down_group * S::kTilesDown * kTileRows;
      const int first_column = across_group * S::kTilesAcross;
      const uint2* const mine =
          resident + (S::kFirstFragments + network * S::kSecondFragments + first_column) * kLanes;
      float sums[S::kTilesDown][S::kTilesAcross][4];
      convolve<First, S::kHalf, S::kQuarter, 2, S::kFirst>(
          lane, map, network * S::kFirst / kChunkChannels, zero, mine, kColumns, first_pixel, sums);
      const float* const bias = biases + 2 * S::kFirst + network * S::kSecond;
      unsigned char* const output =
          work.maps + (static_cast<int64_t>(number) * work.networks + network) * S::kOutputs * 2;
#pragma unroll
      for (int down = 0; down < S::kTilesDown; ++down) {
#pragma unroll
        for (int lower = 0; lower < 2; ++lower) {
          const int pixel = first_pixel + down * kTileRows + lane.group + 8 * lower;
          if (pixel >= kPixels) continue;
#pragma unroll
          for (int across = 0; across < S::kTilesAcross; ++across) {
            const int channel = (first_column + across) * kTileColumns + 2 * lane.quad;
            const float* const found = sums[down][across] + 2 * lower;
            put(output + (pixel * S::kSecond + channel) * 2,
                finish_pair(found[0], found[1], bias, channel, work.slope));
          }
        }
      }
    }
  }
}

// Two rows of the third convolution's results, from five staged rows that begin at `top`.
template <class S>
FASTALPS_DEVICE void third_band(const Lane& lane, const unsigned char* staged,
                                unsigned char* hidden, const uint2* weights, const float* biases,
                                float slope, int band) {
  constexpr int kColumns = S::kThird / kTileColumns;
  constexpr int kSteps = S::kSecond / kTileTerms;
  constexpr int kCells = S::kBandRows * S::kHalf;
  const int first_column = lane.warp * S::kThirdAcross;
  const int top = 2 * S::kBandRows * band - 1;
  float sums[kCells][S::kThirdAcross][4];
  clear(sums);
#pragma unroll 1
  for (int tap = 0; tap < 9; ++tap) {
    const int tap_row = tap / 3, tap_column = tap - 3 * tap_row;
#pragma unroll 1
    for (int step = 0; step < kSteps; ++step) {
      uint2 b[S::kThirdAcross];
#pragma unroll
      for (int across = 0; across < S::kThirdAcross; ++across) {
        b[across] = read_only(weights +
                              ((tap * kSteps + step) * kColumns + first_column + across) * kLanes +
                              lane.index);
      }
#pragma unroll
      for (int cell = 0; cell < kCells; ++cell) {
        const int local = 2 * (cell / S::kHalf) + tap_row;
        const int column = 2 * (cell % S::kHalf) + tap_column - 1;
        const bool outside =
            top + local < 0 || top + local >= S::kSide || column < 0 || column >= S::kSide;
        if (outside) continue;  // For all patches alike.
        const Operand a = load_operand(
            staged + S::StagedMap::chunk((local * S::kSide + column) * kTileRows + lane.row,
                                         2 * step + lane.half));
#pragma unroll
        for (int across = 0; across < S::kThirdAcross; ++across) {
          multiply_add(sums[cell][across], a, b[across]);
        }
      }
    }
  }
#pragma unroll
  for (int cell = 0; cell < kCells; ++cell) {
#pragma unroll
    for (int across = 0; across < S::kThirdAcross; ++across) {
      const int channel = (first_column + across) * kTileColumns + 2 * lane.quad;
#pragma unroll
      for (int lower = 0; lower < 2; ++lower) {
        const float* const found = sums[cell][across] + 2 * lower;
        const int pixel = (band * kCells + cell) * kTileRows + lane.group + 8 * lower;
        put(hidden + S::HiddenMap::channel(pixel, channel),
            finish_pair(found[0], found[1], biases, channel, slope));
      }
    }
  }
}

// The fourth convolution, summed over its four pixels (the weights are packed divided by four):
// one slice of the terms, 16 patches by the warp's columns, into `parts` (slice, patch, latent).
template <class S>
FASTALPS_DEVICE void fourth_slice(const Lane& lane, const unsigned char* hidden,
                                  const uint2* weights, float* parts) {
  constexpr int kColumns = S::kColumns;
  constexpr int kSteps = S::kThird / kTileTerms;
  constexpr int kCells = S::kQuarter * S::kQuarter;
  const int first_column = lane.warp % S::kGroups * S::kFourthAcross;
  const int slice = lane.warp / S::kGroups;
  float sums[kCells][S::kFourthAcross][4];  // Pixels apart: independent sums hide latency.
  clear(sums);
#pragma unroll 1
  for (int tap = 0; tap < 9; ++tap) {
    const int tap_row = tap / 3, tap_column = tap - 3 * tap_row;
#pragma unroll 1
    for (int step = slice; step < kSteps; step += S::kSlices) {
      uint2 b[S::kFourthAcross];
#pragma unroll
      for (int across = 0; across < S::kFourthAcross; ++across) {
        b[across] = read_only(weights +
                              ((tap * kSteps + step) * kColumns + first_column + across) * kLanes +
                              lane.index);
      }
#pragma unroll
      for (int cell = 0; cell < kCells; ++cell) {
        const int row = 2 * (cell / 2) + tap_row - 1, column = 2 * (cell % 2) + tap_column - 1;
        if (row < 0 || column < 0) continue;  // Rows and columns past the last do not occur.
        const Operand a = load_operand(
            hidden + S::HiddenMap::chunk((row * S::kHalf + column) * kTileRows + lane.row,
                                         2 * step + lane.half));
#pragma unroll
        for (int across = 0; across < S::kFourthAcross; ++across) {
          multiply_add(sums[cell][across], a, b[across]);
        }
      }
    }
  }
#pragma unroll
  for (int across = 0; across < S::kFourthAcross; ++across) {
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const int patch = lane.group + 8 * (part / 2);
      const int channel = (first_column + across) * kTileColumns + 2 * lane.quad + part % 2;
      float sum = 0.0f;
#pragma unroll
      for (int cell = 0; cell < kCells; ++cell) sum += sums[cell][across][part];
      parts[(slice * kTileRows + patch) * S::kLatent + channel] = sum;
    }
  }
}

// The perturbation's factor for one patch: 1, or 1 / its root mean square.
template <class S>
FASTALPS_DEVICE float bound_factor(const Work& work, const float* perturbation) {
  if (work.bound != Bound::kNorm) return 1.0f;
  float square = 0.0f;
  for (int i = 0; i < S::kLatent; ++i) square += perturbation[i] * perturbation[i];
  return inverse_root(square / S::kLatent + 1e-12f);
}

// First half of kernel M: 16 patches a block, weights streamed from L2.
template <class S>
FASTALPS_DEVICE void make_latents(const Work& work, const uint2* weights, const float* biases,
                                  unsigned char* shared) {
  using Staged = typename S::StagedMap;
  const Lane lane(thread_index());
  unsigned char* const staged = shared;
  float* const parts = reinterpret_cast<float*>(shared);
  unsigned char* const hidden = shared + S::kHiddenAt;
  float* const kept = reinterpret_cast<float*>(shared + S::kKeptAt);
  constexpr int kValues = kTileRows * S::kLatent;
  constexpr int kMapBytes = S::kSide * S::kSide * S::kSecond * 2;
  const int patches = patches_of(work);

  for (int first = block_index() * kTileRows; first < patches; first += block_count() * kTileRows) {
    for (int network = 0; network < work.networks; ++network) {
#pragma unroll 1
      for (int band = 0; band < S::kBands; ++band) {
        const int top = 2 * S::kBandRows * band - 1;
        barrier();  // The last user of `staged`, or of `parts`, is done.
        constexpr int kRowChunks = S::kSide * Staged::kChunks;  // Of one row of one patch.
        for (int item = thread_index(); item < S::kStagedRows * kTileRows * kRowChunks;
             item += kBlock) {
          const int chunk = item % Staged::kChunks;
          const int column = item / Staged::kChunks % S::kSide;
          const int patch = item / kRowChunks % kTileRows;
          const int local = item / (kRowChunks * kTileRows);
          if (top + local < 0 || top + local >= S::kSide) continue;
          uint4 values{};
          if (first + patch < patches) {
            const unsigned char* const source =
                work.maps +
                (static_cast<int64_t>(first + patch) * work.networks + network) * kMapBytes;
            values = read_only(reinterpret_cast<const uint4*>(source) +
                               ((top + local) * S::kSide + column) * Staged::kChunks + chunk);
          }
          const int pixel = (local * S::kSide + column) * kTileRows + patch;
          *reinterpret_cast<uint4*>(staged + Staged::chunk(pixel, chunk)) = values;
        }
        barrier();
        third_band<S>(lane, staged, hidden, weights + network * S::kThirdFragments * kLanes,
                      biases + network * S::kThird, work.slope, band);
      }
      barrier();
      fourth_slice<S>(lane, hidden,
                      weights + (2 * S::kThirdFragments + network * S::kFourthFragments) * kLanes,
                      parts);
      barrier();
      const float* const bias = biases + 2 * S::kThird + network * S::kLatent;
      for (int i = thread_index(); i < kValues; i += kBlock) {
        float value = read_only(bias + i % S::kLatent);
#pragma unroll
        for (int slice = 0; slice < S::kSlices; ++slice) value += parts[slice * kValues + i];
        // The perturbation stays where the slices were: each thread overwrites its own values.
        (network == 0 ? kept : parts)[i] = value;
      }
    }
    barrier();
    for (int pair = thread_index(); pair < kValues / 2; pair += kBlock) {
      const int patch = 2 * pair / S::kLatent, channel = 2 * pair % S::kLatent;
      if (first + patch >= patches) continue;
      const float* const latent = kept + patch * S::kLatent;
      const float* const perturbation = parts + patch * S::kLatent;
      const float factor = work.networks == 2 ? bound_factor<S>(work, perturbation) : 0.0f;
      for (int pass = 0; pass < work.passes; ++pass) {
        float values[2] = {latent[channel], latent[channel + 1]};
        if (pass == 1 || work.first_perturbed) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float found = perturbation[channel + i];
            values[i] += work.strength *
                         (work.bound == Bound::kTanh ? hyperbolic_tangent(found) : factor * found);
          }
        }
        const int64_t row = static_cast<int64_t>(first + patch) * work.passes + pass;
        put(work.latents + (row * S::kLatent + channel) * 2, round_pair(values[0], values[1]));
      }
    }
  }
}

}  // namespace fastalps::cuda::fused
