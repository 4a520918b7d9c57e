// Norms, rotary embedding, activations and vector operations against plain loops in double; gradients against
// central differences of those loops.
#include <algorithm>
#include <array>

#include "rlhf/kernels/adamw.h"
#include "tests/kernels/support.h"

using namespace rlhf;

namespace {

constexpr std::int64_t kRows = 5;

struct NormForm {
  bool layer_norm, plus_one, bias;
};
constexpr NormForm kNormForms[] = {
    {false, false, false}, {false, true, false}, {true, false, true}, {true, false, false}};

struct NormReference {
  std::vector<double> x, weight, bias;
  NormForm form;
  double eps = 1e-5;

  std::vector<double> forward(std::vector<double>* means, std::vector<double>* rstds) const {
    const std::size_t D = weight.size();
    std::vector<double> y(x.size());
    for (std::size_t t = 0; t < x.size() / D; ++t) {
      double mean = 0, square = 0;
      for (std::size_t d = 0; form.layer_norm && d < D; ++d) mean += x[t * D + d] / static_cast<double>(D);
      for (std::size_t d = 0; d < D; ++d)
        square += (x[t * D + d] - mean) * (x[t * D + d] - mean) / static_cast<double>(D);
      const double rstd = 1 / std::sqrt(square + eps);
      for (std::size_t d = 0; d < D; ++d)
        y[t * D + d] =
            (x[t * D + d] - mean) * rstd * (weight[d] + (form.plus_one ? 1 : 0)) + (form.bias ? bias[d] : 0);
      if (means) means->push_back(mean);
      if (rstds) rstds->push_back(rstd);
    }
    return y;
  }
};

double dot(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

double silu(double x) {
  return x / (1 + std::exp(-x));
}
double gelu_tanh(double x) {
  return 0.5 * x * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
}

std::vector<double> activate(const std::vector<double>& x, std::int64_t rows, std::int64_t F,
                             kernels::GluKind kind) {
  const bool gated = kind != kernels::GluKind::kGeluTanhPlain;
  std::vector<double> y;
  for (std::int64_t t = 0; t < rows; ++t)
    for (std::int64_t f = 0; f < F; ++f) {
      const auto at = static_cast<std::size_t>(t * (gated ? 2 * F : F) + f);
      const double value = kind == kernels::GluKind::kSilu ? silu(x[at]) : gelu_tanh(x[at]);
      y.push_back(gated ? value * x[at + static_cast<std::size_t>(F)] : value);
    }
  return y;
}

}  // namespace

TEMPLATE_TEST_CASE("norms equal the plain loop and their gradients its differences", "", float, double) {
  ThreadPool pool(2);
  for (const auto isa : supported_isas())
    for (const NormForm form : kNormForms)
      for (std::int64_t D : {1, 3, 16, 17, 64, 101}) {
        const Compute<TestType> compute(pool, isa);
        INFO(compute.table().isa << ", D " << D << ", layer norm " << form.layer_norm);
        const auto x = random_values<TestType>(kRows * D, 11), weight = random_values<TestType>(D, 12),
                   bias = random_values<TestType>(D, 13), dy = random_values<TestType>(kRows * D, 14);
        NormReference reference{to_double(x), to_double(weight), to_double(bias), form};
        std::vector<double> means, rstds;
        const auto expected = reference.forward(&means, &rstds);
        std::vector<TestType> y(x.size()), mean(kRows), rstd(kRows);
        compute.norm({x.data(), weight.data(), form.bias ? bias.data() : nullptr, y.data(), mean.data(),
                      rstd.data(), D, reference.eps, form.layer_norm, form.plus_one},
                     kRows);
        // Sums of D squares, then a root: D roundings of same-sign terms, and cancellation in x - mean.
        const double u = 8 * kUnit<TestType> * static_cast<double>(D + 8);
        // With D = 1 a layer norm divides 0 by sqrt(eps).
        check_close(y, expected, u, u);
        check_close(rstd, rstds, 0, u);
        check_close(mean, means, u, u);

        std::vector<TestType> dx(x.size(), 2), dweight(weight.size(), 3), dbias(bias.size(), 4);
        kernels::NormGradArgs<TestType> args{
            dy.data(),   x.data(),  weight.data(),   mean.data(),
            rstd.data(), dx.data(), dweight.data(),  form.bias ? dbias.data() : nullptr,
            kRows,       D,         form.layer_norm, form.plus_one};
        compute.norm_grad(args);
        const auto dy_double = to_double(dy);
        const auto loss = [&] { return dot(reference.forward(nullptr, nullptr), dy_double); };
        std::vector<double> slopes, weight_slopes, bias_slopes;
        for (double& value : reference.x) slopes.push_back(2 + slope_of(value, loss));
        for (double& value : reference.weight) weight_slopes.push_back(3 + slope_of(value, loss));
        for (double& value : reference.bias) bias_slopes.push_back(4 + slope_of(value, loss));
        // Central differences of step 1e-5 are good to about 1e-8; a layer norm of one element has rstd 300.
        const double large = D == 1 ? 300 : 1;
        const double tolerance = large * (2e-7 + 4 * u);
        check_close(dx, slopes, tolerance, tolerance);
        check_close(dweight, weight_slopes, tolerance, tolerance);
        if (form.bias) check_close(dbias, bias_slopes, tolerance, tolerance);
      }
}

TEMPLATE_TEST_CASE("norm gradients skip frozen weights", "", float, double) {
  ThreadPool pool(1);
  const std::int64_t D = 19;
  const auto x = random_values<TestType>(kRows * D, 11), weight = random_values<TestType>(D, 12),
             dy = random_values<TestType>(kRows * D, 14);
  for (const auto isa : supported_isas()) {
    const Compute<TestType> compute(pool, isa);
    std::vector<TestType> y(x.size()), rstd(kRows), dx(x.size()), again(x.size()), dweight(weight.size());
    compute.norm({x.data(), weight.data(), nullptr, y.data(), nullptr, rstd.data(), D, 1e-6, false, false},
                 kRows);
    kernels::NormGradArgs<TestType> args{dy.data(), x.data(), weight.data(), nullptr, rstd.data(), dx.data(),
                                         nullptr,   nullptr,  kRows,         D,       false,       false};
    compute.norm_grad(args);
    args.dx = again.data();
    args.dweight = dweight.data();
    compute.norm_grad(args);
    CHECK(dx == again);
    CHECK(dweight != std::vector<TestType>(weight.size()));
  }
}

TEMPLATE_TEST_CASE("rotary embedding rotates pairs of halves, and back", "", float, double) {
  ThreadPool pool(1);
  const std::vector<std::int32_t> positions = {0, 3, 1, 7};
  for (const auto isa : supported_isas())
    for (std::int64_t H : {2, 6, 16, 34}) {
      const Compute<TestType> compute(pool, isa);
      const std::int64_t half = H / 2, heads = 3, stride = heads * H + 5;
      std::vector<TestType> cosine, sine;
      for (std::int64_t p = 0; p < 8; ++p)
        for (std::int64_t i = 0; i < half; ++i) {
          const double angle = static_cast<double>(p) * std::pow(100.0, -static_cast<double>(i) / 9);
          cosine.push_back(static_cast<TestType>(std::cos(angle)));
          sine.push_back(static_cast<TestType>(std::sin(angle)));
        }
      const auto x = random_values<TestType>(4 * stride, 21);
      auto y = x;
      std::vector<double> expected = to_double(x);
      for (std::size_t t = 0; t < 4; ++t)
        for (std::int64_t n = 0; n < heads; ++n)
          for (std::int64_t i = 0; i < half; ++i) {
            const auto lo = t * static_cast<std::size_t>(stride) + static_cast<std::size_t>(n * H + i);
            const auto hi = lo + static_cast<std::size_t>(half);
            const auto at = static_cast<std::size_t>(positions[t] * half + i);
            const double c = static_cast<double>(cosine[at]), s = static_cast<double>(sine[at]);
            expected[lo] = static_cast<double>(x[lo]) * c - static_cast<double>(x[hi]) * s;
            expected[hi] = static_cast<double>(x[hi]) * c + static_cast<double>(x[lo]) * s;
          }
      kernels::RopeArgs<TestType> args{y.data(),    stride,           heads, H, cosine.data(),
                                       sine.data(), positions.data(), false};
      compute.table().rope(args, 0, 4);
      INFO(compute.table().isa << ", H " << H);
      check_close(y, expected, 8 * kUnit<TestType>, 2 * kUnit<TestType>);
      args.inverse = true;
      compute.table().rope(args, 0, 2);  // rows 0 and 1 only
      auto half_back = expected;
      std::copy_n(x.begin(), 2 * stride, half_back.begin());
      check_close(y, half_back, 16 * kUnit<TestType>, 4 * kUnit<TestType>);
    }
}

TEMPLATE_TEST_CASE("activations equal their formulas and gradients their differences", "", float, double) {
  using kernels::GluKind;
  ThreadPool pool(2);
  for (const auto isa : supported_isas())
    for (const GluKind kind : {GluKind::kSilu, GluKind::kGeluTanh, GluKind::kGeluTanhPlain})
      for (std::int64_t F : {1, 7, 16, 33}) {
        const Compute<TestType> compute(pool, isa);
        const std::int64_t width = kind == GluKind::kGeluTanhPlain ? F : 2 * F;
        const auto x = random_values<TestType>(kRows * width, 31, 3),
                   dy = random_values<TestType>(kRows * F, 32);
        std::vector<TestType> y(dy.size()), dx(x.size(), 99);
        compute.activation({x.data(), y.data(), F, kind}, kRows);
        compute.activation_grad({x.data(), dy.data(), dx.data(), F, kind}, kRows);
        auto inputs = to_double(x);
        const auto upstream = to_double(dy);
        INFO(compute.table().isa << ", kind " << static_cast<int>(kind) << ", F " << F);
        // Where tanh is near -1, 1 + tanh loses all but the last bits of a float: 1e-7 times a product x * up
        // that reaches 50.
        const double tolerance = sizeof(TestType) == 4 ? 2e-5 : 1e-13;
        check_close(y, activate(inputs, kRows, F, kind), tolerance, tolerance);
        const auto loss = [&] { return dot(activate(inputs, kRows, F, kind), upstream); };
        std::vector<double> slopes;
        for (double& value : inputs) slopes.push_back(slope_of(value, loss));
        check_close(dx, slopes, tolerance + 1e-7, tolerance + 1e-7);
      }
}

TEMPLATE_TEST_CASE("activations are finite at the ends of the range", "", float, double) {
  ThreadPool pool(1);
  const std::vector<TestType> x = {-1000, -88, -30, 0, 30, 88, 1000};
  const auto F = static_cast<std::int64_t>(x.size());
  std::vector<TestType> gated = x;
  gated.insert(gated.end(), x.size(), 1);
  const std::vector<double> expected = {0, 0, 0, 0, 30, 88, 1000};
  for (const auto isa : supported_isas())
    for (const auto kind : {kernels::GluKind::kSilu, kernels::GluKind::kGeluTanh}) {
      std::vector<TestType> y(x.size()), dx(gated.size());
      const std::vector<TestType> ones(x.size(), 1);
      const Compute<TestType> compute(pool, isa);
      compute.activation({gated.data(), y.data(), F, kind}, 1);
      check_close(y, expected, 1e-9, 1e-6);
      compute.activation_grad({gated.data(), ones.data(), dx.data(), F, kind}, 1);
      check_close(std::vector<TestType>(dx.begin(), dx.begin() + F), {0, 0, 0, 0.5, 1, 1, 1}, 1e-9, 1e-6);
    }
}

TEMPLATE_TEST_CASE("vector operations equal plain loops", "", float, double) {
  ThreadPool pool(2);
  for (const auto isa : supported_isas()) {
    const Compute<TestType> compute(pool, isa);
    for (std::int64_t n : {0, 1, 7, 8, 33, 1000, 65536, 65537, 140001}) {
      INFO(compute.table().isa << ", n " << n);
      const auto x = random_values<TestType>(n, 41);
      auto y = random_values<TestType>(n, 42);
      std::vector<double> sum, scaled;
      double square = 0;
      for (std::size_t i = 0; i < x.size(); ++i) {
        // One addition of two floats rounds once, so the double result rounded to T is the exact answer.
        sum.push_back(static_cast<double>(
            static_cast<TestType>(static_cast<double>(x[i]) + static_cast<double>(y[i]))));
        scaled.push_back(static_cast<double>(static_cast<TestType>(0.25 * sum.back())));
        square += static_cast<double>(x[i]) * static_cast<double>(x[i]);
      }
      compute.add(y.data(), x.data(), n);
      check_close(y, sum, 1e-300, 0);
      compute.scale(y.data(), TestType(0.25), n);
      check_close(y, scaled, 1e-300, 0);
      CHECK(std::abs(compute.sum_squares(x.data(), n) - square) <= 1e-12 * square);
    }
    for (const auto& [rows, n] : {std::pair<std::int64_t, std::int64_t>{1, 1}, {3, 130}, {50, 129}, {0, 4}}) {
      const auto x = random_values<TestType>(rows * n, 43);
      auto out = random_values<TestType>(n, 44);
      auto expected = to_double(out);
      for (std::int64_t r = 0; r < rows; ++r)
        for (std::int64_t i = 0; i < n; ++i)
          expected[static_cast<std::size_t>(i)] +=
              static_cast<double>(x[static_cast<std::size_t>(r * n + i)]);
      compute.add_column_sums(out.data(), x.data(), rows, n);
      const double u =
          kUnit<TestType> * static_cast<double>(rows + 1) * 4 * std::sqrt(static_cast<double>(rows + 1));
      check_close(out, expected, u, u);
    }
  }
}

TEMPLATE_TEST_CASE("weights of a row are e^x, and the same on every instruction set", "", float, double) {
  const double inf = std::numeric_limits<double>::infinity();
  for (const std::int64_t n : {1, 15, 16, 17, 255, 256, 257, 5000})
    for (const double scale : {1.0, 0.25, 3.0}) {
      auto logits = random_values<TestType>(n, 71, 8);
      if (n > 16) logits[3] = static_cast<TestType>(-inf);
      if (n > 256) logits[256] = TestType(-500);
      double most = -inf, mass = 0, moment = 0;
      for (const TestType x : logits) most = std::max(most, static_cast<double>(x));
      std::vector<double> expected;
      for (const TestType x : logits) {
        const double y = scale * (static_cast<double>(x) - most);
        expected.push_back(std::exp(y));
        mass += expected.back();
        if (expected.back() > 0) moment += y * expected.back();
      }
      std::vector<TestType> on_first_isa;
      kernels::RowWeights first;
      for (const auto isa : supported_isas()) {
        const auto& table = kernels::kernels_for<TestType>(isa);
        INFO(table.isa << ", n " << n << ", scale " << scale);
        std::vector<TestType> weights(logits.size());
        const auto row = table.weigh(logits.data(), n, static_cast<TestType>(scale), weights.data());
        CHECK(static_cast<double>(table.largest(logits.data(), n)) == most);
        CHECK(row.largest == most);
        check_close(weights, expected, 1e-37, 8e-6);  // rounding of x, up to 90
        CHECK(row.mass == Approx(mass).epsilon(1e-5));
        CHECK(row.moment == Approx(moment).epsilon(1e-5).margin(1e-5));
        if (on_first_isa.empty()) {
          on_first_isa = weights;
          first = row;
        }
        CHECK(weights == on_first_isa);
        CHECK(row.mass == first.mass);
        CHECK(row.moment == first.moment);
        weights.assign(logits.size(), 0);
        auto broken = logits;
        broken[static_cast<std::size_t>(n / 2)] = std::numeric_limits<TestType>::quiet_NaN();
        if (n > 1) CHECK(std::isnan(table.weigh(broken.data(), n, TestType(1), weights.data()).moment));
      }
    }
}

TEMPLATE_TEST_CASE("AdamW is the update by hand, and the same on every instruction set", "", float, double) {
  const double rate = 1e-2, beta1 = 0.9, beta2 = 0.95, epsilon = 1e-8, decay = 0.1, scale = 0.5;
  for (const bool amsgrad : {false, true})
    for (const std::int64_t n : {0, 1, 7, 16, 33, 1003}) {
      const auto start = random_values<TestType>(n, 61);
      std::vector<double> p(start.begin(), start.end()), m(start.size()), v(m), top(m);
      std::vector<std::vector<TestType>> gradients;
      for (std::int64_t step = 1; step <= 3; ++step) {
        // Later gradients are smaller, so that the largest second moment is not always the last.
        gradients.push_back(
            random_values<TestType>(n, 61 + static_cast<std::uint64_t>(step), std::pow(4, -step)));
        for (std::size_t i = 0; i < p.size(); ++i) {
          const double g = scale * static_cast<double>(gradients.back()[i]);
          m[i] = beta1 * m[i] + (1 - beta1) * g;
          v[i] = beta2 * v[i] + (1 - beta2) * g * g;
          top[i] = std::max(top[i], v[i]);
          const double m_hat = m[i] / (1 - std::pow(beta1, step));
          const double v_hat = (amsgrad ? top[i] : v[i]) / (1 - std::pow(beta2, step));
          p[i] -= rate * (m_hat / (std::sqrt(v_hat) + epsilon) + decay * p[i]);
        }
      }
      std::vector<TestType> on_first_isa;
      for (const auto isa : supported_isas()) {
        const auto& table = kernels::kernels_for<TestType>(isa);
        INFO(table.isa << ", n " << n << ", amsgrad " << amsgrad);
        auto weights = start;
        std::vector<TestType> first(start.size()), second(first),
            largest(amsgrad ? first : std::vector<TestType>());
        for (std::int64_t step = 1; step <= 3; ++step)
          table.adamw(adamw_factors({rate, beta1, beta2, epsilon, decay, step}), scale,
                      {weights, gradients[static_cast<std::size_t>(step - 1)], first, second, largest});
        check_close(weights, p, 40 * kUnit<TestType>, 40 * kUnit<TestType>);
        check_close(first, m, 8 * kUnit<TestType>, 8 * kUnit<TestType>);
        check_close(second, v, 1e-300, 16 * kUnit<TestType>);
        if (on_first_isa.empty()) on_first_isa = weights;
        CHECK(weights == on_first_isa);
      }
    }
}

TEMPLATE_TEST_CASE("row kernels do not depend on the number of threads", "", float, double) {
  const std::int64_t rows = 70, D = 600;
  const auto x = random_values<TestType>(rows * D, 51), weight = random_values<TestType>(D, 52),
             dy = random_values<TestType>(rows * D, 53);
  check_same_for_any_thread_count<TestType>([&](const Compute<TestType>& compute) {
    std::vector<TestType> result(x.size()), mean(rows), rstd(rows), dx(x.size()), dweight(D), dbias(D);
    compute.norm(
        {x.data(), weight.data(), nullptr, result.data(), mean.data(), rstd.data(), D, 1e-5, true, false},
        rows);
    compute.norm_grad({dy.data(), x.data(), weight.data(), mean.data(), rstd.data(), dx.data(),
                       dweight.data(), dbias.data(), rows, D, true, false});
    std::vector<TestType> activated(static_cast<std::size_t>(rows * D / 2)), dactivated(x.size());
    compute.activation({x.data(), activated.data(), D / 2, kernels::GluKind::kSilu}, rows);
    compute.activation_grad(
        {x.data(), activated.data(), dactivated.data(), D / 2, kernels::GluKind::kGeluTanh}, rows);
    std::vector<TestType> sums(D);
    compute.add_column_sums(sums.data(), x.data(), rows, D);
    for (const auto* part : {&dx, &dweight, &dbias, &activated, &dactivated, &sums})
      result.insert(result.end(), part->begin(), part->end());
    const auto many = random_values<TestType>(300001, 54);
    const double square = compute.sum_squares(many.data(), static_cast<std::int64_t>(many.size()));
    // All bits of the double, also where T is float.
    result.push_back(static_cast<TestType>(square));
    result.push_back(static_cast<TestType>(square - static_cast<double>(static_cast<TestType>(square))));
    return result;
  });
}
