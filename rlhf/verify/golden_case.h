#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "rlhf/ppo/rows.h"
#include "rlhf/verify/report.h"

namespace rlhf::verify {

/// Numbers of a nested list in row-major order.
struct Tensor {
  std::vector<std::size_t> shape;
  std::vector<double> values;

  std::span<const double> row(std::size_t index) const;  ///< along the first axis
};

/// Reads a nested list of numbers, "nan", "inf", "-inf" and booleans. @throws InvalidArgument on anything
/// else or on ragged nesting.
Tensor read_tensor(const nlohmann::json& json);

/// Offsets and mask behind a TokenRows of a B x L matrix.
struct MatrixRows {
  std::vector<std::size_t> offsets;
  std::vector<std::uint8_t> mask;

  ppo::TokenRows view() const { return {offsets, mask}; }
};
MatrixRows matrix_rows(const Tensor& mask);

/// How close is close enough: |actual - expected| <= relative * max |expected| + absolute.
struct Tolerance {
  double relative = 1e-10;
  double absolute = 1e-13;
};

/// One case of a golden file. Remembers which parameters, inputs and outputs were used, so that nothing in a
/// file can be passed over silently.
class GoldenCase {
 public:
  /// `directory` holds the file: cases name checkpoint folders relative to it.
  GoldenCase(const nlohmann::json& json, std::filesystem::path directory, VerifyResult& result);

  const std::string& name() const { return name_; }
  const std::filesystem::path& directory() const { return directory_; }
  const std::string& dtype() const { return dtype_; }
  bool is_float32() const { return dtype_ == "float32"; }
  Tolerance tolerance() const;
  /// `relative` for float64 cases, never tighter than the case's own.
  Tolerance at_least(double relative) const;

  bool has_param(const std::string& key) const;  ///< present and not null; marks it used
  double number(const std::string& key);
  double number(const std::string& key, double otherwise);
  std::size_t count(const std::string& key);  ///< a whole number from 1
  std::optional<double> optional_number(const std::string& key);
  std::optional<std::pair<double, double>> optional_range(const std::string& key);
  bool flag(const std::string& key, bool otherwise = false);
  std::string text(const std::string& key);
  std::string text(const std::string& key, const std::string& otherwise);
  const nlohmann::json& param(const std::string& key);
  void ignore_param(const std::string& key) { used_params_.insert(key); }

  bool has_input(const std::string& key) const;  ///< present and not null
  Tensor input(const std::string& key);
  std::vector<double> values(const std::string& key) { return input(key).values; }
  std::optional<std::vector<double>> optional_values(const std::string& key);
  const nlohmann::json& raw_input(const std::string& key);

  const nlohmann::json& output(const std::string& key);  ///< marks it used
  const nlohmann::json& outputs();                       ///< marks all of them used
  bool has_output(const std::string& key) const { return outputs_.contains(key); }
  void check(const std::string& key, std::span<const double> actual, Tolerance tolerance);
  void check(const std::string& key, std::span<const double> actual) { check(key, actual, tolerance()); }
  void check(const std::string& key, double actual, Tolerance tolerance);
  void check(const std::string& key, double actual) { check(key, actual, tolerance()); }
  /// Compares the whole "metrics" object with named values; a metric without a value here is a failure.
  void check_metrics(const std::map<std::string, double>& actual);
  void compare(const std::string& label, std::span<const double> actual, std::span<const double> expected,
               Tolerance tolerance);
  void fail_with(const std::string& message);
  /// Reports what was not used, and counts the case.
  void finish();

 private:
  void note_failure(const std::string& message);

  const nlohmann::json& json_;
  const nlohmann::json& params_;
  const nlohmann::json& inputs_;
  const nlohmann::json& outputs_;
  std::string name_;
  std::string dtype_;
  std::filesystem::path directory_;
  VerifyResult& result_;
  mutable std::set<std::string> used_params_;
  std::set<std::string> used_inputs_;
  std::set<std::string> used_outputs_;
  bool failed_ = false;
};

/// Checks one case; `functions` is the file's "source" object.
using CaseCheck = void (*)(GoldenCase& golden, const nlohmann::json& source);

void check_grpo_loss(GoldenCase& golden, const nlohmann::json& source);
void check_kl(GoldenCase& golden, const nlohmann::json& source);
void check_gae(GoldenCase& golden, const nlohmann::json& source);
void check_token_reward(GoldenCase& golden, const nlohmann::json& source);
void check_advantage_stage(GoldenCase& golden, const nlohmann::json& source);
void check_group_advantage(GoldenCase& golden, const nlohmann::json& source);
void check_whiten(GoldenCase& golden, const nlohmann::json& source);
void check_shaping_control(GoldenCase& golden, const nlohmann::json& source);
void check_policy_loss(GoldenCase& golden, const nlohmann::json& source);
void check_value_loss(GoldenCase& golden, const nlohmann::json& source);
void check_aggregation(GoldenCase& golden, const nlohmann::json& source);
void check_rollout_correction(GoldenCase& golden, const nlohmann::json& source);
void check_preference_loss(GoldenCase& golden, const nlohmann::json& source);
void check_logprob_entropy(GoldenCase& golden, const nlohmann::json& source);
void check_lr_schedule(GoldenCase& golden, const nlohmann::json& source);
void check_optimizer(GoldenCase& golden, const nlohmann::json& source);
void check_sampling(GoldenCase& golden, const nlohmann::json& source);
void check_defaults(GoldenCase& golden, const nlohmann::json& source);
void check_ppo_record(GoldenCase& golden, const nlohmann::json& source);
void check_group_record(GoldenCase& golden, const nlohmann::json& source);

/// The package of a source object; `package` or `second_package` must be known to the caller.
std::string package_of(const nlohmann::json& source);
/// True when one of the source's functions contains `text`.
bool has_function(const nlohmann::json& source, const std::string& text);

}  // namespace rlhf::verify
