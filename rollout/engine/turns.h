#pragma once

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "rlhf/data/sample.h"

namespace rlhf {

/// Names a sample to whoever answers its turns; unique within an engine.
using TurnTicket = std::uint64_t;

/// What a policy has just said. Views: valid during the call only.
struct FinishedTurn {
  TurnTicket ticket = 0;
  const Sample& sample;                       ///< the whole response so far
  std::size_t first_token = 0;                ///< of this turn, in sample.tokens
  std::string_view text;                      ///< of this turn, without the end token
  FinishReason reason = FinishReason::kStop;  ///< kStop: an end token; kStopString: a string
};

/// What an environment says to a turn.
struct TurnReply {
  std::vector<TokenId> tokens;      ///< written into the context, mask 0; may be empty
  bool opens_turn = true;           ///< the policy answers anew; false: its answer goes on behind the tokens
  std::optional<FinishReason> end;  ///< the response is over; `tokens` is not looked at
  double reward = 0;                ///< for the turn
  std::int32_t tool_calls = 0, tool_errors = 0;
  double seconds = 0;  ///< the reply took
  std::string error;   ///< what went wrong, with FinishReason::kEnvironmentError
};

/// Where replies that take a while arrive. All functions may be called from any thread.
class TurnMailbox {
 public:
  struct Delivery {
    TurnTicket ticket = 0;
    TurnReply reply;
  };
  void post(TurnTicket ticket, TurnReply reply);
  /// All that has arrived, in order of arrival.
  std::vector<Delivery> take();
  /// Sleeps until something is there, at most `seconds`.
  void wait(double seconds);

 private:
  std::mutex mutex_;
  std::condition_variable arrived_;
  std::vector<Delivery> deliveries_;
};

/// Answers the turns of the samples of one request. Called by the lane that runs the engine.
class TurnHandler {
 public:
  virtual ~TurnHandler() = default;

  /// Texts that end a turn as soon as the turn contains one.
  virtual const std::vector<std::string>& strings() const = 0;
  /// Whether end tokens and stop strings end a turn; otherwise they end the response.
  virtual bool takes_stops() const = 0;
  /// Seconds on the engine's clock that a sample may take from its first token; 0 = any.
  virtual double max_seconds() const { return 0; }

  /// Replies at once, or returns nothing and posts the reply later; meanwhile the sample is parked. Must not
  /// throw: an error ends the request and the engine's step.
  virtual std::optional<TurnReply> respond(const FinishedTurn& turn,
                                           const std::shared_ptr<TurnMailbox>& mailbox) = 0;
  /// Whether a reply is not worth waiting for any more: the sample ends with FinishReason::kDeadline.
  virtual bool overdue(TurnTicket ticket, double now_s) const = 0;
  /// The sample is finished or dropped; a reply that comes later is ignored. Must not throw.
  virtual void ended(TurnTicket ticket) = 0;
};

}  // namespace rlhf
