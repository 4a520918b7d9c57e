#include "rollout/engine/response.h"

#include <algorithm>
#include <utility>

#include "rlhf/core/error.h"

namespace rlhf {

Response::Response(const SubmittedRequest& request, const ResponseSetting& setting, Sequence& sequence,
                   Sample its_sample, double start_s)
    : sample(std::move(its_sample)),
      request_(request),
      setting_(setting),
      sequence_(sequence),
      ticket_(sequence.id),
      start_s_(start_s) {}

Response::~Response() {
  if (had_turn_) request_.spec.turns->ended(ticket_);
}

bool Response::is_full() const {
  return static_cast<std::int64_t>(sample.tokens.size()) >= request_.spec.stop.max_new_tokens;
}

bool Response::overdue(double now_s) const {
  const TurnHandler* handler = request_.spec.turns.get();
  if (!handler) return false;
  return (handler->max_seconds() > 0 && now_s - start_s_ >= handler->max_seconds()) ||
         (awaits_reply_ && handler->overdue(ticket_, now_s));
}

void Response::record(const DrawnToken& drawn, WeightVersion version, std::uint8_t mask) {
  const OutputOptions& output = request_.spec.output;
  sample.tokens.push_back(drawn.token);
  sample.logprobs.push_back(drawn.log_prob);
  sample.weight_versions.push_back(version);
  sample.mask.push_back(mask);
  if (output.raw_logprobs) sample.raw_logprobs.push_back(drawn.raw_log_prob);
  if (output.entropies) sample.entropies.push_back(drawn.entropy);
  if (output.top_logprobs > 0) sample.top_logprobs.push_back(drawn.top);
}

Response::Status Response::accept(const DrawnToken& drawn, WeightVersion version) {
  const StopOptions& stops = request_.spec.stop;
  const TurnHandler* handler = request_.spec.turns.get();
  const bool last = static_cast<std::int64_t>(sample.tokens.size()) + 1 == stops.max_new_tokens;
  if (last && stops.forced_last >= 0)
    record({.token = stops.forced_last, .top = {}}, version, 1);
  else
    record(drawn, version, 1);
  const TokenId token = sample.tokens.back();
  if (std::ranges::find(stops.tokens, token) != stops.tokens.end()) return stop(FinishReason::kStop, version);
  if (request_.choices) {
    node_ = request_.choices->next(node_).at(token);
    if (request_.choices->next(node_).empty()) return end(FinishReason::kStop);
  }
  if (handler || !stops.strings.empty()) {
    const std::size_t before = text_.size();
    text_ += setting_.token_bytes(token);
    if (contains_new(stops.strings, before)) return stop(FinishReason::kStopString, version);
    if (handler && !is_full() && contains_new(handler->strings(), before))
      return end_turn(FinishReason::kStopString, version);
  }
  return is_full() ? end(FinishReason::kLength) : Status::kGoesOn;
}

// Whether the turn contains one of them, given that it did not before its text grew.
bool Response::contains_new(const std::vector<std::string>& strings, std::size_t new_text) const {
  return std::ranges::any_of(strings, [&](const std::string& string) {
    const std::size_t from = std::max(turn_text_, new_text - std::min(new_text, string.size()));
    return text_.find(string, from) != std::string::npos;
  });
}

Response::Status Response::end(FinishReason reason) {
  sample.finish_reason = reason;
  return Status::kEnded;
}

Response::Status Response::stop(FinishReason reason, WeightVersion version) {
  const TurnHandler* handler = request_.spec.turns.get();
  return handler && handler->takes_stops() ? end_turn(reason, version) : end(reason);
}

Response::Status Response::end_turn(FinishReason reason, WeightVersion version) {
  had_turn_ = true;
  const FinishedTurn turn{ticket_, sample, turn_token_, std::string_view(text_).substr(turn_text_), reason};
  const auto answer = request_.spec.turns->respond(turn, setting_.mailbox);
  if (answer) return apply(*answer, version);
  awaits_reply_ = true;
  return Status::kAwaitsReply;
}

Response::Status Response::reply(const TurnReply& answer, WeightVersion version) {
  awaits_reply_ = false;
  return apply(answer, version);
}

Response::Status Response::apply(const TurnReply& answer, WeightVersion version) {
  const std::size_t length = sample.tokens.size();
  sample.turns.push_back({static_cast<std::int64_t>(length), answer.reward, answer.tool_calls,
                          answer.tool_errors, answer.seconds});
  sample.environment_error = answer.error;
  if (answer.end) return end(*answer.end);
  // An observation that leaves no room for an answer would teach nothing.
  if (static_cast<std::int64_t>(length + answer.tokens.size()) >= request_.spec.stop.max_new_tokens)
    return end(FinishReason::kLength);
  for (TokenId forced : answer.tokens) {
    RLHF_CHECK(forced >= 0 && forced < setting_.vocab_size, "rollout: the environment's reply to prompt ",
               sample.prompt_id, ": token id ", forced, " is outside the vocabulary of ",
               setting_.vocab_size);
    record({.token = forced, .top = {}}, version, 0);
    text_ += setting_.token_bytes(forced);
  }
  turn_text_ = text_.size();
  turn_token_ = sample.tokens.size();
  if (answer.opens_turn) sample.answer_begin = sample.tokens.size();
  return Status::kGoesOn;
}

}  // namespace rlhf
