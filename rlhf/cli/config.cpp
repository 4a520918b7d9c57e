#include <cmath>
#include <filesystem>
#include <iostream>
#include <nlohmann/json.hpp>

#include "rlhf/cli/verbs.h"
#include "rlhf/config/description.h"
#include "rlhf/config/nearest.h"
#include "rlhf/config/presets.h"
#include "rlhf/config/reader.h"
#include "rlhf/config/writer.h"
#include "rlhf/core/error.h"
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

// One side of a comparison.
struct Side {
  config::Traced<RunOptions> run;
  bool algorithm_only = false;  ///< a preset says nothing about the rest of a run
};

// A preset by its name, a run file, or a run directory (its resolved configuration).
Side load_side(const std::string& name) {
  if (config::find_preset(name))
    return {config::parse_traced<RunOptions>(
                "model: {path: none}\nppo: {algorithm: {preset: " + name + "}}\n", name),
            true};
  std::filesystem::path file = name;
  if (std::filesystem::is_directory(file)) file /= "config.resolved.yaml";
  if (!std::filesystem::exists(file))
    fail<ConfigError>(name, ": neither a file nor a preset; nearest preset is ",
                      config::nearest(name, config::preset_names()));
  return {config::parse_traced<RunOptions>(config::read_config_file(file), file.string())};
}

// Empty for a key that has its default value.
std::string origin_of(const Side& side, const std::string& path) {
  const auto found = side.run.origins.find(path);
  return found == side.run.origins.end() ? "" : config::to_string(found->second);
}

nlohmann::ordered_json text_or_null(const std::string& text) {
  return text.empty() ? nlohmann::ordered_json() : nlohmann::ordered_json(text);
}

std::string describe(const std::string& value, const std::string& origin) {
  if (value.empty()) return "absent";
  return value + " (" + (origin.empty() ? "default" : origin) + ")";
}

// Prints the keys that differ; ends with 1 when there are some, as diff(1) does.
void diff(const std::string& left_name, const std::string& right_name, bool json) {
  const Side left = load_side(left_name), right = load_side(right_name);
  const bool algorithm_only = left.algorithm_only || right.algorithm_only;
  nlohmann::ordered_json out = nlohmann::ordered_json::array();
  for (const config::Difference& d : config::diff(left.run.value, right.run.value)) {
    if (algorithm_only && !d.path.starts_with("ppo.algorithm.")) continue;
    const std::string left_origin = origin_of(left, d.path), right_origin = origin_of(right, d.path);
    out.push_back({{"key", d.path},
                   {"left", text_or_null(d.left)},
                   {"right", text_or_null(d.right)},
                   {"left_origin", text_or_null(left_origin)},
                   {"right_origin", text_or_null(right_origin)}});
    if (!json)
      std::cout << d.path << ": " << describe(d.left, left_origin) << " -> "
                << describe(d.right, right_origin) << "\n";
  }
  if (json) std::cout << out.dump(1) << "\n";
  if (!out.empty()) throw ExitCode{1};
}

void show_presets(const std::string& name) {
  if (name.empty()) {
    for (const config::Preset& preset : config::presets())
      std::cout << preset.name << "  " << preset.yaml.substr(0, preset.yaml.find('\n')) << "\n";
    return;
  }
  const config::Preset* preset = config::find_preset(name);
  if (!preset)
    fail<ConfigError>("there is no preset ", name, "; nearest is ",
                      config::nearest(name, config::preset_names()));
  std::cout << preset->yaml;
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
  auto* compare = verb->add_subcommand("diff",
                                       "Keys whose values differ, with both values and where they were "
                                       "written. Exit code: 0 equal, 1 different, 2 trouble");
  for (auto& [name, value] : {std::pair{"left", &a->left}, {"right", &a->right}})
    compare
        ->add_option(name, *value,
                     "Preset, run file or run directory; with a preset only ppo.algorithm is compared")
        ->required();
  compare->add_flag("--json", a->json, "As JSON; null: no such key, or a default value");
  compare->callback([a] { diff(a->left, a->right, a->json); });
  auto* presets = verb->add_subcommand("presets", "List the presets, or print one");
  presets->add_option("name", a->key, "Preset");
  presets->callback([a] { show_presets(a->key); });
  auto* check = verb->add_subcommand("check", "Read a run file and print it resolved");
  check->add_option("run", a->file, "Run file")->required();
  check->add_option("--set", a->set, "key.path=value")->take_all()->allow_extra_args(false);
  check->callback([a] {
    config::LoadOptions options;
    options.overrides = a->set;
    auto run = config::load<RunOptions>(a->file, options);
    std::cout << config::to_yaml_document(config::Schema::of(run));
  });
  verb->callback([verb, a] {
    if (verb->get_subcommands().empty()) list(a->json);
  });
}

}  // namespace rlhf::cli
