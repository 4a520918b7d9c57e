// Products of few rows, with a norm before and an activation behind, on every device against plain loops in
// double.
#include "tests/cuda/devices.h"

using namespace rlhf;

namespace {

std::size_t at(std::int64_t i) {
  return static_cast<std::size_t>(i);
}

enum class Form { kPlain, kBias, kAccumulate, kRmsNorm, kLayerNorm, kSilu, kNormedGelu };
constexpr Form kForms[] = {Form::kPlain,     Form::kBias, Form::kAccumulate, Form::kRmsNorm,
                           Form::kLayerNorm, Form::kSilu, Form::kNormedGelu};

struct Shape {
  std::int64_t M, N, K;
};
// Fewer outputs than a warp takes and none at all, one row, all rows, K of one access and of several steps of
// all warps, and outputs enough that warps do not share them.
constexpr Shape kShapes[] = {{1, 5, 8},   {0, 8, 8},      {3, 8, 40},   {8, 20, 256},
                             {9, 66, 72}, {16, 17, 2056}, {2, 8200, 16}};

double activate(double x, kernels::GluKind kind) {
  if (kind == kernels::GluKind::kSilu) return x / (1 + std::exp(-x));
  return 0.5 * x * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
}

// Rounded to T where a device stores it.
template <class T>
double stored(double value) {
  return exact(round_to<T>(value));
}

// A row before the product.
template <class T>
std::vector<double> normed(const std::vector<double>& x, const Values<T>& weight, const Values<T>& bias,
                           const kernels::NormArgs<T>& norm) {
  const double n = static_cast<double>(x.size());
  double mean = 0, square = 0;
  if (norm.layer_norm)
    for (const double v : x) mean += v / n;
  for (const double v : x) square += (v - mean) * (v - mean) / n;
  std::vector<double> out;
  for (std::size_t k = 0; k < x.size(); ++k)
    out.push_back(stored<T>((x[k] - mean) / std::sqrt(square + norm.eps) * (norm.plus_one + weight.exact[k]) +
                            (norm.bias ? bias.exact[k] : 0)));
  return out;
}

template <class T>
void check_few_rows(const Shape& shape, Form form) {
  const auto [M, N, K] = shape;
  const bool gated = form == Form::kSilu || form == Form::kNormedGelu;
  const bool norms = form == Form::kRmsNorm || form == Form::kLayerNorm || form == Form::kNormedGelu;
  const std::int64_t ldx = K + 8, ldy = N + 3, outputs = gated ? 2 * N : N;
  const Values<T> x = random_rounded<T>(M * ldx, 1), w = random_rounded<T>(outputs * K, 2),
                  bias = random_rounded<T>(outputs, 3), norm_weight = random_rounded<T>(K, 4, 0.3),
                  norm_bias = random_rounded<T>(K, 5, 0.3), before = random_rounded<T>(M * ldy, 6);
  kernels::FewRowsArgs<T> args{};
  args.M = M;
  args.product.K = K;
  args.product.ldx = ldx;
  args.product.ldy = ldy;
  args.product.accumulate = form == Form::kAccumulate;
  args.gated = gated;
  args.activation = form == Form::kSilu ? kernels::GluKind::kSilu : kernels::GluKind::kGeluTanh;
  args.norm.eps = 1e-5;
  args.norm.layer_norm = form == Form::kLayerNorm;
  args.norm.plus_one = form == Form::kNormedGelu;
  on_every_device<T>([&](const TestDevice<T>& device) {
    if (!device.ops->few_rows_linear) return;  // a GPU has them for bfloat16 only
    INFO(device.name << ", M " << M << ", N " << N << ", K " << K << ", form " << static_cast<int>(form));
    auto dx = device.put(x.stored), dw = device.put(w.stored), db = device.put(bias.stored),
         dn = device.put(norm_weight.stored), dnb = device.put(norm_bias.stored),
         y = device.put(before.stored);
    args.product.x = dx.data();
    args.product.w = dw.data();
    args.product.y = y.data();
    if (form != Form::kPlain) args.product.bias = db.data();
    if (norms) args.norm.weight = dn.data();
    if (form == Form::kLayerNorm) args.norm.bias = dnb.data();
    REQUIRE(kernels::takes_few_rows(args));
    device.ops->few_rows_linear(args, N, device.queue());

    std::vector<double> expected = before.exact;
    for (std::int64_t m = 0; m < M; ++m) {
      std::vector<double> row(x.exact.begin() + m * ldx, x.exact.begin() + m * ldx + K);
      if (norms) row = normed(row, norm_weight, norm_bias, args.norm);
      const auto product = [&](std::int64_t n) {
        double sum = args.product.bias ? bias.exact[at(n)] : 0;
        for (std::int64_t k = 0; k < K; ++k) sum += row[at(k)] * w.exact[at(n * K + k)];
        return sum;
      };
      for (std::int64_t n = 0; n < N; ++n) {
        double& out = expected[at(m * ldy + n)];
        if (gated)
          out = activate(product(n), args.activation) * product(N + n);
        else
          out = product(n) + (args.product.accumulate ? out : 0);
      }
    }
    // Elements of a normed row may round the other way, and the two halves of an activation are rounded
    // before they meet; their products are of the size of sqrt(K).
    const double size = std::sqrt(static_cast<double>(K)), rounding = kRounding<T>;
    const double absolute =
        1e-5 * size * (gated ? size : 1) + (norms ? 2 * rounding : 0) * size * (gated ? size : 1);
    check_values(y.values(), expected, absolute + (gated ? 2 * rounding * size : 0),
                 (gated ? 3 * rounding : 0) + 1e-5);
  });
}

}  // namespace

TEMPLATE_TEST_CASE("products of few rows equal the plain loop on every device", "[device]", float, Bfloat16) {
  for (const Shape& shape : kShapes)
    for (const Form form : kForms) check_few_rows<TestType>(shape, form);
}

TEST_CASE("products of few rows refuse what is not at multiples of 16 bytes, and more rows", "[device]") {
  kernels::FewRowsArgs<Bfloat16> args{};
  args.M = kernels::kFewRows;
  args.product.K = args.product.ldx = 16;
  CHECK(kernels::takes_few_rows(args));
  ++args.M;
  CHECK_FALSE(kernels::takes_few_rows(args));
  --args.M;
  args.product.K = 12;
  CHECK_FALSE(kernels::takes_few_rows(args));
  args.product.K = 16;
  args.product.x = reinterpret_cast<const Bfloat16*>(8);
  CHECK_FALSE(kernels::takes_few_rows(args));
}

TEST_CASE("few rows of small matrices are computed without a library", "[device]") {
  kernels::FewRowsArgs<Bfloat16> args{};
  args.M = 8;
  args.product.K = args.product.ldx = 4096;
  CHECK(kernels::gains_from_few_rows(args, 3072));
  CHECK_FALSE(kernels::gains_from_few_rows(args, 3073));
  args.gated = true;
  CHECK(kernels::gains_from_few_rows(args, 1536));
  CHECK_FALSE(kernels::gains_from_few_rows(args, 1537));
  args.M = 9;  // too much of x
  CHECK_FALSE(kernels::gains_from_few_rows(args, 16));
}
