// Kernel D: the decoder's last four layers, sigmoid and error. A row is one decoder pass of a
// patch.
#pragma once

#include "fused_layers.cuh"

namespace fastalps::cuda::fused {

// One row's results of a tile, from its columns on, if it is to be `stored`: zeros where it is not
// `inside`. `place` is a pixel of the map's first plane. Results are finished in any case: a store
// is cheaper skipped by itself than behind a branch.
template <class Out, int kAcross>
FASTALPS_DEVICE void put_row(const Lane& lane, unsigned char* place, int lower, float slope,
                             bool stored, bool inside, const float (&sums)[kAcross][4]) {
  uint32_t pairs[kAcross];
#pragma unroll
  for (int across = 0; across < kAcross; ++across) {
    const float* const found = sums[across] + 2 * lower;
    const uint32_t pair = leaky_pair(found[0], found[1], slope);
    pairs[across] = inside ? pair : 0;
  }
#pragma unroll
  for (int across = 0; across < kAcross; ++across) {
    if (stored) put(place + Out::chunk(across, 0) + 4 * lane.quad, pairs[across]);
  }
}

// The next row's map, plane by plane, and the cells of zeros behind it; see `await_copies`.
template <class S>
FASTALPS_DEVICE void fetch_input(const Work& work, int row, unsigned char* input) {
  constexpr int kChunks = S::kInputs / kChunkChannels;
  const unsigned char* const source = work.maps + static_cast<int64_t>(row) * (S::kInputValues * 2);
  for (int item = thread_index(); item < S::kInputPixels * kChunks; item += kBlock) {
    copy_async(input + S::InputMap::chunk(item % kChunks, item / kChunks),
               source + item * kChunkBytes);
  }
  if (thread_index() < 8 * kChunks) {
    const int cell = S::kInputPixels + thread_index() % 8;
    *reinterpret_cast<uint4*>(input + S::InputMap::chunk(thread_index() / 8, cell)) = uint4{};
  }
}

// The zeros to the right of the third layer's map and below it.
template <class S>
FASTALPS_DEVICE void border_third(unsigned char* map) {
  constexpr int kCells = 2 * S::kHalf + 1;
  for (int item = thread_index(); item < kCells * (S::kThird / kChunkChannels); item += kBlock) {
    const int cell = item % kCells;
    const int pixel = cell < S::kHalf ? cell * S::kHalfPitch + S::kHalf
                                      : S::kHalf * S::kHalfPitch + cell - S::kHalf;
    *reinterpret_cast<uint4*>(map + S::ThirdMap::chunk(item / kCells, pixel)) = uint4{};
  }
}

// The zeros around the fourth layer's.
template <class S>
FASTALPS_DEVICE void border_fourth(unsigned char* map) {
  constexpr int kSide = S::kSize + 2, kCells = 4 * S::kSize + 4;
  for (int item = thread_index(); item < kCells * (S::kFourth / kChunkChannels); item += kBlock) {
    const int cell = item % kCells;
    int row = cell < kSide ? 0 : kSide - 1, column = cell < kSide ? cell : cell - kSide;
    if (cell >= 2 * kSide) {
      row = 1 + (cell - 2 * kSide) / 2;
      column = (cell - 2 * kSide) % 2 * (kSide - 1);
    }
    const int pixel = row * S::kPitch + column + 1;
    *reinterpret_cast<uint4*>(map + S::FourthMap::chunk(item / kCells, pixel)) = uint4{};
  }
}

// The products of one tap of a transposed convolution of stride 2 (see `tap_phase`): the four
// inputs at and after each anchor, a[2 * y + x], give its four phases of outputs, sums[2 * y + x].
template <int kAcross>
FASTALPS_DEVICE void multiply_tap(int tap, int across, const Operand (&a)[4], uint2 b,
                                  float (&sums)[4][kAcross][4]) {
  const int phase = 2 * tap_phase(tap / 3) + tap_phase(tap % 3);
  const int neighbour = 2 * tap_neighbour(tap / 3) + tap_neighbour(tap % 3);
  multiply_add(sums[phase][across], a[neighbour], b);
}

// The third layer: a tile of 16 anchors, kThirdAcross columns.
template <class S>
FASTALPS_DEVICE void third_tile(const Lane& lane, const unsigned char* input, const uint2* weights,
                                const float* biases, float slope, int tile, int first_column,
                                unsigned char* output) {
  using In = typename S::InputMap;
  using Out = typename S::ThirdMap;
  constexpr int kAcross = S::kThirdAcross, kColumns = S::kThird / kTileColumns;
  constexpr int kSteps = S::kInputs / kTileTerms;
  const int anchor = tile * kTileRows + lane.row;
  // A row's last anchor has no neighbour to the right: zeros, from the banks where it would be.
  const bool last = anchor % S::kQuarter == S::kQuarter - 1;
  const unsigned char* at[4];
#pragma unroll
  for (int neighbour = 0; neighbour < 4; ++neighbour) {
    int pixel = anchor + neighbour / 2 * S::kQuarter + neighbour % 2;
    if (neighbour % 2 == 1 && last) pixel = S::kInputPixels + ((pixel - S::kInputPixels) & 7);
    at[neighbour] = input + In::chunk(lane.half, pixel);
  }
  const Biases<kAcross> bias(lane, biases, first_column);
  float sums[4][kAcross][4];
#pragma unroll
  for (int phase = 0; phase < 4; ++phase) start_sums(sums[phase], bias);
#pragma unroll 1
  for (int step = 0; step < kSteps; ++step) {
    Operand a[4];
#pragma unroll
    for (int neighbour = 0; neighbour < 4; ++neighbour) {
      a[neighbour] = load_operand(at[neighbour] + In::chunk(2 * step, 0));
    }
    const uint2* const first = weights + (step * kColumns + first_column) * kLanes + lane.index;
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) {
#pragma unroll
      for (int across = 0; across < kAcross; ++across) {
        const uint2 b = first[(tap * kSteps * kColumns + across) * kLanes];
        multiply_tap(tap, across, a, b, sums);
      }
    }
  }
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
    const int mine = tile * kTileRows + lane.group + 8 * lower;
    const int row = 2 * (mine / S::kQuarter), column = 2 * (mine % S::kQuarter);
#pragma unroll
    for (int phase = 0; phase < 4; ++phase) {
      const int y = row + phase / 2, x = column + phase % 2;
      const bool stored = mine < S::kInputPixels && y < S::kHalf && x < S::kHalf;
      put_row<Out>(lane, output + Out::chunk(first_column, y * S::kHalfPitch + x), lower, slope,
                   stored, true, sums[phase]);
    }
  }
}

// The fourth layer: two rows of anchors, a tile each, which share weights and the row between.
template <class S>
FASTALPS_DEVICE void fourth_rows(const Lane& lane, const unsigned char* map, const uint2* weights,
                                 const float* biases, float slope, int first_row,
                                 unsigned char* output) {
  using In = typename S::ThirdMap;
  using Out = typename S::FourthMap;
  constexpr int kAcross = S::kFourthAcross;
  constexpr int kSteps = S::kThird / kTileTerms;
  const unsigned char* const corner =
      map + In::chunk(lane.half, first_row * S::kHalfPitch + lane.row);
  const Biases<kAcross> bias(lane, biases, 0);
  float sums[2][4][kAcross][4];
#pragma unroll
  for (int phase = 0; phase < 8; ++phase) start_sums(sums[phase / 4][phase % 4], bias);
#pragma unroll 1
  for (int step = 0; step < kSteps; ++step) {
    Operand a[3][2];
#pragma unroll
    for (int cell = 0; cell < 6; ++cell) {
      a[cell / 2][cell % 2] =
          load_operand(corner + In::chunk(2 * step, cell / 2 * S::kHalfPitch + cell % 2));
    }
    const uint2* const first = weights + step * kAcross * kLanes + lane.index;
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) {
      const int phase = 2 * tap_phase(tap / 3) + tap_phase(tap % 3);
#pragma unroll
      for (int across = 0; across < kAcross; ++across) {
        const uint2 b = first[(tap * kSteps * kAcross + across) * kLanes];
#pragma unroll
        for (int down = 0; down < 2; ++down) {
          multiply_add(sums[down][phase][across],
                       a[down + tap_neighbour(tap / 3)][tap_neighbour(tap % 3)], b);
        }
      }
    }
  }
#pragma unroll
  for (int down = 0; down < 2; ++down) {
#pragma unroll
    for (int phase = 0; phase < 4; ++phase) {
      const int y = 2 * (first_row + down) + phase / 2;
#pragma unroll
      for (int lower = 0; lower < 2; ++lower) {
        const int x = 2 * (lane.group + 8 * lower) + phase % 2;
        const bool stored = y < S::kSize && x < S::kSize;
        put_row<Out>(lane, output + Out::chunk(0, (y + 1) * S::kPitch + x + 2), lower, slope,
                     stored, true, sums[down][phase]);
      }
    }
  }
}

// Where a lane's terms of a step of a layer of stride 1 begin: the taps of a row, left to right,
// and within a tap its planes. Behind the last tap weights are zeros; it is read once more.
template <class In, int kInputs>
FASTALPS_DEVICE int row_terms(const Lane& lane, int step) {
  constexpr int kChunks = kInputs / kChunkChannels;
  const int chunk = 2 * step + lane.half;
  const int tap = chunk / kChunks < 3 ? chunk / kChunks : 2;
  return In::chunk(chunk % kChunks, tap);
}

// The fifth layer, of stride 1: a strip of kStripRows tiles, one below the other, so that an
// operand serves the three rows of results around it.
template <class S>
FASTALPS_DEVICE void fifth_strip(const Lane& lane, const unsigned char* map, const uint2* weights,
                                 const float* biases, float slope, int first_row, int side,
                                 unsigned char* output) {
  using In = typename S::FourthMap;
  using Out = typename S::FifthMap;
  constexpr int kAcross = S::kFifthAcross, kRows = S::kStripRows;
  const int first_column = side * kTileRows;
  const Biases<kAcross> bias(lane, biases, 0);
  float sums[kRows][kAcross][4];
#pragma unroll
  for (int row = 0; row < kRows; ++row) start_sums(sums[row], bias);
#pragma unroll
  for (int step = 0; step < S::kFifthSteps; ++step) {
    const unsigned char* const left =
        map + In::chunk(0, first_column + lane.row) + row_terms<In, S::kFourth>(lane, step);
    Operand a[kRows + 2];
#pragma unroll
    for (int row = 0; row < kRows + 2; ++row) {
      // Below the map there is nothing to read; those results are not stored.
      const int mine = first_row + row < S::kSize + 1 ? first_row + row : S::kSize + 1;
      a[row] = load_operand(left + In::chunk(0, mine * S::kPitch));
    }
#pragma unroll
    for (int tap_row = 0; tap_row < 3; ++tap_row) {
#pragma unroll
      for (int across = 0; across < kAcross; ++across) {
        const int fragment = (tap_row * S::kFifthSteps + step) * kAcross + across;
        const uint2 b = weights[fragment * kLanes + lane.index];
#pragma unroll
        for (int row = 0; row < kRows; ++row) multiply_add(sums[row][across], a[row + tap_row], b);
      }
    }
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      // Columns count from the border; what is outside has to be zero for the last layer.
      const int column = first_column + lane.group + 8 * lower;
      const bool inside = column > 0 && column <= S::kSize;
      put_row<Out>(lane, output + Out::chunk(0, (first_row + row) * S::kPitch + column + 1), lower,
                   slope, first_row + row < S::kSize, inside, sums[row]);
    }
  }
}

// The last layer's products: of each pixel, for each of the three rows of taps, the sum over the
// taps of that row. Its one output is the sum of three of them, from three rows.
template <class S>
FASTALPS_DEVICE void last_products(const Lane& lane, const unsigned char* map, const uint2* weights,
                                   float* products) {
  using In = typename S::FifthMap;
  uint2 b[S::kLastSteps];
  int terms[S::kLastSteps];
#pragma unroll
  for (int step = 0; step < S::kLastSteps; ++step) {
    b[step] = weights[step * kLanes + lane.index];
    terms[step] = row_terms<In, S::kFifth>(lane, step);
  }
  for (int first = lane.warp * kTileRows; first < S::kSize * S::kPitch;
       first += kWarps * kTileRows) {
    float sums[4] = {};
#pragma unroll
    for (int step = 0; step < S::kLastSteps; ++step) {
      const Operand a = load_operand(map + In::chunk(0, first + lane.row) + terms[step]);
      multiply_add(sums, a, b[step]);
    }
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const int tap_row = 2 * lane.quad + part % 2;
      if (tap_row < 3) {
        products[tap_row * S::kPlane + first + lane.group + 8 * (part / 2)] = sums[part];
      }
    }
  }
}

// What a pixel's reconstruction is off; `cell` is its place in a plane of products.
template <class S>
FASTALPS_DEVICE float residual(const float* products, float bias, float target, int row, int cell) {
  float logit = bias + products[S::kPlane + cell];
  if (row > 0) logit += products[cell - S::kPitch];
  if (row < S::kSize - 1) logit += products[2 * S::kPlane + cell + S::kPitch];
  return 1.0f / (1.0f + exponential(-logit)) - target;
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
// memory, the residuals and as many floats more.
template <class S>
FASTALPS_DEVICE float smoothed_squares(const Work& work, float* planes) {
  constexpr int kPixels = S::kSize * S::kSize;
  float* const means = planes + kPixels;
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

// Each block holds all weights and takes rows in turn; the reconstruction stays in registers.
template <class S>
FASTALPS_DEVICE void decode(const Work& work, const uint2* weights, const float* biases,
                            unsigned char* shared) {
  constexpr int kCells = S::kSize * S::kPitch, kMine = divide_up(kCells, kBlock);
  const Lane lane(thread_index());
  unsigned char* const even = shared + S::kEvenAt;
  unsigned char* const odd = shared + S::kOddAt;
  unsigned char* const input = shared + S::kInputAt;
  float* const products = reinterpret_cast<float*>(even);
  float* const warp_sums = reinterpret_cast<float*>(shared + S::kSumsAt);
  const uint2* const third = reinterpret_cast<const uint2*>(shared);
  const uint2* const fourth = third + S::kThirdFragments * kLanes;
  const uint2* const fifth = fourth + S::kFourthFragments * kLanes;
  const uint2* const last = fifth + S::kFifthFragments * kLanes;
  const float* const fourth_bias = biases + S::kThird;
  const float* const fifth_bias = fourth_bias + S::kFourth;
  const float last_bias = read_only(fifth_bias + S::kFifth);
  copy_chunks(shared, weights, S::kEvenAt);
  allow_next();
  await_previous();
  const int rows = patches_of(work) * work.passes;
  if (block_index() >= rows) return;
  fetch_input<S>(work, block_index(), input);
  await_copies();
  barrier();

  for (int row = block_index(); row < rows; row += block_count()) {
    constexpr int kGroups = S::kThird / kTileColumns / S::kThirdAcross;
    constexpr int kThirdItems = divide_up(S::kInputPixels, kTileRows) * kGroups;
    border_third<S>(odd);
    for (int item = lane.warp; item < kThirdItems; item += kWarps) {
      third_tile<S>(lane, input, third, biases, work.slope, item / kGroups,
                    item % kGroups * S::kThirdAcross, odd);
    }
    barrier();
    border_fourth<S>(even);
    for (int first = 2 * lane.warp; first < S::kHalf; first += 2 * kWarps) {
      fourth_rows<S>(lane, odd, fourth, fourth_bias, work.slope, first, even);
    }
    barrier();
    for (int item = lane.warp; item < 2 * divide_up(S::kSize, S::kStripRows); item += kWarps) {
      fifth_strip<S>(lane, even, fifth, fifth_bias, work.slope, item / 2 * S::kStripRows, item % 2,
                     odd);
    }
    // Read long before they are needed.
    const Patch patch = find_patch(work, row / work.passes);
    float targets[kMine];
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int cell = thread_index() + i * kBlock, column = cell % S::kPitch - 1;
      const bool inside = cell < kCells && column >= 0 && column < S::kSize;
      targets[i] = inside ? unit_pixel(work.source, patch, cell / S::kPitch, column) : 0.0f;
    }
    barrier();
    if (row + block_count() < rows) fetch_input<S>(work, row + block_count(), input);
    last_products<S>(lane, odd, last, products);
    barrier();

    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int cell = thread_index() + i * kBlock;
      const int y = cell / S::kPitch, x = cell % S::kPitch - 1;
      if (cell >= kCells || x < 0 || x >= S::kSize) continue;
      const float off = residual<S>(products, last_bias, targets[i], y, cell);
      if (work.reach > 0) reinterpret_cast<float*>(odd)[y * S::kSize + x] = off;
      sum += off * off;
    }
    if (work.reach > 0) sum = smoothed_squares<S>(work, reinterpret_cast<float*>(odd));
    // In a fixed order, so that a score has the same bits in every run.
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) sum += shuffle_down(sum, distance);
    if (lane.index == 0) warp_sums[lane.warp] = sum;
    await_copies();
    barrier();
    if (thread_index() == 0) {
      float total = 0.0f;
      for (int warp = 0; warp < kWarps; ++warp) total += warp_sums[warp];
      work.errors[row % work.passes * work.source.total + patch.place] =
          total / (S::kSize * S::kSize);
    }
  }
}

}  // namespace fastalps::cuda::fused
