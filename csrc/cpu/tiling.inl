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

// A row of pixels, moved as it is.
template <typename T>
inline void copy_row(const T* from, int64_t step, T* to, int64_t count) {
  if (step != 1) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i * step];
    return;
  }
  // Pieces of fixed sizes: rows are short, and a call of memcpy would take longer than they do.
  constexpr int64_t kPiece = 16 / sizeof(T);
  if (count < kPiece) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
    return;
  }
  for (int64_t i = 0; i + kPiece < count; i += kPiece) __builtin_memcpy(to + i, from + i, 16);
  // The last piece overlaps the one before it.
  __builtin_memcpy(to + count - kPiece, from + count - kPiece, 16);
}

// Moves the patches at `origins` into `stage`, as they are: a row of pixels of each in turn, since
// patches that stand side by side share rows of the frame.
template <typename T>
inline void copy_patches(const TileArguments& a, const T* const* origins, int64_t count, T* stage) {
  const int64_t height = a.grid.rows.patch, width = a.grid.columns.patch;
  const int64_t elements = a.channels * height * width;
  constexpr int64_t kPiece = 16 / sizeof(T);
  const bool two_pieces = a.strides[3] == 1 && width >= kPiece && width <= 2 * kPiece;
  for (int64_t channel = 0; channel < a.channels; ++channel) {
    for (int64_t y = 0; y < height; ++y) {
      const int64_t at = channel * a.strides[1] + y * a.strides[2];
      T* to = stage + (channel * height + y) * width;
      if (two_pieces) {
        for (int64_t i = 0; i < count; ++i, to += elements) {
          const T* from = origins[i] + at;
          __builtin_memcpy(to, from, 16);
          __builtin_memcpy(to + width - kPiece, from + width - kPiece, 16);
        }
        continue;
      }
      for (int64_t i = 0; i < count; ++i, to += elements) {
        copy_row(origins[i] + at, a.strides[3], to, width);
      }
    }
  }
}

constexpr int64_t kStage = 16384;  // bytes; half of the L1 cache
constexpr int64_t kBatch = 64;     // patches

// Writes `count` patches, one after the other; origin(i) is the first pixel of patch i. Their
// pixels are first gathered in the L1 cache: rows are short and not aligned, but the run of patches
// is then converted and written in whole vectors.
template <typename In, typename Out, typename F>
inline void emit_patches(const TileArguments& a, int64_t count, const F& origin, Out* to) {
  const int64_t elements = a.channels * a.grid.rows.patch * a.grid.columns.patch;
  if constexpr (sizeof(In) < 8 && sizeof(Out) < 8) {
    alignas(64) In stage[kStage / sizeof(In)];
    const In* origins[kBatch];
    int64_t fit = kStage / static_cast<int64_t>(sizeof(In)) / elements;
    if (fit > kBatch) fit = kBatch;
    if (fit > 0) {
      const Vec factor = splat(static_cast<float>(a.scale));
      const Vec offset = splat(static_cast<float>(a.shift));
      for (int64_t first = 0; first < count; first += fit) {
        const int64_t batch = count - first < fit ? count - first : fit;
        for (int64_t i = 0; i < batch; ++i) origins[i] = origin(first + i);
        copy_patches(a, origins, batch, stage);
        map(to + first * elements, batch * elements, a.stream, [&](int64_t i, int64_t lanes) {
          return load_lanes(stage + i, lanes) * factor + offset;
        });
      }
      return;
    }
  }
  for (int64_t i = 0; i < count; ++i) cut_patch(a, origin(i), to + i * elements);
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
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / rows.count, y = rows.origin(task % rows.count);
      const In* line = static_cast<const In*>(a.frames) + n * a.strides[0] + y * a.strides[2];
      emit_patches<In>(
          a, columns.count,
          [&](int64_t column) { return line + columns.origin(column) * a.strides[3]; },
          static_cast<Out*>(a.patches) + task * columns.count * elements);
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
    const auto origin = [&](int64_t k) {
      const int64_t n = g.index[2 * (begin + k)], patch = g.index[2 * (begin + k) + 1];
      const int64_t y = rows.origin(patch / columns.count);
      const int64_t x = columns.origin(patch % columns.count);
      return static_cast<const In*>(a.frames) + n * a.strides[0] + y * a.strides[2] +
             x * a.strides[3];
    };
    emit_patches<In>(a, end - begin, origin, static_cast<Out*>(a.patches) + begin * elements);
  });
  if (a.stream) stream_end();
}

template <typename G, typename T>
void tile_patches_backward_of(const TileBackwardArguments& a, int64_t begin, int64_t end) {
  typedef Compute<G> C;
  const Axis &rows = a.grid.rows, &columns = a.grid.columns;
  const int64_t patch_elements = rows.patch * columns.patch;
  C* line = static_cast<C*>(__builtin_malloc(sizeof(C) * columns.size));
  int64_t first = 0, last = 0;  // the rows of patches that hold a row of pixels
  for (int64_t task = begin; task < end; ++task) {
    const int64_t y = task % rows.size, plane = task / rows.size;
    const int64_t channel = plane % a.channels, n = plane / a.channels;
    for (int64_t x = 0; x < columns.size; ++x) line[x] = 0;
    if (task == begin || y == 0) first = last = 0;
    rows.advance(y, first, last);
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

// Adds to totals[i] the absolute differences between two runs of `width` bytes from origins[i] on.
inline void add_differences(const uint8_t* frame, int64_t step, const uint8_t* background,
                            int64_t width, const int64_t* origins, int64_t count, int64_t* totals) {
#if defined(__SSE2__)
  if (step == 1 && width >= 16) {
    // The last 16 bytes of a run overlap those before them, which are masked off.
    alignas(16) static const uint8_t kMask[32] = {
        0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,
        255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255};
    const int64_t tail = (width - 1) % 16 + 1, whole = width - tail;
    const __m128i mask = read<__m128i>(kMask + tail);
    for (int64_t i = 0; i < count; ++i) {
      const uint8_t *one = frame + origins[i], *other = background + origins[i];
      const __m128i end = _mm_and_si128(mask, read<__m128i>(one + width - 16));
      const __m128i other_end = _mm_and_si128(mask, read<__m128i>(other + width - 16));
      __m128i total = _mm_sad_epu8(end, other_end);
      for (int64_t x = 0; x < whole; x += 16) {
        const __m128i piece = read<__m128i>(one + x), other_piece = read<__m128i>(other + x);
        total = _mm_add_epi64(total, _mm_sad_epu8(piece, other_piece));
      }
      total = _mm_add_epi64(total, _mm_unpackhi_epi64(total, total));
      totals[i] += _mm_cvtsi128_si64(total);
    }
    return;
  }
#endif
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t x = origins[i]; x < origins[i] + width; ++x) {
      const int difference = static_cast<int>(frame[x * step]) - static_cast<int>(background[x]);
      totals[i] += difference < 0 ? -difference : difference;
    }
  }
}

void activity(const ActivityArguments& a, int64_t begin, int64_t end) {
  const Axis &rows = a.grid.rows, &columns = a.grid.columns;
  int64_t origins[kBatch], totals[kBatch];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / rows.count, y = rows.origin(task % rows.count);
    for (int64_t first = 0; first < columns.count; first += kBatch) {
      const int64_t count = columns.count - first < kBatch ? columns.count - first : kBatch;
      for (int64_t i = 0; i < count; ++i) {
        origins[i] = columns.origin(first + i);
        totals[i] = 0;
      }
      // Row after row of the frame, all patches at once: memory is read in order.
      const uint8_t* frame = a.frames + n * a.strides[0] + y * a.strides[1];
      const uint8_t* background = a.background + y * columns.size;
      for (int64_t row = 0; row < rows.patch; ++row) {
        add_differences(frame, a.strides[2], background, columns.patch, origins, count, totals);
        frame += a.strides[1];
        background += columns.size;
      }
      uint8_t* active = a.active + task * columns.count + first;
      for (int64_t i = 0; i < count; ++i) active[i] = totals[i] > a.limit;
    }
  }
}
