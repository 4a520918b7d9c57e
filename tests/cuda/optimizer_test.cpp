// AdamW, gradient norm and clipping on every device against plain loops in double.
#include "rlhf/kernels/adamw.h"
#include "rlhf/kernels/float_hash.h"
#include "tests/cuda/devices.h"

using namespace rlhf;

namespace {

std::size_t at(std::int64_t i) {
  return static_cast<std::size_t>(i);
}

}  // namespace

TEMPLATE_TEST_CASE("three steps of AdamW equal the formula on every device", "[device]", float, Bfloat16) {
  using T = TestType;
  for (const bool amsgrad : {false, true})
    for (const std::int64_t n : {0, 1, 300, 1000}) {
      const Values<float> start = random_rounded<float>(n, 1);
      on_every_device<T>([&](const TestDevice<T>& device) {
        INFO(device.name << ", n " << n << ", amsgrad " << amsgrad);
        auto master = device.put(start.stored), m = device.put(std::vector<float>(at(n))),
             v = device.put(std::vector<float>(at(n))), largest = device.put(std::vector<float>(at(n)));
        auto shadow = device.put(std::vector<T>(at(n)));
        auto scale = device.put(std::vector<double>{0.5});
        std::vector<double> p = start.exact, first(at(n)), second(at(n)), top(at(n));
        for (std::int64_t step = 1; step <= 3; ++step) {
          const AdamwStep numbers{1e-2, 0.9, 0.95, 1e-8, 0.1, step, 1};
          // Later gradients are smaller, so that the largest second moment is not always the last.
          const Values<float> gradient =
              random_rounded<float>(n, 10 + static_cast<std::uint64_t>(step), 3.0 / std::pow(4, step));
          auto g = device.put(gradient.stored);
          device.ops->adamw(adamw_factors(numbers),
                            {master.data(), shadow.data(), g.data(), m.data(), v.data(),
                             amsgrad ? largest.data() : nullptr, n, scale.data()},
                            device.queue());
          for (std::size_t i = 0; i < p.size(); ++i) {
            const double x = 0.5 * gradient.exact[i];
            first[i] = 0.9 * first[i] + 0.1 * x;
            second[i] = 0.95 * second[i] + 0.05 * x * x;
            top[i] = std::max(top[i], second[i]);
            const double m_hat = first[i] / (1 - std::pow(0.9, step));
            const double v_hat = (amsgrad ? top[i] : second[i]) / (1 - std::pow(0.95, step));
            p[i] -= 1e-2 * (m_hat / (std::sqrt(v_hat) + 1e-8) + 0.1 * p[i]);
          }
        }
        // m may cancel to nothing where sqrt(v) does not: the error of a step is 1e-2 * 1e-6.
        check_values(master.values(), p, 1e-7, 1e-6);
        const std::vector<float> weights = master.values();
        std::vector<T> rounded;
        for (const float weight : weights) rounded.push_back(round_to<T>(static_cast<double>(weight)));
        CHECK(exact(shadow.values()) == exact(rounded));
      });
    }
}

TEMPLATE_TEST_CASE("the gradient norm and its clip stay on the device", "[device]", float, Bfloat16) {
  using T = TestType;
  for (const std::int64_t n : {1, 1000, 70000}) {
    const Values<float> x = random_rounded<float>(n, 1);
    double square = 0;
    for (const double value : x.exact) square += value * value;
    on_every_device<T>([&](const TestDevice<T>& device) {
      auto values = device.put(x.stored);
      auto numbers = device.put(std::vector<double>{NAN, NAN, NAN, NAN});
      auto workspace = device.put(std::vector<double>(at(kernels::kSumPartials), NAN));
      double* data = numbers.data();
      device.ops->sum_squares(data, workspace.data(), values.data(), n, device.queue());
      const double norm = std::sqrt(square);
      device.ops->clip(data + 1, data, norm / 4, device.queue());
      device.ops->clip(data + 2, data, norm * 4, device.queue());
      device.ops->clip(data + 3, data, 0, device.queue());
      const std::vector<double> got = numbers.values();
      CHECK(got[0] == Approx(square).epsilon(1e-12));
      CHECK(got[1] == Approx(0.25 * norm / (norm + 1e-6)).epsilon(1e-9));
      CHECK(got[2] == 1);
      CHECK(got[3] == 1);
    });
  }
}

TEST_CASE("a hash of floats is a sum of SplitMix64's numbers", "[device]") {
  // The first numbers of the generator with seed 0 (Vigna's splitmix64.c), which counts from one.
  CHECK(kernels::float_hash_term(0, 0) == 0xE220A8397B1DCDAFU);
  CHECK(kernels::float_hash_term(1, 0) == 0x6E789E6AA1B965F4U);
  CHECK(kernels::hash_floats(std::vector<float>{0, 0}) == 0xE220A8397B1DCDAFU + 0x6E789E6AA1B965F4U);
  // A sign, a place and a part of a row each make a difference, or none where they must not.
  const std::vector<float> row = random_rounded<float>(1000, 8).stored;
  const std::span<const float> all(row);
  CHECK(kernels::hash_floats(all.first(400)) + kernels::hash_floats(all.subspan(400), 400) ==
        kernels::hash_floats(all));
  CHECK(kernels::hash_floats(all.subspan(400), 400) != kernels::hash_floats(all.subspan(400), 401));
  CHECK(kernels::hash_floats(std::vector<float>{0.0F}) != kernels::hash_floats(std::vector<float>{-0.0F}));
}

TEMPLATE_TEST_CASE("floats have the same hash on every device", "[device]", float, Bfloat16) {
  using T = TestType;
  for (const std::int64_t n : {0, 1, 1000, 70000}) {
    const std::vector<float> x = random_rounded<float>(n, 1).stored;
    on_every_device<T>([&](const TestDevice<T>& device) {
      INFO(device.name << ", " << n);
      auto values = device.put(x);
      auto numbers = device.put(std::vector<std::uint64_t>(1 + at(kernels::kSumPartials), 77));
      device.ops->hash_floats(numbers.data(), numbers.data() + 1, values.data(), n, 123456789012U,
                              device.queue());
      CHECK(numbers.values()[0] == kernels::hash_floats(x, 123456789012U));
    });
  }
}
