#include "rlhf/report/trace_writer.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "rlhf/core/atomic_file.h"
#include "rlhf/core/error.h"

namespace rlhf {
namespace {

using Json = nlohmann::ordered_json;
constexpr int kProcess = 1;

std::string line_of(const Json& event) {
  return event.dump(-1, ' ', false, Json::error_handler_t::replace);
}

}  // namespace

TraceWriter::TraceWriter(std::filesystem::path path, double origin_s)
    : path_(std::move(path)), origin_s_(origin_s) {
  write_file_atomically(path_, "[");
  file_.open(path_, std::ios::binary | std::ios::app);
  if (!file_) fail<IoError>(path_.string(), ": cannot be opened for writing");
}

TraceWriter::~TraceWriter() {
  file_ << "\n]\n";
}

void TraceWriter::write(const std::string& event) {
  file_ << (empty_ ? "\n" : ",\n") << event << std::flush;
  empty_ = false;
  if (!file_) fail<IoError>(path_.string(), ": cannot write (disk full?)");
}

std::size_t TraceWriter::track_number(const std::string& track) {
  const auto found = std::ranges::find(tracks_, track);
  const auto number = static_cast<std::size_t>(found - tracks_.begin()) + 1;
  if (found == tracks_.end()) {
    tracks_.push_back(track);
    write(line_of({{"name", "thread_name"},
                   {"ph", "M"},
                   {"pid", kProcess},
                   {"tid", number},
                   {"args", {{"name", track}}}}));
  }
  return number;
}

void TraceWriter::span(const std::string& track, const std::string& name, double begin_s, double end_s,
                       const Arguments& arguments) {
  Json event = {{"name", name},
                {"ph", "X"},
                {"ts", microseconds(begin_s)},
                {"dur", (end_s - begin_s) * 1e6},
                {"pid", kProcess},
                {"tid", track_number(track)}};
  for (const auto& [key, value] : arguments) event["args"][key] = value;
  write(line_of(event));
}

void TraceWriter::counter(const std::string& name, double time_s, double value) {
  write(line_of({{"name", name},
                 {"ph", "C"},
                 {"ts", microseconds(time_s)},
                 {"pid", kProcess},
                 {"args", {{"value", value}}}}));
}

}  // namespace rlhf
