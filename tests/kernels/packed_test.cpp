// Products with weights in bf16 and int8. int8: all instruction sets give the bits of the plain loop below,
// which is written from the definition in packed_kernels.h; its distance from the exact product is bounded by
// half a step of each operand. bf16: the bits of the fp32 product with rounded weights.
#include <algorithm>
#include <bit>
#include <string>

#include "rlhf/kernels/bfloat16.h"
#include "rlhf/kernels/packed_matrix.h"
#include "tests/kernels/support.h"

using namespace rlhf;

namespace {

struct Shape {
  std::int64_t M, N, K;
};

const std::vector<Shape> kShapes = {{1, 1, 1},      {1, 33, 3},    {2, 32, 4},    {3, 5, 7},
                                    {5, 70, 64},    {12, 31, 9},   {13, 64, 385}, {25, 97, 66},
                                    {30, 129, 130}, {1, 300, 800}, {4, 2100, 8},  {7, 17, 769}};

std::size_t size(std::int64_t n) {
  return static_cast<std::size_t>(n);
}

struct Case {
  Shape shape;
  std::int64_t ldx, ldy;
  std::vector<float> x, w, bias, y;

  explicit Case(Shape s)
      : shape(s),
        ldx(s.K + 3),
        ldy(s.N + 1),
        // The last row ends with the buffer: reading past it is an error that the sanitizer sees.
        x(random_values<float>((s.M - 1) * ldx + s.K, 21)),
        w(random_values<float>(s.N * s.K, 22, 0.1)),
        bias(random_values<float>(s.N, 23)),
        y(random_values<float>((s.M - 1) * ldy + s.N, 24)) {}

  PackedLinearArgs args(bool with_bias, bool accumulate) {
    return {x.data(), ldx, with_bias ? bias.data() : nullptr, y.data(), ldy, accumulate};
  }
  std::vector<float> run(WeightFormat format, const Compute<float>& compute, bool with_bias,
                         bool accumulate) {
    Case fresh(shape);
    PackedMatrix packed(format, shape.N, shape.K);
    packed.pack(compute, fresh.w.data());
    QuantisedRows scratch;
    packed_linear(compute, packed, fresh.args(with_bias, accumulate), shape.M, scratch);
    return fresh.y;
  }
};

// The definition, one element at a time.
struct PlainRow {
  float scale = 0;
  std::vector<int> q;

  PlainRow(const float* x, std::int64_t K) : q(size(K)) {
    float largest = 0;
    for (std::int64_t k = 0; k < K; ++k) largest = std::max(largest, std::abs(x[k]));
    if (largest < 1e-30F) return;
    scale = largest / 127.0F;
    const float factor = 127.0F / largest;
    for (std::int64_t k = 0; k < K; ++k) q[size(k)] = static_cast<int>(std::nearbyint(x[k] * factor));
  }
};

std::vector<float> plain_int8(const Case& c, bool with_bias, bool accumulate) {
  constexpr std::int64_t kInputs = kernels::kQuantisedInputs;
  std::vector<float> y = c.y;
  for (std::int64_t m = 0; m < c.shape.M; ++m)
    for (std::int64_t n = 0; n < c.shape.N; ++n) {
      const PlainRow w(c.w.data() + n * c.shape.K, c.shape.K);
      // volatile: no fused multiply-add here either.
      volatile float value = 0;
      for (std::int64_t begin = 0; begin < c.shape.K; begin += kInputs) {
        const std::int64_t count = std::min(kInputs, c.shape.K - begin);
        const PlainRow x(c.x.data() + m * c.ldx + begin, count);
        int sum = 0;
        for (std::int64_t k = 0; k < count; ++k) sum += x.q[size(k)] * w.q[size(begin + k)];
        volatile float part = static_cast<float>(sum) * x.scale;
        value = value + part;
      }
      value = value * w.scale;
      if (with_bias) value = value + c.bias[size(n)];
      float& out = y[size(m * c.ldy + n)];
      out = accumulate ? out + value : value;
    }
  return y;
}

// Runs `fn(compute)` with every instruction set.
template <class Fn>
void for_all_kernels(const Fn& fn) {
  ThreadPool pool(2);
  for (const auto isa : supported_isas()) fn(Compute<float>(pool, isa));
}

}  // namespace

TEST_CASE("int8 products have the bits of the plain loop on every instruction set") {
  for_all_kernels([](const Compute<float>& compute) {
    for (const Shape& shape : kShapes)
      for (int form = 0; form < 4; ++form) {
        const bool with_bias = form & 1, accumulate = form & 2;
        INFO(compute.packed_table().isa << ", M " << shape.M << ", N " << shape.N << ", K " << shape.K
                                        << ", form " << form);
        Case c(shape);
        CHECK(c.run(WeightFormat::kInt8, compute, with_bias, accumulate) ==
              plain_int8(c, with_bias, accumulate));
      }
  });
}

TEST_CASE("all packed kernels of this machine give equal bits, also those that dispatch would not choose") {
  const auto all = kernels::all_packed_kernels();
  CHECK(std::string(all.front()->isa) == "baseline");
  const std::int64_t M = 14, N = 75, K = 203, words = (K + 3) / 4, groups = 4, panels = (N + 31) / 32;
  const auto x = random_values<float>(M * K, 31), w = random_values<float>(N * K, 32);
  std::vector<std::vector<float>> results;
  for (const kernels::PackedKernels* table : all) {
    std::vector<std::uint32_t> q(size(M * words)), packed(size(panels * words * 32)), rows(size(words * 32));
    std::vector<float> x_scales(size(M * groups)), scales(size(N)), y(size(M * N));
    std::vector<std::int32_t> sums(size(M * groups));
    for (std::int64_t m = 0; m < M; ++m)
      for (std::int64_t g = 0; g < groups; ++g) {
        const auto quantised = table->quantise_row(
            x.data() + m * K + 64 * g, std::min<std::int64_t>(64, K - 64 * g), q.data() + m * words + 16 * g);
        x_scales[size(m * groups + g)] = quantised.scale;
        sums[size(m * groups + g)] = quantised.sum;
      }
    for (std::int64_t p = 0; p < panels; ++p)
      table->pack_int8(w.data(), N, K, p, packed.data() + p * words * 32, scales.data(), rows.data());
    table->linear_int8({q.data(), x_scales.data(), sums.data(), packed.data(), scales.data(), nullptr,
                        y.data(), N, N, K, false},
                       M, 0, panels);
    results.push_back(y);
    INFO(table->isa);
    CHECK(results.back() == results.front());
  }
}

TEST_CASE("an int8 product is off by at most half a step of each operand") {
  for_all_kernels([](const Compute<float>& compute) {
    for (const Shape& shape : kShapes) {
      Case c(shape);
      const std::vector<float> y = c.run(WeightFormat::kInt8, compute, false, false);
      std::size_t off = 0;
      for (std::int64_t m = 0; m < shape.M; ++m)
        for (std::int64_t n = 0; n < shape.N; ++n) {
          const float *x = c.x.data() + m * c.ldx, *w = c.w.data() + n * shape.K;
          double exact = 0, x_sum = 0, w_sum = 0, x_max = 0, w_max = 0;
          for (std::int64_t k = 0; k < shape.K; ++k) {
            exact += static_cast<double>(x[k]) * static_cast<double>(w[k]);
            x_sum += std::abs(static_cast<double>(x[k]));
            w_sum += std::abs(static_cast<double>(w[k]));
            x_max = std::max(x_max, std::abs(static_cast<double>(x[k])));
            w_max = std::max(w_max, std::abs(static_cast<double>(w[k])));
          }
          // |x w - x' w'| <= |x| dw + |w| dx + dx dw with steps of max / 127; 1 % for fp32 rounding.
          const double dx = x_max / 254, dw = w_max / 254;
          const double bound = 1.01 * (x_sum * dw + w_sum * dx + static_cast<double>(shape.K) * dx * dw);
          off += !(std::abs(static_cast<double>(y[size(m * c.ldy + n)]) - exact) <= bound);
        }
      INFO(compute.packed_table().isa << ", M " << shape.M << ", N " << shape.N << ", K " << shape.K);
      CHECK(off == 0);
    }
  });
}

TEST_CASE("bf16 products have the bits of the fp32 product with rounded weights") {
  for_all_kernels([](const Compute<float>& compute) {
    for (const Shape& shape : kShapes)
      for (int form = 0; form < 4; ++form) {
        const bool with_bias = form & 1, accumulate = form & 2;
        Case c(shape);
        std::vector<float> rounded;
        for (float value : c.w) rounded.push_back(to_float(from_float<Bfloat16>(value)));
        CHECK(rounded != c.w);
        const auto got = c.run(WeightFormat::kBf16, compute, with_bias, accumulate);
        compute.linear({c.x.data(), c.ldx, rounded.data(), with_bias ? c.bias.data() : nullptr, c.y.data(),
                        c.ldy, shape.K, accumulate},
                       shape.M, shape.N);
        INFO(compute.packed_table().isa << ", M " << shape.M << ", N " << shape.N << ", K " << shape.K
                                        << ", form " << form);
        CHECK(got == c.y);
      }
  });
}

TEST_CASE("a row of a packed product does not depend on the batch or the number of threads") {
  const Shape shape{37, 97, 390};
  for (const auto format : {WeightFormat::kBf16, WeightFormat::kInt8})
    for (const auto isa : supported_isas()) {
      ThreadPool pool(3), single(1);
      const Compute<float> compute(pool, isa), alone(single, isa);
      Case c(shape);
      const std::vector<float> all = c.run(format, compute, true, false);
      INFO(to_string(format) << ", " << compute.packed_table().isa);
      CHECK(all == c.run(format, alone, true, false));
      PackedMatrix packed(format, shape.N, shape.K);
      packed.pack(compute, c.w.data());
      QuantisedRows scratch;
      std::int64_t different = 0;
      for (std::int64_t rows : {1, 2, 5, 11, 12, 13, 25})
        for (std::int64_t first = 0; first + rows <= shape.M; first += rows) {
          std::vector<float> y(size(rows * c.ldy));
          auto args = c.args(true, false);
          args.x += first * c.ldx;
          args.y = y.data();
          packed_linear(compute, packed, args, rows, scratch);
          for (std::int64_t r = 0; r < rows; ++r)
            different += !std::equal(y.begin() + r * c.ldy, y.begin() + r * c.ldy + shape.N,
                                     all.begin() + (first + r) * c.ldy);
        }
      CHECK(different == 0);
    }
}

TEST_CASE("rows of zeros, of very small numbers and of none that are finite") {
  ThreadPool pool(1);
  const float infinity = std::numeric_limits<float>::infinity(),
              nan = std::numeric_limits<float>::quiet_NaN();
  for (const kernels::PackedKernels* table : kernels::all_packed_kernels()) {
    INFO(table->isa);
    for (const std::int64_t K : {1, 5, 40}) {
      std::vector<std::uint32_t> q(size((K + 3) / 4), 77);
      std::vector<float> x(size(K));
      const auto quantise = [&](float last) {
        x.back() = last;
        return table->quantise_row(x.data(), K, q.data());
      };
      for (const float nothing : {0.0F, -0.0F, 1e-31F, -1e-40F}) {
        const auto row = quantise(nothing);
        CHECK(row.scale == 0);
        CHECK(row.sum == 0);
        CHECK(std::ranges::count(q, 0U) == static_cast<std::ptrdiff_t>(q.size()));
      }
      for (const float bad : {infinity, -infinity, nan, -nan}) {
        const auto row = quantise(bad);
        CHECK(std::isnan(row.scale));
        CHECK(row.sum == 0);
      }
      for (const float large : {3e38F, 1e-29F, -2.0F}) {
        const auto row = quantise(large);
        CHECK(row.scale == std::abs(large) / 127);
        CHECK(row.sum == (large > 0 ? 127 : -127));
      }
    }
  }
  for (const auto format : {WeightFormat::kBf16, WeightFormat::kInt8}) {
    Case c({2, 40, 9});
    c.x[1] = nan;
    const Compute<float> compute(pool, kernels::detect_cpu_isa());
    PackedMatrix packed(format, 40, 9);
    packed.pack(compute, c.w.data());
    QuantisedRows scratch;
    packed_linear(compute, packed, c.args(true, false), 2, scratch);
    CHECK(std::all_of(c.y.begin(), c.y.begin() + 40, [](float y) { return std::isnan(y); }));
    CHECK(std::all_of(c.y.begin() + c.ldy, c.y.end(), [](float y) { return std::isfinite(y); }));
  }
}

TEST_CASE("packed matrices say what they take, and refuse what they cannot hold") {
  CHECK(PackedMatrix::bytes(WeightFormat::kFp32, 10, 10) == 0);
  // By hand: 2 panels of 32 columns; bf16 4 words a column, int8 2 words and a scale for each of 33 outputs.
  CHECK(PackedMatrix::bytes(WeightFormat::kBf16, 33, 7) == 2 * 32 * 4 * 4);
  CHECK(PackedMatrix::bytes(WeightFormat::kInt8, 33, 7) == 2 * 32 * 2 * 4 + 33 * 4);
  for (const auto format : {WeightFormat::kBf16, WeightFormat::kInt8})
    CHECK(PackedMatrix(format, 33, 7).bytes() == PackedMatrix::bytes(format, 33, 7));
  QuantisedRows rows;
  ThreadPool pool(1);
  const std::vector<float> x(21, 1);
  rows.fill(Compute<float>(pool, kernels::CpuIsa::kBaseline), x.data(), 7, 3, 7);
  CHECK(rows.bytes() == QuantisedRows::bytes(3, 7));
  CHECK_THROWS_WITH(PackedMatrix(WeightFormat::kFp32, 2, 2), ContainsSubstring("fp32 is not packed"));
}
