// Edits of rows of logits (penalties, biases, allowed tokens) on every device against plain loops in double.
#include <algorithm>
#include <limits>
#include <optional>
#include <set>
#include <span>

#include "tests/cuda/devices.h"

using namespace rlhf;

namespace {

constexpr double kRemoved = -std::numeric_limits<double>::infinity();
constexpr double kTemperature = 0.8;

std::size_t at(std::int64_t i) {
  return static_cast<std::size_t>(i);
}

struct RowCase {
  std::vector<kernels::LogitEdit> edits;
  std::vector<TokenId> allowed;
  bool greedy = false;

  double scale() const { return greedy ? 1 : 1 / kTemperature; }
  bool changes() const { return !edits.empty() || !allowed.empty(); }
};

// Tokens of [0, V) in an order that is not ascending, each with the probability 1 / among.
std::vector<TokenId> some_tokens(RandomStream& random, std::int64_t V, std::uint64_t among) {
  std::vector<TokenId> tokens;
  for (std::int64_t i = 0; i < V; ++i)
    if (random.below(among) == 0) tokens.push_back(static_cast<TokenId>((i * 7919 + 3) % V));
  std::ranges::sort(tokens);
  tokens.erase(std::unique(tokens.begin(), tokens.end()), tokens.end());
  for (std::size_t i = tokens.size(); i > 1; --i) std::swap(tokens[i - 1], tokens[random.below(i)]);
  return tokens;
}

std::vector<kernels::LogitEdit> edits_for(RandomStream& random, const std::vector<TokenId>& tokens) {
  std::vector<kernels::LogitEdit> edits;
  for (const TokenId token : tokens) {
    kernels::LogitEdit edit;
    edit.token = token;
    if (random.below(2) == 0) edit.bias = static_cast<float>(random.normal());
    if (random.below(2) == 0) edit.penalty = static_cast<float>(random.below(4)) * 0.4F;
    if (random.below(2) == 0) edit.repetition = random.below(2) == 0 ? 1.3F : 0.6F;
    edits.push_back(edit);
  }
  return edits;
}

// No edits; some; all tokens; one allowed; a third allowed, with edits of these and others; tokens ruled out.
std::vector<RowCase> cases_for(std::int64_t V) {
  RandomStream random(5, static_cast<std::uint64_t>(V));
  std::vector<RowCase> out(8);
  out[1].edits = edits_for(random, some_tokens(random, V, 9));
  out[2].edits = edits_for(random, some_tokens(random, V, 1));
  out[3].allowed = {static_cast<TokenId>(V - 1)};
  out[4].allowed = some_tokens(random, V, 3);
  out[4].edits = edits_for(random, some_tokens(random, V, 2));
  out[5].edits = edits_for(random, some_tokens(random, V, 20));
  for (std::size_t i = 0; i < out[5].edits.size() && i < at(V / 2); ++i)
    out[5].edits[i].bias = -std::numeric_limits<float>::infinity();
  out[6].allowed = some_tokens(random, V, 1);
  out[6].greedy = true;
  return out;
}

std::vector<double> edited(const std::vector<double>& row, const RowCase& edits) {
  std::vector<double> out = row;
  if (!edits.allowed.empty()) {
    const std::set<TokenId> allowed(edits.allowed.begin(), edits.allowed.end());
    for (std::size_t i = 0; i < out.size(); ++i)
      if (!allowed.contains(static_cast<TokenId>(i))) out[i] = kRemoved;
  }
  for (const kernels::LogitEdit& edit : edits.edits) {
    double& logit = out[at(edit.token)];
    logit = logit + double{edit.bias} - double{edit.penalty};
    logit = logit > 0 ? logit / double{edit.repetition} : logit * double{edit.repetition};
  }
  return out;
}

double log_sum_exp(const std::vector<double>& row, double scale) {
  const double largest = *std::ranges::max_element(row);
  double sum = 0;
  for (const double logit : row) sum += std::exp((logit - largest) * scale);
  return largest * scale + std::log(sum);
}

// The rows of one length on a device, with their lists there.
template <class T>
class EditedRows {
 public:
  EditedRows(const TestDevice<T>& device, const std::vector<float>& logits, std::int64_t V,
             const std::vector<RowCase>& cases)
      : device_(device), logits_(device.put(logits)), V_(V), count_(static_cast<std::int64_t>(cases.size())) {
    std::vector<kernels::DrawKey> keys;
    std::vector<kernels::RowEdits> rows;
    for (const RowCase& row : cases) {
      keys.push_back(
          {1, 2, 3, static_cast<std::uint32_t>(keys.size()), row.greedy ? 1 : 1 / kTemperature, row.greedy});
      edits_.push_back(device.put(row.edits));
      allowed_.push_back(device.put(row.allowed));
      rows.push_back({edits_.back().data(), static_cast<std::int64_t>(row.edits.size()),
                      allowed_.back().data(), static_cast<std::int64_t>(row.allowed.size())});
    }
    keys_.emplace(device.put(keys));
    rows_.emplace(device.put(rows));
    unedited_.emplace(device.put(std::vector<double>(at(count_), -7)));
    workspace_.emplace(device.put(std::vector<double>(at(kernels::logits_workspace(count_, V)), NAN)));
  }

  void edit() { device_.ops->edit(args(), count_, device_.queue()); }
  std::vector<TokenId> draw(std::vector<kernels::LogitsRow>& statistics) {
    auto tokens = device_.put(std::vector<TokenId>(at(count_), -7));
    auto rows = device_.put(std::vector<kernels::LogitsRow>(at(count_)));
    device_.ops->draw({logits_.data(), V_, keys_->data(), tokens.data(), rows.data(), workspace_->data()},
                      count_, device_.queue());
    device_.ops->unedited_logprobs(args(), tokens.data(), count_, device_.queue());
    statistics = rows.values();
    return tokens.values();
  }
  std::vector<float> logits() const { return logits_.values(); }
  std::vector<double> unedited() const { return unedited_->values(); }

 private:
  kernels::EditArgs<T> args() {
    return {logits_.data(), V_, keys_->data(), rows_->data(), unedited_->data(), workspace_->data()};
  }

  const TestDevice<T>& device_;
  DeviceBuffer<float> logits_;
  std::int64_t V_, count_;
  std::vector<DeviceBuffer<kernels::LogitEdit>> edits_;
  std::vector<DeviceBuffer<TokenId>> allowed_;
  std::optional<DeviceBuffer<kernels::DrawKey>> keys_;
  std::optional<DeviceBuffer<kernels::RowEdits>> rows_;
  std::optional<DeviceBuffer<double>> unedited_, workspace_;
};

}  // namespace

TEMPLATE_TEST_CASE("edited rows are the definition's, and draws from them also report the unedited row",
                   "[device]", float, Bfloat16) {
  using T = TestType;
  for (const std::int64_t V : {1, 31, 300, 4096, 9001}) {
    const std::vector<RowCase> cases = cases_for(V);
    const auto rows = static_cast<std::int64_t>(cases.size());
    const Values<float> logits = random_rounded<float>(rows * V, 3, 3);
    on_every_device<T>([&](const TestDevice<T>& device) {
      EditedRows<T> on_device(device, logits.stored, V, cases);
      on_device.edit();
      const std::vector<float> got = on_device.logits();
      const std::vector<double> lse = on_device.unedited();
      std::vector<kernels::LogitsRow> statistics;
      const std::vector<TokenId> tokens = on_device.draw(statistics);
      const std::vector<double> logprobs = on_device.unedited();
      for (std::int64_t r = 0; r < rows; ++r) {
        INFO(device.name << ", V " << V << ", row " << r);
        const RowCase& row = cases[at(r)];
        const std::vector<double> before(logits.exact.begin() + r * V, logits.exact.begin() + (r + 1) * V),
            after = edited(before, row);
        std::int64_t off = 0;
        for (std::int64_t i = 0; i < V; ++i) {
          const auto value = static_cast<double>(got[at(r * V + i)]);
          // Without edits the bits; sums, a quotient or a product are rounded once each.
          const double allowed = row.edits.empty() ? 0 : 1e-6 * (1 + std::abs(after[at(i)]));
          off += value != after[at(i)] && !(std::abs(value - after[at(i)]) <= allowed);
        }
        CHECK(off == 0);
        if (row.changes()) CHECK(lse[at(r)] == Approx(log_sum_exp(before, row.scale())).margin(1e-5));
        const TokenId token = tokens[at(r)];
        REQUIRE(token >= 0);
        REQUIRE(token < V);
        CHECK(after[at(token)] > kRemoved);
        CHECK(statistics[at(r)].logprob ==
              Approx(after[at(token)] * row.scale() - log_sum_exp(after, row.scale())).margin(1e-5));
        CHECK(logprobs[at(r)] ==
              (row.changes()
                   ? Approx(before[at(token)] * row.scale() - log_sum_exp(before, row.scale())).margin(1e-5)
                   : Approx(-7)));
        if (row.greedy) CHECK(token == std::ranges::max_element(after) - after.begin());
      }
    });
  }
}

TEMPLATE_TEST_CASE("an edited row has the same bits alone and among others", "[device]", float, Bfloat16) {
  using T = TestType;
  const std::int64_t V = kernels::kLogitsPart + 101;  // the rows are aligned differently
  const std::vector<RowCase> cases = cases_for(V);
  const auto rows = static_cast<std::int64_t>(cases.size());
  const std::vector<float> logits = random_rounded<float>(rows * V, 4, 3).stored;
  on_every_device<T>([&](const TestDevice<T>& device) {
    INFO(device.name);
    EditedRows<T> together(device, logits, V, cases);
    together.edit();
    const std::vector<float> expected = together.logits();
    const std::vector<double> lse = together.unedited();
    for (const std::int64_t r : {1, 4}) {
      EditedRows<T> alone(device, {logits.begin() + r * V, logits.begin() + (r + 1) * V}, V, {cases[at(r)]});
      alone.edit();
      CHECK(std::ranges::equal(alone.logits(), std::span(expected).subspan(at(r * V), at(V))));
      CHECK(alone.unedited()[0] == lse[at(r)]);
    }
  });
}

TEMPLATE_TEST_CASE("edited rows that cannot be drawn from give -1 and no log-prob", "[device]", float,
                   Bfloat16) {
  using T = TestType;
  const std::int64_t V = 300;
  std::vector<RowCase> cases(4);
  cases[0].allowed = {3, 4};  // both ruled out again
  for (const TokenId token : cases[0].allowed)
    cases[0].edits.push_back({.token = token, .bias = -std::numeric_limits<float>::infinity()});
  cases[1].allowed = {3, 4};  // one is NaN
  cases[2].allowed = {7, 8};  // NaN lies elsewhere: a draw, of a token without a log-prob of its own
  cases[3].edits.push_back({.token = 3, .penalty = 2});
  std::vector<float> logits(at(4 * V), 0.5F);
  for (std::int64_t r = 1; r < 4; ++r) logits[at(r * V + 4)] = std::nanf("");
  on_every_device<T>([&](const TestDevice<T>& device) {
    INFO(device.name);
    EditedRows<T> rows(device, logits, V, cases);
    rows.edit();
    std::vector<kernels::LogitsRow> statistics;
    const std::vector<TokenId> tokens = rows.draw(statistics);
    CHECK(tokens[0] == -1);
    CHECK(tokens[1] == -1);
    CHECK((tokens[2] == 7 || tokens[2] == 8));
    CHECK(statistics[2].logprob == Approx(-std::log(2.0)));
    CHECK(tokens[3] == -1);
    for (const double logprob : rows.unedited()) CHECK(std::isnan(logprob));
  });
}
