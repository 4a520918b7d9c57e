// Rotary embedding (Su et al. 2021, rotate-half form), gated activations and vector operations. Bound:
// memory.
#include "rlhf/kernels/cpu/exp.h"
#include "rlhf/kernels/cpu/kernels.h"

namespace rlhf::kernels::RLHF_ISA {

template <class T>
void rope(const RopeArgs<T>& args, std::int64_t t0, std::int64_t t1) {
  const std::int64_t half = args.H / 2;
  const T sign = args.inverse ? -1 : 1;
  for (std::int64_t t = t0; t < t1; ++t) {
    const T* cosine = args.cos + args.positions[t] * half;
    const T* sine = args.sin + args.positions[t] * half;
    for (std::int64_t n = 0; n < args.num_heads; ++n) {
      T* lo = args.x + t * args.row_stride + n * args.H;
      T* hi = lo + half;
#pragma omp simd
      for (std::int64_t i = 0; i < half; ++i) {
        const T a = lo[i], b = hi[i], s = sign * sine[i];
        lo[i] = a * cosine[i] - b * s;
        hi[i] = b * cosine[i] + a * s;
      }
    }
  }
}

namespace {

constexpr double kGeluC = 0.7978845608028654, kGeluA = 0.044715;  // sqrt(2 / pi), Hendrycks & Gimpel 2016

struct Silu {
  template <class T>
  static T value(T x) {
    return x / (1 + exp_approx(-x));
  }
  template <class T>
  static T slope(T x) {
    const T s = 1 / (1 + exp_approx(-x));
    return s * (1 + x * (1 - s));
  }
};

struct GeluTanh {
  template <class T>
  static T value(T x) {
    return T(0.5) * x * (1 + tanh_approx(T(kGeluC) * (x + T(kGeluA) * x * x * x)));
  }
  template <class T>
  static T slope(T x) {
    const T t = tanh_approx(T(kGeluC) * (x + T(kGeluA) * x * x * x));
    return T(0.5) * (1 + t) + T(0.5) * x * (1 - t * t) * T(kGeluC) * (1 + 3 * T(kGeluA) * x * x);
  }
};

template <class Fn, class T>
void gated(const ActivationArgs<T>& args, std::int64_t t) {
  const T* gate = args.x + t * 2 * args.F;
  const T* up = gate + args.F;
  T* y = args.y + t * args.F;
#pragma omp simd
  for (std::int64_t f = 0; f < args.F; ++f) y[f] = Fn::value(gate[f]) * up[f];
}

template <class Fn, class T>
void gated_grad(const ActivationGradArgs<T>& args, std::int64_t t) {
  const T* gate = args.x + t * 2 * args.F;
  const T* up = gate + args.F;
  const T* dy = args.dy + t * args.F;
  T* dgate = args.dx + t * 2 * args.F;
  T* dup = dgate + args.F;
#pragma omp simd
  for (std::int64_t f = 0; f < args.F; ++f) {
    const T g = gate[f], u = up[f], d = dy[f];
    dgate[f] = d * u * Fn::slope(g);
    dup[f] = d * Fn::value(g);
  }
}

}  // namespace

template <class T>
void activation(const ActivationArgs<T>& args, std::int64_t t0, std::int64_t t1) {
  for (std::int64_t t = t0; t < t1; ++t) {
    switch (args.kind) {
      case GluKind::kSilu:
        gated<Silu>(args, t);
        break;
      case GluKind::kGeluTanh:
        gated<GeluTanh>(args, t);
        break;
      case GluKind::kGeluTanhPlain: {
        const T* x = args.x + t * args.F;
        T* y = args.y + t * args.F;
#pragma omp simd
        for (std::int64_t f = 0; f < args.F; ++f) y[f] = GeluTanh::value(x[f]);
      }
    }
  }
}

template <class T>
void activation_grad(const ActivationGradArgs<T>& args, std::int64_t t0, std::int64_t t1) {
  for (std::int64_t t = t0; t < t1; ++t) {
    switch (args.kind) {
      case GluKind::kSilu:
        gated_grad<Silu>(args, t);
        break;
      case GluKind::kGeluTanh:
        gated_grad<GeluTanh>(args, t);
        break;
      case GluKind::kGeluTanhPlain: {
        const T* x = args.x + t * args.F;
        const T* dy = args.dy + t * args.F;
        T* dx = args.dx + t * args.F;
#pragma omp simd
        for (std::int64_t f = 0; f < args.F; ++f) dx[f] = dy[f] * GeluTanh::slope(x[f]);
      }
    }
  }
}

template <class T>
void add(T* y, const T* x, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) y[i] += x[i];
}

template <class T>
void scale(T* y, T factor, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) y[i] *= factor;
}

template <class T>
double sum_squares(const T* x, std::int64_t n) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (std::int64_t i = 0; i < n; ++i) total += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return total;
}

#define RLHF_INSTANTIATE(T)                                                                   \
  template void rope<T>(const RopeArgs<T>&, std::int64_t, std::int64_t);                      \
  template void activation<T>(const ActivationArgs<T>&, std::int64_t, std::int64_t);          \
  template void activation_grad<T>(const ActivationGradArgs<T>&, std::int64_t, std::int64_t); \
  template void add<T>(T*, const T*, std::int64_t);                                           \
  template void scale<T>(T*, T, std::int64_t);                                                \
  template double sum_squares<T>(const T*, std::int64_t);
RLHF_INSTANTIATE(float)
RLHF_INSTANTIATE(double)

}  // namespace rlhf::kernels::RLHF_ISA
