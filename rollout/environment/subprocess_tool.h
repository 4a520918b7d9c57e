#pragma once

#include <string>
#include <vector>

#include "rollout/environment/subprocess.h"
#include "rollout/environment/tool.h"

namespace rlhf {

/// A program as a tool: the arguments, one line of JSON, on its standard input; what it writes to standard
/// output is the answer. An exit status other than 0 and a limit it runs into are error results with what it
/// wrote to standard error; of too much output the beginning counts, with a note.
class SubprocessTool : public Tool {
 public:
  /// @param argv program and arguments, at least the program; no shell reads them
  SubprocessTool(ToolSchema schema, std::vector<std::string> argv, const SubprocessLimits& limits);

  const ToolSchema& schema() const override { return schema_; }
  ToolResult call(const nlohmann::json& arguments, const CallLimit& limit) const override;

 private:
  ToolSchema schema_;
  std::vector<std::string> argv_;
  SubprocessLimits limits_;
};

}  // namespace rlhf
