#include "engine_plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace fastalps {
namespace {

constexpr int64_t kMost = int64_t{1} << 24;  // no size or count of a network is larger

[[noreturn]] void fail(const char* what) {
  throw std::runtime_error(std::string("fastalps engine: the plan is damaged: ") + what);
}

}  // namespace

EnginePlan::EnginePlan(const int64_t* plan, int64_t plan_size, const float* weights,
                       int64_t weights_size)
    : plan_(plan),
      plan_end_(plan + plan_size),
      weights_(weights),
      weights_end_(weights + weights_size) {
  network.channels = next(1, kMost);
  network.height = next(1, kMost);
  network.width = next(1, kMost);
  network.latent = next(1, kMost);
  network.bound = static_cast<Bound>(next(0, 2));
  network.strength = *floats(1);
  const int64_t pixels = network.height * network.width;
  network.encoder_layers =
      layers(network.encoder, network.channels, pixels, network.latent, 1, false);
  network.distorter_layers =
      layers(network.distorter, network.channels, pixels, network.latent, 1, true);
  network.decoder_layers =
      layers(network.decoder, network.latent, 1, network.channels, pixels, false);
  if (plan_ != plan_end_ || weights_ != weights_end_) fail("its length");
}

int64_t EnginePlan::next(int64_t least, int64_t most) {
  if (plan_ == plan_end_) fail("it ends early");
  const int64_t value = *plan_++;
  if (value < least || value > most) fail("a number out of its range");
  return value;
}

const float* EnginePlan::floats(int64_t count) {
  if (count > weights_end_ - weights_) fail("the weights end early");
  const float* at = weights_;
  weights_ += count;
  return at;
}

// A list of sums whose terms have an index below `indices` and a second number from low to high.
int32_t EnginePlan::sums(std::deque<std::vector<Sum>>& into, int32_t fewest, int32_t most_terms,
                         int64_t indices, int64_t low, int64_t high, bool targets,
                         int64_t outputs) {
  const int64_t count = next(fewest, kMostProducts);
  std::vector<Sum>& list = into.emplace_back();
  for (int64_t i = 0; i < count; ++i) {
    Sum sum{nullptr, 0, -1, false};
    if (targets) sum.target = static_cast<int32_t>(next(0, outputs - 1));
    sum.count = static_cast<int32_t>(next(1, most_terms));
    std::vector<Term>& terms = terms_.emplace_back();
    for (int32_t t = 0; t < sum.count; ++t) {
      const int64_t index = next(0, indices - 1);
      terms.push_back({static_cast<int32_t>(index), static_cast<int32_t>(next(low, high))});
    }
    sum.terms = terms.data();
    sum.plain = sum.count == 1 && terms[0].factor == 1;
    list.push_back(sum);
  }
  return static_cast<int32_t>(count);
}

AxisPlan EnginePlan::axis() {
  AxisPlan axis{};
  axis.inputs = static_cast<int32_t>(next(1, kMost));
  axis.outputs = static_cast<int32_t>(next(1, kMost));
  axis.filters = static_cast<int32_t>(next(1, kMost));
  axis.band_count = static_cast<int32_t>(next(1, axis.outputs));
  std::vector<Band>& bands = bands_.emplace_back();
  int32_t output = 0;
  for (int32_t b = 0; b < axis.band_count; ++b) {
    Band band{};
    band.value_count =
        sums(sums_, 1, kMostSummed, axis.inputs, -kMostFactor, kMostFactor, false, 0);
    band.values = sums_.back().data();
    band.product_count =
        sums(sums_, 1, kMostTerms, band.value_count, 0, axis.filters - 1, false, 0);
    Sum* products = sums_.back().data();
    band.products = products;
    band.result_count = sums(sums_, 1, kMostResultTerms, band.product_count, -kMostFactor,
                             kMostFactor, true, axis.outputs);
    band.results = sums_.back().data();
    std::vector<int32_t> uses(band.product_count);
    for (int32_t r = 0; r < band.result_count; ++r) {
      if (band.results[r].target != output++) fail("results out of order");
      for (int32_t t = 0; t < band.results[r].count; ++t) ++uses[band.results[r].terms[t].index];
    }
    for (int32_t r = 0; r < band.result_count; ++r) {
      const int32_t product = band.results[r].terms[0].index;
      if (!band.results[r].plain) continue;
      // Written in its place at once, it cannot be read again.
      if (uses[product] != 1) fail("a result shares its only product");
      products[product].target = r;
    }
    band.first_input = axis.inputs - 1;
    for (int32_t v = 0; v < band.value_count; ++v) {
      for (int32_t t = 0; t < band.values[v].count; ++t) {
        band.first_input = std::min(band.first_input, band.values[v].terms[t].index);
        band.last_input = std::max(band.last_input, band.values[v].terms[t].index);
      }
    }
    bands.push_back(band);
  }
  if (output != axis.outputs) fail("results are missing");
  axis.bands = bands.data();
  return axis;
}

Layer EnginePlan::layer() {
  Layer layer{};
  layer.in_channels = next(1, kMost);
  layer.out_channels = next(1, kMost);
  layer.rows = axis();
  layer.columns = axis();
  layer.slope = *floats(1);
  layer.bias = floats(layer.out_channels);
  layer.weights = floats(int64_t{layer.rows.filters} * layer.columns.filters * layer.in_channels *
                         layer.out_channels);
  int64_t terms = 0, row_products = 0;
  for (int32_t b = 0; b < layer.rows.band_count; ++b) {
    const Band& band = layer.rows.bands[b];
    row_products = std::max<int64_t>(row_products, band.product_count);
    for (int32_t m = 0; m < band.product_count; ++m) {
      terms = std::max<int64_t>(terms, band.products[m].count);
    }
  }
  for (int32_t b = 0; b < layer.columns.band_count; ++b) {
    const Band& band = layer.columns.bands[b];
    if (band.value_count > kMostValues) fail("a band has too many values");
    const auto larger = [](int64_t& size, int64_t other) { size = std::max(size, other); };
    larger(layer.row_size, (band.last_input - band.first_input + 1) * layer.in_channels);
    larger(layer.value_size, terms * band.value_count * layer.in_channels);
    larger(layer.product_size, band.product_count * layer.out_channels);
    larger(layer.partial_size, row_products * band.result_count * layer.out_channels);
  }
  return layer;
}

int64_t EnginePlan::layers(const Layer*& into, int64_t in_channels, int64_t in_pixels,
                           int64_t out_channels, int64_t out_pixels, bool optional) {
  const int64_t count = next(optional ? 0 : 1, kMost);
  std::vector<Layer>& list = layers_.emplace_back();
  int64_t size = in_channels * in_pixels;
  for (int64_t i = 0; i < count; ++i) {
    const Layer one = layer();
    if (int64_t{one.rows.inputs} * one.columns.inputs * one.in_channels != size) {
      fail("a layer does not fit the one before");
    }
    size = int64_t{one.rows.outputs} * one.columns.outputs * one.out_channels;
    network.activation = std::max(network.activation, size);
    network.working = std::max(network.working,
                               one.row_size + one.value_size + one.product_size + one.partial_size);
    list.push_back(one);
  }
  if (count > 0 && size != out_channels * out_pixels) fail("the last layer's size");
  into = list.data();
  return count;
}

}  // namespace fastalps
