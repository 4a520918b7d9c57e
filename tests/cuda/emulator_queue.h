#pragma once

#include <functional>

namespace rlhf {

/// What emulated kernels take as their queue: it decides when they run. Null = at once.
class EmulatorQueue {
 public:
  virtual ~EmulatorQueue() = default;
  virtual void push(std::function<void()> work) = 0;
};

}  // namespace rlhf
