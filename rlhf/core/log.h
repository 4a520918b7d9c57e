#pragma once

#include <functional>
#include <string>

namespace rlhf {

enum class LogLevel { kDebug, kInfo, kWarning, kError };

/// Receives the library's messages (one line, no newline). The library itself never prints. May be empty:
/// then messages are dropped. Called from the thread that runs the stage.
using LogSink = std::function<void(LogLevel, const std::string&)>;

inline void log(const LogSink& sink, LogLevel level, const std::string& message) {
  if (sink) sink(level, message);
}

}  // namespace rlhf
