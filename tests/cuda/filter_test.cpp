// Top-k, top-p and min-p on every device against the sampler's filters, which are held to transformers.
#include <algorithm>
#include <limits>
#include <set>

#include "rollout/sampling/filter.h"
#include "tests/cuda/devices.h"

using namespace rlhf;

namespace {

constexpr float kRemoved = -std::numeric_limits<float>::infinity();

std::size_t at(std::int64_t i) {
  return static_cast<std::size_t>(i);
}

struct Case {
  double temperature;
  SamplingOptions options;
};

kernels::RowFilter filter_of(const SamplingOptions& options) {
  kernels::RowFilter filter;
  filter.top_k = static_cast<std::int64_t>(options.top_k);
  filter.top_p = options.top_p;
  if (options.min_p) filter.log_min_p = std::log(*options.min_p);
  return filter;
}

std::vector<Case> cases() {
  std::vector<Case> out;
  const auto add = [&](double temperature, std::size_t top_k, double top_p, std::optional<double> min_p) {
    Case c{temperature, {}};
    c.options.temperature = temperature;
    c.options.top_k = top_k;
    c.options.top_p = top_p;
    c.options.min_p = min_p;
    out.push_back(c);
  };
  for (const double temperature : {1.0, 0.5}) {
    add(temperature, 0, 1, {});
    add(temperature, 1, 1, {});
    add(temperature, 7, 1, {});
    add(temperature, 1000000, 1, {});
    add(temperature, 0, 0.9, {});
    add(temperature, 0, 0.05, {});
    add(temperature, 0, 1e-9, {});
    add(temperature, 50, 0.8, {});
    add(temperature, 0, 1, 0.1);
    add(temperature, 20, 0.95, 0.2);
  }
  return out;
}

// Rows of one length: apart from one another, with many equal logits, with holes, and all equal.
std::vector<float> logits_of(std::int64_t rows, std::int64_t V) {
  RandomStream random(77, static_cast<std::uint64_t>(V));
  std::vector<float> logits;
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t i = 0; i < V; ++i) {
      auto value = static_cast<float>(3 * random.normal());
      if (r % 4 == 1) value = std::round(value * 2) / 2;
      if (r % 4 == 2 && random.below(3) == 0 && i != V / 2) value = kRemoved;
      if (r % 4 == 3) value = i % 5 == 0 ? 0.0F : -0.0F;
      logits.push_back(value);
    }
  return logits;
}

// Whether the mass that top-p has to reach lies so close to what some tokens hold that a rounding decides.
bool is_undecided(std::vector<float> row, const SamplingOptions& options) {
  if (options.top_p >= 1) return false;
  SamplingOptions before = options;
  before.top_p = 1;
  before.min_p = {};
  std::vector<double> masses;
  double all = 0;
  for (const KeptToken& token : filter_tokens(before, row)) masses.push_back(std::exp(double{token.logit}));
  std::ranges::sort(masses, std::greater<>());
  for (const double mass : masses) all += mass;
  double above = 0;
  for (const double mass : masses) {
    above += mass;
    if (std::abs(above / all - options.top_p) < 1e-5) return true;
  }
  return false;
}

}  // namespace

TEMPLATE_TEST_CASE("filters keep what the sampler's keep on every device", "[device]", float, Bfloat16) {
  using T = TestType;
  const auto all = cases();
  const auto rows = static_cast<std::int64_t>(all.size());
  std::int64_t decided = 0;
  // The last one: more tokens of a flat row than a thread keeps apart.
  for (const std::int64_t V : {1, 3, 200, 1100, 9001}) {
    const std::vector<float> logits = logits_of(rows, V);
    std::vector<kernels::DrawKey> keys;
    std::vector<kernels::RowFilter> filters;
    for (const Case& c : all) {
      keys.push_back({1, 2, 3, 4, 1 / c.temperature, false});
      filters.push_back(filter_of(c.options));
    }
    on_every_device<T>([&](const TestDevice<T>& device) {
      auto values = device.put(logits);
      auto on_device_keys = device.put(keys);
      auto on_device_filters = device.put(filters);
      auto lse = device.put(std::vector<double>(at(rows), -7));
      device.ops->filter({values.data(), V, on_device_keys.data(), on_device_filters.data(), lse.data()},
                         rows, device.queue());
      const std::vector<float> got = values.values();
      for (std::int64_t r = 0; r < rows; ++r) {
        INFO(device.name << ", V " << V << ", row " << r);
        const SamplingOptions& options = all[at(r)].options;
        std::vector<float> row(logits.begin() + r * V, logits.begin() + (r + 1) * V), scaled = row;
        double sum = 0;
        for (const float logit : row) sum += std::exp(double{logit} / options.temperature);
        const bool removes = filters[at(r)].removes();
        CHECK(lse.values()[at(r)] == (removes ? Approx(std::log(sum)).margin(1e-5) : Approx(-7)));
        apply_temperature(options, scaled);
        if (is_undecided(scaled, options)) continue;
        ++decided;
        std::set<TokenId> expected, kept;
        for (const KeptToken& token : filter_tokens(options, scaled)) expected.insert(token.token);
        bool unchanged = true;
        for (std::int64_t i = 0; i < V; ++i) {
          const float value = got[at(r * V + i)];
          if (value == kRemoved) continue;
          kept.insert(static_cast<TokenId>(i));
          unchanged = unchanged && value == row[at(i)];
        }
        CHECK(unchanged);
        CHECK((kept == expected));
      }
    });
  }
  CHECK(decided > 100);  // on one device
}

TEMPLATE_TEST_CASE("a row that cannot be drawn from passes a filter as it is", "[device]", float, Bfloat16) {
  using T = TestType;
  const std::int64_t V = 300;
  std::vector<float> logits(at(3 * V), 0.5F);
  logits[17] = std::nanf("");
  std::fill(logits.begin() + V, logits.begin() + 2 * V, kRemoved);
  logits[at(2 * V + 5)] = std::numeric_limits<float>::infinity();
  const std::vector<kernels::DrawKey> keys(3, {1, 2, 3, 4, 1, false});
  const std::vector<kernels::RowFilter> filters(3, {2, 0.5, -1});
  on_every_device<T>([&](const TestDevice<T>& device) {
    INFO(device.name);
    auto values = device.put(logits);
    auto on_device_keys = device.put(keys);
    auto on_device_filters = device.put(filters);
    auto lse = device.put(std::vector<double>(3, 0));
    device.ops->filter({values.data(), V, on_device_keys.data(), on_device_filters.data(), lse.data()}, 3,
                       device.queue());
    const std::vector<float> got = values.values();
    CHECK(std::isnan(got[17]));
    CHECK(got[at(V)] == kRemoved);
    CHECK(std::isinf(got[at(2 * V + 5)]));
    for (const double value : lse.values()) CHECK(std::isnan(value));
    auto tokens = device.put(std::vector<TokenId>(3, 9));
    auto workspace = device.put(std::vector<double>(at(kernels::logits_workspace(3, V))));
    device.ops->draw({values.data(), V, on_device_keys.data(), tokens.data(), nullptr, workspace.data()}, 3,
                     device.queue());
    CHECK(tokens.values() == std::vector<TokenId>{-1, -1, -1});
  });
}
