// Kernel D: the decoder's last four layers, sigmoid and error. A row of work is one decoder pass of
// a patch; where its maps lie and why: `DecodeShape`.
#pragma once

#include "fused_residuals.cuh"
#include "fused_transposed.cuh"

namespace fastalps::cuda::fused {

// The next row's map, plane by plane; see `await_copies`. M stores pixels with all their channels,
// so neighbours in planes are none in scratch, and shared memory takes a lane's 16 bytes at a time;
// M would lose more by storing planes (measured: bench/NOTES.md).
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
