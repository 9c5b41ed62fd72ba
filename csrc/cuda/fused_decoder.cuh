// The second half of kernel M, and D: from latents to errors. A row is one decoder pass of a patch.
#pragma once

#include "fused_layers.cuh"

namespace fastalps::cuda::fused {

// The dense layer: 16 rows by all outputs, into the start map (pixel, row, channel).
template <class S>
FASTALPS_DEVICE void dense(const Lane& lane, const unsigned char* latents, unsigned char* start,
                           const uint2* weights, const float* biases, float slope) {
  constexpr int kColumns = S::kDense / kTileColumns;
  constexpr int kAcross = S::kDenseAcross;
  for (int first_column = lane.warp * kAcross; first_column < kColumns;
       first_column += kWarps * kAcross) {
    float sums[1][kAcross][4];
    clear(sums);
#pragma unroll 1
    for (int step = 0; step < S::kLatent / kTileTerms; ++step) {
      const Operand a = load_operand(latents + S::LatentMap::chunk(lane.row, 2 * step + lane.half));
#pragma unroll
      for (int across = 0; across < kAcross; ++across) {
        multiply_add(
            sums[0][across], a,
            read_only(weights + (step * kColumns + first_column + across) * kLanes + lane.index));
      }
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
  float sums[kCells][S::kFirstAcross][4];
  clear(sums);
#pragma unroll 1
  for (int step = 0; step < kSteps; ++step) {
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
        const uint2 b = read_only(
            weights + ((tap * kSteps + step) * kColumns + first_column + across) * kLanes +
            lane.index);
#pragma unroll
        for (int pixel = 0; pixel < 4; ++pixel) {
          const int row = 2 * (pixel / 2) - 1 + tap / 3, column = 2 * (pixel % 2) - 1 + tap % 3;
          if (row < 0 || column < 0 || row >= S::kHalf || column >= S::kHalf) continue;
          multiply_add(sums[row * S::kHalf + column][across], a[pixel], b);
        }
      }
    }
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
  float sums[2 * S::kSide][kAcross][4];
  clear(sums);
#pragma unroll 1
  for (int step = 0; step < kSteps; ++step) {
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
          const uint2 b = read_only(
              weights + ((tap * kSteps + step) * kColumns + first_column + across) * kLanes +
              lane.index);
#pragma unroll
          for (int pixel = 0; pixel < S::kHalf; ++pixel) {
            const int column = 2 * pixel - 1 + tap % 3;
            if (column < 0 || column >= S::kSide) continue;
            multiply_add(sums[tap_phase(tap / 3) * S::kSide + column][across], a[pixel], b);
          }
        }
      }
    }
  }
#pragma unroll
  for (int cell = 0; cell < 2 * S::kSide; ++cell) {
    const int row = 2 * anchor_row + cell / S::kSide, column = cell % S::kSide;
    if (row >= S::kSide) continue;
#pragma unroll
    for (int across = 0; across < kAcross; ++across) {
      const int channel = (first_column + across) * kTileColumns + 2 * lane.quad;
#pragma unroll
      for (int lower = 0; lower < 2; ++lower) {
        const int pass = lane.group + 8 * lower;
        if (pass >= rows) continue;
        const float* const found = sums[cell][across] + 2 * lower;
        put(output + static_cast<int64_t>(pass) * S::kOutputs * 2 +
                ((row * S::kSide + column) * S::kSecond + channel) * 2,
            finish_pair(found[0], found[1], biases, channel, slope));
      }
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
  const int rows = patches_of(work) * work.passes;
  for (int first = block_index() * kTileRows; first < rows; first += block_count() * kTileRows) {
    for (int item = thread_index(); item < kTileRows * Latent::kChunks; item += kBlock) {
      const int row = item / Latent::kChunks, chunk = item % Latent::kChunks;
      uint4 values{};
      if (first + row < rows) {
        values = read_only(reinterpret_cast<const uint4*>(work.latents) +
                           static_cast<int64_t>(first + row) * Latent::kChunks + chunk);
      }
      *reinterpret_cast<uint4*>(shared + Latent::chunk(row, chunk)) = values;
    }
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

// The last layer's products of every pixel with each tap: one product of matrices, where a
// convolution for one output would read each input nine times and use one column of eight.
template <class S>
FASTALPS_DEVICE void tap_products(const Lane& lane, const unsigned char* map,
                                  const unsigned char* zero, const uint2* weights,
                                  float* products) {
  using Fifth = typename S::FifthMap;
  constexpr int kPixels = S::kSize * S::kSize;
  constexpr int kColumns = divide_up(S::kTaps, kTileColumns);
  constexpr int kSteps = divide_up(S::kFifth, kTileTerms);
  for (int tile = lane.warp; tile * kTileRows < kPixels; tile += kWarps) {
    const int mine = tile * kTileRows + lane.row;
    float sums[1][kColumns][4];
    clear(sums);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int chunk = 2 * step + lane.half;
      const bool inside = mine < kPixels && chunk < Fifth::kChunks;
      const Operand a = load_tap(map, zero, Fifth::chunk(mine, chunk), inside);
#pragma unroll
      for (int column = 0; column < kColumns; ++column) {
        multiply_add(sums[0][column], a, weights[(step * kColumns + column) * kLanes + lane.index]);
      }
    }
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const int tap = column * kTileColumns + 2 * lane.quad + part % 2;
        const int pixel = tile * kTileRows + lane.group + 8 * (part / 2);
        if (tap < S::kTaps && pixel < kPixels) {
          products[tap * S::kPlane + pixel] = sums[0][column][part];
        }
      }
    }
  }
}

// What a pixel's reconstruction is off: its logit is the sum of its neighbours' products.
template <class S>
FASTALPS_DEVICE float residual(const Work& work, const Patch& patch, const float* products,
                               float bias, int pixel) {
  const int row = pixel / S::kSize, column = pixel - row * S::kSize;
  float logit = bias;
#pragma unroll
  for (int tap = 0; tap < S::kTaps; ++tap) {
    const int y = row + tap / 3 - 1, x = column + tap % 3 - 1;
    if (y < 0 || y >= S::kSize || x < 0 || x >= S::kSize) continue;
    logit += products[tap * S::kPlane + y * S::kSize + x];
  }
  const float reconstruction = 1.0f / (1.0f + exponential(-logit));
  return reconstruction - unit_pixel(work.source, patch, row, column);
}

// The mean along an axis of the values up to `reach` from the `place`th, as far as there are any.
template <class S>
FASTALPS_DEVICE float neighbourhood(const float* value, int step, int place, int reach) {
  const int first = place < reach ? -place : -reach;
  const int last = place + reach < S::kSize ? reach : S::kSize - 1 - place;
  float sum = 0.0f;
  for (int i = first; i <= last; ++i) sum += value[i * step];
  return sum / static_cast<float>(last - first + 1);
}

// This thread's share of the squared means of the residuals' neighbourhoods. `planes`: of shared
// memory, two floats a pixel.
template <class S>
FASTALPS_DEVICE float smoothed_squares(const Work& work, const Patch& patch, const float* products,
                                       float bias, float* planes) {
  constexpr int kPixels = S::kSize * S::kSize;
  float* const means = planes + kPixels;
  for (int pixel = thread_index(); pixel < kPixels; pixel += kBlock) {
    planes[pixel] = residual<S>(work, patch, products, bias, pixel);
  }
  barrier();
  for (int pixel = thread_index(); pixel < kPixels; pixel += kBlock) {
    means[pixel] = neighbourhood<S>(planes + pixel, 1, pixel % S::kSize, work.reach);
  }
  barrier();
  float sum = 0.0f;
  for (int pixel = thread_index(); pixel < kPixels; pixel += kBlock) {
    const float mean = neighbourhood<S>(means + pixel, S::kSize, pixel / S::kSize, work.reach);
    sum += mean * mean;
  }
  return sum;
}

// Kernel D: each block holds all weights and takes rows in turn; the reconstruction stays in
// registers.
template <class S>
FASTALPS_DEVICE void decode(const Work& work, const uint2* weights, const float* biases,
                            unsigned char* shared) {
  const Lane lane(thread_index());
  unsigned char* const even = shared + S::kEvenAt;
  unsigned char* const odd = shared + S::kOddAt;
  unsigned char* const zero = shared + S::kZeroAt;
  float* const warp_sums = reinterpret_cast<float*>(shared + S::kSumsAt);
  const uint2* const third = reinterpret_cast<const uint2*>(shared);
  const uint2* const fourth = third + S::kThirdFragments * kLanes;
  const uint2* const fifth = fourth + S::kFourthFragments * kLanes;
  const uint2* const last = fifth + S::kFifthFragments * kLanes;
  const float* const fourth_bias = biases + S::kThird;
  const float* const fifth_bias = fourth_bias + S::kFourth;
  const float last_bias = read_only(fifth_bias + S::kFifth);
  const int rows = patches_of(work) * work.passes;
  if (block_index() >= rows) return;
  copy_chunks(shared, weights, S::kEvenAt);
  if (thread_index() < kBankBytes) zero[thread_index()] = 0;

  for (int row = block_index(); row < rows; row += block_count()) {
    using Input = typename S::InputMap;
    const uint4* const source = reinterpret_cast<const uint4*>(work.maps) +
                                static_cast<int64_t>(row) * (S::kInputBytes / kChunkBytes);
    for (int item = thread_index(); item < S::kInputBytes / kChunkBytes; item += kBlock) {
      *reinterpret_cast<uint4*>(even + Input::chunk(item / Input::kChunks, item % Input::kChunks)) =
          read_only(source + item);
    }
    barrier();

    constexpr int kThirdGroups = S::kThird / kTileColumns / S::kThirdAcross;
    constexpr int kThirdTiles = divide_up(S::kQuarter * S::kQuarter, kTileRows);
    for (int item = lane.warp; item < kThirdTiles * kThirdGroups; item += kWarps) {
      const int first_column = item % kThirdGroups * S::kThirdAcross;
      const int first_pixel = item / kThirdGroups * kTileRows;
      float sums[4][S::kThirdAcross][4];
      transpose<Input, S::kQuarter, S::kInputs>(lane, even, zero, third + first_column * kLanes,
                                                S::kThird / kTileColumns, first_pixel, sums);
      put_phases<typename S::ThirdMap, S::kQuarter, S::kHalf>(lane, odd, biases, work.slope,
                                                              first_pixel, first_column, sums);
    }
    barrier();

    constexpr int kFourthTiles = divide_up(S::kHalf * S::kHalf, kTileRows);
    for (int tile = lane.warp; tile < kFourthTiles; tile += kWarps) {
      float sums[4][S::kFourthAcross][4];
      transpose<typename S::ThirdMap, S::kHalf, S::kThird>(
          lane, odd, zero, fourth, S::kFourth / kTileColumns, tile * kTileRows, sums);
      put_phases<typename S::FourthMap, S::kHalf, S::kSize>(lane, even, fourth_bias, work.slope,
                                                            tile * kTileRows, 0, sums);
    }
    barrier();

    constexpr int kPixels = S::kSize * S::kSize;
    constexpr int kGroupPixels = S::kTilesDown * kTileRows;
    for (int first = lane.warp * kGroupPixels; first < kPixels; first += kWarps * kGroupPixels) {
      float sums[S::kTilesDown][S::kFifthAcross][4];
      convolve<typename S::FourthMap, S::kSize, S::kSize, 1, S::kFourth>(
          lane, even, 0, zero, fifth, S::kFifth / kTileColumns, first, sums);
#pragma unroll
      for (int down = 0; down < S::kTilesDown; ++down) {
#pragma unroll
        for (int lower = 0; lower < 2; ++lower) {
          const int pixel = first + down * kTileRows + lane.group + 8 * lower;
          if (pixel >= kPixels) continue;
#pragma unroll
          for (int across = 0; across < S::kFifthAcross; ++across) {
            const int channel = across * kTileColumns + 2 * lane.quad;
            const float* const found = sums[down][across] + 2 * lower;
            put(odd + S::FifthMap::channel(pixel, channel),
                finish_pair(found[0], found[1], fifth_bias, channel, work.slope));
          }
        }
      }
    }
    barrier();

    float* const products = reinterpret_cast<float*>(even);
    tap_products<S>(lane, odd, zero, last, products);
    barrier();

    const Patch patch = find_patch(work, row / work.passes);
    float sum = 0.0f;
    if (work.reach > 0) {
      sum = smoothed_squares<S>(work, patch, products, last_bias, reinterpret_cast<float*>(odd));
    } else {
      for (int pixel = thread_index(); pixel < kPixels; pixel += kBlock) {
        const float off = residual<S>(work, patch, products, last_bias, pixel);
        sum += off * off;
      }
    }
    // In a fixed order, so that a score has the same bits in every run.
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) sum += shuffle_down(sum, distance);
    if (lane.index == 0) warp_sums[lane.warp] = sum;
    barrier();
    if (thread_index() == 0) {
      float total = 0.0f;
      for (int warp = 0; warp < kWarps; ++warp) total += warp_sums[warp];
      work.errors[row % work.passes * work.source.total + patch.place] = total / kPixels;
    }
  }
}

}  // namespace fastalps::cuda::fused
