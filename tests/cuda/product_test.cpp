// Products of matrices on every device against plain loops in double. |error| <= (K + 2) u sum |a b| (Higham
// 2002, eq. 3.5), with u of float: all devices sum in float.
#include "tests/cuda/devices.h"

using namespace rlhf;

namespace {

std::size_t at(std::int64_t i) {
  return static_cast<std::size_t>(i);
}

struct Shape {
  std::int64_t M, N, K;
};
constexpr Shape kShapes[] = {{0, 5, 7}, {1, 1, 1}, {3, 66, 17}, {65, 64, 16}, {70, 130, 33}, {2, 5, 300}};

double bound(const Shape& shape) {
  return static_cast<double>(shape.K + 8) * 0x1.0p-24 * 8;
}

template <class T, class Y, class Run>
void check_linear(const Shape& shape, bool with_bias, bool accumulate, const Run& run) {
  const auto [M, N, K] = shape;
  const std::int64_t ldx = K + 3, ldy = N + 2;
  const Values<T> x = random_rounded<T>(M * ldx, 1), w = random_rounded<T>(N * K, 2),
                  bias = random_rounded<T>(N, 3);
  const Values<Y> before = random_rounded<Y>(M * ldy, 4);
  std::vector<double> expected = before.exact;
  for (std::int64_t m = 0; m < M; ++m)
    for (std::int64_t n = 0; n < N; ++n) {
      double sum = with_bias ? bias.exact[at(n)] : 0;
      for (std::int64_t k = 0; k < K; ++k) sum += x.exact[at(m * ldx + k)] * w.exact[at(n * K + k)];
      expected[at(m * ldy + n)] = sum + (accumulate ? before.exact[at(m * ldy + n)] : 0);
    }
  on_every_device<T>([&](const TestDevice<T>& device) {
    INFO(device.name << ", M " << M << ", N " << N << ", K " << K << ", bias " << with_bias << ", accumulate "
                     << accumulate);
    auto dx = device.put(x.stored), dw = device.put(w.stored), db = device.put(bias.stored);
    auto y = device.put(before.stored);
    run(device, kernels::LinearArgs<T, Y>{dx.data(), ldx, dw.data(), with_bias ? db.data() : nullptr,
                                          y.data(), ldy, K, accumulate});
    // cuBLASLt rounds once more before it adds the bias to what was there (seen on an H200); values before
    // that are below 8.
    const bool twice = std::string(device.name) == "cuda" && with_bias && accumulate;
    const double more = twice ? kRounding<Y> : 0;
    check_values(y.values(), expected, bound(shape) + 8 * more, bound(shape) + more);
  });
}

template <class T, class C, class Run>
void check_gemm(const Shape& shape, bool transposed, bool accumulate, const Run& run) {
  const auto [M, N, K] = shape;
  const std::int64_t ldb = N + 1, ldc = N + 3, row = transposed ? 1 : K, column = transposed ? M : 1;
  const Values<T> a = random_rounded<T>(M * K, 1), b = random_rounded<T>(K * ldb, 2);
  const Values<C> before = random_rounded<C>(M * ldc, 3);
  std::vector<double> expected = before.exact;
  for (std::int64_t i = 0; i < M; ++i)
    for (std::int64_t j = 0; j < N; ++j) {
      double sum = accumulate ? before.exact[at(i * ldc + j)] : 0;
      for (std::int64_t k = 0; k < K; ++k)
        sum += a.exact[at(i * row + k * column)] * b.exact[at(k * ldb + j)];
      expected[at(i * ldc + j)] = sum;
    }
  on_every_device<T>([&](const TestDevice<T>& device) {
    INFO(device.name << ", M " << M << ", N " << N << ", K " << K << ", transposed " << transposed
                     << ", accumulate " << accumulate);
    auto da = device.put(a.stored), db = device.put(b.stored);
    auto c = device.put(before.stored);
    run(device,
        kernels::GemmArgs<T, C>{da.data(), row, column, db.data(), ldb, c.data(), ldc, M, N, K, accumulate});
    check_values(c.values(), expected, bound(shape), bound(shape));
  });
}

}  // namespace

TEMPLATE_TEST_CASE("linear equals the plain loop on every device", "[device]", float, Bfloat16) {
  using T = TestType;
  for (const Shape& shape : kShapes)
    for (int form = 0; form < 4; ++form) {
      check_linear<T, T>(shape, form & 1, form & 2, [&](const auto& device, const auto& args) {
        device.ops->linear(args, shape.M, shape.N, device.queue());
      });
      check_linear<T, Wide<T>>(shape, form & 1, form & 2, [&](const auto& device, const auto& args) {
        device.ops->linear_wide(args, shape.M, shape.N, device.queue());
      });
    }
}

TEMPLATE_TEST_CASE("gemm equals the plain loop on every device", "[device]", float, Bfloat16) {
  using T = TestType;
  for (const Shape& shape : kShapes)
    for (int form = 0; form < 4; ++form) {
      check_gemm<T, T>(shape, form & 1, form & 2,
                       [](const auto& device, const auto& args) { device.ops->gemm(args, device.queue()); });
      check_gemm<T, Wide<T>>(shape, form & 1, form & 2, [](const auto& device, const auto& args) {
        device.ops->gemm_wide(args, device.queue());
      });
    }
}
