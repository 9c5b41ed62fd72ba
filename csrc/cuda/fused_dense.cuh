// Between the halves of kernel M: from the networks' outputs to the map that the decoder starts
// with. A row is one decoder pass of a patch.
#pragma once

#include "fused_layers.cuh"

namespace fastalps::cuda::fused {

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

FASTALPS_DEVICE void read_eight(const float* place, float (&values)[kChunkChannels]) {
  const float4 first = read_only(reinterpret_cast<const float4*>(place));
  const float4 second = read_only(reinterpret_cast<const float4*>(place) + 1);
  const float found[kChunkChannels] = {first.x,  first.y,  first.z,  first.w,
                                       second.x, second.y, second.z, second.w};
#pragma unroll
  for (int i = 0; i < kChunkChannels; ++i) values[i] = found[i];
}

// The latents of the block's rows: of a perturbed pass z + strength * bounded(p). Zeros for rows
// that there are not. No branch is between the reads of some items, so that all are on their way.
template <class S>
FASTALPS_DEVICE void put_latents(const Work& work, int first, int rows, const float* factors,
                                 unsigned char* latents) {
  using Latent = typename S::LatentMap;
  constexpr int kItems = S::kRows * Latent::kChunks, kTogether = 2;
  for (int start = thread_index(); start < kItems; start += kTogether * kBlock) {
    float values[kTogether][kChunkChannels], found[kTogether][kChunkChannels];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int item = start + i * kBlock, row = first + item / Latent::kChunks;
      const int64_t patch = (row < rows ? row : rows - 1) >> (work.passes - 1);
      const float* const place = work.latents + patch * work.networks * S::kLatent +
                                 item % Latent::kChunks * kChunkChannels;
      read_eight(place, values[i]);
      read_eight(place + (work.networks - 1) * S::kLatent, found[i]);
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int item = start + i * kBlock, row = item / Latent::kChunks;
      if (kItems % (kTogether * kBlock) != 0 && item >= kItems) break;
      const bool there = first + row < rows;
      if (there && (work.first_perturbed || ((first + row) & (work.passes - 1)) != 0)) {
        const float factor = work.strength * (work.bound == Bound::kNorm ? factors[row] : 1.0f);
#pragma unroll
        for (int k = 0; k < kChunkChannels; ++k) {
          const float change = found[i][k];
          values[i][k] +=
              factor * (work.bound == Bound::kTanh ? hyperbolic_tangent(change) : change);
        }
      }
      uint4 pairs = {};
      if (there) {
        pairs =
            uint4{round_pair(values[i][0], values[i][1]), round_pair(values[i][2], values[i][3]),
                  round_pair(values[i][4], values[i][5]), round_pair(values[i][6], values[i][7])};
      }
      *reinterpret_cast<uint4*>(latents + Latent::chunk(row, item % Latent::kChunks)) = pairs;
    }
  }
}

// Kernel M's middle: kRows decoder passes and the columns of a group, into where the second half of
// M puts these passes' results later. Many rows meet the weights, which are as many as all others
// of the decoder but meet each row only once.
template <class S>
FASTALPS_DEVICE void make_starts(const Work& work, const uint2* weights, const float* biases,
                                 unsigned char* shared) {
  constexpr int kAcross = S::kAcross, kTiles = S::kTiles, kDepth = S::kDepth;
  const Lane lane(thread_index());
  float* const factors = reinterpret_cast<float*>(shared + S::kFactorsAt);
  allow_next();
  await_previous();
  const int rows = patches_of(work) * work.passes;
  const int tasks = divide_up(rows, S::kRows) * S::kGroups;
  for (int task = block_index(); task < tasks; task += block_count()) {
    const int first = task / S::kGroups * S::kRows;
    const int first_column = (task % S::kGroups * kWarps + lane.warp) * kAcross;
    // The warps of the last group may have no columns.
    const bool busy = S::kColumns % (kAcross * kWarps) == 0 || first_column < S::kColumns;
    const uint2* const mine = weights + (busy ? first_column : 0) * kLanes + lane.index;
    Stream<kDepth, kAcross> stream(mine, S::kColumns * kLanes);
    if (work.bound == Bound::kNorm && work.networks == 2) {
      find_factors<S>(lane, work, first, rows, factors);
      barrier();
    }
    put_latents<S>(work, first, rows, factors, shared);
    barrier();
    if (busy) {
      float sums[kTiles][kAcross][4];
      start_joint(lane, biases + first_column * kTileColumns, sums);
#pragma unroll
      for (int step = 0; step < S::kSteps; ++step) {
        if (step % kDepth == 0 && step + kDepth < S::kSteps) stream.read();
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const int row = tile * kTileRows + lane.row;
          const Operand a = load_operand(shared + S::LatentMap::chunk(row, 2 * step + lane.half));
#pragma unroll
          for (int across = 0; across < kAcross; ++across) {
            multiply_add(sums[tile][across], a, stream.current[step % kDepth][across]);
          }
        }
        if (step % kDepth == kDepth - 1) stream.advance();
      }
#pragma unroll
      for (int half = 0; half < 2 * kTiles; ++half) {
        const int row = first + lane.group + 8 * half;
        put_joint(work.maps +
                      (static_cast<int64_t>(row) * S::kRowValues + first_column * kTileColumns) * 2,
                  lane, half % 2, work.slope, row < rows, sums[half / 2]);
      }
    }
    barrier();  // The latents have been read.
  }
}

}  // namespace fastalps::cuda::fused
