// Products of values and filters: where the engine spends its time.

// A product over several terms: pointers to the values of each, and to its filter's weights.
struct Product {
  const float* values[kMostTerms * kMostTerms];
  const float* weights[kMostTerms * kMostTerms];
  int count;
};

// `Rows` output channels of one pixel: the sum over terms and channels of weight * value.
template <int V, int Rows>
__attribute__((always_inline)) inline void multiply(const Product& product, int64_t tile_start,
                                                    int64_t channels, float* to,
                                                    const Epilogue& epilogue, int64_t first) {
  // Of few rows the sums are split, to have enough of them in flight.
  constexpr int kSplit = Rows == 1 ? 4 : Rows == 2 ? 2 : 1;
  Vec sums[kSplit][Rows][V] = {};
  for (int t = 0; t < product.count; ++t) {
    const float* x = product.values[t];
    const float* w = product.weights[t] + tile_start;
    int64_t c = 0;
    for (; c + kSplit <= channels; c += kSplit) {
#pragma GCC unroll 4
      for (int s = 0; s < kSplit; ++s) {
        Vec value[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) value[v] = load(x + (s * V + v) * kLanes);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
          const Vec weight = splat(w[s * Rows + r]);
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) sums[s][r][v] += weight * value[v];
        }
      }
      x += kSplit * V * kLanes;
      w += kSplit * Rows;
    }
    for (; kSplit > 1 && c < channels; ++c) {
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sums[0][r][v] += splat(w[r]) * load(x + v * kLanes);
      }
      x += V * kLanes;
      w += Rows;
    }
  }
  const Vec slope = splat(epilogue.slope);
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
    const Vec bias = epilogue.bias ? splat(epilogue.bias[first + r]) : Vec{};
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      Vec sum = sums[0][r][v];
#pragma GCC unroll 4
      for (int s = 1; s < kSplit; ++s) sum += sums[s][r][v];
      if (epilogue.bias) sum = leaky(sum + bias, slope);
      store(to + ((first + r) * V + v) * kLanes, sum);
    }
  }
}

// One output channel of kTile pixels that have the same filters: each weight is loaded once.
template <int V>
inline void multiply_pixels(const Product* products, int64_t channels, float* const* to,
                            const Epilogue& epilogue) {
  Vec sums[kTile][V] = {};
  for (int t = 0; t < products[0].count; ++t) {
    const float* x[kTile];
    for (int p = 0; p < kTile; ++p) x[p] = products[p].values[t];
    const float* w = products[0].weights[t];
    for (int64_t c = 0; c < channels; ++c) {
      const Vec weight = splat(w[c]);
#pragma GCC unroll 4
      for (int p = 0; p < kTile; ++p) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sums[p][v] += weight * load(x[p] + (c * V + v) * kLanes);
      }
    }
  }
  const Vec bias = splat(epilogue.bias ? epilogue.bias[0] : 0.0f), slope = splat(epilogue.slope);
#pragma GCC unroll 4
  for (int p = 0; p < kTile; ++p) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(to[p] + v * kLanes, leaky(sums[p][v] + bias, slope));
  }
}

template <int V>
inline void multiply_all(const Product& product, const Layer& layer, float* to,
                         const Epilogue& epilogue) {
  const int64_t channels = layer.in_channels;
  int64_t first = 0;
  for (; first + kTile <= layer.out_channels; first += kTile) {
    multiply<V, kTile>(product, first * channels, channels, to, epilogue, first);
  }
  switch (layer.out_channels - first) {
    case 1:
      return multiply<V, 1>(product, first * channels, channels, to, epilogue, first);
    case 2:
      return multiply<V, 2>(product, first * channels, channels, to, epilogue, first);
    case 3:
      return multiply<V, 3>(product, first * channels, channels, to, epilogue, first);
    default:
      return;
  }
}
