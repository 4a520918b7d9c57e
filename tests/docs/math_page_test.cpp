// docs/reference/math.md against the options: every key and every value of the algorithm sections has a row,
// no row is stale, and the presets named in a row are those that use it.
#include <algorithm>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <sstream>

#include "rlhf/config/description.h"
#include "rlhf/config/presets.h"
#include "rlhf/config/reader.h"
#include "rlhf/core/atomic_file.h"
#include "rlhf/train/run_options.h"
#include "tests/catch.h"

namespace rlhf {
namespace {

using config::FieldInfo;
using ppo::PpoOptions;

const std::string kPpo = "ppo.algorithm.";

struct Row {
  std::string formula, presets;
};

// Rows by the key in their first cell: "key" or "key: value".
std::map<std::string, Row> read_rows() {
  std::map<std::string, Row> rows;
  std::istringstream page(read_text_file(RLHF_SOURCE_DIR "/docs/reference/math.md"));
  for (std::string line; std::getline(page, line);) {
    if (!line.starts_with("| `")) continue;
    std::vector<std::string> cells(1);
    for (const char c : line.substr(2)) {
      if (c == '|')
        cells.emplace_back();
      else
        cells.back() += c;
    }
    INFO(line);
    REQUIRE(cells.size() == 5);
    const auto trim = [](const std::string& text) {
      const auto first = text.find_first_not_of(' ');
      return first == std::string::npos ? "" : text.substr(first, text.find_last_not_of(' ') - first + 1);
    };
    const std::string key = cells[0].substr(1, cells[0].find('`', 1) - 1);
    CHECK(rows.emplace(key, Row{trim(cells[1]), trim(cells[3])}).second);
  }
  return rows;
}

bool is_algorithm(const std::string& path) {
  for (const char* section :
       {"ppo.algorithm.", "ppo.old_log_probs", "ppo.weight_mismatch", "preference.loss.",
        "preference.unpaired.", "online_preference.loss.", "rejection_sampling.keep",
        "rejection_sampling.min_score", "reward.kind", "reward.centring", "reward.target",
        "reward.objectives[].", "reward.step_", "ppo.step_rewards", "rollout.sampling.", "rewards[]."})
    if (path.starts_with(section)) return true;
  return false;
}

// Keys of the algorithm sections that hold a value, as the page writes them.
std::vector<FieldInfo> documented_fields() {
  std::vector<FieldInfo> fields;
  for (FieldInfo field : config::list_fields<RunOptions>()) {
    if (field.type.starts_with("group") || field.type == "list of groups" || !is_algorithm(field.path))
      continue;
    if (field.path.starts_with(kPpo)) field.path = field.path.substr(kPpo.size());
    fields.push_back(std::move(field));
  }
  return fields;
}

// A group whose row says "as `other`" has the keys of the other one.
struct Alias {
  std::string row, target;
};
std::optional<Alias> alias_of(const std::map<std::string, Row>& rows, std::string path) {
  std::string rest;
  while (path.find('.') != std::string::npos) {
    rest = path.substr(path.rfind('.')) + rest;
    path.resize(path.rfind('.'));
    const auto row = rows.find(path);
    if (row == rows.end() || !row->second.formula.starts_with("as `")) continue;
    const std::string& formula = row->second.formula;
    return Alias{path, formula.substr(4, formula.find('`', 4) - 4) + rest};
  }
  return {};
}

// Whether a preset's value at a key changes anything. Keys that are not listed always do.
bool in_effect(const PpoOptions& o, const std::string& path) {
  using Rule = std::pair<std::string, bool>;
  const bool gae = o.advantage.form == ppo::AdvantageForm::kGae;
  const bool to_go = o.advantage.form == ppo::AdvantageForm::kRewardToGo;
  const bool grouped = o.advantage.group.baseline != ppo::GroupBaseline::kNone ||
                       o.advantage.group.scale != ppo::GroupScale::kNone;
  const bool scaled = o.advantage.group.scale != ppo::GroupScale::kNone &&
                      o.advantage.group.scale != ppo::GroupScale::kNonZeroShare;
  const bool kl_reward = o.kl.placement != ppo::KlRewardPlacement::kNone;
  const bool adaptive = kl_reward && o.kl.controller.kind == ppo::KlControllerKind::kAdaptive;
  const bool clip = o.reward.score.clip_min || o.reward.score.clip_max;
  const auto objective = o.policy.objective;
  const auto shape = o.optimizer.schedule.shape;
  const Rule rules[] = {
      {"value.huber_delta", gae && o.value.error == ppo::ValueError::kHuber},
      {"value", gae},
      {"critic_update", true},
      {"advantage.gae.lambda", gae},
      {"advantage.gae.length_adaptive_alpha", gae},
      {"advantage.gae", gae || to_go},
      {"advantage.group.epsilon", scaled},
      {"advantage.group.singletons", grouped},
      {"advantage.group.precision", grouped},
      {"reward.clip_stage", clip},
      {"reward.placement", gae || to_go},
      {"reward.length.overlong", o.reward.length.overlong_buffer > 0},
      {"kl.placement", true},
      {"kl.controller.target", adaptive},
      {"kl.controller.horizon", adaptive},
      {"kl.", kl_reward},
      {"policy.kl.coefficient", true},
      {"policy.kl", o.policy.kl.coefficient > 0},
      {"policy.entropy_aggregation", o.policy.entropy_coefficient > 0},
      {"policy.aggregation.length_epsilon",
       o.policy.aggregation.mode == ppo::Aggregation::kSequenceMeanTokenMean},
      {"policy.sapo", objective == ppo::PolicyObjective::kSapo},
      {"policy.dro", objective == ppo::PolicyObjective::kDro},
      {"policy.vespo", objective == ppo::PolicyObjective::kVespo},
      {"policy.covariance",
       objective == ppo::PolicyObjective::kClipCov || objective == ppo::PolicyObjective::kKlCov},
      {"correction.level", true},
      {"correction.bypass", true},
      {"correction.rejection", true},
      {"correction", o.correction.level != ppo::CorrectionLevel::kOff},
      {"dynamic_sampling.max_rounds", o.dynamic_sampling.enabled},
      {"distillation.estimate", o.distillation.coefficient > 0},
      {"optimizer.schedule.min_ratio", shape != LrShape::kConstant && shape != LrShape::kLinear}};
  for (const auto& [prefix, holds] : rules)
    if (path.starts_with(prefix)) return holds;
  return true;
}

std::string unquoted(const std::string& yaml) {
  const bool quoted = yaml.size() >= 2 && (yaml[0] == '"' || yaml[0] == '\'');
  return quoted ? yaml.substr(1, yaml.size() - 2) : yaml;
}

std::map<std::string, std::string> values_of(PpoOptions options) {
  std::map<std::string, std::string> values;
  for (const auto& [path, yaml] : config::flatten(config::Schema::of(options))) values[path] = unquoted(yaml);
  return values;
}

// "`a`, `b`", "all", "all but `a`" or "none", of the presets for which `uses` holds.
std::string name_presets(const std::function<bool(const std::string&)>& uses) {
  std::string in, out;
  std::size_t number_in = 0, number_out = 0;
  for (const std::string& name : config::preset_names()) {
    const bool used = uses(name);
    std::string& list = used ? in : out;
    ++(used ? number_in : number_out);
    list += (list.empty() ? "`" : ", `") + name + "`";
  }
  if (number_in == 0) return "none";
  if (number_out == 0) return "all";
  return number_out <= 4 && number_in > number_out ? "all but " + out : in;
}

}  // namespace

TEST_CASE("every key and value of the algorithm sections has a formula in math.md, and no row is stale") {
  const std::map<std::string, Row> rows = read_rows();
  const std::vector<FieldInfo> fields = documented_fields();
  std::set<std::string> known;
  const auto require_row = [&](const std::string& key) {
    INFO("docs/reference/math.md has no row for `" << key << "`");
    known.insert(key);
    const auto row = rows.find(key);
    CHECK((row != rows.end() && !row->second.formula.empty()));
  };
  for (const FieldInfo& field : fields) {
    if (const auto alias = alias_of(rows, field.path)) {
      INFO(field.path << " is said to be as " << alias->target);
      const auto other = std::ranges::find(fields, alias->target, &FieldInfo::path);
      REQUIRE(other != fields.end());
      CHECK(other->choices == field.choices);
      known.insert(alias->row);
      continue;
    }
    if (field.choices.empty()) require_row(field.path);
    for (const std::string& choice : field.choices) require_row(field.path + ": " + choice);
  }
  CHECK(fields.size() > 100);
  for (const auto& [key, row] : rows) {
    INFO("docs/reference/math.md: there is no key or value `" << key << "`");
    CHECK(known.count(key) == 1);
  }
}

TEST_CASE("math.md names the presets that use a formula") {
  const std::map<std::string, Row> rows = read_rows();
  std::map<std::string, PpoOptions> presets;
  std::map<std::string, std::map<std::string, std::string>> values;
  for (const std::string& name : config::preset_names()) {
    presets[name] = config::load_preset<PpoOptions>(name);
    values[name] = values_of(presets[name]);
  }
  const auto defaults = values_of({});
  for (const auto& [key, row] : rows) {
    const std::size_t colon = key.find(": ");
    const std::string path = key.substr(0, colon);
    if (!defaults.count(path) || row.formula.starts_with("as `")) {
      INFO(key);
      CHECK(row.presets.empty());
      continue;
    }
    const std::string expected = name_presets([&](const std::string& name) {
      const std::string& value = values[name].at(path);
      if (!in_effect(presets[name], path)) return false;
      return colon == std::string::npos ? value != defaults.at(path) : value == key.substr(colon + 2);
    });
    INFO("row `" << key << "` names the presets: " << row.presets << "; expected: " << expected);
    CHECK(row.presets == expected);
  }
}

}  // namespace rlhf
