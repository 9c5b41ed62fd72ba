// Kernel E: from pixels to the maps of the first two convolutions.
#pragma once

#include "fused_layers.cuh"

namespace fastalps::cuda::fused {

template <class S>
FASTALPS_DEVICE void put_image(const Source& source, const Lane& lane,
                               const Pixels<Lines<S::kSize>>& pixels, uint16_t* image) {
#pragma unroll
  for (int i = 0; i < pixels.kCount; ++i) {
    if (!pixels.inside(lane, i)) continue;
    image[(pixels.row(lane, i) + 1) * S::kBordered + lane.index + 1] =
        static_cast<uint16_t>(round_pair(pixels.level(source, i), 0.0f) & 0xffff);
  }
}

// The first convolution: a tile is a row of outputs, the even columns, then the odd ones, of both
// networks. Its 9 taps on the image are terms of one step; so is the bias, in three parts whose
// pixels are ones.
template <class S>
FASTALPS_DEVICE void first_convolution(const Lane& lane, const uint16_t* image,
                                       const uint2* weights, float slope, unsigned char* map) {
  using Out = typename S::FirstMap;
  constexpr uint32_t kOne = 0x3f80;  // In bf16.
  constexpr float kZeros[4] = {};
  const int even = 2 * lane.quad, odd = even + 1;
  const int even_at = even / 3 * S::kBordered + even % 3;
  const int odd_at = odd / 3 * S::kBordered + odd % 3;
  uint2 b[S::kFirstColumns];
#pragma unroll
  for (int column = 0; column < S::kFirstColumns; ++column) {
    b[column] = weights[column * kLanes + lane.index];
  }
  for (int row = lane.warp; row < S::kHalf; row += kWarps) {
    Operand a;
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      // Behind the last column there is nothing of this row; those results are zeros.
      const uint16_t* const corner = image + 2 * row * S::kBordered + 2 * (2 * lane.group + lower);
      const uint32_t first = corner[even_at], second = corner[odd_at];
      const uint32_t last = corner[2 * S::kBordered + 2];
      const bool inside = 2 * lane.group + lower < S::kHalf;
      a.word[lower] = inside ? first | second << 16 : 0;
      const uint32_t others = (lane.quad == 0   ? last
                               : lane.quad == 1 ? kOne
                                                : 0) |
                              (lane.quad < 2 ? kOne << 16 : 0);
      a.word[2 + lower] = inside ? others : 0;
    }
    // Of two columns at once; behind the last pixel there are cells for zeros, or that nobody
    // reads.
    unsigned char* const place = map + Out::chunk(0, S::cell(row, 0));
#pragma unroll
    for (int column = 0; column < S::kFirstColumns; column += 2) {
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float sums[4];
        multiply_add(sums, a, b[column + i], kZeros);
        pairs[2 * i] = leaky_pair(sums[0], sums[1], slope);
        pairs[2 * i + 1] = leaky_pair(sums[2], sums[3], slope);
      }
      put_tiles(lane, pairs, true, place + Out::chunk(column, 0), [](int tile) {
        return Out::chunk(tile / 2, S::cell(0, tile % 2) - S::cell(0, 0));
      });
    }
  }
}

// The second convolution of one network: tiles of two rows of 8 outputs, whose last column may be
// none. The rows are kTilesDown apart: so the inputs below a tile's are those above the next one's.
// `weights` and `biases` begin at the first of the columns: those of a group.
template <class S>
FASTALPS_DEVICE void second_convolution(const Lane& lane, const unsigned char* map,
                                        const unsigned char* weights, const float2* biases,
                                        float slope, int first_tile, unsigned char* output) {
  using In = typename S::FirstMap;
  constexpr int kAcross = S::kTilesAcross, kDown = S::kTilesDown;
  constexpr int kSteps = S::kFirst / kTileTerms;
  const int first_row = 2 * first_tile + lane.row / 8 * kDown;
  const unsigned char* const corner =
      map + In::chunk(lane.half, 2 * first_row * S::kRow + lane.row % 8);
  const unsigned char* const mine = weights + part_of<1>(lane, S::kSecondColumns);
  float sums[kDown][kAcross][4];
  start_joint(lane, biases, sums);
#pragma unroll
  for (int i = 0; i < 3 * kSteps; ++i) {
    const int tap_column = i / kSteps, step = i % kSteps;
    Operand a[2 * kDown + 1];
#pragma unroll
    for (int row = 0; row < 2 * kDown + 1; ++row) {
      a[row] = load_operand(corner + In::chunk(2 * step, S::tap_cell(tap_column) + row * S::kRow));
    }
#pragma unroll
    for (int tap_row = 0; tap_row < 3; ++tap_row) {
      const int terms = (3 * tap_row + tap_column) * kSteps + step;
      uint2 b[kAcross];
      read_parts<1>(mine + terms * S::kSecondColumns * 2 * kPartBytes, b);
#pragma unroll
      for (int across = 0; across < kAcross; ++across) {
#pragma unroll
        for (int down = 0; down < kDown; ++down) {
          multiply_add(sums[down][across], a[2 * down + tap_row], b[across]);
        }
      }
    }
  }
#pragma unroll
  for (int down = 0; down < kDown; ++down) {
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      const int row = 2 * first_tile + down + kDown * lower;
      put_joint(output + ((row * S::kQuarter + lane.group) * S::kSecond) * 2, lane, lower, slope,
                row < S::kQuarter && lane.group < S::kQuarter, sums[down]);
    }
  }
}

// The same by a group of warps, all of a network's results at once: a part of A is a row of
// outputs, its rows in memory what a tap reads. Nothing but biases and results passes through
// registers.
template <class S>
FASTALPS_DEVICE void second_by_group(const Lane& lane, const unsigned char* map,
                                     const unsigned char* weights, const float2* biases,
                                     float slope, unsigned char* output) {
  using In = typename S::FirstMap;
  constexpr int kAcross = S::kTilesAcross, kColumns = S::kSecondColumns;
  constexpr int kSteps = S::kFirst / kTileTerms;
  const Matrix inputs(map, In::kPlaneBytes, 2 * S::kRow * kChunkBytes);
  const Matrix terms(weights, kColumns * kPartBytes, kPartBytes);
  float sums[kColumns][4];
#pragma unroll
  for (int i = 0; i < 4 * kColumns; ++i) {
    const int column = i / 4, group = column / kAcross;
    const float2 bias =
        biases[(group * kAcross * kTileColumns + joint_channel<kAcross>(lane.quad)) / 2 +
               column % kAcross];
    sums[column][i % 4] = i % 2 == 0 ? bias.x : bias.y;
  }
  hold(sums);
  start_group();
#pragma unroll
  for (int i = 0; i < 9 * kSteps; ++i) {
    multiply_group(sums, inputs.at(In::chunk(2 * (i % kSteps), S::tap_cell(i / kSteps))),
                   terms.at(i * kColumns * 2 * kPartBytes));
  }
  finish_group();
  hold(sums);
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
    const int row = lane.warp % kGroupWarps * 2 + lower;
    unsigned char* const pixel = output + (row * S::kQuarter + lane.group) * S::kSecond * 2;
#pragma unroll
    for (int group = 0; group < S::kSecondGroups; ++group) {
      put_joint(pixel + group * kAcross * kTileColumns * 2, lane, lower, slope,
                row < S::kQuarter && lane.group < S::kQuarter,
                reinterpret_cast<const float (&)[kAcross][4]>(sums[group * kAcross]));
    }
  }
}

// Kernel E: each block holds all weights and takes patches in turn.
template <class S>
FASTALPS_DEVICE void encode(const Work& work, const uint2* weights, const float* biases,
                            unsigned char* shared) {
  const Lane lane(thread_index());
  unsigned char* const map = shared + S::kMapAt;
  uint16_t* const image = reinterpret_cast<uint16_t*>(shared + S::kImageAt);
  const uint2* const first_weights = reinterpret_cast<const uint2*>(shared);
  const unsigned char* const second = shared + S::kFirstFragments * kLanes * 8;
  const float2* const second_biases = reinterpret_cast<const float2*>(shared + S::kBiasesAt);
  Patch* const turns = reinterpret_cast<Patch*>(shared + S::kPatchesAt);
  copy_chunks(shared, weights, S::kMapAt);
  copy_chunks(shared + S::kBiasesAt, biases + 2 * S::kFirst, 2 * S::kSecond * 4);
  allow_next();
  await_previous();
  const int patches = patches_of(work);
  if (block_index() >= patches) return await_copies();
  // The borders of map and image stay zeros.
  clear_chunks(map, S::kBiasesAt - S::kMapAt);
  // The last warp, which has the fewest rows of the first convolution, finds for all where the next
  // but one patch is. Kernel D reads it again.
  const auto find = [&](int number, int turn) {
    if (lane.warp != kWarps - 1 || number >= patches) return;
    const Patch found = find_patch(work, number);
    if (lane.index == 0) turns[turn] = work.patches[number] = found;
  };
  const Patch first = find_patch(work, block_index());
  if (thread_index() == 0) work.patches[block_index()] = first;
  find(block_index() + block_count(), 0);
  Pixels<Lines<S::kSize>> pixels(work.source, lane, first);
  await_copies();
  publish();
  barrier();

  int turn = 0;
  for (int number = block_index(); number < patches; number += block_count(), turn ^= 1) {
    // Nobody reads the last patch's image any more: its second layer came after a barrier.
    put_image<S>(work.source, lane, pixels, image);
    barrier();
    first_convolution<S>(lane, image, first_weights, work.slope, map);
    // The next patch's, long before they are needed.
    if (number + block_count() < patches) {
      pixels = Pixels<Lines<S::kSize>>(work.source, lane, turns[turn]);
    }
    find(number + 2 * block_count(), turn ^ 1);
    publish();
    barrier();
    if (multiplies_by_groups()) {
      const int network = lane.warp / kGroupWarps;
      if (network >= work.networks) continue;
      second_by_group<S>(
          lane, map + S::FirstMap::chunk(network * (S::kFirst / kChunkChannels), 0),
          second + network * S::kSecondFragments * kLanes * 8,
          second_biases + network * S::kSecond / 2, work.slope,
          work.maps + (static_cast<int64_t>(number) * work.networks + network) * S::kOutputs * 2);
      continue;
    }
    constexpr int kTiles = divide_up(S::kQuarter, 2);
    constexpr int kDownGroups = divide_up(kTiles, S::kTilesDown);
    const uint32_t items = work.networks * kDownGroups * S::kSecondGroups;
    for (uint32_t item = lane.warp; item < items; item += kWarps) {
      const int group = item % S::kSecondGroups, down_group = item / S::kSecondGroups % kDownGroups;
      const int network = item / (S::kSecondGroups * kDownGroups);
      const int first_channel = group * S::kTilesAcross * kTileColumns;
      second_convolution<S>(
          lane, map + S::FirstMap::chunk(network * (S::kFirst / kChunkChannels), 0),
          second + network * S::kSecondFragments * kLanes * 8 + first_channel * kChunkBytes,
          second_biases + (network * S::kSecond + first_channel) / 2, work.slope,
          down_group * S::kTilesDown,
          work.maps + (static_cast<int64_t>(number) * work.networks + network) * S::kOutputs * 2 +
              first_channel * 2);
    }
  }
}

}  // namespace fastalps::cuda::fused
