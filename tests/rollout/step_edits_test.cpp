// The lists that an accelerator edits rows by, against what requests ask for, token by token.
#include <algorithm>
#include <limits>

#include "rollout/engine/step_edits.h"
#include "tests/rollout/support.h"

using namespace rlhf;

namespace {

constexpr std::int64_t kVocabulary = 40;
constexpr float kImpossible = -std::numeric_limits<float>::infinity();

struct History {
  std::vector<TokenId> tokens = {7, 3, 3, 11, 7, 20, 11, 11};
  std::size_t prompt = 3;

  DrawContext context(const GenerationRequest& request) const {
    return {request, 0, tokens, std::span<const TokenId>(tokens).subspan(prompt)};
  }
};

// A token's logit in draws of this context, by the options' definitions.
float expected_logit(const DrawContext& context, TokenId token, float logit) {
  const GenerationRequest& request = context.request;
  const auto contains = [token](const auto& tokens) {
    return std::ranges::find(tokens, token) != tokens.end();
  };
  const auto& allowed = request.constraint.allowed_tokens;
  const bool is_early = context.generated.size() <
                        static_cast<std::size_t>(std::max<std::int64_t>(request.stop.min_new_tokens, 0));
  if (!allowed.empty() && !contains(allowed)) return kImpossible;
  if (context.choices) {
    const bool goes_on = context.choices->next(context.node).contains(token);
    const bool may_stop = context.choices->ends(context.node) && contains(request.stop.tokens);
    if (!goes_on && !may_stop) return kImpossible;
  }
  if (is_early && contains(request.stop.tokens)) return kImpossible;
  if (request.constraint.logit_bias.contains(token)) logit += request.constraint.logit_bias.at(token);
  const auto count = static_cast<double>(std::ranges::count(context.generated, token));
  if (count > 0)
    logit -=
        static_cast<float>(request.sampling.presence_penalty + count * request.sampling.frequency_penalty);
  const auto repetition = static_cast<float>(request.sampling.repetition_penalty);
  if (contains(context.tokens)) return logit < 0 ? logit * repetition : logit / repetition;
  return logit;
}

// Row number `row` of the edits applied to logits.
std::vector<float> apply(const StepEdits& edits, std::size_t row, const std::vector<float>& logits) {
  std::vector<float> out = logits;
  if (const auto allowed = edits.allowed_of(row); !allowed.empty())
    for (std::size_t i = 0; i < out.size(); ++i)
      if (std::ranges::find(allowed, static_cast<TokenId>(i)) == allowed.end()) out[i] = kImpossible;
  for (const kernels::LogitEdit& edit : edits.edits_of(row)) {
    float& logit = out[static_cast<std::size_t>(edit.token)];
    logit = kernels::edited_logit(edit, logit);
  }
  return out;
}

template <class Tokens, class Token>
bool differ(const Tokens& entries, const Token& token_of) {
  std::vector<TokenId> tokens;
  for (const auto& entry : entries) tokens.push_back(token_of(entry));
  std::ranges::sort(tokens);
  return std::ranges::adjacent_find(tokens) == tokens.end();
}

std::vector<GenerationRequest> all_kinds() {
  std::vector<GenerationRequest> requests(9);
  for (GenerationRequest& request : requests) request.stop.tokens = {2, 11, 2};
  requests[1].sampling.repetition_penalty = 1.4;
  requests[2].sampling.presence_penalty = 0.7;
  requests[2].sampling.frequency_penalty = -0.2;
  requests[3].constraint.logit_bias = {{7, 2.5F}, {39, -1.0F}, {0, 0.25F}};
  requests[4].constraint.allowed_tokens = {39, 11, 0, 11, 7};
  requests[5].stop.min_new_tokens = 6;
  requests[6].stop.min_new_tokens = 5;  // five are there
  requests[7] = requests[1];
  requests[7].sampling.temperature = 0;
  requests[7].sampling.frequency_penalty = 0.3;
  requests[7].constraint = {{{11, 4.0F}, {3, 1.0F}}, {3, 11, 2, 7}, {}};
  requests[7].stop.min_new_tokens = 9;
  requests[8].sampling.top_k = 3;
  return requests;
}

}  // namespace

TEST_CASE("edits of a step make the rows that draws on the host are made from") {
  const History history;
  std::vector<float> logits;
  for (std::int64_t i = 0; i < kVocabulary; ++i) logits.push_back(static_cast<float>(i * 17 % 23) / 4 - 2.6F);
  const auto requests = all_kinds();
  StepEdits edits(kVocabulary);
  for (int step = 0; step < 2; ++step) {  // what the first leaves behind does not matter
    edits.clear();
    CHECK_FALSE(edits.any());
    for (const GenerationRequest& request : requests) edits.add(history.context(request));
    CHECK(edits.any());
    for (std::size_t r = 0; r < requests.size(); ++r) {
      INFO("step " << step << ", row " << r);
      const DrawContext context = history.context(requests[r]);
      CHECK(draws_on_device(context));
      std::vector<float> expected;
      for (TokenId token = 0; token < kVocabulary; ++token)
        expected.push_back(expected_logit(context, token, logits[static_cast<std::size_t>(token)]));
      CHECK(apply(edits, r, logits) == expected);
      CHECK(edits.changes(r) == (expected != logits));
      CHECK(differ(edits.allowed_of(r), [](TokenId token) { return token; }));
      CHECK(differ(edits.edits_of(r), [](const kernels::LogitEdit& edit) { return edit.token; }));
    }
  }
}

TEST_CASE("edits keep a response inside its choices, and let it stop where one ends") {
  GenerationRequest request;
  request.constraint.choices = {{4, 5}, {4, 5, 6}, {9}};
  request.stop.tokens = {2};
  const TokenTrie choices(request.constraint.choices);
  const std::vector<float> logits(static_cast<std::size_t>(kVocabulary), 0.5F);
  StepEdits edits(kVocabulary);
  TokenTrie::Node node = TokenTrie::kRoot;
  std::vector<std::vector<TokenId>> left;
  std::size_t row = 0;
  for (const TokenId token : {4, 5, 6}) {
    const std::vector<TokenId> tokens = {1};
    const DrawContext context{request, 0, tokens, {}, &choices, node};
    edits.add(context);
    std::vector<float> expected;
    for (TokenId t = 0; t < kVocabulary; ++t) expected.push_back(expected_logit(context, t, 0.5F));
    CHECK(apply(edits, row, logits) == expected);
    left.emplace_back(edits.allowed_of(row).begin(), edits.allowed_of(row).end());
    ++row;
    node = choices.next(node).at(token);
  }
  CHECK(left == std::vector<std::vector<TokenId>>{{4, 9}, {5}, {6, 2}});
}

TEST_CASE("rows of one request share their allowed tokens in an upload") {
  GenerationRequest request, other;
  request.constraint.allowed_tokens = {5, 6, 7};
  other.constraint.allowed_tokens = {5, 6, 7};
  const History history;
  StepEdits edits(kVocabulary);
  edits.add(history.context(request));
  edits.add(history.context(other));
  edits.add(history.context(request));
  CHECK(edits.allowed_of(2).data() == edits.allowed_of(0).data());
  CHECK(edits.allowed_of(1).data() != edits.allowed_of(0).data());
  CHECK(std::ranges::equal(edits.allowed_of(1), request.constraint.allowed_tokens));
}

TEST_CASE("rows that the host draws have no edits, and tokens outside the vocabulary are refused") {
  const History history;
  GenerationRequest request;
  request.sampling.repetition_penalty = 2;
  StepEdits edits(kVocabulary);
  request.output.top_logprobs = 1;
  CHECK_FALSE(draws_on_device(history.context(request)));
  edits.add(history.context(request));
  CHECK_FALSE(edits.changes(0));
  request.output.top_logprobs = 0;
  request.sampling.top_p = 0.5;
  request.sampling.min_tokens_to_keep = 2;
  CHECK_FALSE(draws_on_device(history.context(request)));
  request.sampling.min_tokens_to_keep = 1;
  for (const TokenId outside : {static_cast<TokenId>(kVocabulary), TokenId{-1}}) {
    GenerationRequest biased, allowing;
    biased.constraint.logit_bias = {{outside, 1.0F}};
    allowing.constraint.allowed_tokens = {3, outside};
    History strange = history;
    strange.tokens.push_back(outside);
    for (const DrawContext& context :
         {history.context(biased), history.context(allowing), strange.context(request)})
      CHECK_THROWS_WITH(StepEdits(kVocabulary).add(context),
                        ContainsSubstring(concat("token ", outside, " outside a vocabulary of 40")));
  }
}
