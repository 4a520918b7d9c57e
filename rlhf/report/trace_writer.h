#pragma once

#include <filesystem>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

namespace rlhf {

/// Writes `trace.json` in the Chrome trace event format (JSON array form), which Perfetto and
/// chrome://tracing open. Times are seconds on any steady clock; the file counts microseconds from
/// `origin_s`. The file is readable at any moment: the format allows the closing bracket to be missing, so a
/// killed run keeps its trace.
///
/// Not thread-safe: one call at a time.
class TraceWriter {
 public:
  using Arguments = std::vector<std::pair<std::string, double>>;

  /// Starts a new file, replacing an old one. @throws IoError.
  TraceWriter(std::filesystem::path path, double origin_s);
  /// Closes the array.
  ~TraceWriter();
  TraceWriter(const TraceWriter&) = delete;
  TraceWriter& operator=(const TraceWriter&) = delete;

  /// A stretch of time on a track (a row of the picture), which is made when it is first named.
  /// @throws IoError when the disk is full.
  void span(const std::string& track, const std::string& name, double begin_s, double end_s,
            const Arguments& arguments = {});
  /// The value of a counter from this moment on.
  void counter(const std::string& name, double time_s, double value);

 private:
  std::size_t track_number(const std::string& track);
  double microseconds(double time_s) const { return (time_s - origin_s_) * 1e6; }
  void write(const std::string& event);

  std::filesystem::path path_;
  std::ofstream file_;
  double origin_s_;
  std::vector<std::string> tracks_;
  bool empty_ = true;
};

}  // namespace rlhf
