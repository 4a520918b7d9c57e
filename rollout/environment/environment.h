#pragma once

#include <atomic>
#include <cstdint>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "rlhf/core/clock.h"
#include "rlhf/data/chat.h"
#include "rlhf/data/sample.h"

namespace rlhf {

/// How long a call may take, and whether anybody still waits for it. Cheap to copy.
struct CallLimit {
  Clock clock = steady_clock();
  double deadline_s = std::numeric_limits<double>::infinity();  ///< on `clock`
  std::shared_ptr<const std::atomic<bool>> abandoned;           ///< true: the answer is not wanted any more

  double seconds_left() const { return deadline_s - clock(); }
  bool expired() const { return seconds_left() <= 0; }
  bool is_abandoned() const { return abandoned && abandoned->load(std::memory_order_relaxed); }
};

/// What an episode is about: one sample of one prompt.
struct EpisodeStart {
  const Prompt& prompt;  ///< lives as long as the environment
  std::uint32_t sample_index = 0;
};

/// What the policy has just said. Views: valid during the call only.
struct AssistantTurn {
  std::string_view text;            ///< without the end token
  std::span<const TokenId> tokens;  ///< with it
  std::int64_t number = 1;          ///< of the turn in its episode, from 1
  CallLimit limit;
};

/// What the environment says to it. At most one of messages, text and tokens is filled; with none of them the
/// policy goes on as if nothing had been said.
struct Observation {
  bool over = false;            ///< the episode ends here
  Chat messages;                ///< turns of a tool or a user, written by the chat template; then a new turn
  std::string text;             ///< written as it is; the policy's turn goes on behind it
  std::vector<TokenId> tokens;  ///< written as they are, then a new turn
  double reward = 0;            ///< for the turn; rewards of type `environment` are their sum
  std::int32_t tool_calls = 0, tool_errors = 0;
};

/// One episode's other side: tools, a user, a game. Embedders derive from it.
///
/// Calls on one object come one after another, but not always from the same thread. An exception ends the
/// episode with FinishReason::kEnvironmentError and nothing else.
class Environment {
 public:
  virtual ~Environment() = default;
  /// Answers a turn. Should return before turn.limit expires: later the episode ends with
  /// FinishReason::kDeadline, and the thread is lost to others until it returns.
  virtual Observation observe(const AssistantTurn& turn) = 0;
};

/// Begins episodes, and says how their turns end. Shared by all episodes; functions are called from several
/// threads at once.
class EnvironmentFactory {
 public:
  virtual ~EnvironmentFactory() = default;
  /// A fresh environment, made when the episode's first turn has ended. An exception ends the episode as one
  /// of `observe` does.
  virtual std::unique_ptr<Environment> begin(const EpisodeStart& start) const = 0;
  /// Texts that end a turn, beside end tokens; e.g. a closing tag behind which a result is to follow.
  virtual const std::vector<std::string>& turn_strings() const;
  /// Whether end tokens and stop strings are heard by the environment; otherwise they end the episode.
  virtual bool hears_stops() const { return true; }
  /// True: `observe` takes microseconds and is called by the lane that decodes, so that a run repeats to the
  /// order in which its samples finish. False: worker threads call it while others decode.
  virtual bool answers_at_once() const { return false; }
};

inline const std::vector<std::string>& EnvironmentFactory::turn_strings() const {
  static const std::vector<std::string> kNone;
  return kNone;
}

}  // namespace rlhf
