#include <iostream>
#include <nlohmann/json.hpp>

#include "rlhf/cli/verbs.h"
#include "rlhf/config/description.h"
#include "rlhf/config/reader.h"
#include "rlhf/config/writer.h"
#include "rlhf/train/run_options.h"

namespace rlhf::cli {
namespace {

void list(bool json) {
  nlohmann::ordered_json out = nlohmann::ordered_json::array();
  for (const config::FieldInfo& field : config::list_fields<RunOptions>()) {
    if (json) {
      nlohmann::ordered_json entry = {
          {"key", field.path}, {"type", field.type}, {"default", field.default_value}};
      if (std::isfinite(field.bounds.min)) entry["min"] = field.bounds.min;
      if (std::isfinite(field.bounds.max)) entry["max"] = field.bounds.max;
      if (!field.choices.empty()) entry["choices"] = field.choices;
      entry["help"] = field.help;
      out.push_back(std::move(entry));
      continue;
    }
    std::cout << field.path << "  (" << field.type;
    if (!field.default_value.empty()) std::cout << ", default " << field.default_value;
    if (std::isfinite(field.bounds.min) || std::isfinite(field.bounds.max))
      std::cout << ", " << field.bounds.min << " .. " << field.bounds.max;
    for (std::size_t i = 0; i < field.choices.size(); ++i)
      std::cout << (i == 0 ? ", one of " : " | ") << field.choices[i];
    std::cout << ")  " << field.help << "\n";
  }
  if (json) std::cout << out.dump(1) << "\n";
}

// A preset's name gives the algorithm alone; a file gives a whole run.
RunOptions load_side(const std::string& name) {
  config::LoadOptions options;
  options.preset_folders = preset_folders();
  if (name.ends_with(".yaml") || name.ends_with(".yml")) return config::load<RunOptions>(name, options);
  return config::parse<RunOptions>("model: {path: none}\nppo: {algorithm: {preset: " + name + "}}\n", name,
                                   options);
}

void diff(const std::string& left, const std::string& right) {
  for (const config::Difference& difference : config::diff(load_side(left), load_side(right)))
    std::cout << difference.path << ": " << difference.left << " -> " << difference.right << "\n";
}

}  // namespace

void add_config(CLI::App& app) {
  auto* verb = app.add_subcommand("config", "List, explain, check and compare the keys of run files");
  verb->require_subcommand(0, 1);
  struct Arguments {
    std::string key, left, right, file;
    std::vector<std::string> set;
    bool json = false;
  };
  auto a = std::make_shared<Arguments>();
  verb->add_flag("--json", a->json, "As JSON");
  auto* explain = verb->add_subcommand("explain", "Type, default, bounds and meaning of one key");
  explain->add_option("key", a->key, "e.g. ppo.algorithm.policy.clip_low")->required();
  explain->callback([a] { std::cout << config::explain<RunOptions>(a->key) << "\n"; });
  auto* compare = verb->add_subcommand("diff", "Keys in which two presets or run files differ");
  compare->add_option("left", a->left, "Preset name or run file")->required();
  compare->add_option("right", a->right, "Preset name or run file")->required();
  compare->callback([a] { diff(a->left, a->right); });
  auto* check = verb->add_subcommand("check", "Read a run file and print it resolved");
  check->add_option("run", a->file, "Run file")->required();
  check->add_option("--set", a->set, "key.path=value")->take_all()->allow_extra_args(false);
  check->callback([a] {
    config::LoadOptions options;
    options.overrides = a->set;
    options.preset_folders = preset_folders();
    auto run = config::load<RunOptions>(a->file, options);
    std::cout << config::to_yaml_document(config::Schema::of(run));
  });
  verb->callback([verb, a] {
    if (verb->get_subcommands().empty()) list(a->json);
  });
}

}  // namespace rlhf::cli
