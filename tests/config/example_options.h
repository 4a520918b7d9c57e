#pragma once
// Option structs of every shape the visitor knows.
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "rlhf/config/field.h"

namespace rlhf::config {

enum class Mode { kSerial, kStreamed };

struct TermOptions {
  std::string rule = "exact_match";
  double weight = 1.0;

  template <class V>
  void visit_fields(V& v) {
    v.field("rule", rule, "Name of the rule");
    v.field("weight", weight, "Factor of this term", at_least(0));
  }
};

struct LoraOptions {
  int rank = 8;

  template <class V>
  void visit_fields(V& v) {
    v.field("rank", rank, "Inner width", at_least(1));
  }
};

struct PpoOptions {
  double clip_range = 0.2;
  double min_ratio = 0.5;
  double max_ratio = 2.0;
  float entropy = 0.0F;
  std::optional<double> target_kl;

  template <class V>
  void visit_fields(V& v) {
    v.field("clip_range", clip_range, "Ratio clip epsilon", Bounds{0, 1});
    v.field("min_ratio", min_ratio, "Lower ratio bound", positive());
    v.field("max_ratio", max_ratio, "Upper ratio bound", positive());
    v.field("entropy", entropy, "Entropy bonus");
    v.field("target_kl", target_kl, "Stops an epoch early; null = off", at_least(0));
  }
  void validate(Problems& problems) const {
    if (min_ratio > max_ratio) problems.add("min_ratio", "must not exceed max_ratio");
  }
};

struct RunOptions {
  std::string path;
  std::uint64_t seed = 1;
  std::size_t batch = 8;
  std::int64_t offset = -1;
  std::int32_t small = 0;
  bool verbose = false;
  Mode mode = Mode::kSerial;
  std::vector<std::string> stages = {"sft", "ppo"};
  std::vector<int> layers;
  std::map<std::string, double> weights;
  MemorySize memory{0, 80.0};
  PpoOptions ppo;
  std::optional<LoraOptions> lora;
  std::vector<TermOptions> rewards;

  template <class V>
  void visit_fields(V& v) {
    v.required("path", path, "Model folder");
    v.field("seed", seed, "Run seed");
    v.field("batch", batch, "Prompts per step", at_least(1));
    v.field("offset", offset, "Signed");
    v.field("small", small, "32 bits");
    v.field("verbose", verbose, "Says more");
    v.choice("mode", mode, {{"serial", Mode::kSerial}, {"streamed", Mode::kStreamed}}, "Order of work");
    v.field("stages", stages, "What runs");
    v.field("layers", layers, "Trained layers", at_least(0));
    v.field("weights", weights, "By task", at_least(0));
    v.field("memory", memory, "Budget");
    v.group("ppo", ppo, "Policy optimisation");
    v.group("lora", lora, "Adapters; null = off");
    v.list("rewards", rewards, "Reward terms");
  }
};

}  // namespace rlhf::config
