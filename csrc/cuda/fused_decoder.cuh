// Kernel D: the decoder's last four layers, sigmoid and error. A row of work is one decoder pass of
// a patch; where its maps lie and why: `DecodeShape`.
#pragma once

#include "fused_residuals.cuh"

namespace fastalps::cuda::fused {

// The next row's map, plane by plane; see `await_copies`. Neighbouring lanes copy neighbouring
// pixels of a plane, as shared memory takes a lane's 16 bytes at a time where they are far apart.
template <class S>
FASTALPS_DEVICE void fetch_input(const Work& work, int row, unsigned char* input) {
  constexpr int kChunks = S::kInputs / kChunkChannels, kItems = S::kQuarter * kChunks * S::kRun;
  const unsigned char* const source = work.maps + static_cast<int64_t>(row) * (S::kInputValues * 2);
  const int thread = thread_index_anew();
#pragma unroll
  for (int i = 0; i < divide_up(kItems, kBlock); ++i) {
    const int item = thread + i * kBlock;
    if (kItems % kBlock != 0 && item >= kItems) break;
    const int x = item % S::kRun, plane = item / S::kRun % kChunks, y = item / (S::kRun * kChunks);
    if (S::kQuarter % S::kRun != 0 && x >= S::kQuarter) continue;
    copy_async(input + S::InputMap::chunk(plane, y * S::kInputPitch + x),
               source + ((y * S::kQuarter + x) * kChunks + plane) * kChunkBytes);
  }
}

// Two layers are transposed convolutions (see `tap_phase`), which make of the four inputs at and
// after each anchor its four phases of results. Their weights, of a step of terms, are kTaps parts
// of kColumns columns.
constexpr int kTaps = 9;

// What a warp stores of the third layer: the phases of a row of 8 anchors, in pairs of 8 channels.
// The last rows and columns may be outside, where all is zeros.
template <class S>
FASTALPS_DEVICE void put_third(const Lane& lane, uint32_t (&pairs)[4], int row, int last_row,
                               unsigned char* place) {
  using Out = typename S::ThirdMap;
#pragma unroll
  for (int phase = 0; phase < 4; ++phase) {
    const int up = phase / 2, left = phase % 2;
    if (left + 2 * (S::kRun - 1) >= S::kHalf && left + 2 * lane.group >= S::kHalf) {
      pairs[phase] = 0;
    }
    if (up + 2 * last_row >= S::kHalf && up + 2 * row >= S::kHalf) pairs[phase] = 0;
  }
  put_tiles(lane, pairs, true, place,
            [](int phase) { return Out::chunk(0, S::third_cell(phase / 2, phase % 2)); });
}

// The third layer: kThirdDown tiles, one column. A tile has two rows of anchors, kThirdDown apart:
// so the inputs below it are those of the next tile.
template <class S>
FASTALPS_DEVICE void third_rows(const Lane& lane, const unsigned char* input,
                                const unsigned char* weights, const float4* biases, float slope,
                                int first_row, int column, unsigned char* output) {
  using In = typename S::InputMap;
  using Out = typename S::ThirdMap;
  constexpr int kDown = S::kThirdDown, kSteps = S::kInputs / kTileTerms;
  constexpr int kAcross = S::kThirdAcross, kParts = kTaps * kAcross;
  const unsigned char* const corner =
      input +
      In::chunk(lane.half, (first_row + lane.row / 8 * kDown) * S::kInputPitch + lane.row % 8);
  const Biases<1> bias(lane, biases, column);
  float sums[kDown][4][1][4];
#pragma unroll
  for (int i = 0; i < 4 * kDown; ++i) start_sums(sums[i / 4][i % 4], bias);
  const unsigned char* const mine = weights + part_of<kAcross>(lane, kParts) +
                                    (column / kAcross * 2 * kParts + column % kAcross) * kPartBytes;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    Operand a[kDown + 1][2];
#pragma unroll
    for (int i = 0; i < 2 * (kDown + 1); ++i) {
      const int cell = i / 2 * S::kInputPitch + i % 2;
      a[i / 2][i % 2] = load_operand(corner + In::chunk(2 * step, cell));
    }
    uint2 b[kTaps];
    read_parts<kAcross>(mine + step * 4 * kParts * kPartBytes, b);
#pragma unroll
    for (int place = 0; place < kTaps; ++place) {
      const int tap = ordered_tap(place);
      const int phase = 2 * tap_phase(tap / 3) + tap_phase(tap % 3);
      const int below = tap_neighbour(tap / 3), right = tap_neighbour(tap % 3);
#pragma unroll
      for (int down = 0; down < kDown; ++down) {
        multiply_add(sums[down][phase][0], a[down + below][right], b[place]);
      }
    }
  }
  unsigned char* const first_place = output + Out::chunk(column, S::third_cell(2 * first_row, 0));
#pragma unroll
  for (int row = 0; row < 2 * kDown; ++row) {
    uint32_t pairs[4];
#pragma unroll
    for (int phase = 0; phase < 4; ++phase) {
      const float* const found = sums[row % kDown][phase][0] + 2 * (row / kDown);
      pairs[phase] = leaky_pair(found[0], found[1], slope);
    }
    put_third<S>(lane, pairs, first_row + row, S::kRun - 2 * kDown + row,
                 first_place + Out::chunk(0, S::third_cell(2 * row, 0)));
  }
}

// sums += the products of 64 anchors with the weights of all steps, by a group of warps; `terms` of
// the first step, which are kStride bytes from those of the next; inputs(step, input): of the four
// at and after the anchors. Each input's products have sums of their own, as those of another
// number of columns would have to be waited for.
template <int kSteps, int kColumns, int kStride, class Inputs>
FASTALPS_DEVICE void multiply_phases(float (&sums)[4 * kColumns][4], const Matrix& terms,
                                     const Inputs& inputs) {
  float right[2 * kColumns][4] = {}, below[2 * kColumns][4] = {}, after[kColumns][4] = {};
  hold(sums);
  hold(right);
  hold(below);
  hold(after);
  start_group();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const auto of = [&](int input) {
      return terms.at(step * kStride + first_tap_of_input(input) * kColumns * kPartBytes);
    };
    multiply_group(sums, inputs(step, 0), of(0));
    multiply_group(right, inputs(step, 1), of(1));
    multiply_group(below, inputs(step, 2), of(2));
    multiply_group(after, inputs(step, 3), of(3));
  }
  finish_group();
  hold(sums);
  hold(right);
  hold(below);
  hold(after);
#pragma unroll
  for (int i = 0; i < 8 * kColumns; ++i) {
    const int tile = i / 4, part = i % 4;
    sums[first_phase_of_input(1) * kColumns + tile][part] += right[tile][part];
    sums[first_phase_of_input(2) * kColumns + tile][part] += below[tile][part];
    if (tile < kColumns) sums[first_phase_of_input(3) * kColumns + tile][part] += after[tile][part];
  }
}

// The third layer's anchors, all 64, by a group of warps: half of the columns.
template <class S>
FASTALPS_DEVICE void third_by_group(const Lane& lane, const unsigned char* input,
                                    const unsigned char* weights, const float4* biases, float slope,
                                    int group, unsigned char* output) {
  using In = typename S::InputMap;
  using Out = typename S::ThirdMap;
  constexpr int kAcross = S::kThirdAcross, kParts = kTaps * kAcross;
  constexpr int kSteps = S::kInputs / kTileTerms;
  const Matrix cells(input, In::kPlaneBytes, S::kInputPitch * kChunkBytes);
  const Matrix terms(weights + group * 2 * kParts * kPartBytes, kParts * kPartBytes, kPartBytes);
  const Biases<kAcross> bias(lane, biases, group * kAcross);
  float sums[4 * kAcross][4];
#pragma unroll
  for (int i = 0; i < 16 * kAcross; ++i) sums[i / 4][i % 4] = bias.four[i / 4 % kAcross][i % 4];
  multiply_phases<kSteps, kAcross, 4 * kParts * kPartBytes>(sums, terms, [&](int step, int which) {
    return cells.at(In::chunk(2 * step, which / 2 * S::kInputPitch + which % 2));
  });
#pragma unroll
  for (int across = 0; across < kAcross; ++across) {
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      const int row = lane.warp % kGroupWarps * 2 + lower;
      uint32_t pairs[4];
#pragma unroll
      for (int phase = 0; phase < 4; ++phase) {
        const float* const found = sums[ordered_phase(phase) * kAcross + across] + 2 * lower;
        pairs[phase] = leaky_pair(found[0], found[1], slope);
      }
      put_third<S>(lane, pairs, row, S::kRun - 2 + lower,
                   output + Out::chunk(group * kAcross + across, S::third_cell(2 * row, 0)));
    }
  }
}

// The fourth layer: a share of the rows of anchors, one column. A tile is a row: its even anchors,
// then its odd ones. A row of inputs serves the anchors above it and those in it. Shares that are
// not full compute a row more, which is not stored: a branch would have to wait for the sums.
template <class S>
FASTALPS_DEVICE void fourth_rows(const Lane& lane, const unsigned char* map,
                                 const unsigned char* weights, const float4* biases, float slope,
                                 int part, int column, unsigned char* output) {
  using In = typename S::ThirdMap;
  using Out = typename S::FourthMap;
  constexpr int kSteps = S::kThird / kTileTerms, kMost = S::FourthShares::kMost;
  constexpr int kColumns = S::kFourthColumns, kParts = kTaps * kColumns;
  const int first_row = S::FourthShares::first(part);
  const unsigned char* const corner =
      map + In::chunk(lane.half, first_row * S::kHalfPitch + lane.row);
  const bool full = S::FourthShares::full(part);
  unsigned char* const first_place = output + Out::chunk(column, S::fourth_cell(2 * first_row, 0));
  // To the right of even anchors are odd ones, then even ones.
  const int right = lane.row < 8 ? S::kRun + lane.row : lane.row - 7;
  const unsigned char* const after = map + In::chunk(lane.half, first_row * S::kHalfPitch + right);
  Operand next[2];
  const auto load = [&](int row, int step) {
    next[0] = load_operand(corner + In::chunk(2 * step, row * S::kHalfPitch));
    next[1] = load_operand(after + In::chunk(2 * step, row * S::kHalfPitch));
  };
  load(0, 0);
  uint2 b[kSteps][kTaps];
  const unsigned char* const mine = weights + part_of<kColumns>(lane, kParts) + column * kPartBytes;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    read_parts<kColumns>(mine + step * 2 * kParts * kPartBytes, b[step]);
  }
  const Biases<1> bias(lane, biases, column);
  float sums[2][4][4];
#pragma unroll
  for (int row = 0; row <= kMost; ++row) {
    bool fresh[4] = {true, true, true, true};  // This row's phases have no sums yet.
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const Operand a[2] = {next[0], next[1]};
      // The next step's, if there is one.
      const int following = row * kSteps + step + 1;
      if (following < (kMost + 1) * kSteps) load(following / kSteps, following % kSteps);
#pragma unroll
      for (int place = 0; place < kTaps; ++place) {
        const int tap = ordered_tap(place), anchor = row - tap_neighbour(tap / 3);
        if (anchor < 0 || anchor == kMost) continue;
        const int phase = 2 * tap_phase(tap / 3) + tap_phase(tap % 3);
        float (&found)[4] = sums[anchor % 2][phase];
        const Operand& terms = a[tap_neighbour(tap % 3)];
        if (anchor == row && fresh[phase]) {
          multiply_add(found, terms, b[step][place], bias.four[0]);
          fresh[phase] = false;
        } else {
          multiply_add(found, terms, b[step][place]);
        }
      }
    }
    if (row == 0) continue;
    const int done = row - 1;
#pragma unroll
    for (int down = 0; down < 2; ++down) {
      uint32_t pairs[4];
#pragma unroll
      for (int kind = 0; kind < 4; ++kind) {
        const float* const found = sums[done % 2][2 * down + kind % 2] + 2 * (kind / 2);
        pairs[kind] = leaky_pair(found[0], found[1], slope);
        // The next layer reads zeros behind the last column.
        if (kind == S::kSize % 4 && 4 * lane.group + kind == S::kSize) pairs[kind] = 0;
      }
      // An odd size has no last row of the lower phase.
      const bool stored = (done + 1 < kMost || full) &&
                          (S::kSize % 2 == 0 || 2 * (first_row + done) + down < S::kSize);
      put_tiles(lane, pairs, stored, first_place + Out::chunk(0, (2 * done + down) * S::kPitch),
                [](int kind) { return Out::chunk(0, S::kind_at(kind)); });
    }
  }
}

// The fourth layer by a group of warps: of 8 rows of anchors the even ones, then the odd ones.
template <class S>
FASTALPS_DEVICE void fourth_by_group(const Lane& lane, const unsigned char* map,
                                     const unsigned char* weights, const float4* biases,
                                     float slope, int group, unsigned char* output) {
  using In = typename S::ThirdMap;
  using Out = typename S::FourthMap;
  constexpr int kColumns = S::kFourthColumns, kParts = kTaps * kColumns;
  constexpr int kSteps = S::kThird / kTileTerms;
  const Matrix cells(map + In::chunk(0, group * S::kRun * S::kHalfPitch), In::kPlaneBytes,
                     S::kHalfPitch * kChunkBytes);
  const Matrix terms(weights, kParts * kPartBytes, kPartBytes);
  const Biases<kColumns> bias(lane, biases, 0);
#pragma unroll
  for (int odd = 0; odd < 2; ++odd) {
    float sums[4 * kColumns][4];
#pragma unroll
    for (int i = 0; i < 16 * kColumns; ++i) sums[i / 4][i % 4] = bias.four[i / 4 % kColumns][i % 4];
    multiply_phases<kSteps, kColumns, 2 * kParts * kPartBytes>(
        sums, terms, [&](int step, int which) {
          // To the right of even anchors are odd ones, then even ones.
          const int column = which % 2 == 0 ? odd * S::kRun : odd == 0 ? S::kRun : 1;
          return cells.at(In::chunk(2 * step, which / 2 * S::kHalfPitch + column));
        });
#pragma unroll
    for (int across = 0; across < kColumns; ++across) {
#pragma unroll
      for (int lower = 0; lower < 2; ++lower) {
        const int row = 2 * (group * S::kRun + lane.warp % kGroupWarps * 2 + lower);
        uint32_t pairs[4];
#pragma unroll
        for (int phase = 0; phase < 4; ++phase) {
          const float* const found = sums[ordered_phase(phase) * kColumns + across] + 2 * lower;
          const int kind = 2 * odd + phase % 2;
          pairs[phase] = leaky_pair(found[0], found[1], slope);
          // The next layer reads zeros behind the last column.
          if (kind == S::kSize % 4 && 4 * lane.group + kind == S::kSize) pairs[phase] = 0;
          // So does it below the last row.
          if (S::kSize % 2 != 0 && row + phase / 2 == S::kSize) pairs[phase] = 0;
        }
        put_tiles(lane, pairs, row < S::kSize, output + Out::chunk(across, S::fourth_cell(row, 0)),
                  [&](int phase) {
                    return Out::chunk(0, phase / 2 * S::kPitch + S::kind_at(2 * odd + phase % 2));
                  });
      }
    }
  }
}

// A row of the last layer's products of two neighbouring pixels by a lane's tap, its first column.
// The fourth lane has the third one's: it stores the same, which is cheaper than to store nothing.
FASTALPS_DEVICE void put_products(float* place, const float (&sums)[4]) {
  place[0] = sums[0];
  place[1] = sums[2];
}

// The last two layers, of stride 1: a share of the rows, the columns of one side. A row of inputs
// serves the three rows of results around it, and a row of the fifth layer's results, which are
// operands as they stand, the three rows of products around it. Shares that are not full have a
// last row of zeros in their place, whatever the inputs behind theirs are.
template <class S>
FASTALPS_DEVICE void last_rows(const Lane& lane, const unsigned char* map, const uint4* weights,
                               const float4* biases, float slope, int part, int side,
                               float* products) {
  constexpr int kAcross = S::kFifthAcross, kSteps = S::kFifthSteps;
  using In = typename S::FourthMap;
  constexpr int kPlanes = S::kFourth / kChunkChannels, kMost = S::FifthShares::kMost;
  constexpr float kZeros[4] = {};
  const bool full = S::FifthShares::full(part);
  const int first_row = S::FifthShares::first(part);
  // A tap meets two neighbouring runs. The last step may have half a step's terms.
  const auto half = [](int step, int chunks) { return 2 * step + 1 >= chunks; };
  const unsigned char* corner[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int chunk = 2 * step + lane.half, tap = chunk / kPlanes < 3 ? chunk / kPlanes : 2;
    const int cell = first_row * S::kPitch + S::run_at(side, tap + lane.row / 8) + lane.row % 8;
    corner[step] = map + In::chunk(chunk % kPlanes, cell);
  }
  float* const place = products + S::product_at(lane.quad < 3 ? lane.quad : 2) +
                       part * S::kStripRows * S::kProductPitch + 4 * lane.group + 2 * side;
  Operand next[kSteps];
  // Where nothing is made of the last row, the one before it is read again: behind it is memory
  // that other warps write.
  const int last_row = full ? kMost + 1 : kMost;
  const auto load = [&](int row) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const unsigned char* const place =
          corner[step] + In::chunk(0, (row == kMost + 1 ? last_row : row) * S::kPitch);
      next[step] = load_terms(place, half(step, 3 * kPlanes));
    }
  };
  load(0);
  uint2 b[S::kFifthFragments + S::kLastFragments];
  read_twins(weights + lane.index, b);
  const uint2* const last = b + S::kFifthFragments;
  const Biases<kAcross> bias(lane, biases, 0);
  float sums[3][kAcross][4];  // Of the results of a row and the two above it, in turn.
  // Products of the rows above, of and below the last one that is done.
  float above[4] = {}, here[4] = {}, below[4];
#pragma unroll
  for (int row = 0; row < kMost + 2; ++row) {
    Operand a[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) a[step] = next[step];
    if (row + 1 < kMost + 2) load(row + 1);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int tap_row = 0; tap_row < 3; ++tap_row) {
        const int result = row - tap_row;
        if (result < 0 || result >= kMost) continue;
#pragma unroll
        for (int across = 0; across < kAcross; ++across) {
          float (&mine)[4] = sums[result % 3][across];
          const float (&before)[4] = mine;
          add_terms(mine, a[step], b[(tap_row * kSteps + step) * kAcross + across],
                    tap_row == 0 && step == 0 ? bias.four[across] : before,
                    half(step, 3 * kPlanes));
        }
      }
    }
    if (row < 2) continue;
    const int done = row - 2;
    const float (&mine)[kAcross][4] = sums[done % 3];
#pragma unroll
    for (int step = 0; step < S::kLastSteps; ++step) {
      Operand a;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int across = 2 * step + i / 2;
        a.word[i] = across >= kAcross || (done + 1 == kMost && !full)
                        ? 0
                        : leaky_pair(mine[across][i % 2 * 2], mine[across][i % 2 * 2 + 1], slope);
      }
      const float (&before)[4] = below;
      add_terms(below, a, last[step], step == 0 ? kZeros : before, half(step, kAcross));
      add_terms(here, a, last[S::kLastSteps + step], here, half(step, kAcross));
      add_terms(above, a, last[2 * S::kLastSteps + step], above, half(step, kAcross));
    }
    put_products(place + done * S::kProductPitch, above);
    if (done + 1 == kMost) break;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      above[i] = here[i];
      here[i] = below[i];
    }
  }
  put_products(place + kMost * S::kProductPitch, here);
  put_products(place + (kMost + 1) * S::kProductPitch, below);
}

// Each block holds all weights and takes rows of work in turn; the reconstruction stays in
// registers.
template <class S>
FASTALPS_DEVICE void decode(const Work& work, const uint2* weights, const float* biases,
                            unsigned char* shared) {
  using Targets = Pixels<Fours<S::kSize>>;
  const Lane lane(thread_index());
  unsigned char* const even = shared + S::kEvenAt;
  unsigned char* const odd = shared + S::kOddAt;
  unsigned char* const input = shared + S::kInputAt;
  float* const products = reinterpret_cast<float*>(odd);
  float* const warp_sums = reinterpret_cast<float*>(shared + S::kSumsAt);
  const unsigned char* const third = shared;
  const unsigned char* const fourth = third + S::kThirdFragments * kLanes * 8;
  const uint4* const fifth =
      reinterpret_cast<const uint4*>(fourth + S::kFourthFragments * kLanes * 8);
  float4* const third_bias = reinterpret_cast<float4*>(shared + S::kBiasesAt);
  const float4* const fourth_bias = third_bias + S::kThird / 2;
  const float4* const fifth_bias = fourth_bias + S::kFourth / 2;
  copy_chunks(shared, weights, S::kEvenAt);
  keep_biases(third_bias, biases, S::kBiases / kTileColumns);
  // The borders of the input and of the even map stay zeros.
  clear_chunks(even, S::kEvenBytes);
  clear_chunks(input, S::kInputBytes);
  allow_next();
  await_previous();
  const int rows = patches_of(work) * work.passes;
  if (block_index() >= rows) return await_copies();
  barrier();
  fetch_input<S>(work, block_index(), input);
  await_copies();
  publish();
  barrier();

  for (int row = block_index(); row < rows; row += block_count()) {
    const int group = lane.warp / kGroupWarps;
    if (multiplies_by_groups()) {
      third_by_group<S>(lane, input, third, third_bias, work.slope, group, odd);
      publish();
    } else {
#pragma unroll
      for (int i = 0; i < divide_up(S::kThirdItems, kWarps); ++i) {
        const int item = lane.warp + i * kWarps;
        if (S::kThirdItems % kWarps != 0 && item >= S::kThirdItems) break;
        third_rows<S>(lane, input, third, third_bias, work.slope,
                      item / S::kThirdColumns * 2 * S::kThirdDown, item % S::kThirdColumns, odd);
      }
    }
    barrier();
    if (row + block_count() < rows) fetch_input<S>(work, row + block_count(), input);
    if (multiplies_by_groups()) {
      fourth_by_group<S>(lane, odd, fourth, fourth_bias, work.slope, group, even);
    } else {
      fourth_rows<S>(lane, odd, fourth, fourth_bias, work.slope, lane.warp / S::kFourthColumns,
                     lane.warp % S::kFourthColumns, even);
    }
    // Read long before they are needed. There are one or two passes. Where this thread's pixels are
    // is found in each pass anew, as the layers' loops need the registers that would keep it.
    const Patch patch = read_patch(work, row >> (work.passes - 1));
    const Lane mine(thread_index_anew());
    const Targets targets(work.source, mine, patch);
    barrier();
    last_rows<S>(lane, even, fifth, fifth_bias, work.slope, lane.warp / 2, lane.warp % 2, products);
    barrier();

    float sum = 0.0f, off[4] = {};
    if (Targets::inside(mine, 0)) {
      float logits[4];
      find_logits<S>(products, fifth_bias[S::kFifth / 2].x, Targets::row(mine, 0),
                     Targets::column(mine, 0), logits);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (!Targets::inside(mine, i)) continue;
        off[i] = reciprocal(1.0f + exponential(-logits[i])) - targets.unit(work.source, i);
        sum += off[i] * off[i];
      }
    }
    if (work.reach > 0) {
      barrier();  // The products have been read.
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int pixel = Targets::row(mine, i) * S::kSize + Targets::column(mine, i);
        if (Targets::inside(mine, i)) products[pixel] = off[i];
      }
      sum = smoothed_squares<S>(work, products);
    }
    // In a fixed order, so that a score has the same bits in every run.
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) sum += shuffle_down(sum, distance);
    if (mine.index == 0) warp_sums[mine.warp] = sum;
    await_copies();
    publish();
    barrier();
    if (thread_index() == 0) {
      float total = 0.0f;
      for (int warp = 0; warp < kWarps; ++warp) total += warp_sums[warp];
      work.errors[(row & (work.passes - 1)) * work.source.total + patch.place] =
          total * (1.0f / (S::kSize * S::kSize));
    }
  }
}

}  // namespace fastalps::cuda::fused
