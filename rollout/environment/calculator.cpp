#include "rollout/environment/calculator.h"

#include "rlhf/data/calculator.h"

namespace rlhf {
namespace {

class CalculatorTag : public Environment {
 public:
  Observation observe(const AssistantTurn& turn) override {
    Observation observation;
    if (turn.number > 1) return observation;
    const auto expression = find_calculation(turn.text);
    const Calculation calculation =
        expression ? calculate(*expression) : Calculation{std::nullopt, "no expression"};
    observation.text = tool_result(calculation);
    observation.tool_calls = 1;
    observation.tool_errors = !calculation.value;
    return observation;
  }
};

}  // namespace

CalculatorTool::CalculatorTool(std::string name, std::string description) {
  schema_.name = name.empty() ? "calculator" : std::move(name);
  schema_.description = description.empty()
                            ? "Evaluates arithmetic on decimal numbers: + - * / ^, parentheses, min(...), "
                              "max(...), round(x, digits)."
                            : std::move(description);
  schema_.parameters = nlohmann::ordered_json{
      {"type", "object"},
      {"properties", {{"expression", {{"type", "string"}, {"description", "e.g. (1 + 2) * 3.5"}}}}},
      {"required", nlohmann::ordered_json::array({"expression"})}};
}

ToolResult CalculatorTool::call(const nlohmann::json& arguments, const CallLimit&) const {
  const Calculation calculation = calculate(arguments.at("expression").get<std::string>());
  return calculation.value ? ToolResult::ok(to_text(*calculation.value))
                           : ToolResult::error(calculation.error);
}

CalculatorTagFactory::CalculatorTagFactory() : strings_{std::string(kCalcClose)} {}

std::unique_ptr<Environment> CalculatorTagFactory::begin(const EpisodeStart&) const {
  return std::make_unique<CalculatorTag>();
}

}  // namespace rlhf
