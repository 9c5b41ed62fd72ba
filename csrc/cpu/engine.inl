// Runs a block of patches through the whole network: pixels in, errors out.

// max(x, slope * x): the leaky ReLU for slopes up to 1.
inline Vec leaky(Vec x, Vec slope) {
  const Vec low = x * slope;
#if defined(FASTALPS_AVX512)
  return bits_of<Vec>(_mm512_maskz_max_ps(0xffff, bits_of<__m512>(x), bits_of<__m512>(low)));
#elif defined(FASTALPS_AVX2)
  return bits_of<Vec>(_mm256_max_ps(bits_of<__m256>(x), bits_of<__m256>(low)));
#else
  return x > low ? x : low;
#endif
}

// What is done to a result on its way to memory: nothing, or the bias and the activation.
struct Epilogue {
  const float* bias;  // null: nothing
  float slope;
};

// `to` = sum of factors[i] * from[i] over `channels` values.
template <int V, int Count>
inline void combine_of(float* to, const float* const* from, const float* factors, int64_t channels,
                       const Epilogue& epilogue) {
  Vec factor[Count];
  for (int i = 0; i < Count; ++i) factor[i] = splat(factors[i]);
  const Vec slope = splat(epilogue.slope);
  for (int64_t c = 0; c < channels; ++c) {
    const Vec bias = epilogue.bias ? splat(epilogue.bias[c]) : Vec{};
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const int64_t at = (c * V + v) * kLanes;
      Vec sum = factor[0] * load(from[0] + at) + bias;
#pragma GCC unroll 8
      for (int i = 1; i < Count; ++i) sum += factor[i] * load(from[i] + at);
      store(to + at, epilogue.bias ? leaky(sum, slope) : sum);
    }
  }
}

// The same for any number of terms: `from(i)` is where the values of term i begin.
template <int V, typename From>
inline void combine(float* to, const Sum& sum, int64_t channels, const Epilogue& epilogue,
                    const From& from) {
  const float* sources[kMostSummed];
  float factors[kMostSummed];
  for (int i = 0; i < sum.count; ++i) {
    sources[i] = from(sum.terms[i].index);
    factors[i] = static_cast<float>(sum.terms[i].factor);
  }
  switch (sum.count) {
    case 1:
      return combine_of<V, 1>(to, sources, factors, channels, epilogue);
    case 2:
      return combine_of<V, 2>(to, sources, factors, channels, epilogue);
    case 3:
      return combine_of<V, 3>(to, sources, factors, channels, epilogue);
    case 4:
      return combine_of<V, 4>(to, sources, factors, channels, epilogue);
    case 5:
      return combine_of<V, 5>(to, sources, factors, channels, epilogue);
    default:
      for (int64_t i = 0; i < channels * V * kLanes; i += kLanes) {
        Vec total = {};
        for (int t = 0; t < sum.count; ++t) total += factors[t] * load(sources[t] + i);
        store(to + i, total);
      }
  }
}

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

// One band of rows by one of columns.
template <int V>
void run_tile(const Layer& layer, const Band& rows, const Band& columns, const float* in,
              float* out, float* scratch) {
  constexpr int64_t kValue = V * kLanes;
  const int64_t in_channels = layer.in_channels, out_channels = layer.out_channels;
  const int64_t filter_size = in_channels * out_channels;
  float* const row = scratch;
  float* const values = row + layer.row_size * kValue;
  float* const products = values + layer.value_size * kValue;
  float* const partial = products + layer.product_size * kValue;
  const int64_t first_output = columns.results[0].target;
  const Epilogue none = {nullptr, 1.0f}, last = {layer.bias, layer.slope};
  const auto in_at = [&](int64_t y, int64_t x) {
    return in + (y * layer.columns.inputs + x) * in_channels * kValue;
  };
  const auto out_at = [&](int64_t y, int64_t place) {
    return out + (y * layer.columns.outputs + first_output + place) * out_channels * kValue;
  };
  const auto partial_at = [&](int64_t m, int64_t place) {
    return partial + (m * columns.result_count + place) * out_channels * kValue;
  };

  for (int m = 0; m < rows.product_count; ++m) {
    const Sum& outer = rows.products[m];
    const bool final_row = outer.target >= 0;
    const auto result_at = [&](int64_t place) {
      return final_row ? out_at(rows.results[outer.target].target, place) : partial_at(m, place);
    };
    const Epilogue& epilogue = final_row ? last : none;

    const float* at[kMostTerms][kMostValues];
    for (int t = 0; t < outer.count; ++t) {
      const Sum& value = rows.values[outer.terms[t].index];
      const float* line = in_at(value.terms[0].index, columns.first_input);
      if (!value.plain) {
        const int64_t width = columns.last_input - columns.first_input + 1;
        combine<V>(row, value, width * in_channels, none,
                   [&](int y) { return in_at(y, columns.first_input); });
        line = row;
      }
      const auto line_at = [&](int x) {
        return line + (x - columns.first_input) * in_channels * kValue;
      };
      for (int v = 0; v < columns.value_count; ++v) {
        const Sum& inner = columns.values[v];
        if (inner.plain && value.plain) {
          at[t][v] = line_at(inner.terms[0].index);
          continue;
        }
        float* to = values + (t * columns.value_count + v) * in_channels * kValue;
        combine<V>(to, inner, in_channels, none, line_at);
        at[t][v] = to;
      }
    }

    for (int n = 0; n < columns.product_count; ++n) {
      const Sum& inner = columns.products[n];
      Product product;
      product.count = 0;
      for (int t = 0; t < outer.count; ++t) {
        for (int u = 0; u < inner.count; ++u) {
          const int64_t filter =
              outer.terms[t].factor * layer.columns.filters + inner.terms[u].factor;
          product.values[product.count] = at[t][inner.terms[u].index];
          product.weights[product.count++] = layer.weights + filter * filter_size;
        }
      }
      if (inner.target >= 0) {
        multiply_all<V>(product, layer, result_at(inner.target), epilogue);
      } else {
        multiply_all<V>(product, layer, products + n * out_channels * kValue, none);
      }
    }
    for (int r = 0; r < columns.result_count; ++r) {
      const Sum& result = columns.results[r];
      if (result.plain) continue;
      combine<V>(result_at(r), result, out_channels, epilogue,
                 [&](int n) { return products + n * out_channels * kValue; });
    }
  }
  for (int r = 0; r < rows.result_count; ++r) {
    const Sum& result = rows.results[r];
    if (result.plain) continue;
    for (int place = 0; place < columns.result_count; ++place) {
      combine<V>(out_at(result.target, place), result, out_channels, last,
                 [&](int m) { return partial_at(m, place); });
    }
  }
}

// All layers in turn, between two buffers; returns where the last one wrote.
template <int V>
const float* run_layers(const Layer* layers, int64_t count, const float* in, float* ping,
                        float* pong, float* working) {
  for (int64_t i = 0; i < count; ++i) {
    for (int r = 0; r < layers[i].rows.band_count; ++r) {
      for (int c = 0; c < layers[i].columns.band_count; ++c) {
        run_tile<V>(layers[i], layers[i].rows.bands[r], layers[i].columns.bands[c], in, ping,
                    working);
      }
    }
    in = ping;
    ping = pong;
    pong = const_cast<float*>(in);
  }
  return in;
}

// Pixels of `count` patches, transposed to values in [0, 1]; lanes past the last patch are zero.
template <int V, typename T>
void load_block(const EngineArguments& a, int64_t first, int64_t count, float* to) {
  constexpr int64_t kValue = V * kLanes;
  const Network& network = *a.network;
  const T* pixels = static_cast<const T*>(a.pixels);
  const float scale = sizeof(T) == 1 ? 1.0f / 255.0f : 1.0f;
  for (int64_t y = 0; y < network.height; ++y) {
    float* row = to + y * network.width * network.channels * kValue;
    for (int64_t lane = 0; lane < kValue; ++lane) {
      const bool used = lane < count;
      const T* from = pixels + (used ? a.origins[first + lane] + y * a.row_stride : 0);
      float* at = row + lane;
      for (int64_t x = 0; x < network.width; ++x) {
        for (int64_t c = 0; c < network.channels; ++c, at += kValue) {
          *at = used ? static_cast<float>(from[x * a.column_stride + c * a.channel_stride]) * scale
                     : 0.0f;
        }
      }
    }
  }
}

template <int V>
void store_errors(const EngineArguments& a, int64_t first, int64_t count, const float* logits,
                  const float* images, float* to) {
  constexpr int64_t kValue = V * kLanes;
  const Network& network = *a.network;
  double totals[kValue] = {};
  // Sums of a row in single precision, rows in double: no digits are lost in large images.
  const int64_t row = network.width * network.channels;
  for (int64_t y = 0; y < network.height; ++y) {
    Vec sums[V] = {};
    for (int64_t i = y * row; i < (y + 1) * row; ++i) {
      Vec value[V];
      for (int v = 0; v < V; ++v) value[v] = load(logits + i * kValue + v * kLanes);
      sigmoid<V>(value);
      for (int v = 0; v < V; ++v) {
        value[v] -= load(images + i * kValue + v * kLanes);
        sums[v] += value[v] * value[v];
      }
    }
    for (int64_t lane = 0; lane < kValue; ++lane)
      totals[lane] += sums[lane / kLanes][lane % kLanes];
  }
  for (int64_t lane = 0; lane < count; ++lane) {
    to[a.positions[first + lane]] =
        static_cast<float>(totals[lane] / static_cast<double>(network.pixels()));
  }
}

// latent += strength * bound(perturbation)
template <int V>
void perturb(const Network& network, float* latent, const float* perturbation) {
  constexpr int64_t kValue = V * kLanes;
  for (int v = 0; v < V; ++v) {
    const float* from = perturbation + v * kLanes;
    Vec factor = splat(network.strength);
    if (network.bound == Bound::kNorm) {
      Vec squares = {};
      for (int64_t d = 0; d < network.latent; ++d) {
        squares += load(from + d * kValue) * load(from + d * kValue);
      }
      const Vec mean = squares / splat(static_cast<float>(network.latent)) + splat(1e-12f);
      for (int lane = 0; lane < kLanes; ++lane) factor[lane] /= __builtin_sqrtf(mean[lane]);
    }
    for (int64_t d = 0; d < network.latent; ++d) {
      Vec p = load(from + d * kValue);
      // tanh(p) = 2 * sigmoid(2 * p) - 1
      if (network.bound == Bound::kTanh) p = 2.0f * sigmoid(2.0f * p) - 1.0f;
      float* at = latent + d * kValue + v * kLanes;
      store(at, load(at) + factor * p);
    }
  }
}

template <int V>
void load_noise(const EngineArguments& a, int64_t first, int64_t count, float* to) {
  const int64_t latent = a.network->latent;
  for (int64_t d = 0; d < latent; ++d) {
    for (int64_t lane = 0; lane < V * kLanes; ++lane) {
      *to++ = lane < count ? a.noise[a.positions[first + lane] * latent + d] : 0.0f;
    }
  }
}

template <int V>
void engine_block_of(const EngineArguments& a, int64_t first, int64_t count, float* scratch) {
  constexpr int64_t kValue = V * kLanes;
  const Network& network = *a.network;
  float* images = scratch;
  float* ping = images + network.pixels() * kValue;
  float* pong = ping + network.activation * kValue;
  float* latent = pong + network.activation * kValue;
  float* perturbation = latent + network.latent * kValue;
  float* working = perturbation + network.latent * kValue;
  const int64_t latent_bytes = network.latent * kValue * sizeof(float);
  float* errors = a.errors;

  if (a.type == DType::kUInt8) {
    load_block<V, uint8_t>(a, first, count, images);
  } else {
    load_block<V, float>(a, first, count, images);
  }
  const auto decode = [&] {
    const float* logits =
        run_layers<V>(network.decoder, network.decoder_layers, latent, ping, pong, working);
    store_errors<V>(a, first, count, logits, images, errors);
    errors += a.error_count;
  };
  __builtin_memcpy(
      latent, run_layers<V>(network.encoder, network.encoder_layers, images, ping, pong, working),
      latent_bytes);
  if (a.normal) decode();
  if (!a.perturbed) return;
  if (a.noise) {
    load_noise<V>(a, first, count, perturbation);
  } else {
    __builtin_memcpy(
        perturbation,
        run_layers<V>(network.distorter, network.distorter_layers, images, ping, pong, working),
        latent_bytes);
  }
  perturb<V>(network, latent, perturbation);
  decode();
}

// `vectors`: 1 to 3, as many as `count` patches fill.
void engine_block(const EngineArguments& a, int64_t first, int64_t count, int vectors,
                  float* scratch) {
  if (vectors == 1) return engine_block_of<1>(a, first, count, scratch);
  if (vectors == 2) return engine_block_of<2>(a, first, count, scratch);
  return engine_block_of<3>(a, first, count, scratch);
}
