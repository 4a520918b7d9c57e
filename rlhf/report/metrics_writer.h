#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

namespace rlhf {

/// Named numbers of one step, in the order in which they are written.
using Metrics = std::vector<std::pair<std::string, double>>;

/// Named hashes of one step, as text.
using Hashes = std::vector<std::pair<std::string, std::string>>;

/// Appends one JSON object a step to `metrics.jsonl`: `{"stage": "ppo", "step": 3, "reward/mean": 0.5, ...}`.
/// Every line is flushed, so that a killed run keeps what it wrote. NaN and infinities, which JSON lacks,
/// become null.
class MetricsWriter {
 public:
  /// Starts a new file, replacing an old one. @throws IoError.
  static MetricsWriter create(const std::filesystem::path& path);
  /// Continues a file after a restart: keeps every line of other stages, and those of `stage` up to and
  /// including `last_step`; later ones belong to work that is done again. A torn last line is dropped.
  /// @throws IoError.
  static MetricsWriter resume(const std::filesystem::path& path, const std::string& stage,
                              std::int64_t last_step);

  /// Writes one line. @throws IoError when the disk is full; InvalidArgument for a name given twice.
  void write(const std::string& stage, std::int64_t step, const Metrics& metrics);
  void write_hashes(const std::string& stage, std::int64_t step, const Hashes& hashes);

 private:
  template <class Values, class ToJson>
  void write_line(const std::string& stage, std::int64_t step, const Values& values, const ToJson& to_json);
  explicit MetricsWriter(std::filesystem::path path);

  std::filesystem::path path_;
  std::ofstream file_;
};

}  // namespace rlhf
