#include "rollout/environment/episode_runner.h"

#include <atomic>
#include <exception>
#include <map>
#include <optional>
#include <string>
#include <utility>

#include "rlhf/core/error.h"
#include "rlhf/core/worker_pool.h"

namespace rlhf {
namespace {

// A reply that is late by more than this is not waited for: whoever made it does not look at its limit.
constexpr double kPatience_s = 1;

// What a worker needs of a runner; it holds no threads, so the last owner may be one of them.
struct Rules {
  std::shared_ptr<const EnvironmentFactory> factory;
  ObservationEncoder encode;
  EpisodeLimits limits;
  Clock clock;
};

// One sample and its environment. Only one thread at a time answers; the atomics are read by the engine's.
struct Episode {
  std::shared_ptr<const Rules> rules;
  std::shared_ptr<const Prompt> prompt;
  std::uint32_t sample_index = 0;
  std::unique_ptr<Environment> environment;
  std::int64_t num_turns = 0;
  std::atomic<double> begun_s = -1;  // of the reply at work
  std::shared_ptr<std::atomic<bool>> abandoned = std::make_shared<std::atomic<bool>>(false);
};

// A turn that outlives the engine's view of it.
struct KeptTurn {
  std::string text;
  std::vector<TokenId> tokens;
  FinishReason reason = FinishReason::kStop;
};

TurnReply to_reply(Episode& episode, const KeptTurn& turn, const Observation& observation) {
  TurnReply reply;
  reply.reward = observation.reward;
  reply.tool_calls = observation.tool_calls;
  reply.tool_errors = observation.tool_errors;
  if (observation.over) {
    reply.end = turn.reason;
  } else if (episode.num_turns >= episode.rules->limits.max_turns) {
    reply.end = FinishReason::kTurns;
  } else {
    const TokenId ended_by = turn.reason == FinishReason::kStop ? turn.tokens.back() : TokenId{-1};
    reply.tokens = episode.rules->encode(observation, ended_by);
    reply.opens_turn = !observation.messages.empty() || !observation.tokens.empty();
  }
  return reply;
}

TurnReply answer(Episode& episode, const KeptTurn& turn) {
  const Rules& rules = *episode.rules;
  const double begin = rules.clock();
  TurnReply reply;
  try {
    if (!episode.environment)
      episode.environment = rules.factory->begin({*episode.prompt, episode.sample_index});
    const CallLimit limit{rules.clock, begin + rules.limits.max_reply_seconds, episode.abandoned};
    ++episode.num_turns;
    reply = to_reply(episode, turn,
                     episode.environment->observe({turn.text, turn.tokens, episode.num_turns, limit}));
  } catch (const std::exception& error) {
    reply.end = FinishReason::kEnvironmentError;
    reply.error = error.what();
  } catch (...) {
    reply.end = FinishReason::kEnvironmentError;
    reply.error = "something that is no std::exception";
  }
  reply.seconds = rules.clock() - begin;
  return reply;
}

}  // namespace

struct EpisodeRunner::Shared {
  std::shared_ptr<const Rules> rules;
  std::shared_ptr<WorkerPool> pool;  // null where every reply comes at once
};

class EpisodeRunner::Handler : public TurnHandler {
 public:
  Handler(std::shared_ptr<const Shared> shared, const Prompt& prompt)
      : shared_(std::move(shared)), prompt_(std::make_shared<const Prompt>(prompt)) {}

  const std::vector<std::string>& strings() const override { return shared_->rules->factory->turn_strings(); }
  bool takes_stops() const override { return shared_->rules->factory->hears_stops(); }
  double max_seconds() const override { return shared_->rules->limits.max_seconds; }

  std::optional<TurnReply> respond(const FinishedTurn& turn,
                                   const std::shared_ptr<TurnMailbox>& mailbox) override {
    auto& episode = episodes_[turn.ticket];
    if (!episode) {
      episode = std::make_shared<Episode>();
      episode->rules = shared_->rules;
      episode->prompt = prompt_;
      episode->sample_index = turn.sample.sample_index;
    }
    const auto first = turn.sample.tokens.begin() + static_cast<std::ptrdiff_t>(turn.first_token);
    KeptTurn kept{std::string(turn.text), {first, turn.sample.tokens.end()}, turn.reason};
    if (!shared_->pool) return answer(*episode, kept);
    episode->begun_s = -1;
    shared_->pool->add([episode, mailbox, ticket = turn.ticket, kept = std::move(kept)] {
      if (*episode->abandoned) return;
      episode->begun_s = episode->rules->clock();
      mailbox->post(ticket, answer(*episode, kept));
    });
    return std::nullopt;
  }

  bool overdue(TurnTicket ticket, double now_s) const override {
    const auto found = episodes_.find(ticket);
    if (found == episodes_.end()) return false;
    const double begun = found->second->begun_s;
    return begun >= 0 && now_s - begun > shared_->rules->limits.max_reply_seconds + kPatience_s;
  }

  void ended(TurnTicket ticket) override {
    const auto found = episodes_.find(ticket);
    if (found == episodes_.end()) return;
    *found->second->abandoned = true;
    episodes_.erase(found);
  }

 private:
  std::shared_ptr<const Shared> shared_;
  std::shared_ptr<const Prompt> prompt_;
  std::map<TurnTicket, std::shared_ptr<Episode>> episodes_;
};

EpisodeRunner::EpisodeRunner(std::shared_ptr<const EnvironmentFactory> factory, ObservationEncoder encode,
                             const EpisodeRunnerOptions& options) {
  RLHF_CHECK(factory && encode, "episodes need an environment and an encoder of observations");
  RLHF_CHECK(options.workers > 0, "episodes: workers is ", options.workers, ", expected above 0");
  auto shared = std::make_shared<Shared>();
  if (!factory->answers_at_once()) shared->pool = std::make_shared<WorkerPool>(options.workers);
  shared->rules = std::make_shared<const Rules>(
      Rules{std::move(factory), std::move(encode), options.limits, options.clock});
  shared_ = std::move(shared);
}

std::shared_ptr<TurnHandler> EpisodeRunner::handler(const Prompt& prompt) const {
  return std::make_shared<Handler>(shared_, prompt);
}

const EnvironmentFactory& EpisodeRunner::factory() const {
  return *shared_->rules->factory;
}

}  // namespace rlhf
