// Log-probs, entropies, their gradient, and draws, on every device against plain loops in double.
#include <algorithm>

#include "tests/cuda/devices.h"

using namespace rlhf;

namespace {

std::size_t at(std::int64_t i) {
  return static_cast<std::size_t>(i);
}

struct RowReference {
  std::vector<double> capped, p;
  double max = -INFINITY, lse = 0, entropy = 0, logprob = 0;

  RowReference(const double* logits, std::int64_t V, double temperature, double softcap, TokenId target) {
    for (std::int64_t i = 0; i < V; ++i) {
      capped.push_back(softcap > 0 ? softcap * std::tanh(logits[i] / softcap) : logits[i]);
      max = std::max(max, capped.back() / temperature);
    }
    double total = 0;
    for (const double z : capped) total += std::exp(z / temperature - max);
    lse = max + std::log(total);
    for (const double z : capped) {
      p.push_back(std::exp(z / temperature - lse));
      entropy -= p.back() > 0 ? p.back() * (z / temperature - lse) : 0;
    }
    logprob = capped[at(target)] / temperature - lse;
  }
};

}  // namespace

TEMPLATE_TEST_CASE("log-probs, entropies and gradients equal the plain loop on every device", "[device]",
                   float, Bfloat16) {
  using T = TestType;
  const std::int64_t rows = 3;
  // Below, at and above the tokens that one block reads, aligned rows and others.
  for (const std::int64_t V : {1, 2, 100, 257, 4096, 8197})
    for (const double temperature : {1.0, 0.7})
      for (const double softcap : {0.0, 4.0}) {
        const Values<float> logits = random_rounded<float>(rows * V, 1, 3),
                            dlogprobs = random_rounded<float>(rows, 2),
                            dentropies = random_rounded<float>(rows, 3);
        const std::vector<TokenId> targets = {0, static_cast<TokenId>(V - 1), static_cast<TokenId>(V / 2)};
        std::vector<double> capped, gradient;
        std::vector<RowReference> references;
        for (std::int64_t r = 0; r < rows; ++r) {
          const RowReference row(logits.exact.data() + r * V, V, temperature, softcap, targets[at(r)]);
          capped.insert(capped.end(), row.capped.begin(), row.capped.end());
          for (std::int64_t i = 0; i < V; ++i) {
            const double log_p = row.capped[at(i)] / temperature - row.lse;
            double slope = dlogprobs.exact[at(r)] * ((i == targets[at(r)]) - row.p[at(i)]) -
                           dentropies.exact[at(r)] * row.p[at(i)] * (log_p + row.entropy);
            slope /= temperature;
            if (softcap > 0) slope *= 1 - std::pow(row.capped[at(i)] / softcap, 2);
            gradient.push_back(slope);
          }
          references.push_back(row);
        }
        on_every_device<T>([&](const TestDevice<T>& device) {
          INFO(device.name << ", V " << V << ", temperature " << temperature << ", softcap " << softcap);
          auto values = device.put(logits.stored), dlp = device.put(dlogprobs.stored),
               dent = device.put(dentropies.stored);
          auto ids = device.put(targets);
          auto statistics = device.put(std::vector<kernels::LogitsRow>(at(rows)));
          auto workspace = device.put(std::vector<double>(at(kernels::logits_workspace(rows, V)), NAN));
          const kernels::LogitsArgs<T> args{values.data(), V,           1 / temperature,
                                            softcap,       ids.data(),  statistics.data(),
                                            dlp.data(),    dent.data(), workspace.data()};
          device.ops->logits(args, rows, device.queue());
          check_values(values.values(), capped, 2e-6, 2e-6);
          const std::vector<kernels::LogitsRow> got = statistics.values();
          for (std::int64_t r = 0; r < rows; ++r) {
            CHECK(got[at(r)].max == Approx(references[at(r)].max).margin(1e-5));
            CHECK(got[at(r)].lse == Approx(references[at(r)].lse).margin(1e-5));
            CHECK(got[at(r)].logprob == Approx(references[at(r)].logprob).margin(1e-5));
            CHECK(got[at(r)].entropy == Approx(references[at(r)].entropy).margin(1e-5));
          }
          auto rounded = device.put(std::vector<T>(at(rows * V), round_to<T>(7)));
          kernels::LogitsArgs<T> elsewhere = args;
          elsewhere.rounded = rounded.data();
          device.ops->logits_grad(elsewhere, rows, device.queue());
          check_values(rounded.values(), gradient, 1e-5, 1e-5);
          check_values(values.values(), capped, 2e-6, 2e-6);
          device.ops->logits_grad(args, rows, device.queue());
          check_values(values.values(), gradient, 1e-5, 1e-5);
        });
      }
}

TEMPLATE_TEST_CASE("log-probs of far apart logits are finite and exact on every device", "[device]", float,
                   Bfloat16) {
  using T = TestType;
  const std::int64_t V = 600;
  std::vector<float> logits(at(V), -500);
  logits[5] = 500;
  on_every_device<T>([&](const TestDevice<T>& device) {
    INFO(device.name);
    auto values = device.put(logits);
    auto ids = device.put(std::vector<TokenId>{6});
    auto statistics = device.put(std::vector<kernels::LogitsRow>(1));
    auto workspace = device.put(std::vector<double>(at(kernels::logits_workspace(1, V)), NAN));
    device.ops->logits(
        {values.data(), V, 1, 0, ids.data(), statistics.data(), nullptr, nullptr, workspace.data()}, 1,
        device.queue());
    CHECK(statistics.values()[0].logprob == -1000);
    CHECK(statistics.values()[0].entropy == Approx(0).margin(1e-12));
  });
}

TEMPLATE_TEST_CASE("draws invert the cumulative probabilities at the counter's uniform number", "[device]",
                   float, Bfloat16) {
  using T = TestType;
  const std::int64_t rows = 40;
  for (const std::int64_t V : {1, 7, 1500, 4096, 9001}) {
    Values<float> logits = random_rounded<float>(rows * V, 1, 2);
    std::vector<kernels::DrawKey> keys;
    for (std::int64_t r = 0; r < rows; ++r) {
      keys.push_back(
          {99, static_cast<std::uint64_t>(r), 3, static_cast<std::uint32_t>(r * 7), 1.25, r % 8 == 7});
      // Half of the vocabulary is impossible in some rows, the end of it too.
      for (std::int64_t i = V / 2; r % 3 == 1 && i < V && V > 1; ++i)
        logits.stored[at(r * V + i)] = -INFINITY, logits.exact[at(r * V + i)] = -INFINITY;
    }
    on_every_device<T>([&](const TestDevice<T>& device) {
      INFO(device.name << ", V " << V);
      auto values = device.put(logits.stored);
      auto counters = device.put(keys);
      auto tokens = device.put(std::vector<TokenId>(at(rows), -7));
      auto statistics = device.put(std::vector<kernels::LogitsRow>(at(rows)));
      auto workspace = device.put(std::vector<double>(at(kernels::logits_workspace(rows, V)), NAN));
      device.ops->draw(
          {values.data(), V, counters.data(), tokens.data(), statistics.data(), workspace.data()}, rows,
          device.queue());
      const std::vector<TokenId> drawn = tokens.values();
      const std::vector<kernels::LogitsRow> got = statistics.values();
      std::int64_t off = 0;
      for (std::int64_t r = 0; r < rows; ++r) {
        const double* row = logits.exact.data() + r * V;
        const auto largest = std::max_element(row, row + V) - row;
        if (drawn[at(r)] < 0 || drawn[at(r)] >= V) FAIL("row " << r << " drew " << drawn[at(r)]);
        const RowReference expected(row, V, keys[at(r)].greedy ? 1 : 1 / 1.25, 0, drawn[at(r)]);
        CHECK(got[at(r)].max == Approx(expected.max).margin(1e-5));
        CHECK(got[at(r)].lse == Approx(expected.lse).margin(1e-5));
        CHECK(got[at(r)].logprob == Approx(expected.logprob).margin(1e-5));
        CHECK(got[at(r)].entropy == Approx(expected.entropy).margin(1e-5));
        if (keys[at(r)].greedy) {
          off += drawn[at(r)] != largest;
          continue;
        }
        double mass = 0, below = 0, up_to = 0;
        for (std::int64_t i = 0; i < V; ++i) {
          const double weight = std::exp((row[i] - row[largest]) * 1.25);
          if (i == drawn[at(r)]) below = mass;
          mass += weight;
          if (i == drawn[at(r)]) up_to = mass;
        }
        const double u = uniform_at(99, static_cast<std::uint64_t>(r), 3, static_cast<std::uint32_t>(r * 7));
        // Weights are floats, so the ends of a token's interval are good to 1e-7.
        off += up_to <= below || u < below / mass - 1e-6 || u > up_to / mass + 1e-6;
      }
      CHECK(off == 0);
    });
  }
}

TEMPLATE_TEST_CASE("rows that cannot be drawn from give -1", "[device]", float, Bfloat16) {
  using T = TestType;
  const std::int64_t V = 300;
  std::vector<float> logits(at(4 * V), 0);
  logits[at(250)] = NAN;
  for (std::int64_t i = 0; i < V; ++i) logits[at(V + i)] = -INFINITY;
  logits[at(2 * V + 1)] = INFINITY;
  on_every_device<T>([&](const TestDevice<T>& device) {
    INFO(device.name);
    auto values = device.put(logits);
    auto counters = device.put(std::vector<kernels::DrawKey>(4, {1, 2, 3, 4, 1, false}));
    auto tokens = device.put(std::vector<TokenId>(4, -7));
    auto statistics = device.put(std::vector<kernels::LogitsRow>(4));
    auto workspace = device.put(std::vector<double>(at(kernels::logits_workspace(4, V)), NAN));
    device.ops->draw({values.data(), V, counters.data(), tokens.data(), statistics.data(), workspace.data()},
                     4, device.queue());
    const std::vector<TokenId> drawn = tokens.values();
    for (std::size_t r = 0; r < 3; ++r) CHECK(std::isnan(statistics.values()[r].logprob));
    CHECK(statistics.values()[3].entropy == Approx(std::log(V)));
    CHECK(std::vector<TokenId>(drawn.begin(), drawn.begin() + 3) == std::vector<TokenId>{-1, -1, -1});
    CHECK(drawn[3] == static_cast<TokenId>(uniform_at(1, 2, 3, 4) * static_cast<double>(V)));
  });
}

TEMPLATE_TEST_CASE("greedy rows take the lowest of equal tokens, whatever part it is in", "[device]", float,
                   Bfloat16) {
  using T = TestType;
  // Parts without any finite logit before, between and after.
  const std::int64_t V = 5 * kernels::kLogitsPart + 1;
  const std::vector<TokenId> expected = {4097, 12287, static_cast<TokenId>(V - 1)};
  std::vector<float> logits(at(3 * V), -INFINITY);
  for (std::size_t r = 0; r < expected.size(); ++r) {
    logits[r * at(V) + static_cast<std::size_t>(expected[r])] = -3;
    logits[r * at(V) + at(V - 1)] = -3;
  }
  on_every_device<T>([&](const TestDevice<T>& device) {
    INFO(device.name);
    auto values = device.put(logits);
    auto counters = device.put(std::vector<kernels::DrawKey>(3, {1, 2, 3, 4, 0.5, true}));
    auto tokens = device.put(std::vector<TokenId>(3, -7));
    auto statistics = device.put(std::vector<kernels::LogitsRow>(3));
    auto workspace = device.put(std::vector<double>(at(kernels::logits_workspace(3, V)), NAN));
    device.ops->draw({values.data(), V, counters.data(), tokens.data(), statistics.data(), workspace.data()},
                     3, device.queue());
    CHECK(tokens.values() == expected);
    CHECK(statistics.values()[0].logprob == Approx(-std::log(2.0)));
    CHECK(statistics.values()[2].logprob == Approx(0).margin(1e-12));
  });
}

TEMPLATE_TEST_CASE("a row of logits gives the same bits alone and among others, drawn or scored", "[device]",
                   float, Bfloat16) {
  using T = TestType;
  const std::int64_t rows = 3, V = kernels::kLogitsPart + 101;  // the rows are aligned differently
  const Values<float> logits = random_rounded<float>(rows * V, 1, 3);
  on_every_device<T>([&](const TestDevice<T>& device) {
    INFO(device.name);
    auto counters = device.put(std::vector<kernels::DrawKey>(at(rows), {1, 2, 3, 4, 1.25, false}));
    auto workspace = device.put(std::vector<double>(at(kernels::logits_workspace(rows, V)), NAN));
    const auto run = [&](const std::vector<float>& some, std::int64_t count) {
      auto values = device.put(some);
      auto tokens = device.put(std::vector<TokenId>(at(rows), 0));
      auto drawn = device.put(std::vector<kernels::LogitsRow>(at(rows))),
           scored = device.put(std::vector<kernels::LogitsRow>(at(rows)));
      device.ops->draw({values.data(), V, counters.data(), tokens.data(), drawn.data(), workspace.data()},
                       count, device.queue());
      device.ops->logits(
          {values.data(), V, 1.25, 0, tokens.data(), scored.data(), nullptr, nullptr, workspace.data()},
          count, device.queue());
      std::vector<double> out;
      for (std::int64_t r = 0; r < count; ++r) {
        const kernels::LogitsRow a = drawn.values()[at(r)], b = scored.values()[at(r)];
        if (std::string(device.name) != "cpu")  // there a draw's statistics are in double
          CHECK(std::vector<double>{a.max, a.lse, a.logprob, a.entropy} ==
                std::vector<double>{b.max, b.lse, b.logprob, b.entropy});
        out.insert(out.end(),
                   {static_cast<double>(tokens.values()[at(r)]), a.max, a.lse, a.logprob, a.entropy});
      }
      return out;
    };
    const std::vector<double> together = run(logits.stored, rows),
                              alone = run({logits.stored.end() - V, logits.stored.end()}, 1);
    CHECK(std::vector<double>(together.end() - 5, together.end()) == alone);
  });
}
