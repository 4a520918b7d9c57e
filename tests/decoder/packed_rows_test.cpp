// Sequences with common heads against the same sequences one by one: equal log-probs, gradients equal up to
// the order of summation.
#include "rlhf/model/packed_rows.h"

#include <algorithm>
#include <map>
#include <set>

#include "rlhf/core/random.h"
#include "rlhf/model/parameters.h"
#include "rlhf/model/sequence_pass.h"
#include "rlhf/model/weight_file.h"
#include "tests/catch.h"

using namespace rlhf;

namespace {

using Sequences = std::vector<std::vector<TokenId>>;

// Sequences of 0 to 44 tokens: new ones, and branches, continuations and heads of earlier ones.
Sequences make_sequences(std::uint64_t seed, std::size_t count) {
  RandomStream random(seed);
  Sequences sequences;
  while (sequences.size() < count) {
    std::vector<TokenId> tokens;
    if (!sequences.empty() && random.below(4) != 0) {
      tokens = sequences[random.below(sequences.size())];
      tokens.resize(random.below(tokens.size() + 1));
    }
    if (random.below(5) != 0)
      for (std::uint64_t n = random.below(24); n > 0; --n)
        tokens.push_back(static_cast<TokenId>(3 + random.below(20)));
    sequences.push_back(std::move(tokens));
  }
  return sequences;
}

std::vector<std::span<const TokenId>> spans(const Sequences& sequences) {
  return {sequences.begin(), sequences.end()};
}

struct Model {
  Parameters<double> parameters;
  ThreadPool pool{2};
  SequencePass<double> pass;

  explicit Model(const std::filesystem::path& directory, const TrainableOptions& trainable = {},
                 Recompute recompute = Recompute::kNone)
      : parameters(load_model_config(directory), trainable, nullptr),
        pass(parameters.config(), Compute<double>(pool, kernels::detect_cpu_isa()), recompute) {
    parameters.load(*WeightFile::open(directory));
  }
  // Log-probs of all next tokens of the packed sequences; adds the gradient of their sum, each weighted by
  // its place.
  std::vector<std::vector<double>> run(const Sequences& sequences, double first_weight) {
    const PackedRows rows(spans(sequences));
    std::vector<TokenTarget> targets;
    std::vector<double> weights;
    for (std::size_t s = 0; s < sequences.size(); ++s)
      for (std::size_t t = 1; t < sequences[s].size(); ++t) {
        targets.push_back({rows.row(s, static_cast<std::int64_t>(t) - 1), sequences[s][t]});
        weights.push_back(first_weight + 0.1 * static_cast<double>(s) + 0.01 * static_cast<double>(t));
      }
    std::vector<double> flat(targets.size());
    if (targets.empty()) return std::vector<std::vector<double>>(sequences.size());
    pass.forward(parameters.weights(), rows, SequencePass<double>::Keep::kForBackward);
    pass.token_logprobs(parameters.weights(), targets, 1, flat, {});
    pass.token_logprobs_backward(parameters.weights(), targets, 1, weights, {});
    pass.backward(parameters.weights(), rows);
    std::vector<std::vector<double>> result;
    auto next = flat.begin();
    for (const auto& sequence : sequences) {
      const auto n = static_cast<std::ptrdiff_t>(sequence.empty() ? 0 : sequence.size() - 1);
      result.emplace_back(next, next + n);
      next += n;
    }
    return result;
  }
};

}  // namespace

TEST_CASE("a pass over common heads equals separate passes") {
  for (const char* name :
       {"model_llama_gqa_untied", "model_qwen3", "model_gemma2", "model_gpt2", "model_mistral"}) {
    Model model(std::filesystem::path(RLHF_SOURCE_DIR) / "tests" / "golden" / name);
    for (std::uint64_t seed = 1; seed <= 3; ++seed) {
      INFO(name << ", seed " << seed);
      const Sequences sequences = make_sequences(seed, 9);
      model.parameters.zero_gradient();
      std::vector<std::vector<double>> separate;
      for (std::size_t s = 0; s < sequences.size(); ++s)
        separate.push_back(model.run({sequences[s]}, 1 + 0.1 * static_cast<double>(s)).front());
      const std::vector<double> expected(model.parameters.gradient().begin(),
                                         model.parameters.gradient().end());
      model.parameters.zero_gradient();
      CHECK(model.run(sequences, 1) == separate);  // bit for bit
      double worst = 0;
      for (std::size_t i = 0; i < expected.size(); ++i)
        worst = std::max(
            worst, std::abs(model.parameters.gradient()[i] - expected[i]) / (1 + std::abs(expected[i])));
      CHECK(worst < 1e-11);  // sums of a few hundred terms in another order
    }
  }
}

TEST_CASE("layers that are computed again give the same bits") {
  TrainableOptions last_layer;
  last_layer.mode = TrainableMode::kLastLayers;
  last_layer.last_layers = 1;
  TrainableOptions adapters;
  adapters.mode = TrainableMode::kLora;
  for (const char* name :
       {"model_llama_gqa_untied", "model_qwen3", "model_gemma2", "model_gpt2", "model_mistral"})
    for (const TrainableOptions& trainable : {TrainableOptions(), last_layer, adapters}) {
      const bool fused = name == std::string("model_gpt2");
      if (trainable.mode == TrainableMode::kLora && fused) continue;  // its projections have other names
      const auto folder = std::filesystem::path(RLHF_SOURCE_DIR) / "tests" / "golden" / name;
      Model kept(folder, trainable), again(folder, trainable, Recompute::kLayers);
      // Passes of several sizes with the same buffers.
      for (std::uint64_t seed = 1; seed <= 3; ++seed) {
        INFO(name << ", " << kept.parameters.trainable().size() << " weights trained, seed " << seed);
        const Sequences sequences = make_sequences(seed, 3 + 3 * (seed % 3));
        CHECK(again.run(sequences, 1) == kept.run(sequences, 1));
        CHECK(std::ranges::equal(again.parameters.gradient(), kept.parameters.gradient()));
      }
      CHECK(std::ranges::any_of(kept.parameters.gradient(), [](double g) { return g != 0; }));
      if (kept.parameters.weights().first_trainable_layer == 0)
        CHECK(again.pass.held_bytes() < kept.pass.held_bytes());
    }
}

TEST_CASE("floating-point operations of a training pass are those counted by hand") {
  const auto folder = std::filesystem::path(RLHF_SOURCE_DIR) / "tests" / "golden" / "model_llama_gqa_untied";
  const auto count = [&](const TrainableOptions& trainable, Recompute recompute) {
    Model model(folder, trainable, recompute);
    model.run({{3, 4, 5, 6, 7}, {3, 4, 8}}, 1);
    return std::pair(model.pass.matmul_flops(), model.parameters.config());
  };
  const auto [all, c] = count({}, Recompute::kNone);
  // Rows: 5 of the first sequence, 1 of the second, whose head is shared. Keys: 1 to 5, and 3.
  const double rows = 6, keys = 1 + 2 + 3 + 4 + 5 + 3, targets = 4 + 2;
  const auto D = static_cast<double>(c.hidden_size), F = static_cast<double>(c.intermediate_size),
             L = static_cast<double>(c.num_layers), V = static_cast<double>(c.vocab_size),
             Q = static_cast<double>(c.num_heads * c.head_dim),
             KV = static_cast<double>(c.num_kv_heads * c.head_dim);
  const double layer = 2 * rows * (D * (Q + 2 * KV) + Q * D + 3 * D * F), attention = 2 * keys * Q,
               head = 2 * targets * D * V;
  // Forward, gradient of the input, gradient of the weight; attention has two products forward, five
  // backward.
  CHECK(all == L * (3 * layer + 7 * attention) + 3 * head);
  CHECK(count({}, Recompute::kLayers).first == L * (4 * layer + 9 * attention) + 3 * head);
  TrainableOptions last;
  last.mode = TrainableMode::kLastLayers;
  last.last_layers = 1;
  CHECK(count(last, Recompute::kNone).first < all);
}

TEST_CASE("equal tokens behind equal heads have one row, and nothing else has") {
  for (std::uint64_t seed = 1; seed <= 50; ++seed) {
    const Sequences sequences = make_sequences(seed, 12);
    const PackedRows packed(spans(sequences));
    std::map<std::vector<TokenId>, std::int64_t> row_of_head;
    for (std::size_t s = 0; s < sequences.size(); ++s)
      for (std::size_t p = 0; p < sequences[s].size(); ++p) {
        const std::vector<TokenId> head(sequences[s].begin(),
                                        sequences[s].begin() + static_cast<std::ptrdiff_t>(p) + 1);
        const std::int64_t row = packed.row(s, static_cast<std::int64_t>(p));
        CHECK(row_of_head.try_emplace(head, row).first->second == row);
        CHECK(packed.rows().tokens[static_cast<std::size_t>(row)] == sequences[s][p]);
        CHECK(packed.rows().positions[static_cast<std::size_t>(row)] == static_cast<std::int32_t>(p));
      }
    CHECK(static_cast<std::size_t>(packed.rows().size()) == row_of_head.size());
    // Every row is in one tree, and the blocks of different trees differ.
    std::set<std::int64_t> seen;
    std::map<std::int32_t, std::size_t> owner;
    for (std::size_t tree = 0; tree < packed.trees().size(); ++tree)
      for (const std::int64_t t : packed.trees()[tree]) {
        CHECK(seen.insert(t).second);
        for (std::int32_t b = 0; b <= packed.rows().positions[static_cast<std::size_t>(t)] / 16; ++b)
          CHECK(owner.try_emplace(packed.rows().tables[static_cast<std::size_t>(t)][b], tree).first->second ==
                tree);
      }
    CHECK(seen.size() == row_of_head.size());
    // Kept apart, every token has a row and every sequence a tree.
    const PackedRows apart(spans(sequences), PackedRows::Heads::kSeparate);
    std::set<std::int64_t> rows;
    std::size_t tokens = 0, filled = 0;
    for (std::size_t s = 0; s < sequences.size(); ++s) {
      tokens += sequences[s].size();
      filled += !sequences[s].empty();
      for (std::size_t p = 0; p < sequences[s].size(); ++p)
        rows.insert(apart.row(s, static_cast<std::int64_t>(p)));
    }
    CHECK(rows.size() == tokens);
    CHECK(static_cast<std::size_t>(apart.rows().size()) == tokens);
    CHECK(apart.trees().size() == filled);
  }
}

TEST_CASE("passes hold their budget, keep items whole and let common heads meet") {
  const std::vector<TokenId> head(20, 5);
  Sequences sequences;
  for (TokenId last = 0; last < 6; ++last) {
    sequences.push_back(std::vector<TokenId>(10, 7 + last));
    sequences.push_back(head);
    sequences.back().push_back(last);
  }
  // 6 branches of one head take 26 rows; without sharing they would take 126.
  const auto passes = split_into_passes(spans(sequences), 30);
  REQUIRE(passes.size() >= 2);
  CHECK(passes.front() == std::vector<std::size_t>{1, 3, 5, 7, 9, 11});
  std::set<std::size_t> items;
  for (const auto& pass : passes) {
    Sequences chosen;
    for (std::size_t i : pass) {
      chosen.push_back(sequences[i]);
      CHECK(items.insert(i).second);
    }
    CHECK(PackedRows(spans(chosen)).rows().size() <= 30);
  }
  CHECK(items.size() == sequences.size());
  CHECK(split_into_passes(spans(sequences), 1).size() == sequences.size());  // longer than the budget: alone
  CHECK(split_into_passes(spans(sequences), 1, 2).size() == sequences.size() / 2);
}
