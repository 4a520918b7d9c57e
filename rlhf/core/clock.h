#pragma once

#include <chrono>
#include <functional>

namespace rlhf {

/// Returns seconds since some fixed moment; never goes back. Injected wherever time is measured, so that
/// tests control it.
using Clock = std::function<double()>;

/// Returns the monotonic clock of the machine.
inline Clock steady_clock() {
  return [] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  };
}

}  // namespace rlhf
