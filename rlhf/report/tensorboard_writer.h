#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>

#include "rlhf/report/metrics_writer.h"

namespace rlhf {

/// Writes scalars as a TensorBoard event file (TFRecord framing, protobuf by hand). Flushed after every step.
class TensorBoardWriter {
 public:
  /// Returns seconds since 1970.
  using WallClock = std::function<double()>;

  /// Creates `folder` and a new event file in it, named by the time. @throws IoError.
  TensorBoardWriter(const std::filesystem::path& folder, WallClock clock);

  /// Writes one event with a value for every metric, tags `prefix/name` (or `name` for an empty prefix).
  /// Values are stored as float32; NaN and infinities are kept. @throws IoError.
  void write(const std::string& prefix, std::int64_t step, const Metrics& metrics);

  const std::filesystem::path& path() const { return path_; }

 private:
  void write_record(const std::string& event);

  WallClock clock_;
  std::filesystem::path path_;
  std::ofstream file_;
};

}  // namespace rlhf
