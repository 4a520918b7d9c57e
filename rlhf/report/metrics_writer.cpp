#include "rlhf/report/metrics_writer.h"

#include <cmath>
#include <nlohmann/json.hpp>
#include <string_view>

#include "rlhf/core/atomic_file.h"
#include "rlhf/core/error.h"

namespace rlhf {
namespace {

// A metrics line is small; a file over this size is not one of ours.
constexpr std::size_t kMaxFileBytes = std::size_t{1} << 30;

bool is_kept(const std::string& line, const std::string& stage, std::int64_t last_step) {
  const auto object = nlohmann::json::parse(line, nullptr, false);
  const bool complete = object.is_object() && object.contains("stage") && object.contains("step") &&
                        object["stage"].is_string() && object["step"].is_number_integer();
  if (!complete) return false;
  return object["stage"] != stage || object["step"].get<std::int64_t>() <= last_step;
}

}  // namespace

MetricsWriter::MetricsWriter(std::filesystem::path path) : path_(std::move(path)) {
  file_.open(path_, std::ios::binary | std::ios::app);
  if (!file_) fail<IoError>(path_.string(), ": cannot be opened for writing");
}

MetricsWriter MetricsWriter::create(const std::filesystem::path& path) {
  write_file_atomically(path, "");
  return MetricsWriter(path);
}

MetricsWriter MetricsWriter::resume(const std::filesystem::path& path, const std::string& stage,
                                    std::int64_t last_step) {
  if (!std::filesystem::exists(path)) return create(path);
  const std::string text = read_text_file(path, kMaxFileBytes);
  std::string kept;
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = std::min(text.find('\n', begin), text.size());
    const std::string line = text.substr(begin, end - begin);
    if (is_kept(line, stage, last_step)) kept += line + '\n';
    begin = end + 1;
  }
  write_file_atomically(path, kept);
  return MetricsWriter(path);
}

template <class Values, class ToJson>
void MetricsWriter::write_line(const std::string& stage, std::int64_t step, const Values& values,
                               const ToJson& to_json) {
  nlohmann::ordered_json line{{"stage", stage}, {"step", step}};
  for (const auto& [name, value] : values) {
    RLHF_CHECK(!line.contains(name), "metrics: ", name, " is given twice in stage ", stage, ", step ", step);
    line[name] = to_json(value);
  }
  file_ << line.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) << '\n' << std::flush;
  if (!file_)
    fail<IoError>(path_.string(), ": cannot write the line of stage ", stage, ", step ", step,
                  " (disk full?)");
}

void MetricsWriter::write(const std::string& stage, std::int64_t step, const Metrics& metrics) {
  write_line(stage, step, metrics, [](double value) {
    return std::isfinite(value) ? nlohmann::ordered_json(value) : nlohmann::ordered_json(nullptr);
  });
}

void MetricsWriter::write_hashes(const std::string& stage, std::int64_t step, const Hashes& hashes) {
  write_line(stage, step, hashes, [](const std::string& hash) { return nlohmann::ordered_json(hash); });
}

}  // namespace rlhf
