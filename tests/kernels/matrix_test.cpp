// Matrix products against plain loops in double. Tolerance of a sum of K products in precision u: each of the
// K additions and the product round once, so |error| <= (K + 2) u sum |x w| (Higham 2002, eq. 3.5); a missing
// or doubled product is K times larger than that for the K used here.
#include <algorithm>
#include <array>

#include "tests/kernels/support.h"

using namespace rlhf;

namespace {

struct Shape {
  std::int64_t M, N, K;
};

template <class T>
struct LinearCase {
  Shape shape;
  std::int64_t ldx, ldy;
  std::vector<T> x, w, bias, y;

  LinearCase(Shape s, std::int64_t x_padding, std::int64_t y_padding)
      : shape(s),
        ldx(s.K + x_padding),
        ldy(s.N + y_padding),
        // The last row ends with the buffer: reading past it is an error that the sanitizer sees.
        x(random_values<T>((s.M - 1) * ldx + s.K, 1)),
        w(random_values<T>(s.N * s.K, 2)),
        bias(random_values<T>(s.N, 3)),
        y(random_values<T>((s.M - 1) * ldy + s.N, 4)) {}

  kernels::LinearArgs<T> args(bool with_bias, bool accumulate) {
    return {x.data(), ldx, w.data(), with_bias ? bias.data() : nullptr, y.data(), ldy, shape.K, accumulate};
  }
};

template <class T>
void check_linear(Shape shape, bool with_bias, bool accumulate, const Compute<T>& compute) {
  LinearCase<T> c(shape, shape.K % 3, shape.N % 2);
  const std::vector<T> before = c.y;
  compute.linear(c.args(with_bias, accumulate), shape.M, shape.N);
  std::size_t off = 0;
  for (std::int64_t m = 0; m < shape.M; ++m)
    for (std::int64_t n = 0; n < c.ldy && m * c.ldy + n < static_cast<std::int64_t>(c.y.size()); ++n) {
      const auto at = static_cast<std::size_t>(m * c.ldy + n);
      if (n >= shape.N) {  // between the rows
        off += c.y[at] != before[at];
        continue;
      }
      double sum = 0, size = 0;
      for (std::int64_t k = 0; k < shape.K; ++k) {
        const double product = static_cast<double>(c.x[static_cast<std::size_t>(m * c.ldx + k)]) *
                               static_cast<double>(c.w[static_cast<std::size_t>(n * shape.K + k)]);
        sum += product;
        size += std::abs(product);
      }
      for (double extra : {with_bias ? static_cast<double>(c.bias[static_cast<std::size_t>(n)]) : 0,
                           accumulate ? static_cast<double>(before[at]) : 0}) {
        sum += extra;
        size += std::abs(extra);
      }
      off += !(std::abs(static_cast<double>(c.y[at]) - sum) <=
               static_cast<double>(shape.K + 4) * kUnit<T> * size);
    }
  if (off > 0) {
    INFO(compute.table().isa << ", M " << shape.M << ", N " << shape.N << ", K " << shape.K << ", bias "
                             << with_bias << ", accumulate " << accumulate);
    CHECK(off == 0);
  }
}

template <class T>
struct GemmCase {
  Shape shape;
  bool transposed;
  std::int64_t ldb, ldc;
  std::vector<T> a, b, c;

  GemmCase(Shape s, bool transpose_a)
      : shape(s),
        transposed(transpose_a),
        ldb(s.N + s.K % 2),
        ldc(s.N + s.M % 3),
        a(random_values<T>(s.M * s.K, 5)),
        b(random_values<T>((s.K - 1) * ldb + s.N, 6)),
        c(random_values<T>((s.M - 1) * ldc + s.N, 7)) {}

  std::int64_t row_stride() const { return transposed ? 1 : shape.K; }
  std::int64_t col_stride() const { return transposed ? shape.M : 1; }
  kernels::GemmArgs<T> args(bool accumulate) {
    return {a.data(), row_stride(), col_stride(), b.data(), ldb,       c.data(),
            ldc,      shape.M,      shape.N,      shape.K,  accumulate};
  }
};

template <class T>
void check_gemm(Shape shape, bool transposed, bool accumulate, const Compute<T>& compute) {
  GemmCase<T> g(shape, transposed);
  const std::vector<T> before = g.c;
  compute.gemm(g.args(accumulate));
  std::size_t off = 0;
  for (std::int64_t i = 0; i < shape.M; ++i)
    for (std::int64_t j = 0; j < g.ldc && i * g.ldc + j < static_cast<std::int64_t>(g.c.size()); ++j) {
      const auto at = static_cast<std::size_t>(i * g.ldc + j);
      if (j >= shape.N) {
        off += g.c[at] != before[at];
        continue;
      }
      double sum = accumulate ? static_cast<double>(before[at]) : 0, size = std::abs(sum);
      for (std::int64_t k = 0; k < shape.K; ++k) {
        const double product =
            static_cast<double>(g.a[static_cast<std::size_t>(i * g.row_stride() + k * g.col_stride())]) *
            static_cast<double>(g.b[static_cast<std::size_t>(k * g.ldb + j)]);
        sum += product;
        size += std::abs(product);
      }
      off += !(std::abs(static_cast<double>(g.c[at]) - sum) <=
               static_cast<double>(shape.K + 4) * kUnit<T> * size);
    }
  if (off > 0) {
    INFO(compute.table().isa << ", M " << shape.M << ", N " << shape.N << ", K " << shape.K << ", transposed "
                             << transposed << ", accumulate " << accumulate);
    CHECK(off == 0);
  }
}

}  // namespace

TEST_CASE("the instruction sets are named, and the best one is supported") {
  CHECK(kernels::cpu_supports(kernels::CpuIsa::kBaseline));
  CHECK(kernels::cpu_supports(kernels::detect_cpu_isa()));
  CHECK(std::string(kernels::kernels_for<float>(kernels::CpuIsa::kBaseline).isa) == "baseline");
  // Which tests of this file ran is part of what it says.
  if (supported_isas().size() < 3)
    WARN("this machine has " << supported_isas().size()
                             << " of 3 instruction sets; the others are not tested");
}

TEMPLATE_TEST_CASE("linear equals the plain loop", "", float, double) {
  ThreadPool pool(2);
  for (const auto isa : supported_isas()) {
    const Compute<TestType> compute(pool, isa);
    for (std::int64_t M : {1, 2, 3, 5, 6, 7, 13})
      for (std::int64_t N : {1, 3, 4, 5, 31, 33, 66})
        for (std::int64_t K : {1, 3, 7, 8, 15, 17, 33, 100})
          for (int form = 0; form < 4; ++form) check_linear<TestType>({M, N, K}, form & 1, form & 2, compute);
    // More than one block of rows and of columns; the decode path's wide head.
    for (const Shape shape : {Shape{99, 130, 67}, Shape{193, 65, 20}, Shape{9, 4100, 5}, Shape{2, 4099, 9},
                              Shape{1, 97, 385}, Shape{4, 260, 130}})
      for (int form = 0; form < 4; ++form) check_linear<TestType>(shape, form & 1, form & 2, compute);
  }
}

TEMPLATE_TEST_CASE("linear without rows writes nothing", "", float, double) {
  ThreadPool pool(1);
  for (const auto isa : supported_isas()) {
    LinearCase<TestType> c({1, 5, 7}, 0, 0);
    const auto before = c.y;
    Compute<TestType>(pool, isa).linear(c.args(true, false), 0, 5);
    CHECK(c.y == before);
  }
}

TEMPLATE_TEST_CASE("a row of linear does not depend on the batch, bit for bit", "", float, double) {
  ThreadPool pool(2);
  for (const auto isa : supported_isas()) {
    const Compute<TestType> compute(pool, isa);
    for (const Shape shape : {Shape{37, 33, 100}, Shape{37, 66, 17}, Shape{130, 130, 67}, Shape{37, 4101, 24},
                              Shape{37, 3, 5}, Shape{37, 70, 801}}) {
      LinearCase<TestType> c(shape, 3, 1);
      compute.linear(c.args(true, false), shape.M, shape.N);
      const std::vector<TestType> all = c.y;
      std::int64_t different = 0;
      // Alone, and as a member of every smaller batch.
      for (std::int64_t rows : {1, 2, 4, 5, 8, 9, 11})
        for (std::int64_t first = 0; first + rows <= shape.M; first += rows) {
          std::vector<TestType> y(static_cast<std::size_t>(rows * c.ldy));
          auto args = c.args(true, false);
          args.x += first * c.ldx;
          args.y = y.data();
          compute.linear(args, rows, shape.N);
          for (std::int64_t r = 0; r < rows; ++r)
            different += !std::equal(y.begin() + r * c.ldy, y.begin() + r * c.ldy + shape.N,
                                     all.begin() + (first + r) * c.ldy);
        }
      INFO(compute.table().isa << ", N " << shape.N << ", K " << shape.K);
      CHECK(different == 0);
    }
  }
}

TEMPLATE_TEST_CASE("gemm equals the plain loop, also with A transposed", "", float, double) {
  ThreadPool pool(2);
  for (const auto isa : supported_isas()) {
    const Compute<TestType> compute(pool, isa);
    for (std::int64_t M : {1, 5, 6, 7, 13})
      for (std::int64_t N : {1, 7, 16, 33, 65})
        for (std::int64_t K : {1, 6, 17, 40})
          for (int form = 0; form < 4; ++form) check_gemm<TestType>({M, N, K}, form & 1, form & 2, compute);
    // Several panels, blocks of K (384) and of rows (384).
    for (const Shape shape : {Shape{20, 150, 390}, Shape{391, 70, 30}, Shape{64, 129, 64}, Shape{7, 9, 1000}})
      for (int form = 0; form < 4; ++form) check_gemm<TestType>(shape, form & 1, form & 2, compute);
  }
}

TEMPLATE_TEST_CASE("matrix products do not depend on the number of threads", "", float, double) {
  for (const Shape shape : {Shape{200, 130, 100}, Shape{5, 300, 100}, Shape{1, 5000, 64}})
    check_same_for_any_thread_count<TestType>([&](const Compute<TestType>& compute) {
      LinearCase<TestType> c(shape, 0, 0);
      compute.linear(c.args(true, true), shape.M, shape.N);
      return c.y;
    });
  for (const bool transposed : {false, true})
    check_same_for_any_thread_count<TestType>([&](const Compute<TestType>& compute) {
      GemmCase<TestType> g({400, 200, 70}, transposed);
      compute.gemm(g.args(true));
      return g.c;
    });
}
