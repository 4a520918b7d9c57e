#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "rlhf/config/field.h"
#include "rollout/environment/episode_runner.h"

namespace rlhf {

/// One tool of a configuration. Which keys apply depends on the type.
struct ToolSection {
  enum class Type { kCalculator, kTableLookup, kSubprocess };
  Type type = Type::kCalculator;
  std::string name, description;
  std::string file, key;
  std::vector<std::string> argv;
  std::string parameters;
  double max_seconds = 10, max_cpu_seconds = 10;
  config::MemorySize max_memory{std::uint64_t{1} << 30, {}};
  std::int64_t max_output_bytes = 4096;

  template <class V>
  void visit_fields(V& v) {
    v.choice("type", type,
             {{"calculator", Type::kCalculator},
              {"table_lookup", Type::kTableLookup},
              {"subprocess", Type::kSubprocess}},
             "What the tool does");
    v.field("name", name, "Name that calls give; empty = the type, not for subprocess");
    v.field("description", description, "What the policy is told; empty = a sentence of the tool's own");
    v.field("file", file, "table_lookup: .jsonl with one object a line, or CSV with a header");
    v.field("key", key, "table_lookup: column whose values name the rows");
    v.field("argv", argv, "subprocess: program and arguments; no shell reads them");
    v.field("parameters", parameters, "subprocess: JSON schema of the arguments; empty = any object");
    v.field("max_seconds", max_seconds, "subprocess: wall time of a call, then its process group is killed",
            {0.001, 1e6});
    v.field("max_cpu_seconds", max_cpu_seconds, "subprocess: CPU time of each of its processes",
            {0.001, 1e6});
    v.field("max_memory", max_memory, "subprocess: address space of each of its processes (512MiB)");
    v.field("max_output_bytes", max_output_bytes,
            "subprocess: output that counts; a program that writes more is ended", {1, 1 << 24});
  }
  void validate(config::Problems& problems) const;
};

/// What answers the turns of a policy.
struct EnvironmentOptions {
  std::vector<ToolSection> tools;
  bool scripted_user = false;
  EpisodeLimits limits;
  std::int64_t max_calls_per_turn = 8;
  std::int64_t max_result_bytes = 4096;
  std::int64_t workers = 4;

  template <class V>
  void visit_fields(V& v) {
    v.list("tools", tools,
           "Tools that the policy may call: <tool_call>{\"name\", \"arguments\"}</tool_call>");
    v.field("scripted_user", scripted_user,
            "Say the data's user_turns, one after each turn of the policy without a call");
    limits.visit_fields(v);
    v.field("max_calls_per_turn", max_calls_per_turn, "Calls of one turn that are answered", {1, 1000});
    v.field("max_result_bytes", max_result_bytes, "Bytes of a result that the policy reads", {16, 1 << 24});
    v.field("workers", workers, "Threads that run tools which take a while", {1, 1024});
  }
};

}  // namespace rlhf
