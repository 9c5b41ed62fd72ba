// The whole-network engine: an ALPS model as plain arrays, and what a block of patches needs.
//
// Activations lie pixel by pixel, channel by channel, and innermost the patches of a block: one
// "value" is a few vectors, each lane of which is another patch. No sum crosses lanes, so a score
// depends neither on the batch nor on a patch's place in it. Every layer is a pair of bilinear
// algorithms, one an axis (fastalps/engine/axes.py): sums of inputs, products, sums of products.
// In bf16 and int8 (engine_narrow.inl) layers are direct, and a word holds several channels.
#pragma once

#include <cstdint>

#include "../dtype.h"

namespace fastalps {

// In values: an input and an integer factor. In products: a value and a filter.
struct Term {
  int32_t index, factor;
};

struct Sum {
  const Term* terms;
  int32_t count;
  bool plain;  // one term of factor 1: no arithmetic
  bool tiled;  // values: computed by a tile's transform
  // Products: the place of the result that is this product alone, or -1.
  int32_t result;
};

// The algorithms of several results at once, as in fastalps/engine/axes.py.
enum class Algorithm { kF22, kF32, kF23, kF43, kF32Plus };
constexpr int kAlgorithms = 5;
constexpr int kTileInputs[kAlgorithms] = {3, 4, 4, 6, 4};
constexpr int kTileProducts[kAlgorithms] = {3, 4, 4, 6, 5};
constexpr int kTileResults[kAlgorithms] = {2, 3, 2, 4, 3};

struct Tile {
  Algorithm algorithm;
  int32_t inputs[6];  // -1: zero
  int32_t first_value, first_product, first_result, step;
};

// Consecutive results of an axis, computed at once.
struct Band {
  const Sum* values;
  const Sum* products;
  const Tile* tiles;
  int32_t value_count, product_count, tile_count;
  int32_t first_result, result_count;
};

struct AxisPlan {
  int32_t inputs, outputs, filters;
  const Band* bands;
  int32_t band_count;
};

struct Layer {
  int64_t in_channels, out_channels;
  AxisPlan rows, columns;
  float slope;           // of the leaky ReLU; 1: none
  const float* bias;     // (out_channels)
  const float* weights;  // (row filter, column filter, tile of kTile out_channels, channel, tile)
  // Channels of working memory: of the values and the products of a band, and of results that wait
  // for other rows.
  int64_t value_size, product_size, partial_size;
};

// How the engine computes; the plan says which.
enum class Precision { kFp32, kBf16, kInt8 };
// Channels of one pixel in a word of 32 bits; in fp32 a float is a word.
constexpr int kGroups[] = {1, 2, 4};

// From float to int8: round(x * factor + zero), clamped to 0 to 255; to bf16: x * factor.
struct Coding {
  float factor, zero;
};

// A sum over pixels of the input, each of which meets the same filters.
struct NarrowSum {
  const int32_t* pixels;
  int32_t count;
};

// An output pixel: a filter (`factor`) for each of its input pixels (or sums) that are not border.
struct NarrowPixel {
  const Term* terms;
  int32_t count;
  int32_t bias_class;  // the same for pixels with the same filters
};

// A layer in bf16 or int8, see engine_narrow.inl.
struct NarrowLayer {
  int64_t in_channels, out_channels;
  const NarrowSum* sums;  // what the terms index, in place of the input's pixels; or none
  int64_t sum_count;
  const NarrowPixel* pixels;
  int64_t pixel_count;
  bool plain;               // floats out, not words
  float slope;              // of the leaky ReLU; 1: none
  Coding coding;            // of the words out
  float pool_factor;        // of the sums' words, and, for each sum, the zero
  const float* pool_zeros;  // (sum_count)
  const float* scale;       // (out_channels): of a sum of products of words
  const float* bias;        // (bias classes, out_channels)
  const uint32_t* words;    // (filter, out_channels, group of in_channels)
};

// Vectors in a value at most. With kTile they fill the 16 registers of AVX2: 12 sums.
constexpr int kBlockVectors = 3;
// Output channels whose weights lie side by side.
constexpr int kTile = 4;
// Terms of a product along one axis; values of a band along one axis. The plan's reader checks.
constexpr int kMostTerms = 3;
constexpr int kMostValues = 64;
constexpr int kMostSummed = 64;  // terms of a value
constexpr int kMostFactor = 1 << 10;
constexpr int kMostTileTerms = 4;  // of a tile's value
constexpr int kMostSums = 1 << 16;
// Of a narrow layer: terms of a pixel; bytes that 16 bits can sum.
constexpr int kMostNarrowTerms = 9;
constexpr int kMostPooled = 256;
constexpr int kMostSmoothing = 31;

enum class Bound { kNone, kTanh, kNorm };

struct Network {
  Precision precision;
  int64_t channels, height, width, latent;
  Bound bound;
  float strength;
  int64_t smoothing;  // side of the neighbourhood that a residual is averaged over; 1: none
  const Layer* encoder;
  const Layer* distorter;
  const Layer* decoder;
  int64_t encoder_layers, distorter_layers, decoder_layers;
  // In bf16 and int8 these take the place of the layers, and of the decoder's dense layer.
  const NarrowLayer* narrow_encoder;
  const NarrowLayer* narrow_distorter;
  const NarrowLayer* narrow_decoder;
  int64_t narrow_encoder_layers, narrow_distorter_layers, narrow_decoder_layers;
  const Layer* dense;
  Coding dense_coding;
  // Words of a single lane: the largest activation, the working memory of the largest layer, the
  // encoded pixels.
  int64_t activation, working, words;
  int64_t widest;  // channels of the input of the widest layer

  int64_t pixels() const { return channels * height * width; }
  // Floats that a block needs, for each lane.
  int64_t scratch() const {
    return pixels() + 2 * activation + 2 * latent + widest + working + words;
  }
  bool perturbs() const { return distorter_layers + narrow_distorter_layers > 0; }
};

struct EngineArguments {
  const Network* network;
  const void* pixels;
  DType type;                // uint8 (0 to 255) or float32 (0 to 1)
  const int64_t* origins;    // of each patch to score, in elements from `pixels`
  const int64_t* positions;  // of each patch to score, in the errors and the noise
  int64_t channel_stride, row_stride, column_stride;
  const float* noise;      // (positions, latent) in the distorter's place, or null
  bool normal, perturbed;  // which passes
  float* errors;           // (passes, positions)
  int64_t error_count;     // positions
};

}  // namespace fastalps
