// Layers of the engine in bf16 and int8 as products of matrices in tile registers (AMX). The words
// lie as those want them: a row of the first matrix is a channel's weights, a row of the second the
// words of many patches for which they are meant, so that nothing is moved before or after.

// Of a tile register: rows, and bytes of a row.
constexpr int kTileRows = 16;
constexpr int kTileBytes = 64;
// Weights in a product at least: below, the products of vectors take no more cycles.
constexpr int64_t kLeastTile = 64;

// What `ldtilecfg` reads.
struct TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// The largest divisor of at most `most`: no tile is filled in part.
inline int64_t largest_part(int64_t size, int64_t most) {
  while (size % most) --most;
  return most;
}

// Sums of patches: registers 0 to 2; weights: 3; words of patches: 4 to 6.
template <typename P, int V>
__attribute__((always_inline)) inline void multiply_tiles(const uint32_t* x, const uint32_t* w,
                                                          int64_t groups, int64_t part) {
  constexpr int64_t kRow = V * kTileBytes;
  for (int64_t g = 0; g < groups; g += part) {
    _tile_loadd(3, w + g, groups * sizeof(uint32_t));
    const char* const words = reinterpret_cast<const char*>(x) + g * kRow;
    _tile_loadd(4, words, kRow);
    P::multiply_tile_0();
    if constexpr (V > 1) {
      _tile_loadd(5, words + kTileBytes, kRow);
      P::multiply_tile_1();
    }
    if constexpr (V > 2) {
      _tile_loadd(6, words + 2 * kTileBytes, kRow);
      P::multiply_tile_2();
    }
  }
}

// The layer if its shape suits tiles; false: it does not, and nothing was done.
template <typename P, int V>
bool run_tiled_layer(const NarrowLayer& layer, const uint32_t* in, void* out, int64_t groups,
                     int64_t out_size) {
  static_assert(kLanes == kTileRows && kLanes * sizeof(uint32_t) == kTileBytes);
  if (layer.out_channels % kTile) return false;
  const int64_t part = largest_part(groups, kTileRows);
  const int64_t rows = kTile * largest_part(layer.out_channels / kTile, kTileRows / kTile);
  if (part * rows < kLeastTile) return false;
  TileShapes shapes;
  for (int v = 0; v < V; ++v) {
    shapes.rows[v] = static_cast<uint8_t>(rows);
    shapes.rows[4 + v] = static_cast<uint8_t>(part);
    shapes.bytes[v] = shapes.bytes[4 + v] = kTileBytes;
  }
  shapes.rows[3] = static_cast<uint8_t>(rows);
  shapes.bytes[3] = static_cast<uint16_t>(part * sizeof(uint32_t));
  // gcc's intrinsics do not say that they read memory: what they read is written before this.
  asm volatile("" ::: "memory");
  _tile_loadconfig(&shapes);
  alignas(kTileBytes) typename P::Sum sums[kTileRows][V];
  for (int64_t p = 0; p < layer.pixel_count; ++p) {
    const NarrowPixel& pixel = layer.pixels[p];
    uint32_t* const to = static_cast<uint32_t*>(out) + p * out_size;
    for (int64_t first = 0; first < layer.out_channels; first += rows) {
      _tile_zero(0);
      if constexpr (V > 1) _tile_zero(1);
      if constexpr (V > 2) _tile_zero(2);
      for (int t = 0; t < pixel.count; ++t) {
        const Term term = pixel.terms[t];
        multiply_tiles<P, V>(in + term.index * groups * V * kLanes,
                             layer.words + (term.factor * layer.out_channels + first) * groups,
                             groups, part);
      }
      _tile_stored(0, &sums[0][0], V * kTileBytes);
      if constexpr (V > 1) _tile_stored(1, &sums[0][1], V * kTileBytes);
      if constexpr (V > 2) _tile_stored(2, &sums[0][2], V * kTileBytes);
      for (int64_t r = 0; r < rows; r += kTile) {
        finish_narrow<P, V, kTile>(layer, sums + r, pixel.bias_class, first + r, to);
      }
    }
  }
  // Registers in use make the kernel's switch of threads save 8 KiB.
  _tile_release();
  return true;
}
