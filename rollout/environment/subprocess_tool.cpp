#include "rollout/environment/subprocess_tool.h"

#include <utility>

#include "rlhf/core/error.h"

namespace rlhf {
namespace {

std::string without_last_line_end(std::string text) {
  if (text.ends_with('\n')) text.pop_back();
  return text;
}

}  // namespace

SubprocessTool::SubprocessTool(ToolSchema schema, std::vector<std::string> argv,
                               const SubprocessLimits& limits)
    : schema_(std::move(schema)), argv_(std::move(argv)), limits_(limits) {
  RLHF_CHECK(!argv_.empty() && !argv_.front().empty(), "tool '", schema_.name,
             "': there is no program to run");
}

ToolResult SubprocessTool::call(const nlohmann::json& arguments, const CallLimit& limit) const {
  using End = SubprocessResult::End;
  const std::string input = arguments.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
  SubprocessResult result = run_subprocess(argv_, input, limits_, limit);
  const std::string said = result.errors.empty() ? "" : ": " + without_last_line_end(result.errors);
  switch (result.end) {
    case End::kExited:
      return result.code == 0 ? ToolResult::ok(without_last_line_end(std::move(result.output)))
                              : ToolResult::error(concat("exit status ", result.code, said));
    case End::kTooMuchOutput:
      return ToolResult::ok(
          concat(result.output, " [cut after ", limits_.max_output_bytes, " bytes; the program was ended]"));
    case End::kSignalled:
      return ToolResult::error(concat("ended by signal ", result.code, said));
    case End::kTooSlow:
      return ToolResult::error("took longer than it may");
    case End::kAbandoned:
      return ToolResult::error("the episode is over");
    case End::kNotStarted:
      return ToolResult::error(result.errors);
  }
  return ToolResult::error("failed");
}

}  // namespace rlhf
