#include "rlhf/cli/work_package.h"

#include <algorithm>
#include <cmath>

#include "rlhf/core/error.h"
#include "rlhf/data/records.h"
#include "rlhf/model/json_file.h"

namespace rlhf::cli {
namespace {

constexpr std::int64_t kMaxTokenId = 1 << 24;

std::vector<double> read_fractions(const std::filesystem::path& path) {
  const nlohmann::json json = read_json_file(path);
  const JsonFields fields(json, path.string());
  const nlohmann::json* list = fields.find("fraction");
  if (!list || !list->is_array() || list->empty())
    fail<IoError>(path.string(), ": key \"fraction\": expected a list of numbers in (0, 1]");
  std::vector<double> fractions;
  for (const nlohmann::json& value : *list) {
    const double fraction = value.is_number() ? value.get<double>() : 0;
    if (!(fraction > 0 && fraction <= 1))
      fail<IoError>(path.string(), ": key \"fraction\", entry ", fractions.size(), ": got ", value.dump(),
                    ", expected a number in (0, 1]");
    fractions.push_back(fraction);
  }
  return fractions;
}

}  // namespace

std::int64_t WorkPackage::response_tokens(std::uint64_t slot, Mode mode, std::int64_t longest) const {
  if (mode == Mode::kFixed) return longest;
  // nearbyint rounds halves to even, as Python's round does.
  const double tokens = std::nearbyint(fractions[slot % fractions.size()] * static_cast<double>(longest));
  return std::clamp<std::int64_t>(static_cast<std::int64_t>(tokens), 2, longest);
}

void WorkPackage::fix_length(std::uint64_t slot, Mode mode, std::int64_t longest, StopOptions& stop) const {
  stop.tokens = {eos, pad};
  stop.max_new_tokens = stop.min_new_tokens = response_tokens(slot, mode, longest);
  if (mode == Mode::kNatural) stop.forced_last = eos;
}

CLI::Option* add_work_options(CLI::App& bench, WorkArguments& arguments) {
  bench.add_option("--mode", arguments.mode, "fixed: all responses of one length; natural: as recorded")
      ->check(CLI::IsMember({"fixed", "natural"}));
  auto* tokens =
      bench.add_option("--response-tokens", arguments.response_tokens, "Tokens of the longest response")
          ->check(CLI::Range(2, 1 << 20));
  return bench.add_option("--work", arguments.work, "Folder of the work package")->needs(tokens);
}

WorkPackage load_work_package(const std::filesystem::path& folder) {
  if (!std::filesystem::is_directory(folder))
    fail<IoError>(folder.string(), ": no such directory; expected a work package (work.json, prompts.jsonl, ",
                  "lengths.json, policy/, reward/, value/)");
  WorkPackage work;
  work.folder = folder;
  const std::string meta_path = (folder / "work.json").string();
  const nlohmann::json meta = read_json_file(meta_path);
  const JsonFields fields(meta, meta_path);
  work.variant = fields.text("variant", "");
  work.pad = static_cast<TokenId>(fields.integer("pad_token_id", std::nullopt, 0, kMaxTokenId));
  work.eos = static_cast<TokenId>(fields.integer("eos_token_id", std::nullopt, 0, kMaxTokenId));
  const std::string prompts_path = (folder / "prompts.jsonl").string();
  for (PromptRecord& record : read_prompt_records(prompts_path, PromptText::kRaw)) {
    if (record.content.input_ids.empty())
      fail<IoError>(prompts_path, ":", record.line, ": expected \"input_ids\" with at least one token id");
    Prompt prompt;
    prompt.id = record.id;
    prompt.tokens = std::move(record.content.input_ids);
    prompt.task = "work";
    work.prompts.push_back(std::move(prompt));
  }
  work.fractions = read_fractions(folder / "lengths.json");
  return work;
}

void check_fits(const WorkPackage& work, const ModelConfig& policy, std::int64_t longest) {
  for (const TokenId token : {work.pad, work.eos})
    if (token >= policy.vocab_size)
      fail<IoError>((work.folder / "work.json").string(), ": token id ", token,
                    " is outside the policy's vocabulary of ", policy.vocab_size);
  for (const Prompt& prompt : work.prompts) {
    const std::string where =
        concat((work.folder / "prompts.jsonl").string(), ": the prompt with id ", prompt.id);
    for (const TokenId token : prompt.tokens)
      if (token < 0 || token >= policy.vocab_size)
        fail<IoError>(where, " has token id ", token, ", expected ids below the policy's vocabulary of ",
                      policy.vocab_size);
    if (static_cast<std::int64_t>(prompt.tokens.size()) + longest > policy.max_positions)
      fail<IoError>(where, " has ", prompt.tokens.size(), " tokens; with --response-tokens ", longest,
                    " that exceeds the policy's context of ", policy.max_positions);
  }
}

void check_scalar_model(const WorkPackage& work, const std::string& name, const ModelConfig& other,
                        const ModelConfig& policy) {
  const std::string where = (work.folder / name / "config.json").string();
  if (!other.scalar_head || other.num_labels != 1)
    fail<IoError>(where, ": expected a sequence classification model with one label");
  const auto check = [&](const char* key, auto ours, auto expected) {
    if (ours != expected)
      fail<IoError>(where, ": ", key, " is ", ours, ", expected ", expected,
                    " as in policy/config.json: the models of a work package have one shape");
  };
  check("model_type", model_type_name(other.architecture), model_type_name(policy.architecture));
  check("vocab_size", other.vocab_size, policy.vocab_size);
  check("hidden_size", other.hidden_size, policy.hidden_size);
  check("intermediate_size", other.intermediate_size, policy.intermediate_size);
  check("num_hidden_layers", other.num_layers, policy.num_layers);
  check("num_attention_heads", other.num_heads, policy.num_heads);
  check("num_key_value_heads", other.num_kv_heads, policy.num_kv_heads);
  check("head_dim", other.head_dim, policy.head_dim);
}

}  // namespace rlhf::cli
