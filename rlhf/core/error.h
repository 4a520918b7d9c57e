#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace rlhf {

/// Base of every exception the library throws on purpose.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A configuration that cannot be used. The message lists every problem as `file:line:column: key: ...`.
class ConfigError : public Error {
 public:
  using Error::Error;
};

/// A caller broke a documented precondition.
class InvalidArgument : public Error {
 public:
  using Error::Error;
};

/// A memory budget that cannot hold what is asked; the message says who holds what.
class MemoryError : public Error {
 public:
  using Error::Error;
};

/// A file that is missing, truncated, malformed or not writable. The message names path, offset or line, and
/// what was expected there.
class IoError : public Error {
 public:
  using Error::Error;
};

/// A broken invariant of this library: a bug.
class InternalError : public Error {
 public:
  using Error::Error;
};

/// Concatenates the streamed form of all arguments.
template <typename... Args>
std::string concat(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  return out.str();
}

/// Throws `E` with the concatenation of `args` as its message.
template <typename E, typename... Args>
[[noreturn]] void fail(const Args&... args) {
  throw E(concat(args...));
}

}  // namespace rlhf

/// Throws rlhf::InvalidArgument with the streamed arguments unless the condition holds.
#define RLHF_CHECK(condition, ...)                        \
  do {                                                    \
    if (!(condition)) [[unlikely]]                        \
      ::rlhf::fail<::rlhf::InvalidArgument>(__VA_ARGS__); \
  } while (false)
