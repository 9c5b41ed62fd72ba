// The transposed convolutions of kernel D, its third and fourth layers: by warps, and by groups of
// warps, where there are (`multiplies_by_groups`).
#pragma once

#include "fused_layers.cuh"

namespace fastalps::cuda::fused {

// Both layers (see `tap_phase`) make of the four inputs at and after each anchor its four phases of
// results. Their weights of a step of terms are so many parts for each column and 8 terms.
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

}  // namespace fastalps::cuda::fused
