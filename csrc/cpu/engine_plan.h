// Reads the plan that fastalps/engine/packing.py writes.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "engine.h"

namespace fastalps {

// A network read from a plan (whole numbers) and its packed weights (floats, and words of several
// channels for bf16 and int8), which it points into. Throws
// std::runtime_error when they do not fit each other: no index that passes can leave its array.
class EnginePlan {
 public:
  EnginePlan(const int64_t* plan, int64_t plan_size, const float* weights, int64_t weights_size,
             const int32_t* words, int64_t words_size);
  EnginePlan(const EnginePlan&) = delete;
  EnginePlan& operator=(const EnginePlan&) = delete;

  Network network{};

 private:
  int64_t next(int64_t least, int64_t most);
  const float* floats(int64_t count);
  std::vector<Sum>& sums(int64_t most_terms, int64_t indices, int64_t low, int64_t high);
  std::vector<Tile>& tiles(const AxisPlan& axis, std::vector<Sum>& values,
                           const std::vector<Sum>& products, std::vector<bool>& found);
  Band band(const AxisPlan& axis, int32_t first_result);
  AxisPlan axis();
  Layer layer();
  int64_t layers(const Layer*& into, int64_t in_channels, int64_t in_pixels, int64_t out_channels,
                 int64_t out_pixels, bool optional);
  Coding coding();
  const NarrowSum* sums_of_pixels(int64_t count, int64_t in_pixels);
  NarrowLayer narrow_layer(int64_t in_pixels);
  int64_t narrow_layers(const NarrowLayer*& into, int64_t in_channels, int64_t in_pixels,
                        int64_t out_channels, int64_t out_pixels, bool optional);
  void fit(int64_t activation, int64_t working);
  int64_t group_count(int64_t channels) const;  // words of a pixel

  const int64_t* plan_;
  const int64_t* plan_end_;
  const float* weights_;
  const float* weights_end_;
  const int32_t* words_;
  const int32_t* words_end_;
  // Deques: what they hold stays where it is.
  std::deque<std::vector<Term>> terms_;
  std::deque<std::vector<Sum>> sums_;
  std::deque<std::vector<Tile>> tiles_;
  std::deque<std::vector<Band>> bands_;
  std::deque<std::vector<Layer>> layers_;
  std::deque<std::vector<int32_t>> numbers_;
  std::deque<std::vector<NarrowSum>> narrow_sums_;
  std::deque<std::vector<NarrowPixel>> pixels_;
  std::deque<std::vector<NarrowLayer>> narrow_layers_;
};

}  // namespace fastalps
