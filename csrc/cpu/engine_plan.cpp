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
                       int64_t weights_size, const int32_t* words, int64_t words_size)
    : plan_(plan),
      plan_end_(plan + plan_size),
      weights_(weights),
      weights_end_(weights + weights_size),
      words_(words),
      words_end_(words + words_size) {
  network.precision = static_cast<Precision>(next(0, 2));
  network.channels = next(1, kMost);
  network.height = next(1, kMost);
  network.width = next(1, kMost);
  network.latent = next(1, kMost);
  network.bound = static_cast<Bound>(next(0, 2));
  network.strength = *floats(1);
  network.smoothing = next(1, kMostSmoothing);
  if (network.smoothing % 2 == 0) fail("a neighbourhood without a middle");
  const int64_t pixels = network.height * network.width;
  fit(network.channels * pixels, 0);
  if (network.precision == Precision::kFp32) {
    network.encoder_layers =
        layers(network.encoder, network.channels, pixels, network.latent, 1, false);
    network.distorter_layers =
        layers(network.distorter, network.channels, pixels, network.latent, 1, true);
    network.decoder_layers =
        layers(network.decoder, network.latent, 1, network.channels, pixels, false);
  } else {
    network.words = pixels * group_count(network.channels);
    network.narrow_encoder_layers =
        narrow_layers(network.narrow_encoder, network.channels, pixels, network.latent, 1, false);
    network.narrow_distorter_layers =
        narrow_layers(network.narrow_distorter, network.channels, pixels, network.latent, 1, true);
    const int64_t start = next(1, kMost), small = next(1, kMost);
    if (layers(network.dense, network.latent, 1, start, small, false) != 1) fail("a dense layer");
    network.dense_coding = coding();
    fit(small * group_count(start), 0);
    network.narrow_decoder_layers =
        narrow_layers(network.narrow_decoder, start, small, network.channels, pixels, false);
  }
  if (plan_ != plan_end_ || weights_ != weights_end_ || words_ != words_end_) fail("its length");
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
std::vector<Sum>& EnginePlan::sums(int64_t most_terms, int64_t indices, int64_t low, int64_t high) {
  std::vector<Sum>& list = sums_.emplace_back();
  const int64_t count = next(1, kMostSums);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t length = next(1, most_terms);
    std::vector<Term>& terms = terms_.emplace_back();
    for (int64_t t = 0; t < length; ++t) {
      const int64_t index = next(0, indices - 1);
      terms.push_back({static_cast<int32_t>(index), static_cast<int32_t>(next(low, high))});
    }
    const bool plain = length == 1 && terms[0].factor == 1;
    list.push_back({terms.data(), static_cast<int32_t>(length), plain, false, -1});
  }
  return list;
}

std::vector<Tile>& EnginePlan::tiles(const AxisPlan& axis, std::vector<Sum>& values,
                                     const std::vector<Sum>& products, std::vector<bool>& found) {
  std::vector<Tile>& list = tiles_.emplace_back();
  const int64_t count = next(0, kMostSums);
  for (int64_t i = 0; i < count; ++i) {
    Tile tile{};
    const int64_t number = next(0, kAlgorithms - 1);
    tile.algorithm = static_cast<Algorithm>(number);
    for (int n = 0; n < kTileInputs[number]; ++n) {
      tile.inputs[n] = static_cast<int32_t>(next(-1, axis.inputs - 1));
    }
    const auto room = [](size_t all, int64_t taken) { return static_cast<int64_t>(all) - taken; };
    tile.first_value = static_cast<int32_t>(next(0, room(values.size(), kTileInputs[number])));
    tile.first_product =
        static_cast<int32_t>(next(0, room(products.size(), kTileProducts[number])));
    tile.first_result = static_cast<int32_t>(next(0, kMost));
    tile.step = static_cast<int32_t>(next(1, 2));
    for (int v = 0; v < kTileInputs[number]; ++v) {
      values[tile.first_value + v].tiled = true;
      if (values[tile.first_value + v].count > kMostTileTerms) fail("a tile's value");
    }
    for (int p = 0; p < kTileProducts[number]; ++p) {
      if (products[tile.first_product + p].result >= 0) fail("a product has two uses");
    }
    for (int r = 0; r < kTileResults[number]; ++r) {
      const size_t place = tile.first_result + r * tile.step;
      if (place >= found.size() || found[place]) fail("the results of a tile");
      found[place] = true;
    }
    list.push_back(tile);
  }
  return list;
}

Band EnginePlan::band(const AxisPlan& axis, int32_t first_result) {
  Band band{};
  std::vector<Sum>& values = sums(kMostSummed, axis.inputs, -kMostFactor, kMostFactor);
  std::vector<Sum>& products =
      sums(kMostTerms, static_cast<int64_t>(values.size()), 0, axis.filters - 1);
  const int64_t results = next(1, axis.outputs - first_result);
  std::vector<bool> found(results);
  for (int64_t r = 0; r < results; ++r) {
    const int64_t product = next(-1, static_cast<int64_t>(products.size()) - 1);
    if (product < 0) continue;
    // Written in its place at once, it cannot be read again.
    if (products[product].result >= 0) fail("a product has two uses");
    products[product].result = static_cast<int32_t>(r);
    found[r] = true;
  }
  const std::vector<Tile>& list = tiles(axis, values, products, found);
  if (std::find(found.begin(), found.end(), false) != found.end()) fail("a result is missing");
  band.values = values.data();
  band.products = products.data();
  band.tiles = list.data();
  band.value_count = static_cast<int32_t>(values.size());
  band.product_count = static_cast<int32_t>(products.size());
  band.tile_count = static_cast<int32_t>(list.size());
  band.first_result = first_result;
  band.result_count = static_cast<int32_t>(results);
  return band;
}

AxisPlan EnginePlan::axis() {
  AxisPlan axis{};
  axis.inputs = static_cast<int32_t>(next(1, kMost));
  axis.outputs = static_cast<int32_t>(next(1, kMost));
  axis.filters = static_cast<int32_t>(next(1, kMost));
  axis.band_count = static_cast<int32_t>(next(1, axis.outputs));
  std::vector<Band>& bands = bands_.emplace_back();
  int32_t result = 0;
  for (int32_t b = 0; b < axis.band_count; ++b) {
    bands.push_back(band(axis, result));
    result += bands.back().result_count;
  }
  if (result != axis.outputs) fail("results are missing");
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
    network.widest = std::max(network.widest, one.in_channels);
    fit(size, one.value_size + one.product_size + one.partial_size);
    list.push_back(one);
  }
  if (count > 0 && size != out_channels * out_pixels) fail("the last layer's size");
  into = list.data();
  return count;
}

void EnginePlan::fit(int64_t activation, int64_t working) {
  network.activation = std::max(network.activation, activation);
  network.working = std::max(network.working, working);
}

int64_t EnginePlan::group_count(int64_t channels) const {
  const int64_t group = kGroups[static_cast<int>(network.precision)];
  return (channels + group - 1) / group;
}

Coding EnginePlan::coding() {
  const float factor = *floats(1);
  return {factor, *floats(1)};
}

const NarrowSum* EnginePlan::sums_of_pixels(int64_t count, int64_t in_pixels) {
  std::vector<NarrowSum>& list = narrow_sums_.emplace_back();
  for (int64_t s = 0; s < count; ++s) {
    std::vector<int32_t>& pixels = numbers_.emplace_back();
    const int64_t length = next(1, kMostPooled);
    for (int64_t i = 0; i < length; ++i) {
      pixels.push_back(static_cast<int32_t>(next(0, in_pixels - 1)));
    }
    list.push_back({pixels.data(), static_cast<int32_t>(length)});
  }
  return list.data();
}

NarrowLayer EnginePlan::narrow_layer(int64_t in_pixels) {
  NarrowLayer layer{};
  layer.in_channels = next(1, kMost);
  layer.out_channels = next(1, kMost);
  layer.plain = next(0, 1) == 1;
  layer.sum_count = next(0, kMostSums);
  layer.sums = sums_of_pixels(layer.sum_count, in_pixels);
  const int64_t filters = next(1, kMost);
  // No more than what follows can hold: memory is taken by these numbers.
  const int64_t classes = next(1, std::min<int64_t>(kMost, weights_end_ - weights_));
  layer.pixel_count = next(1, std::min<int64_t>(kMost, plan_end_ - plan_));
  std::vector<NarrowPixel>& list = pixels_.emplace_back();
  std::vector<const NarrowPixel*> first(classes);
  // No growth below: `first` points into it.
  list.reserve(layer.pixel_count);
  for (int64_t p = 0; p < layer.pixel_count; ++p) {
    const int32_t bias_class = static_cast<int32_t>(next(0, classes - 1));
    const int64_t length = next(1, kMostNarrowTerms);
    std::vector<Term>& terms = terms_.emplace_back();
    for (int64_t t = 0; t < length; ++t) {
      const int64_t index = next(0, (layer.sum_count ? layer.sum_count : in_pixels) - 1);
      terms.push_back({static_cast<int32_t>(index), static_cast<int32_t>(next(0, filters - 1))});
    }
    list.push_back({terms.data(), static_cast<int32_t>(length), bias_class});
    // Pixels of a class are computed by the filters of the first.
    const NarrowPixel*& like = first[bias_class];
    if (like == nullptr) like = &list.back();
    bool same = like->count == length;
    for (int64_t t = 0; same && t < length; ++t) same = like->terms[t].factor == terms[t].factor;
    if (!same) fail("pixels of a class have other filters");
  }
  layer.pixels = list.data();
  layer.slope = *floats(1);
  layer.coding = coding();
  layer.pool_factor = *floats(1);
  layer.pool_zeros = floats(layer.sum_count);
  layer.scale = floats(layer.out_channels);
  layer.bias = floats(classes * layer.out_channels);
  const int64_t size = filters * group_count(layer.in_channels) * layer.out_channels;
  if (size > words_end_ - words_) fail("the words end early");
  layer.words = reinterpret_cast<const uint32_t*>(words_);
  words_ += size;
  return layer;
}

int64_t EnginePlan::narrow_layers(const NarrowLayer*& into, int64_t in_channels, int64_t in_pixels,
                                  int64_t out_channels, int64_t out_pixels, bool optional) {
  const int64_t count = next(optional ? 0 : 1, kMost);
  std::vector<NarrowLayer>& list = narrow_layers_.emplace_back();
  int64_t channels = in_channels, pixels = in_pixels;
  for (int64_t i = 0; i < count; ++i) {
    const NarrowLayer one = narrow_layer(pixels);
    if (one.in_channels != channels) fail("a layer does not fit the one before");
    if (one.plain != (i + 1 == count)) fail("floats within the network");
    channels = one.out_channels;
    pixels = one.pixel_count;
    fit(pixels * (one.plain ? channels : group_count(channels)),
        one.sum_count * group_count(one.in_channels));
    list.push_back(one);
  }
  if (count > 0 && (channels != out_channels || pixels != out_pixels)) {
    fail("the last layer's size");
  }
  into = list.data();
  return count;
}

}  // namespace fastalps
