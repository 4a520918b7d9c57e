#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

/// How option structs describe themselves. An option struct is a plain struct with defaults on its members
/// and
///
///     template <class V>
///     void visit_fields(V& v) {
///       v.field("clip_range", clip_range, "Ratio clip epsilon; 0 turns clipping off", Bounds{0, 1});
///       v.required("path", path, "Model folder or GGUF file");
///       v.choice("mode", mode, {{"serial", Mode::kSerial}, {"streamed", Mode::kStreamed}}, "Order of work");
///       v.group("rollout", rollout, "Sampling");        // a nested option struct, or std::optional of one
///       v.list("rewards", rewards, "Reward terms");     // std::vector of option structs
///     }
///     void validate(config::Problems& problems) const;   // optional: checks across fields
///
/// `field` takes bool, signed and unsigned integers, float, double, std::string, config::MemorySize, and
/// std::vector, std::optional and std::map<std::string, ...> of those. From this one declaration come the
/// strict YAML reader, the resolved file, `rlhf config`, `rlhf config explain` and the difference sheet. The
/// key `preset` is reserved: it names values that lie below the explicit keys of its group (presets.h).
namespace rlhf::config {

/// Inclusive range of a number (of each number, for lists and maps). NaN is never inside.
struct Bounds {
  double min = -std::numeric_limits<double>::infinity();
  double max = std::numeric_limits<double>::infinity();
};

inline Bounds positive() {
  return {std::numeric_limits<double>::denorm_min()};
}
inline Bounds at_least(double min) {
  return {min};
}
inline Bounds at_most(double max) {
  return {-std::numeric_limits<double>::infinity(), max};
}
/// [0, 1]
inline Bounds fraction() {
  return {0.0, 1.0};
}

/// What `validate` found. Keys are relative to the struct that is validated ("" is the struct itself, "a.b" a
/// member of a group); the reader puts the full path and the place in the file in front.
class Problems {
 public:
  struct Problem {
    std::string key;
    std::string message;
  };

  void add(std::string key, std::string message) {
    problems_.push_back({std::move(key), std::move(message)});
  }
  bool empty() const { return problems_.empty(); }
  const std::vector<Problem>& all() const { return problems_; }

 private:
  std::vector<Problem> problems_;
};

/// An amount of memory: absolute ("6GiB", "512MB", "1048576") or a share of what the machine has ("80%").
struct MemorySize {
  std::uint64_t bytes = 0;        ///< used when `percent` is empty
  std::optional<double> percent;  ///< (0, 100]

  /// Returns the amount in bytes on a machine with `total_bytes`.
  std::uint64_t resolve(std::uint64_t total_bytes) const {
    if (!percent) return bytes;
    return static_cast<std::uint64_t>(static_cast<double>(total_bytes) * *percent / 100.0);
  }
  bool operator==(const MemorySize&) const = default;
};

/// Parses "6GiB", "1.5 GB", "300000" or "80%". Returns nothing when the text is none of these.
std::optional<MemorySize> parse_memory_size(const std::string& text);
/// Writes the text that parse_memory_size reads back unchanged.
std::string to_string(const MemorySize& size);

}  // namespace rlhf::config
