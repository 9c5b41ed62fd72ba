// The end of kernel D: from the last layer's products to logits, and residuals smoothed.
#pragma once

#include "fused_layers.cuh"

namespace fastalps::cuda::fused {

// The logits of four neighbouring pixels, from the fourth of a row on: sums of the products in
// three columns of three rows, those of neighbouring strips added up already but at their edges.
template <class S>
FASTALPS_DEVICE void find_logits(const float* products, float bias, int y, int x,
                                 float (&logits)[4]) {
  using Shares = typename S::FifthShares;
  const int part = Shares::part_of(y), row = y - Shares::first(part);
#pragma unroll
  for (float& logit : logits) logit = bias;
  const auto add = [&](int strip, int line) {
    const float* const place = products + (strip * S::kStripRows + line) * S::kProductPitch + x;
    const auto four = [&](int tap) {
      return *reinterpret_cast<const float4*>(place + tap * S::kProductPlane);
    };
    const float4 left = four(0), middle = four(1), right = four(2);
    const float lefts[4] = {x > 0 ? left.x : 0.0f, left.y, left.z, left.w};
    const float middles[4] = {middle.x, middle.y, middle.z, middle.w};
    const float rights[4] = {right.x, right.y, right.z, right.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      logits[i] += lefts[i] + middles[i];
      if (i != (S::kSize - 1) % 4 || x + i < S::kSize - 1) logits[i] += rights[i];
    }
  };
  add(part, row + 1);
  const bool first = row == 0 && part > 0;
  const bool last = row == Shares::rows(part) - 1 && part < Shares::kParts - 1;
  if (first || last) {
    add(first ? part - 1 : part + 1, first ? Shares::rows(part - 1) + 1 : 0);
  }
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

}  // namespace fastalps::cuda::fused
