#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "rollout/engine/draw_token.h"
#include "rollout/engine/generation.h"
#include "rollout/engine/scheduler.h"

namespace rlhf {

/// A request as the engine keeps it; its prompt has moved into the scheduler.
struct SubmittedRequest {
  GenerationRequest spec;
  std::optional<TokenTrie> choices;
  std::uint32_t unfinished = 0;
};

/// What all responses of an engine share.
struct ResponseSetting {
  std::function<std::string(TokenId)> token_bytes;
  std::int64_t vocab_size = 0;
  std::shared_ptr<TurnMailbox> mailbox;
};

/// What a sample is besides its tokens' K/V: what it records, and when its turns and it itself end. It
/// outlives preemptions.
class Response {
 public:
  enum class Status {
    kGoesOn,
    kAwaitsReply,  ///< of its TurnHandler
    kEnded,        ///< the sample's finish reason says why
  };

  /// @param start_s time on the engine's clock
  Response(const SubmittedRequest& request, const ResponseSetting& setting, Sequence& sequence, Sample sample,
           double start_s);
  ~Response();
  Response(const Response&) = delete;
  Response& operator=(const Response&) = delete;

  /// Adds a drawn token and what it sets off. @throws InvalidArgument for a reply outside the vocabulary, and
  /// whatever the handler throws
  Status accept(const DrawnToken& token, WeightVersion version);
  /// Adds the reply it has been waiting for. @throws as accept
  Status reply(const TurnReply& reply, WeightVersion version);
  /// Whether it has taken, or waited, longer than its handler allows.
  bool overdue(double now_s) const;

  const SubmittedRequest& request() const { return request_; }
  Sequence& sequence() const { return sequence_; }
  bool awaits_reply() const { return awaits_reply_; }
  TokenTrie::Node node() const { return node_; }  ///< in the request's choices

  Sample sample;

 private:
  void record(const DrawnToken& token, WeightVersion version, std::uint8_t mask);
  Status end(FinishReason reason);
  Status stop(FinishReason reason, WeightVersion version);
  Status end_turn(FinishReason reason, WeightVersion version);
  Status apply(const TurnReply& reply, WeightVersion version);
  bool is_full() const;
  bool contains_new(const std::vector<std::string>& strings, std::size_t new_text) const;

  const SubmittedRequest& request_;
  const ResponseSetting& setting_;
  Sequence& sequence_;
  const SequenceId ticket_;
  const double start_s_;
  std::string text_;                            // kept only when stop strings or a handler need it
  std::size_t turn_text_ = 0, turn_token_ = 0;  // where the turn begins
  bool awaits_reply_ = false, had_turn_ = false;
  TokenTrie::Node node_ = TokenTrie::kRoot;
};

}  // namespace rlhf
