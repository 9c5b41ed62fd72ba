// Runs a block of patches through the whole network: pixels in, errors out.

// A band of rows by a band of columns, row product by row product.
template <int V>
struct BandRunner {
  static constexpr int64_t kValue = V * kLanes;
  const Layer& layer;
  const Band &rows, &columns;
  const float *in, *zeros;
  float *out, *values, *products, *partial;

  const float* in_at(int64_t y, int64_t x) const {
    return in + (y * layer.columns.inputs + x) * layer.in_channels * kValue;
  }
  float* out_at(int64_t row_place, int64_t place) const {
    const int64_t y = rows.first_result + row_place, x = columns.first_result + place;
    return out + (y * layer.columns.outputs + x) * layer.out_channels * kValue;
  }
  float* partial_at(int64_t m, int64_t place) const {
    return partial + (m * columns.result_count + place) * layer.out_channels * kValue;
  }

  // Values of all columns for one sum of rows; where each begins.
  void prepare(const Sum& row, float* room, const float** at) const {
    const int64_t size = layer.in_channels * kValue;
    for (int v = 0; v < columns.value_count; ++v) {
      const Sum& column = columns.values[v];
      at[v] = room + v * size;
      if (column.tiled) continue;
      if (row.plain && column.plain) {
        at[v] = in_at(row.terms[0].index, column.terms[0].index);
      } else {
        sum_inputs(room + v * size, row, column, size,
                   [&](int64_t y, int64_t x) { return in_at(y, x); });
      }
    }
    for (int t = 0; t < columns.tile_count; ++t) {
      const Tile& tile = columns.tiles[t];
      const float* lines[kMostTileTerms][6];
      float factors[kMostTileTerms];
      for (int r = 0; r < row.count; ++r) {
        factors[r] = static_cast<float>(row.terms[r].factor);
        for (int n = 0; n < kTileInputs[static_cast<int>(tile.algorithm)]; ++n) {
          lines[r][n] = tile.inputs[n] < 0 ? zeros : in_at(row.terms[r].index, tile.inputs[n]);
        }
      }
      float* to = room + tile.first_value * size;
      with_algorithm(tile.algorithm, [&](auto type) {
        typedef typename decltype(type)::type A;
        if (row.plain) return tile_values<A, 1>(lines, factors, to, size, size);
        if (row.count <= 2) {
          // A second row of zeros where there is none.
          if (row.count == 1) {
            factors[1] = 0.0f;
            for (int n = 0; n < 6; ++n) lines[1][n] = zeros;
          }
          return tile_values<A, 2>(lines, factors, to, size, size);
        }
        if (row.count == 3) return tile_values<A, 3>(lines, factors, to, size, size);
        tile_values<A, 4>(lines, factors, to, size, size);
      });
    }
  }

  Product product_of(const Sum& outer, const Sum& inner,
                     const float* const (*at)[kMostValues]) const {
    Product product;
    product.count = 0;
    for (int t = 0; t < outer.count; ++t) {
      for (int u = 0; u < inner.count; ++u) {
        const int64_t filter =
            outer.terms[t].factor * layer.columns.filters + inner.terms[u].factor;
        product.values[product.count] = at[t][inner.terms[u].index];
        product.weights[product.count++] =
            layer.weights + filter * layer.in_channels * layer.out_channels;
      }
    }
    return product;
  }

  // Whether the kTile products from `n` on are results, and of the same filters.
  bool same_filters(int n) const {
    if (n + kTile > columns.product_count) return false;
    const Sum& first = columns.products[n];
    for (int p = 0; p < kTile; ++p) {
      const Sum& other = columns.products[n + p];
      if (other.result < 0 || other.count != first.count) return false;
      for (int u = 0; u < first.count; ++u) {
        if (other.terms[u].factor != first.terms[u].factor) return false;
      }
    }
    return true;
  }

  void run() const {
    const Epilogue none = {nullptr, 1.0f}, last = {layer.bias, layer.slope};
    const int64_t out_size = layer.out_channels * kValue;
    for (int m = 0; m < rows.product_count; ++m) {
      const Sum& outer = rows.products[m];
      const bool final_row = outer.result >= 0;
      const Epilogue& epilogue = final_row ? last : none;
      const auto result_at = [&](int64_t place) {
        return final_row ? out_at(outer.result, place) : partial_at(m, place);
      };
      const float* at[kMostTerms][kMostValues];
      for (int t = 0; t < outer.count; ++t) {
        float* room = values + t * columns.value_count * layer.in_channels * kValue;
        prepare(rows.values[outer.terms[t].index], room, at[t]);
      }
      for (int n = 0; n < columns.product_count; ++n) {
        const Sum& inner = columns.products[n];
        if (layer.out_channels == 1 && same_filters(n)) {
          Product pixels[kTile];
          float* to[kTile];
          for (int p = 0; p < kTile; ++p) {
            pixels[p] = product_of(outer, columns.products[n + p], at);
            to[p] = result_at(columns.products[n + p].result);
          }
          multiply_pixels<V>(pixels, layer.in_channels, to, epilogue);
          n += kTile - 1;
          continue;
        }
        const Product product = product_of(outer, inner, at);
        if (inner.result >= 0) {
          multiply_all<V>(product, layer, result_at(inner.result), epilogue);
        } else {
          multiply_all<V>(product, layer, products + n * out_size, none);
        }
      }
      for (int t = 0; t < columns.tile_count; ++t) {
        const Tile& tile = columns.tiles[t];
        finish(tile, products + tile.first_product * out_size, out_size, epilogue, result_at);
      }
    }
    for (int t = 0; t < rows.tile_count; ++t) {
      const Tile& tile = rows.tiles[t];
      for (int64_t place = 0; place < columns.result_count; ++place) {
        finish(tile, partial_at(tile.first_product, place), columns.result_count * out_size, last,
               [&](int64_t row_place) { return out_at(row_place, place); });
      }
    }
  }

  // The results of a tile; `result_at(place)` is where the one at this place of its band belongs.
  template <typename F>
  void finish(const Tile& tile, const float* from, int64_t distance, const Epilogue& epilogue,
              const F& result_at) const {
    float* to[4];
    for (int r = 0; r < kTileResults[static_cast<int>(tile.algorithm)]; ++r) {
      to[r] = result_at(tile.first_result + r * tile.step);
    }
    with_algorithm(tile.algorithm, [&](auto type) {
      tile_results<typename decltype(type)::type, V>(from, distance, to, layer.out_channels,
                                                     epilogue);
    });
  }
};

template <int V>
void run_layer(const Layer& layer, const float* in, float* out, const float* zeros,
               float* working) {
  constexpr int64_t kValue = V * kLanes;
  float* const values = working;
  float* const products = values + layer.value_size * kValue;
  float* const partial = products + layer.product_size * kValue;
  for (int r = 0; r < layer.rows.band_count; ++r) {
    for (int c = 0; c < layer.columns.band_count; ++c) {
      const BandRunner<V> runner = {
          layer,  layer.rows.bands[r], layer.columns.bands[c], in, zeros, out, values, products,
          partial};
      runner.run();
    }
  }
}

// All layers in turn, between two buffers; returns where the last one wrote.
template <int V>
const float* run_layers(const Layer* layers, int64_t count, const float* in, float* ping,
                        float* pong, const float* zeros, float* working) {
  for (int64_t i = 0; i < count; ++i) {
    run_layer<V>(layers[i], in, ping, zeros, working);
    in = ping;
    ping = pong;
    pong = const_cast<float*>(in);
  }
  return in;
}

// Pixels of `count` patches, transposed to values in [0, 1]; lanes past the last patch are zero.
// They are transposed as they come, a few at a time, and scaled as vectors.
template <int V, typename T>
void load_block(const EngineArguments& a, int64_t first, int64_t count, float* to) {
  constexpr int64_t kValue = V * kLanes, kPiece = 32;
  const Network& network = *a.network;
  const T* pixels = static_cast<const T*>(a.pixels);
  const Vec scale = splat(sizeof(T) == 1 ? 1.0f / 255.0f : 1.0f);
  T piece[kPiece * kValue] = {};
  for (int64_t y = 0; y < network.height; ++y) {
    for (int64_t c = 0; c < network.channels; ++c) {
      float* const row = to + (y * network.width * network.channels + c) * kValue;
      for (int64_t x = 0; x < network.width; x += kPiece) {
        const int64_t taken = network.width - x < kPiece ? network.width - x : kPiece;
        for (int64_t lane = 0; lane < count; ++lane) {
          const T* from = pixels + a.origins[first + lane] + y * a.row_stride +
                          x * a.column_stride + c * a.channel_stride;
          for (int64_t i = 0; i < taken; ++i) piece[i * kValue + lane] = from[i * a.column_stride];
        }
        for (int64_t i = 0; i < taken; ++i) {
          float* at = row + (x + i) * network.channels * kValue;
          for (int v = 0; v < V; ++v) {
            store(at + v * kLanes, load(piece + i * kValue + v * kLanes) * scale);
          }
        }
      }
    }
  }
}

// Sigmoids of the logits less the pixels, in place.
template <int V>
void residuals_of(const Network& network, float* logits, const float* images) {
  constexpr int64_t kValue = V * kLanes;
  for (int64_t i = 0; i < network.pixels(); ++i) {
    Vec value[V];
    for (int v = 0; v < V; ++v) value[v] = load(logits + i * kValue + v * kLanes);
    sigmoid<V>(value);
    for (int v = 0; v < V; ++v) {
      store(logits + i * kValue + v * kLanes, value[v] - load(images + i * kValue + v * kLanes));
    }
  }
}

// Sums over as many places of an axis as a neighbourhood holds, `reach` on either side, as far as
// the axis goes: from[begin * step], ..., from[(end - 1) * step] for the place `at`.
template <int V>
void sum_neighbours(const float* from, int64_t step, int64_t at, int64_t length, int64_t reach,
                    Vec (&sums)[V], int64_t& count) {
  const int64_t begin = at > reach ? at - reach : 0;
  const int64_t end = at + reach < length ? at + reach + 1 : length;
  for (int v = 0; v < V; ++v) sums[v] = Vec{};
  for (int64_t i = begin; i < end; ++i) {
    for (int v = 0; v < V; ++v) sums[v] += load(from + i * step + v * kLanes);
  }
  count = end - begin;
}

// Squares of residuals that are averaged over a neighbourhood first: along rows into `spare`, then
// along columns.
template <int V>
void add_smoothed_squares(const Network& network, const float* residuals, float* spare,
                          double* totals) {
  constexpr int64_t kValue = V * kLanes;
  const int64_t reach = network.smoothing / 2, step = network.channels * kValue;
  const int64_t row = network.width * step;
  Vec sums[V];
  int64_t count;
  for (int64_t y = 0; y < network.height; ++y) {
    for (int64_t x = 0; x < network.width; ++x) {
      for (int64_t c = 0; c < step; c += kValue) {
        sum_neighbours<V>(residuals + y * row + c, step, x, network.width, reach, sums, count);
        const Vec factor = splat(1.0f / static_cast<float>(count));
        float* to = spare + y * row + x * step + c;
        for (int v = 0; v < V; ++v) store(to + v * kLanes, sums[v] * factor);
      }
    }
  }
  for (int64_t y = 0; y < network.height; ++y) {
    Vec squares[V] = {};
    for (int64_t i = 0; i < row; i += kValue) {
      sum_neighbours<V>(spare + i, row, y, network.height, reach, sums, count);
      const Vec factor = splat(1.0f / static_cast<float>(count));
      for (int v = 0; v < V; ++v) squares[v] += sums[v] * factor * (sums[v] * factor);
    }
    for (int64_t lane = 0; lane < kValue; ++lane) {
      totals[lane] += squares[lane / kLanes][lane % kLanes];
    }
  }
}

template <int V>
void add_squares(const Network& network, const float* logits, const float* images, double* totals) {
  constexpr int64_t kValue = V * kLanes;
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
}

// The logits, and as many values beside them in `spare`, are lost where residuals are smoothed.
template <int V>
void store_errors(const EngineArguments& a, int64_t first, int64_t count, float* logits,
                  const float* images, float* spare, float* to) {
  const Network& network = *a.network;
  // Sums of a row in single precision, rows in double: no digits are lost in large images.
  double totals[V * kLanes] = {};
  if (network.smoothing == 1) {
    add_squares<V>(network, logits, images, totals);
  } else {
    residuals_of<V>(network, logits, images);
    add_smoothed_squares<V>(network, logits, spare, totals);
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
  float* zeros = perturbation + network.latent * kValue;
  float* working = zeros + network.widest * kValue;
  __builtin_memset(zeros, 0, network.widest * kValue * sizeof(float));
  const int64_t latent_bytes = network.latent * kValue * sizeof(float);
  float* errors = a.errors;

  if (a.type == DType::kUInt8) {
    load_block<V, uint8_t>(a, first, count, images);
  } else {
    load_block<V, float>(a, first, count, images);
  }
  const auto decode = [&] {
    float* logits = const_cast<float*>(
        run_layers<V>(network.decoder, network.decoder_layers, latent, ping, pong, zeros, working));
    store_errors<V>(a, first, count, logits, images, logits == ping ? pong : ping, errors);
    errors += a.error_count;
  };
  __builtin_memcpy(
      latent,
      run_layers<V>(network.encoder, network.encoder_layers, images, ping, pong, zeros, working),
      latent_bytes);
  if (a.normal) decode();
  if (!a.perturbed) return;
  if (a.noise) {
    load_noise<V>(a, first, count, perturbation);
  } else {
    __builtin_memcpy(perturbation,
                     run_layers<V>(network.distorter, network.distorter_layers, images, ping, pong,
                                   zeros, working),
                     latent_bytes);
  }
  perturb<V>(network, latent, perturbation);
  decode();
}

// `vectors`: 1 to 3, as many as `count` patches fill.
inline void engine_block_fp32(const EngineArguments& a, int64_t first, int64_t count, int vectors,
                              float* scratch) {
  if (vectors == 1) return engine_block_of<1>(a, first, count, scratch);
  if (vectors == 2) return engine_block_of<2>(a, first, count, scratch);
  return engine_block_of<3>(a, first, count, scratch);
}
