#include <nlohmann/json.hpp>

#include "rlhf/core/error.h"
#include "rlhf/model/tokenizer_spec.h"

namespace rlhf {
namespace {

using Json = nlohmann::ordered_json;

Json added_json(const AddedToken& token) {
  return {{"id", token.id},          {"content", token.text},  {"single_word", token.single_word},
          {"lstrip", token.lstrip},  {"rstrip", token.rstrip}, {"normalized", token.normalized},
          {"special", token.special}};
}

Json normalizer_json(const TokenizerSpec& spec) {
  constexpr const char* kNames[] = {"NFC", "NFD", "NFKC", "NFKD"};
  if (spec.normalizers.empty()) return nullptr;
  Json parts = Json::array();
  for (const UnicodeForm form : spec.normalizers)
    parts.push_back({{"type", kNames[static_cast<std::size_t>(form)]}});
  if (parts.size() == 1) return parts[0];
  return {{"type", "Sequence"}, {"normalizers", parts}};
}

// ByteLevel comes last: it spells the bytes, after which patterns would see other characters.
Json pre_tokenizer_json(const TokenizerSpec& spec) {
  constexpr const char* kBehaviors[] = {"Isolated", "Removed", "MergedWithPrevious", "MergedWithNext",
                                        "Contiguous"};
  Json parts = Json::array();
  bool prefix_space = false;
  for (const SplitRule& rule : spec.splits) {
    prefix_space = prefix_space || rule.add_prefix_space;
    if (rule.pattern.empty()) continue;
    parts.push_back({{"type", "Split"},
                     {"pattern", {{"Regex", rule.pattern}}},
                     {"behavior", kBehaviors[static_cast<std::size_t>(rule.behavior)]},
                     {"invert", rule.invert}});
  }
  parts.push_back({{"type", "ByteLevel"},
                   {"add_prefix_space", prefix_space},
                   {"trim_offsets", true},
                   {"use_regex", false}});
  return {{"type", "Sequence"}, {"pretokenizers", parts}};
}

Json post_processor_json(const TokenizerSpec& spec) {
  const Json byte_level = {
      {"type", "ByteLevel"}, {"add_prefix_space", true}, {"trim_offsets", false}, {"use_regex", true}};
  if (spec.prefix_ids.empty() && spec.suffix_ids.empty()) return byte_level;
  Json tokens = Json::object();
  const auto entries = [&](const std::vector<TokenId>& ids) {
    Json list = Json::array();
    for (const TokenId id : ids) {
      const std::string& text = spec.vocabulary[static_cast<std::size_t>(id)];
      tokens[text] = {{"id", text}, {"ids", {id}}, {"tokens", {text}}};
      list.push_back({{"SpecialToken", {{"id", text}, {"type_id", 0}}}});
    }
    return list;
  };
  const Json prefix = entries(spec.prefix_ids), suffix = entries(spec.suffix_ids);
  const auto around = [&](const char* name, Json& out) {
    out.insert(out.end(), prefix.begin(), prefix.end());
    out.push_back({{"Sequence", {{"id", name}, {"type_id", 0}}}});
    out.insert(out.end(), suffix.begin(), suffix.end());
  };
  Json single = Json::array(), pair = Json::array();
  around("A", single);
  around("A", pair);
  around("B", pair);
  const Json processor = {
      {"type", "TemplateProcessing"}, {"single", single}, {"pair", pair}, {"special_tokens", tokens}};
  return {{"type", "Sequence"}, {"processors", {byte_level, processor}}};
}

Json model_json(const TokenizerSpec& spec) {
  Json vocabulary = Json::object();
  // ordered_json searches linearly on operator[]; its storage is a plain vector of pairs.
  auto& entries = vocabulary.get_ref<Json::object_t&>();
  for (std::size_t id = 0; id < spec.vocabulary.size(); ++id) {
    if (!spec.vocabulary[id].empty()) entries.emplace_back(spec.vocabulary[id], id);
  }
  Json merges = Json::array();
  for (const auto& [left, right] : spec.merges) merges.push_back(concat(left, " ", right));
  return {{"type", "BPE"},
          {"dropout", nullptr},
          {"unk_token", spec.unk_token ? Json(*spec.unk_token) : Json(nullptr)},
          {"continuing_subword_prefix", nullptr},
          {"end_of_word_suffix", nullptr},
          {"fuse_unk", spec.fuse_unk},
          {"byte_fallback", false},
          {"ignore_merges", spec.ignore_merges},
          {"vocab", std::move(vocabulary)},
          {"merges", std::move(merges)}};
}

}  // namespace

std::string to_tokenizer_json(const TokenizerSpec& spec) {
  Json root;
  root["version"] = "1.0";
  root["truncation"] = nullptr;
  root["padding"] = nullptr;
  root["added_tokens"] = Json::array();
  for (const AddedToken& token : spec.added) root["added_tokens"].push_back(added_json(token));
  root["normalizer"] = normalizer_json(spec);
  root["pre_tokenizer"] = pre_tokenizer_json(spec);
  root["post_processor"] = post_processor_json(spec);
  root["decoder"] = {
      {"type", "ByteLevel"}, {"add_prefix_space", true}, {"trim_offsets", true}, {"use_regex", true}};
  root["model"] = model_json(spec);
  return root.dump() + "\n";
}

std::string to_tokenizer_config_json(const TokenizerSpec& spec, std::int64_t max_positions) {
  const auto optional = [](const std::optional<std::string>& text) {
    return text ? Json(*text) : Json(nullptr);
  };
  Json root;
  root["tokenizer_class"] = "PreTrainedTokenizerFast";
  root["bos_token"] = optional(spec.bos_token);
  root["eos_token"] = optional(spec.eos_token);
  root["pad_token"] = optional(spec.pad_token);
  root["clean_up_tokenization_spaces"] = false;
  root["model_max_length"] = max_positions;
  if (spec.chat_template) root["chat_template"] = *spec.chat_template;
  return root.dump(2) + "\n";
}

}  // namespace rlhf
