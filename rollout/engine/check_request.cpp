#include "rollout/engine/check_request.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "rlhf/core/error.h"
#include "rollout/sampling/token_trie.h"

namespace rlhf {
namespace {

class RequestChecker {
 public:
  RequestChecker(const GenerationRequest& request, const ModelConfig& config)
      : request_(request),
        config_(config),
        where_(concat("generation request for prompt ", request.prompt_id, ": ")) {}

  void check_prompt() const {
    const auto length = static_cast<std::int64_t>(request_.prompt.size());
    RLHF_CHECK(length > 0, where_, "the prompt is empty");
    RLHF_CHECK(request_.num_samples > 0, where_, "num_samples must be positive");
    RLHF_CHECK(length < config_.max_positions, where_, "the prompt has ", length,
               " tokens, which leaves no room in the model's context of ", config_.max_positions);
    for (TokenId token : request_.prompt) check_token("token id", token);
  }

  void check_stop(bool has_text) const {
    const StopOptions& stop = request_.stop;
    RLHF_CHECK(stop.max_new_tokens > 0, where_, "max_new_tokens must be positive");
    for (TokenId token : stop.tokens) check_token("stop token", token);
    if (stop.forced_last >= 0) check_token("stop token", stop.forced_last);
    RLHF_CHECK((stop.strings.empty() && !request_.turns) || has_text, where_,
               "stop strings and environments need a tokenizer");
  }

  void check_sampling() const {
    const SamplingOptions& s = request_.sampling;
    RLHF_CHECK(s.temperature >= 0, where_, "temperature is ", s.temperature, ", expected at least 0");
    RLHF_CHECK(s.top_p >= 0 && s.top_p <= 1, where_, "top_p is ", s.top_p, ", expected 0 to 1");
    RLHF_CHECK(!s.min_p || (*s.min_p >= 0 && *s.min_p <= 1), where_, "min_p is ", s.min_p.value_or(0),
               ", expected 0 to 1");
    RLHF_CHECK(s.repetition_penalty > 0, where_, "repetition_penalty is ", s.repetition_penalty,
               ", expected above 0");
  }

  void check_constraint() const {
    const ConstraintOptions& constraint = request_.constraint;
    for (const auto& [token, bias] : constraint.logit_bias) {
      check_token("logit_bias: token", token);
      RLHF_CHECK(std::isfinite(bias), where_, "logit_bias of token ", token, " is ", bias,
                 ", expected a finite number; allowed_tokens excludes tokens");
    }
    for (TokenId token : constraint.allowed_tokens) check_token("allowed token", token);
    if (!constraint.choices.empty()) check_choices();
  }

  void check_schedule() const {
    RLHF_CHECK(std::abs(request_.priority) <= 1000, where_, "priority is ", request_.priority,
               ", expected -1000 to 1000");
    RLHF_CHECK(request_.deadline.steps >= 0 && request_.deadline.seconds >= 0, where_, "the deadline is ",
               request_.deadline.steps, " steps and ", request_.deadline.seconds,
               " seconds, expected at least 0");
    RLHF_CHECK(request_.output.top_logprobs >= 0 && request_.output.top_logprobs <= config_.vocab_size,
               where_, "top_logprobs is ", request_.output.top_logprobs, ", expected 0 to ",
               config_.vocab_size);
  }

 private:
  void check_token(const char* name, TokenId token) const {
    RLHF_CHECK(token >= 0 && token < config_.vocab_size, where_, name, " ", token,
               " is outside the vocabulary of ", config_.vocab_size);
  }

  void check_choices() const {
    const auto& choices = request_.constraint.choices;
    const std::int64_t room =
        std::min(request_.stop.max_new_tokens,
                 config_.max_positions - static_cast<std::int64_t>(request_.prompt.size()));
    RLHF_CHECK(request_.constraint.allowed_tokens.empty() && !request_.turns, where_,
               "choices cannot be combined with allowed_tokens or an environment");
    for (std::size_t i = 0; i < choices.size(); ++i) {
      for (TokenId token : choices[i]) check_token("choice token", token);
      RLHF_CHECK(static_cast<std::int64_t>(choices[i].size()) <= room, where_, "choice ", i + 1, " has ",
                 choices[i].size(), " tokens, the response at most ", room);
    }
    try {
      const auto inner = TokenTrie(choices).inner_end();
      RLHF_CHECK(!inner || !request_.stop.tokens.empty(), "choice ", inner.value_or(0),
                 " is the beginning of another one, which needs a stop token to end it");
    } catch (const InvalidArgument& error) {
      fail<InvalidArgument>(where_, error.what());
    }
  }

  const GenerationRequest& request_;
  const ModelConfig& config_;
  std::string where_;
};

}  // namespace

void check_request(const GenerationRequest& request, const ModelConfig& config, bool has_text) {
  const RequestChecker checker(request, config);
  checker.check_prompt();
  checker.check_stop(has_text);
  checker.check_sampling();
  checker.check_constraint();
  checker.check_schedule();
}

}  // namespace rlhf
