#pragma once
// What a run of several processes has left in its directory.

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "rlhf/core/atomic_file.h"
#include "rlhf/model/weight_file.h"
#include "tests/catch.h"

namespace rlhf {

/// Metrics by (stage, step).
inline std::map<std::pair<std::string, std::int64_t>, nlohmann::json> read_metrics(
    const std::filesystem::path& run) {
  std::map<std::pair<std::string, std::int64_t>, nlohmann::json> steps;
  std::istringstream lines(read_text_file(run / "metrics.jsonl"));
  for (std::string line; std::getline(lines, line);) {
    auto json = nlohmann::json::parse(line);
    const std::pair<std::string, std::int64_t> key = {json.at("stage"), json.at("step")};
    CHECK(steps.emplace(key, std::move(json)).second);
  }
  return steps;
}

inline std::vector<float> final_weights(const std::filesystem::path& run, const std::string& stage) {
  const auto file = WeightFile::open(run / "checkpoints" / (stage + ".final.safetensors"));
  std::vector<float> weights(static_cast<std::size_t>(file->find("weights")->num_elements()));
  file->read("weights", std::span(weights));
  return weights;
}

inline double largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  REQUIRE(a.size() == b.size());
  double largest = 0;
  for (std::size_t i = 0; i < a.size(); ++i)
    largest = std::max(largest, std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i])));
  return largest;
}

}  // namespace rlhf
