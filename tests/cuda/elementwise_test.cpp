// Activations, vector operations, embedding rows and block copies on every device.
#include <numeric>

#include "tests/cuda/devices.h"

using namespace rlhf;
using kernels::GluKind;

namespace {

std::size_t at(std::int64_t i) {
  return static_cast<std::size_t>(i);
}

double activate(double x, GluKind kind) {
  if (kind == GluKind::kSilu) return x / (1 + std::exp(-x));
  return 0.5 * x * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
}
double slope(double x, GluKind kind) {
  const double h = 1e-5;
  return (activate(x + h, kind) - activate(x - h, kind)) / (2 * h);
}

}  // namespace

TEMPLATE_TEST_CASE("activations equal their formulas on every device", "[device]", float, Bfloat16) {
  using T = TestType;
  for (const GluKind kind : {GluKind::kSilu, GluKind::kGeluTanh, GluKind::kGeluTanhPlain})
    for (const std::int64_t rows : {0, 1, 5})
      for (const std::int64_t F : {1, 33, 128, 2052}) {
        const bool gated = kind != GluKind::kGeluTanhPlain;
        const std::int64_t width = gated ? 2 * F : F;
        const Values<T> x = random_rounded<T>(rows * width, 1, 3), dy = random_rounded<T>(rows * F, 2);
        std::vector<double> expected, dexpected(x.exact.size());
        for (std::int64_t t = 0; t < rows; ++t)
          for (std::int64_t f = 0; f < F; ++f) {
            const std::size_t gate = at(t * width + f), up = gate + at(F), out = at(t * F + f);
            const double factor = gated ? x.exact[up] : 1;
            expected.push_back(activate(x.exact[gate], kind) * factor);
            dexpected[gate] = dy.exact[out] * factor * slope(x.exact[gate], kind);
            if (gated) dexpected[up] = dy.exact[out] * activate(x.exact[gate], kind);
          }
        on_every_device<T>([&](const TestDevice<T>& device) {
          INFO(device.name << ", kind " << static_cast<int>(kind) << ", F " << F);
          auto in = device.put(x.stored), upstream = device.put(dy.stored), y = device.put(dy.stored),
               dx = device.put(x.stored);
          device.ops->activation({in.data(), y.data(), F, kind}, rows, device.queue());
          device.ops->activation_grad({in.data(), upstream.data(), dx.data(), F, kind}, rows, device.queue());
          // Near tanh = -1 a float keeps few bits of 1 + tanh.
          check_values(y.values(), expected, 2e-5, 2e-5);
          check_values(dx.values(), dexpected, 2e-5, 2e-5);
        });
      }
}

TEMPLATE_TEST_CASE("vector operations equal plain loops on every device", "[device]", float, Bfloat16) {
  using T = TestType;
  for (const std::int64_t n : {0, 1, 255, 257, 1500}) {
    const Values<T> x = random_rounded<T>(n, 1), y = random_rounded<T>(n, 2);
    const Values<float> wide = random_rounded<float>(n, 3), other = random_rounded<float>(n, 4);
    on_every_device<T>([&](const TestDevice<T>& device) {
      auto from = device.put(x.stored), sum = device.put(y.stored), scaled = device.put(y.stored),
           narrow = device.put(y.stored);
      auto source = device.put(wide.stored), wide_sum = device.put(other.stored);
      device.ops->add(sum.data(), from.data(), n, device.queue());
      device.ops->add_wide(wide_sum.data(), source.data(), n, device.queue());
      device.ops->scale(scaled.data(), 0.75, n, device.queue());
      device.ops->narrow(narrow.data(), source.data(), n, device.queue());
      std::vector<T> sums, products, rounded;
      std::vector<float> wide_sums;
      for (std::int64_t i = 0; i < n; ++i) {
        sums.push_back(round_to<T>(static_cast<float>(x.exact[at(i)] + y.exact[at(i)])));
        wide_sums.push_back(static_cast<float>(wide.exact[at(i)] + other.exact[at(i)]));
        products.push_back(round_to<T>(static_cast<float>(0.75 * y.exact[at(i)])));
        rounded.push_back(round_to<T>(wide.exact[at(i)]));
      }
      CHECK(exact(sum.values()) == exact(sums));
      CHECK(exact(wide_sum.values()) == exact(wide_sums));
      CHECK(exact(scaled.values()) == exact(products));
      CHECK(exact(narrow.values()) == exact(rounded));
    });
  }
}

TEMPLATE_TEST_CASE("vector operations take any address on every device", "[device]", float, Bfloat16) {
  using T = TestType;
  const std::int64_t n = 100;
  const Values<T> x = random_rounded<T>(n, 1), y = random_rounded<T>(n, 2);
  for (const std::int64_t begin : {1, 2, 8})
    on_every_device<T>([&](const TestDevice<T>& device) {
      INFO(device.name << ", from element " << begin);
      auto from = device.put(x.stored), sum = device.put(y.stored);
      device.ops->add(sum.data() + begin, from.data(), n - begin - 1, device.queue());
      std::vector<double> expected = y.exact;
      for (std::int64_t i = begin; i < n - 1; ++i)
        expected[at(i)] = exact(round_to<T>(static_cast<float>(y.exact[at(i)] + x.exact[at(i - begin)])));
      CHECK(exact(sum.values()) == expected);
    });
}

TEMPLATE_TEST_CASE("embedding rows and their gradient equal plain loops on every device", "[device]", float,
                   Bfloat16) {
  using T = TestType;
  const std::int64_t V = 11, D = GENERATE(70, 72), max_positions = 9;
  const std::vector<TokenId> tokens = {3, 10, 3, 0, 3};
  const std::vector<std::int32_t> positions = {0, 1, 2, 8, 0};
  const auto rows = static_cast<std::int64_t>(tokens.size());
  const Values<T> table = random_rounded<T>(V * D, 1), places = random_rounded<T>(max_positions * D, 2),
                  dx = random_rounded<T>(rows * D, 3);
  std::vector<double> expected, dtable(at(V * D), 1);
  for (std::int64_t i = 0; i < rows * D; ++i) {
    expected.push_back(table.exact[at(tokens[at(i / D)] * D + i % D)] * 1.5 +
                       places.exact[at(positions[at(i / D)] * D + i % D)]);
    dtable[at(tokens[at(i / D)] * D + i % D)] += 1.5 * dx.exact[at(i)];
  }
  on_every_device<T>([&](const TestDevice<T>& device) {
    auto weights = device.put(table.stored), position_weights = device.put(places.stored),
         x = device.put(dx.stored), upstream = device.put(dx.stored);
    auto ids = device.put(tokens);
    auto places_of = device.put(positions);
    kernels::PassRows view;
    view.count = rows;
    view.tokens = ids.data();
    view.positions = places_of.data();
    device.ops->embed({weights.data(), position_weights.data(), x.data(), D, 1.5}, view, device.queue());
    check_values(x.values(), expected, 1e-6, 1e-6);
    auto keys = device.put(std::vector<std::int32_t>{0, 3, 10});
    auto offsets = device.put(std::vector<std::int64_t>{0, 1, 4, 5});
    auto order = device.put(std::vector<std::int64_t>{3, 0, 2, 4, 1});
    auto gradient = device.put(std::vector<float>(at(V * D), 1));
    device.ops->embed_grad(
        {upstream.data(), gradient.data(), D, 1.5, 3, keys.data(), offsets.data(), order.data()},
        device.queue());
    check_values(gradient.values(), dtable, 1e-6, 1e-6);
  });
}

TEMPLATE_TEST_CASE("rows are gathered, added back and blocks copied on every device", "[device]", float,
                   Bfloat16) {
  using T = TestType;
  // Rows and blocks that start at multiples of 16 bytes, and others.
  const std::int64_t D = GENERATE(37, 40), layers = 2, stride = GENERATE(304, 301), blocks = 4;
  const Values<T> from = random_rounded<T>(6 * D, 1), small = random_rounded<T>(3 * D, 2),
                  cache = random_rounded<T>(layers * blocks * stride, 3);
  const std::vector<std::int64_t> index = {5, 0, 2};
  on_every_device<T>([&](const TestDevice<T>& device) {
    auto source = device.put(from.stored), gathered = device.put(small.stored),
         added = device.put(small.stored);
    auto rows = device.put(index);
    device.ops->gather_rows(gathered.data(), source.data(), rows.data(), 3, D, device.queue());
    std::vector<double> expected, sums = from.exact;
    for (std::int64_t i = 0; i < 3 * D; ++i) {
      const std::size_t to = at(index[at(i / D)] * D + i % D);
      expected.push_back(from.exact[to]);
      sums[to] = exact(round_to<T>(from.exact[to] + small.exact[at(i)]));
    }
    CHECK(exact(gathered.values()) == expected);
    device.ops->add_to_rows(source.data(), added.data(), rows.data(), 3, D, device.queue());
    check_values(source.values(), sums, 1e-7, 1e-7);

    auto base = device.put(cache.stored);
    auto pairs = device.put(std::vector<std::int32_t>{0, 3, 2, 1});
    device.ops->copy_blocks(base.data(), layers, blocks * stride, stride, pairs.data(), 2, device.queue());
    std::vector<double> copied = cache.exact;
    for (std::int64_t l = 0; l < layers; ++l)
      for (std::int64_t i = 0; i < stride; ++i) {
        copied[at((l * blocks + 3) * stride + i)] = cache.exact[at(l * blocks * stride + i)];
        copied[at((l * blocks + 1) * stride + i)] = cache.exact[at((l * blocks + 2) * stride + i)];
      }
    CHECK(exact(base.values()) == copied);
  });
}
