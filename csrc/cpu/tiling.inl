// Cutting frames into patches and back, and the motion gate in front of it.

// A row of pixels to a row of a patch.
template <typename In, typename Out>
inline void convert_row(const In* from, int64_t step, Out* to, int64_t count, double scale,
                        double shift) {
  if constexpr (sizeof(In) == 8 || sizeof(Out) == 8) {
    for (int64_t i = 0; i < count; ++i) {
      const Compute<In> value = get(from + i * step);
      // As the reference does: in float32 unless the pixels are float64.
      if constexpr (sizeof(In) == 8) {
        put(to + i, value * scale + shift);
      } else {
        put(to + i, value * static_cast<float>(scale) + static_cast<float>(shift));
      }
    }
  } else {
    const Vec factor = splat(static_cast<float>(scale)), offset = splat(static_cast<float>(shift));
    if (step != 1) {
      In lanes[kLanes];
      map(to, count, false, [&](int64_t i, int64_t filled) {
        for (int64_t lane = 0; lane < filled; ++lane) lanes[lane] = from[(i + lane) * step];
        return load_lanes(lanes, filled) * factor + offset;
      });
      return;
    }
    if (count >= kLanes) {
      // The last vector overlaps the one before it: cheaper than a partial one.
      int64_t i = 0;
      for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i) * factor + offset);
      if (i < count) {
        i = count - kLanes;
        store(to + i, load(from + i) * factor + offset);
      }
      return;
    }
    store_part(to, load_part(from, count) * factor + offset, count);
  }
}

template <typename In, typename Out>
inline void cut_patch(const TileArguments& a, const In* origin, Out* to) {
  for (int64_t channel = 0; channel < a.channels; ++channel) {
    const In* row = origin + channel * a.strides[1];
    for (int64_t y = 0; y < a.grid.rows.patch; ++y) {
      convert_row(row, a.strides[3], to, a.grid.columns.patch, a.scale, a.shift);
      row += a.strides[2];
      to += a.grid.columns.patch;
    }
  }
}

constexpr int64_t kStage = 16384;  // bytes of a patch that is staged in the L1 cache

// Writes one patch; past the caches by way of a staging buffer, since its rows are not aligned.
template <typename In, typename Out>
inline void emit_patch(const TileArguments& a, const In* origin, Out* to) {
  const int64_t elements = a.channels * a.grid.rows.patch * a.grid.columns.patch;
  const int64_t bytes = elements * static_cast<int64_t>(sizeof(Out));
  if (!a.stream || bytes > kStage || bytes % 4 != 0 || reinterpret_cast<uintptr_t>(to) % 4 != 0) {
    return cut_patch(a, origin, to);
  }
  alignas(64) unsigned char stage[kStage];
  cut_patch(a, origin, reinterpret_cast<Out*>(stage));
  // Copied as raw 32-bit words, whatever the dtype.
  const float* words = reinterpret_cast<const float*>(stage);
  map(reinterpret_cast<float*>(to), bytes / 4, true,
      [&](int64_t i, int64_t lanes) { return load_lanes(words + i, lanes); });
}

template <typename F>
inline void with_pixels(const TileArguments& a, const F& f) {
  const auto with_output = [&](auto in) {
    with_floating(a.patches_type, [&](auto out) { f(in, out); });
  };
  if (a.frames_type == DType::kUInt8) return with_output(Type<uint8_t>{});
  with_floating(a.frames_type, with_output);
}

void tile_patches(const TileArguments& a, int64_t begin, int64_t end) {
  const Axis &rows = a.grid.rows, &columns = a.grid.columns;
  const int64_t elements = a.channels * rows.patch * columns.patch;
  with_pixels(a, [&](auto in, auto out) {
    typedef typename decltype(in)::type In;
    typedef typename decltype(out)::type Out;
    Out* to = static_cast<Out*>(a.patches) + begin * columns.count * elements;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / rows.count, y = rows.origin(task % rows.count);
      const In* line = static_cast<const In*>(a.frames) + n * a.strides[0] + y * a.strides[2];
      for (int64_t column = 0; column < columns.count; ++column) {
        emit_patch(a, line + columns.origin(column) * a.strides[3], to);
        to += elements;
      }
    }
  });
  if (a.stream) stream_end();
}

void gather(const GatherArguments& g, int64_t begin, int64_t end) {
  const TileArguments& a = g.tile;
  const Axis &rows = a.grid.rows, &columns = a.grid.columns;
  const int64_t elements = rows.patch * columns.patch;
  with_pixels(a, [&](auto in, auto out) {
    typedef typename decltype(in)::type In;
    typedef typename decltype(out)::type Out;
    for (int64_t k = begin; k < end; ++k) {
      const int64_t n = g.index[2 * k], patch = g.index[2 * k + 1];
      const int64_t y = rows.origin(patch / columns.count);
      const int64_t x = columns.origin(patch % columns.count);
      const In* origin =
          static_cast<const In*>(a.frames) + n * a.strides[0] + y * a.strides[2] + x * a.strides[3];
      emit_patch(a, origin, static_cast<Out*>(a.patches) + k * elements);
    }
  });
  if (a.stream) stream_end();
}

template <typename G, typename T>
void tile_patches_backward_of(const TileBackwardArguments& a, int64_t begin, int64_t end) {
  typedef Compute<G> C;
  const Axis &rows = a.grid.rows, &columns = a.grid.columns;
  const int64_t patch_elements = rows.patch * columns.patch;
  C* line = static_cast<C*>(__builtin_malloc(sizeof(C) * columns.size));
  for (int64_t task = begin; task < end; ++task) {
    const int64_t y = task % rows.size, plane = task / rows.size;
    const int64_t channel = plane % a.channels, n = plane / a.channels;
    for (int64_t x = 0; x < columns.size; ++x) line[x] = 0;
    const int64_t first = rows.first(y), last = first + rows.holders(y);
    for (int64_t r = first; r < last; ++r) {
      for (int64_t c = 0; c < columns.count; ++c) {
        const int64_t patch = (n * rows.count + r) * columns.count + c;
        const G* grad = static_cast<const G*>(a.grad) +
                        (patch * a.channels + channel) * patch_elements +
                        (y - rows.origin(r)) * columns.patch;
        C* to = line + columns.origin(c);
        for (int64_t x = 0; x < columns.patch; ++x) to[x] += get(grad + x);
      }
    }
    T* to = static_cast<T*>(a.frames) + task * columns.size;
    if constexpr (sizeof(C) == 8 || sizeof(T) == 8) {
      for (int64_t x = 0; x < columns.size; ++x) put(to + x, line[x] * a.scale);
    } else {
      const Vec scale = splat(static_cast<float>(a.scale));
      map(to, columns.size, false,
          [&](int64_t x, int64_t lanes) { return load_lanes(line + x, lanes) * scale; });
    }
  }
  __builtin_free(line);
}

void tile_patches_backward(const TileBackwardArguments& a, int64_t begin, int64_t end) {
  with_floating(a.grad_type, [&](auto grad) {
    with_floating(a.frames_type, [&](auto frames) {
      tile_patches_backward_of<typename decltype(grad)::type, typename decltype(frames)::type>(
          a, begin, end);
    });
  });
}

// Sum of absolute differences of two runs of bytes.
inline int64_t absolute_difference(const uint8_t* a, int64_t step, const uint8_t* b,
                                   int64_t count) {
#if defined(__SSE2__)
  if (step == 1 && count >= 16) {
    __m128i total = _mm_setzero_si128();
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
      total = _mm_add_epi64(total, _mm_sad_epu8(read<__m128i>(a + i), read<__m128i>(b + i)));
    }
    if (i < count) {
      // The last 16 bytes again; those already counted are masked off.
      alignas(16) static const uint8_t kMask[32] = {
          0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,
          255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255};
      const __m128i mask = read<__m128i>(kMask + (count - i));
      const __m128i x = _mm_and_si128(mask, read<__m128i>(a + count - 16));
      const __m128i y = _mm_and_si128(mask, read<__m128i>(b + count - 16));
      total = _mm_add_epi64(total, _mm_sad_epu8(x, y));
    }
    return _mm_cvtsi128_si64(total) + _mm_cvtsi128_si64(_mm_srli_si128(total, 8));
  }
#endif
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int difference = static_cast<int>(a[i * step]) - static_cast<int>(b[i]);
    total += difference < 0 ? -difference : difference;
  }
  return total;
}

void activity(const ActivityArguments& a, int64_t begin, int64_t end) {
  const Axis &rows = a.grid.rows, &columns = a.grid.columns;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / rows.count, origin = rows.origin(task % rows.count);
    for (int64_t c = 0; c < columns.count; ++c) {
      const int64_t x = columns.origin(c);
      int64_t total = 0;
      for (int64_t y = origin; y < origin + rows.patch; ++y) {
        total +=
            absolute_difference(a.frames + n * a.strides[0] + y * a.strides[1] + x * a.strides[2],
                                a.strides[2], a.background + y * columns.size + x, columns.patch);
      }
      a.active[task * columns.count + c] = total > a.limit;
    }
  }
}
