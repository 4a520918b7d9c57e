#include "rlhf/verify/vectors.h"

#include <filesystem>
#include <fstream>
#include <map>

#include "rlhf/core/error.h"
#include "rlhf/verify/golden_case.h"

namespace rlhf {
namespace {

const std::map<std::string, verify::CaseCheck>& families() {
  static const std::map<std::string, verify::CaseCheck> kFamilies = {
      {"advantage_stage", verify::check_advantage_stage},
      {"aggregation", verify::check_aggregation},
      {"defaults", verify::check_defaults},
      {"gae", verify::check_gae},
      {"group_advantage", verify::check_group_advantage},
      {"group_record", verify::check_group_record},
      {"grpo_loss", verify::check_grpo_loss},
      {"kl", verify::check_kl},
      {"logprob_entropy", verify::check_logprob_entropy},
      {"lr_schedule", verify::check_lr_schedule},
      {"optimizer", verify::check_optimizer},
      {"policy_loss", verify::check_policy_loss},
      {"ppo_record", verify::check_ppo_record},
      {"preference_loss", verify::check_preference_loss},
      {"rollout_correction", verify::check_rollout_correction},
      {"sampling", verify::check_sampling},
      {"shaping_control", verify::check_shaping_control},
      {"token_reward", verify::check_token_reward},
      {"value_loss", verify::check_value_loss},
      {"whiten", verify::check_whiten},
  };
  return kFamilies;
}

nlohmann::json read_json(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  if (!stream) fail<IoError>(path, ": cannot be opened");
  try {
    return nlohmann::json::parse(stream);
  } catch (const nlohmann::json::parse_error& error) {
    fail<IoError>(path, ": not valid JSON at byte ", error.byte, ": ", error.what());
  }
}

void fail_file(VerifyResult& result, const std::string& message) {
  ++result.failures;
  result.messages.push_back(message);
}

}  // namespace

bool is_vector_file(const std::string& path) {
  const nlohmann::json json = read_json(path);
  return json.is_object() && json.value("format", "") == "golden-1" &&
         families().contains(json.value("family", ""));
}

VerifyResult verify_vectors(const std::string& path) {
  VerifyResult result;
  result.file = path;
  const nlohmann::json json = read_json(path);
  if (!json.is_object() || !json.contains("cases") || !json["cases"].is_array()) {
    fail_file(result, "not a vector file: no list of cases");
    return result;
  }
  if (json.value("format", "") != "golden-1") {
    fail_file(result, "format '" + json.value("format", "") + "' is not known, expected golden-1");
    return result;
  }
  const std::string family = json.value("family", "");
  const auto check = families().find(family);
  if (check == families().end()) {
    fail_file(result, "family '" + family + "' is not known");
    return result;
  }
  const nlohmann::json source = json.value("source", nlohmann::json::object());
  if (json["cases"].empty()) fail_file(result, "the file has no cases");
  for (const auto& item : json["cases"]) {
    verify::GoldenCase golden(item, std::filesystem::path(path).parent_path(), result);
    try {
      check->second(golden, source);
    } catch (const std::exception& error) {
      golden.fail_with(error.what());
    }
    golden.finish();
  }
  return result;
}

}  // namespace rlhf
