#include "rollout/engine/turns.h"

#include <chrono>
#include <utility>

namespace rlhf {

void TurnMailbox::post(TurnTicket ticket, TurnReply reply) {
  const std::lock_guard lock(mutex_);
  deliveries_.push_back({ticket, std::move(reply)});
  arrived_.notify_all();
}

std::vector<TurnMailbox::Delivery> TurnMailbox::take() {
  const std::lock_guard lock(mutex_);
  return std::exchange(deliveries_, {});
}

void TurnMailbox::wait(double seconds) {
  std::unique_lock lock(mutex_);
  arrived_.wait_for(lock, std::chrono::duration<double>(seconds), [&] { return !deliveries_.empty(); });
}

}  // namespace rlhf
