#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace rlhf {

/// What a check of one file of golden numbers found.
struct VerifyResult {
  std::string file;
  std::size_t cases = 0;
  std::size_t failures = 0;
  /// Largest deviation from a golden number, relative to what the check tolerates in; 0 where texts or ids
  /// are compared.
  double largest_error = 0;
  /// One line per failure, capped by the check.
  std::vector<std::string> messages;
};

}  // namespace rlhf
