#include "rlhf/schedule/simulated_engine.h"

#include <algorithm>
#include <utility>

#include "rlhf/core/error.h"

namespace rlhf::schedule {
namespace {

// std heaps have the greatest on top; wanted is the first to finish, of equals the first that started.
constexpr auto kLater = [](const auto& a, const auto& b) {
  return std::pair(a.finish, a.number) > std::pair(b.finish, b.number);
};

}  // namespace

void SimulatedEngine::fork(Group& group) {
  const Request& request = group.request;
  Sequence sequence;
  sequence.sample = {request.iteration, request.first_sample + group.started};
  sequence.counted = step_;
  sequence.finish = step_ + request.lengths[group.started];
  sequence.tokens = request.prompt_tokens + request.lengths[group.started];
  sequence.number = started_++;
  context_tokens_ += request.prompt_tokens;
  ++group.started;
  running_.push_back(sequence);
  std::ranges::push_heap(running_, kLater);
}

// As RolloutEngine: groups that are ready start samples while there are slots; a new group enters when the
// slots are not all spoken for, and starts one sample at once.
void SimulatedEngine::admit() {
  std::int64_t reserved = num_running();
  for (Group& group : groups_) {
    while (group.prefill_left == 0 && group.started < group.request.lengths.size() && has_slot()) {
      fork(group);
      ++reserved;
    }
    reserved += static_cast<std::int64_t>(group.request.lengths.size() - group.started);
  }
  while (!queue_.empty() && reserved < limits_.max_sequences) {
    groups_.push_back({std::move(queue_.front()), 0, 0});
    queue_.pop_front();
    Group& group = groups_.back();
    group.prefill_left = group.request.prompt_tokens - 1;
    reserved += static_cast<std::int64_t>(group.request.lengths.size());
    if (group.prefill_left == 0 && has_slot()) fork(group);
  }
  std::erase_if(groups_, [](const Group& g) { return g.started == g.request.lengths.size(); });
}

// Prompt tokens that fit into this step beside the running sequences.
std::int64_t SimulatedEngine::prefill() {
  const std::int64_t room = std::max(limits_.max_tokens_per_step - num_running(), std::int64_t{1});
  std::int64_t left = room;
  for (Group& group : groups_) {
    const std::int64_t tokens = std::min(left, group.prefill_left);
    group.prefill_left -= tokens;
    left -= tokens;
  }
  return room - left;
}

// Nothing can enter before a sample finishes.
bool SimulatedEngine::is_steady() const {
  return !has_slot() || (groups_.empty() && queue_.empty());
}

std::int64_t SimulatedEngine::run(std::int64_t max_steps) {
  RLHF_CHECK(max_steps >= 1 && busy(), "SimulatedEngine: ", max_steps, " steps, ",
             busy() ? "" : "and nothing to generate");
  admit();
  const std::int64_t prompt_tokens = prefill();
  std::int64_t steps = 1;
  if (prompt_tokens == 0 && is_steady()) steps = std::min(max_steps, running_.front().finish - step_);
  const auto n = static_cast<double>(steps), running = static_cast<double>(num_running());
  // Every step adds a token of each sequence to the cache.
  const double context = n * static_cast<double>(context_tokens_) + running * n * (n - 1) / 2;
  seconds_ += n * (costs_.step_s + std::max(costs_.weights_s, costs_.sequence_s * running)) +
              context * costs_.context_token_s + static_cast<double>(prompt_tokens) * costs_.prefill_token_s;
  step_ += steps;
  context_tokens_ += steps * num_running();
  finish_sequences();
  return steps;
}

void SimulatedEngine::finish_sequences() {
  while (!running_.empty() && running_.front().finish == step_) {
    std::ranges::pop_heap(running_, kLater);
    count_tokens(running_.back());
    context_tokens_ -= running_.back().tokens;
    finished_.push_back(running_.back().sample);
    running_.pop_back();
  }
}

void SimulatedEngine::count_tokens(Sequence& sequence) {
  const std::int64_t staleness = sequence.sample.iteration - version_;
  if (staleness < 0)
    fail<InternalError>("simulation: iteration ", sequence.sample.iteration, " is sampled with weights ",
                        version_);
  const auto entry = static_cast<std::size_t>(staleness);
  if (entry >= tokens_by_staleness_.size()) tokens_by_staleness_.resize(entry + 1);
  tokens_by_staleness_[entry] += step_ - sequence.counted;
  sequence.counted = step_;
}

void SimulatedEngine::set_version(std::int64_t version) {
  for (Sequence& sequence : running_)
    if (sequence.counted != step_) count_tokens(sequence);
  version_ = version;
}

double SimulatedEngine::take_seconds() {
  return std::exchange(seconds_, 0);
}

std::vector<FinishedSample> SimulatedEngine::take_finished() {
  return std::exchange(finished_, {});
}

}  // namespace rlhf::schedule
