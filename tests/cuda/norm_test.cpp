// Norms and column sums on every device against plain loops in double.
#include "tests/cuda/devices.h"

using namespace rlhf;

namespace {

std::size_t at(std::int64_t i) {
  return static_cast<std::size_t>(i);
}

struct NormForm {
  bool layer_norm, plus_one, bias;
};
constexpr NormForm kForms[] = {{false, false, false}, {false, true, false}, {true, false, true}};

struct NormReference {
  std::int64_t rows, D;
  NormForm form;
  double eps;
  std::vector<double> x, weight, bias;

  double scale(std::int64_t d) const { return weight[at(d)] + (form.plus_one ? 1 : 0); }
  double mean(std::int64_t t) const {
    double sum = 0;
    for (std::int64_t d = 0; form.layer_norm && d < D; ++d) sum += x[at(t * D + d)];
    return sum / static_cast<double>(D);
  }
  double rstd(std::int64_t t) const {
    const double m = mean(t);
    double square = 0;
    for (std::int64_t d = 0; d < D; ++d) square += std::pow(x[at(t * D + d)] - m, 2);
    return 1 / std::sqrt(square / static_cast<double>(D) + eps);
  }
  std::vector<double> normalised() const {
    std::vector<double> out;
    for (std::int64_t t = 0; t < rows; ++t) {
      const double m = mean(t), r = rstd(t);
      for (std::int64_t d = 0; d < D; ++d) out.push_back((x[at(t * D + d)] - m) * r);
    }
    return out;
  }
  std::vector<double> forward() const {
    std::vector<double> y = normalised();
    for (std::int64_t i = 0; i < rows * D; ++i)
      y[at(i)] = y[at(i)] * scale(i % D) + (form.bias ? bias[at(i % D)] : 0);
    return y;
  }
  // The textbook gradient: r (g - mean(g) - n mean(g n)), without mean(g) for RMSNorm.
  std::vector<double> grad_input(const std::vector<double>& dy) const {
    const std::vector<double> n = normalised();
    std::vector<double> dx;
    for (std::int64_t t = 0; t < rows; ++t) {
      double sum = 0, dot = 0;
      for (std::int64_t d = 0; d < D; ++d) {
        const double g = dy[at(t * D + d)] * scale(d);
        sum += form.layer_norm ? g / static_cast<double>(D) : 0;
        dot += g * n[at(t * D + d)] / static_cast<double>(D);
      }
      const double r = rstd(t);
      for (std::int64_t d = 0; d < D; ++d)
        dx.push_back(r * (dy[at(t * D + d)] * scale(d) - sum - n[at(t * D + d)] * dot));
    }
    return dx;
  }
};

struct Shape {
  std::int64_t rows, D;
};

}  // namespace

TEMPLATE_TEST_CASE("norms and their gradients equal the plain loop on every device", "[device]", float,
                   Bfloat16) {
  using T = TestType;
  for (const NormForm form : kForms)
    for (const Shape shape :
         {Shape{0, 8}, Shape{1, 2}, Shape{3, 33}, Shape{5, 576},
          // Edges of what a thread holds in registers, rows aligned to 16 bytes and not,
          // and a row that a block does not hold.
          Shape{2, 1100}, Shape{2, 2056}, Shape{2, 4099}, Shape{1, 8200}, Shape{1, 33000}}) {
      const auto [rows, D] = shape;
      const Values<T> x = random_rounded<T>(rows * D, 1, 2, 0.5), weight = random_rounded<T>(D, 2),
                      bias = random_rounded<T>(D, 3), dy = random_rounded<T>(rows * D, 4),
                      before = random_rounded<T>(rows * D, 5);
      const NormReference reference{rows, D, form, 1e-5, x.exact, weight.exact, bias.exact};
      on_every_device<T>([&](const TestDevice<T>& device) {
        INFO(device.name << ", rows " << rows << ", D " << D << ", layer norm " << form.layer_norm);
        auto dx_in = device.put(x.stored), w = device.put(weight.stored), b = device.put(bias.stored),
             upstream = device.put(dy.stored), dx = device.put(before.stored),
             y = device.put(std::vector<T>(x.stored.size()));
        auto mean = device.put(std::vector<float>(at(rows), NAN)),
             rstd = device.put(std::vector<float>(at(rows), NAN));
        const T* bias_data = form.bias ? b.data() : nullptr;
        device.ops->norm({dx_in.data(), w.data(), bias_data, y.data(), mean.data(), rstd.data(), D,
                          reference.eps, form.layer_norm, form.plus_one},
                         rows, device.queue());
        // Sums of D squares in float: D / 2 roundings of terms of one sign at most in a row.
        const double u = 0x1.0p-24 * static_cast<double>(D + 16);
        check_values(y.values(), reference.forward(), 8 * u, 8 * u);
        std::vector<double> rstds, means;
        for (std::int64_t t = 0; t < rows; ++t) {
          rstds.push_back(reference.rstd(t));
          means.push_back(reference.mean(t));
        }
        check_values(rstd.values(), rstds, 0, 4 * u);
        if (form.layer_norm) check_values(mean.values(), means, 4 * u, 4 * u);

        const std::vector<float> dweight_before(at(D), 3), dbias_before(at(D), 4);
        auto dweight = device.put(dweight_before), dbias = device.put(dbias_before);
        device.ops->norm_grad(
            {upstream.data(), dx_in.data(), w.data(), mean.data(), rstd.data(), dx.data(), dweight.data(),
             form.bias ? dbias.data() : nullptr, rows, D, form.layer_norm, form.plus_one},
            device.queue());
        std::vector<double> expected = reference.grad_input(dy.exact), dweights(at(D), 3), dbiases(at(D), 4);
        const std::vector<double> n = reference.normalised();
        for (std::int64_t i = 0; i < rows * D; ++i) {
          expected[at(i)] += before.exact[at(i)];
          dweights[at(i % D)] += dy.exact[at(i)] * n[at(i)];
          if (form.bias) dbiases[at(i % D)] += dy.exact[at(i)];
        }
        const double large = D == 2 ? 50 : 1;  // a layer norm of two close elements divides by little
        check_values(dx.values(), expected, 16 * large * u, 16 * large * u);
        check_values(dweight.values(), dweights, 16 * u, 16 * u);
        check_values(dbias.values(), dbiases, 16 * u, 16 * u);
      });
    }
}

TEMPLATE_TEST_CASE("a norm in place equals one into another buffer", "[device]", float, Bfloat16) {
  using T = TestType;
  const std::int64_t rows = 3, D = 200;
  const Values<T> x = random_rounded<T>(rows * D, 1), weight = random_rounded<T>(D, 2);
  on_every_device<T>([&](const TestDevice<T>& device) {
    auto in_place = device.put(x.stored), source = device.put(x.stored), other = device.put(x.stored),
         w = device.put(weight.stored);
    device.ops->norm(
        {in_place.data(), w.data(), nullptr, in_place.data(), nullptr, nullptr, D, 1e-6, false, false}, rows,
        device.queue());
    device.ops->norm(
        {source.data(), w.data(), nullptr, other.data(), nullptr, nullptr, D, 1e-6, false, false}, rows,
        device.queue());
    CHECK(exact(in_place.values()) == exact(other.values()));
    CHECK(exact(in_place.values()) != x.exact);
  });
}

TEMPLATE_TEST_CASE("column sums equal the plain loop on every device", "[device]", float, Bfloat16) {
  using T = TestType;
  for (const Shape shape : {Shape{0, 4}, Shape{1, 1}, Shape{7, 31}, Shape{50, 70}, Shape{1100, 40}}) {
    const auto [rows, n] = shape;
    const Values<T> x = random_rounded<T>(rows * n, 1);
    std::vector<double> expected(at(n), 2);
    for (std::int64_t i = 0; i < rows * n; ++i) expected[at(i % n)] += x.exact[at(i)];
    on_every_device<T>([&](const TestDevice<T>& device) {
      auto source = device.put(x.stored);
      auto out = device.put(std::vector<float>(at(n), 2));
      device.ops->add_column_sums(out.data(), source.data(), rows, n, device.queue());
      check_values(out.values(), expected, 1e-5, 1e-6);
    });
  }
}
