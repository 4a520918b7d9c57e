#pragma once

#include <memory>
#include <string>
#include <vector>

#include "rollout/environment/environment.h"
#include "rollout/environment/tool.h"

namespace rlhf {

/// Argument `expression`: arithmetic as calculate (rlhf/data/calculator.h) understands it.
class CalculatorTool : public Tool {
 public:
  /// Empty texts stand for "calculator" and a description of what it understands.
  explicit CalculatorTool(std::string name = "", std::string description = "");
  const ToolSchema& schema() const override { return schema_; }
  ToolResult call(const nlohmann::json& arguments, const CallLimit& limit) const override;
  bool answers_at_once() const override { return true; }

 private:
  ToolSchema schema_;
};

/// The finance desk's form of the same: behind `<calc>EXPRESSION</calc>` stands `=RESULT` or `=error`, inside
/// the policy's turn. One call an episode is answered; further tags are plain text. End tokens end the
/// episode.
class CalculatorTagFactory : public EnvironmentFactory {
 public:
  CalculatorTagFactory();
  std::unique_ptr<Environment> begin(const EpisodeStart& start) const override;
  const std::vector<std::string>& turn_strings() const override { return strings_; }
  bool hears_stops() const override { return false; }
  bool answers_at_once() const override { return true; }

 private:
  std::vector<std::string> strings_;
};

}  // namespace rlhf
