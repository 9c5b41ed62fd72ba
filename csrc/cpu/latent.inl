// The latent perturbation and its per-sample energy, from one pass.

template <typename T>
void perturb_latent_of(const PerturbArguments& a, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const T* latent = static_cast<const T*>(a.latent) + n * a.latent_stride;
    const T* perturbation = static_cast<const T*>(a.perturbation) + n * a.perturbation_stride;
    T* perturbed = static_cast<T*>(a.perturbed) + n * a.size;
    double total = 0;
    if constexpr (sizeof(T) == 8) {
      for (int64_t i = 0; i < a.size; ++i) {
        const double scaled = a.strength * perturbation[i];
        perturbed[i] = latent[i] + scaled;
        total += scaled * scaled;
      }
    } else {
      const Vec strength = splat(static_cast<float>(a.strength));
      for (int64_t at = 0; at < a.size; at += kRun) {
        const int64_t count = a.size - at < kRun ? a.size - at : kRun;
        Vec energy = {};
        map(perturbed + at, count, a.stream, [&](int64_t i, int64_t lanes) {
          const Vec scaled = strength * load_lanes(perturbation + at + i, lanes);
          energy += scaled * scaled;
          return load_lanes(latent + at + i, lanes) + scaled;
        });
        total += sum_lanes(energy);
      }
    }
    a.energy[n] = static_cast<float>(total / static_cast<double>(a.size));
  }
  if (a.stream) stream_end();
}

void perturb_latent(const PerturbArguments& a, int64_t begin, int64_t end) {
  with_floating(a.type,
                [&](auto t) { perturb_latent_of<typename decltype(t)::type>(a, begin, end); });
}

template <typename T>
void perturb_latent_backward_of(const PerturbBackwardArguments& a, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const T* grad = static_cast<const T*>(a.grad_output) + n * a.grad_stride;
    const T* perturbation = static_cast<const T*>(a.perturbation) + n * a.perturbation_stride;
    T* result = static_cast<T*>(a.result) + n * a.size;
    const double factor =
        2 * a.strength * a.strength / static_cast<double>(a.size) * a.grad_energy[n];
    if constexpr (sizeof(T) == 8) {
      for (int64_t i = 0; i < a.size; ++i) {
        result[i] = a.strength * grad[i] + factor * perturbation[i];
      }
    } else {
      const Vec strength = splat(static_cast<float>(a.strength));
      const Vec scale = splat(static_cast<float>(factor));
      map(result, a.size, a.stream, [&](int64_t i, int64_t lanes) {
        return strength * load_lanes(grad + i, lanes) + scale * load_lanes(perturbation + i, lanes);
      });
    }
  }
  if (a.stream) stream_end();
}

void perturb_latent_backward(const PerturbBackwardArguments& a, int64_t begin, int64_t end) {
  with_floating(a.type, [&](auto t) {
    perturb_latent_backward_of<typename decltype(t)::type>(a, begin, end);
  });
}
