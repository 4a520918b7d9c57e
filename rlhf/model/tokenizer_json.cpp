#include <algorithm>
#include <array>
#include <limits>
#include <nlohmann/json.hpp>

#include "rlhf/core/error.h"
#include "rlhf/model/json_file.h"
#include "rlhf/model/tokenizer_spec.h"

namespace rlhf {

const char* const kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

namespace {

using nlohmann::json;

constexpr std::int64_t kMaxId = 1 << 24;

template <typename T, std::size_t N>
T read_choice(const JsonFields& fields, std::string_view key,
              const std::array<std::pair<std::string_view, T>, N>& choices,
              std::optional<T> fallback = std::nullopt) {
  if (!fields.find(key) && fallback) return *fallback;
  const std::string name = fields.text(key, std::nullopt);
  std::string known;
  for (const auto& [choice, value] : choices) {
    if (choice == name) return value;
    known += concat(known.empty() ? "" : ", ", choice);
  }
  fields.reject(key, concat("one of ", known));
}

std::string escape_pattern(std::string_view literal) {
  std::string out;
  for (const char c : literal) {
    if (std::string_view("\\^$.|?*+()[]{}#-").find(c) != std::string_view::npos) out += '\\';
    out += c;
  }
  return out;
}

void read_normalizer(const json& value, TokenizerSpec& spec) {
  const JsonFields fields(value, spec.source, "normalizer.");
  if (fields.text("type", std::nullopt) == "Sequence") {
    const auto* parts = fields.find("normalizers");
    if (!parts || !parts->is_array()) fields.reject("normalizers", "a list");
    for (const json& part : *parts) read_normalizer(part, spec);
    return;
  }
  constexpr std::array<std::pair<std::string_view, UnicodeForm>, 4> kForms{{{"NFC", UnicodeForm::kNfc},
                                                                            {"NFD", UnicodeForm::kNfd},
                                                                            {"NFKC", UnicodeForm::kNfkc},
                                                                            {"NFKD", UnicodeForm::kNfkd}}};
  spec.normalizers.push_back(read_choice(fields, "type", kForms));
}

SplitRule read_split(const JsonFields& fields) {
  constexpr std::array<std::pair<std::string_view, SplitBehavior>, 5> kBehaviors{
      {{"Isolated", SplitBehavior::kIsolated},
       {"Removed", SplitBehavior::kRemoved},
       {"MergedWithPrevious", SplitBehavior::kMergedWithPrevious},
       {"MergedWithNext", SplitBehavior::kMergedWithNext},
       {"Contiguous", SplitBehavior::kContiguous}}};
  const auto* pattern = fields.find("pattern");
  if (!pattern) fields.reject("pattern", "{\"Regex\": ...} or {\"String\": ...}");
  const JsonFields pattern_fields(*pattern, fields.source(), "pre_tokenizer.pattern.");
  SplitRule rule;
  if (pattern_fields.find("String")) {
    rule.pattern = escape_pattern(pattern_fields.text("String", std::nullopt));
  } else {
    rule.pattern = pattern_fields.text("Regex", std::nullopt);
  }
  if (rule.pattern.empty()) fields.reject("pattern", "a pattern that is not empty");
  rule.behavior = read_choice(fields, "behavior", kBehaviors);
  rule.invert = fields.flag("invert", false);
  return rule;
}

// Returns whether a ByteLevel step was found, without which the vocabulary is no byte-level one.
bool read_pre_tokenizer(const json& value, TokenizerSpec& spec) {
  const JsonFields fields(value, spec.source, "pre_tokenizer.");
  const std::string type = fields.text("type", std::nullopt);
  if (type == "Sequence") {
    const auto* parts = fields.find("pretokenizers");
    if (!parts || !parts->is_array()) fields.reject("pretokenizers", "a list");
    bool byte_level = false;
    for (const json& part : *parts) byte_level = read_pre_tokenizer(part, spec) || byte_level;
    return byte_level;
  }
  if (type == "Split") {
    spec.splits.push_back(read_split(fields));
    return false;
  }
  if (type == "Digits") {
    const bool single = fields.flag("individual_digits", false);
    spec.splits.push_back(
        {R"(\p{N})", single ? SplitBehavior::kIsolated : SplitBehavior::kContiguous, false, false});
    return false;
  }
  if (type != "ByteLevel") fields.reject("type", "Sequence, Split, Digits or ByteLevel (byte-level BPE)");
  SplitRule rule;
  if (fields.flag("use_regex", true)) rule.pattern = kGpt2Pattern;
  rule.add_prefix_space = fields.flag("add_prefix_space", true);
  if (!rule.pattern.empty() || rule.add_prefix_space) spec.splits.push_back(rule);
  return true;
}

void place_token(TokenizerSpec& spec, std::int64_t id, const std::string& token) {
  if (static_cast<std::size_t>(id) >= spec.vocabulary.size())
    spec.vocabulary.resize(static_cast<std::size_t>(id) + 1);
  std::string& place = spec.vocabulary[static_cast<std::size_t>(id)];
  if (!place.empty() && place != token) {
    fail<IoError>(spec.source, ": id ", id, ": is given to both ", place, " and ", token);
  }
  place = token;
}

void read_vocabulary(const JsonFields& model, TokenizerSpec& spec) {
  const auto* vocabulary = model.find("vocab");
  if (!vocabulary || !vocabulary->is_object() || vocabulary->empty())
    model.reject("vocab", "an object {token: id}");
  // Ids may have holes, but hardly more holes than tokens: a single huge id must not cost memory.
  const auto limit =
      static_cast<std::int64_t>(std::min<std::size_t>(kMaxId, 16 * vocabulary->size() + 65536));
  for (const auto& [token, id] : vocabulary->items()) {
    if (!id.is_number_unsigned() || id.get<std::uint64_t>() >= static_cast<std::uint64_t>(limit)) {
      fail<IoError>(spec.source, ": model.vocab.", token, ": ", id.dump(), ": expected an id below ", limit);
    }
    if (token.empty()) fail<IoError>(spec.source, ": model.vocab: an empty token");
    place_token(spec, id.get<std::int64_t>(), token);
  }
}

void read_merges(const JsonFields& model, TokenizerSpec& spec) {
  const auto* merges = model.find("merges");
  if (!merges || !merges->is_array()) model.reject("merges", "a list");
  spec.merges.reserve(merges->size());
  for (const json& merge : *merges) {
    if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
      spec.merges.emplace_back(merge[0].get<std::string>(), merge[1].get<std::string>());
      continue;
    }
    const std::string text = merge.is_string() ? merge.get<std::string>() : "";
    const std::size_t space = text.find(' ');
    if (space == std::string::npos) {
      fail<IoError>(spec.source, ": model.merges: ", merge.dump(),
                    ": expected \"left right\" or [left, right]");
    }
    spec.merges.emplace_back(text.substr(0, space), text.substr(space + 1));
  }
}

void read_model(const json& value, TokenizerSpec& spec) {
  const JsonFields model(value, spec.source, "model.");
  // Files of old versions leave the type out.
  if (model.text("type", "BPE") != "BPE") model.reject("type", "BPE");
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (!model.text(key, "").empty()) model.reject(key, "null or empty");
  }
  if (model.flag("byte_fallback", false)) model.reject("byte_fallback", "false (byte-level BPE)");
  if (model.number("dropout", 0.0, 0, 1) != 0) model.reject("dropout", "null or 0");
  spec.ignore_merges = model.flag("ignore_merges", false);
  spec.fuse_unk = model.flag("fuse_unk", false);
  if (model.find("unk_token")) spec.unk_token = model.text("unk_token", std::nullopt);
  read_vocabulary(model, spec);
  read_merges(model, spec);
}

void read_added_tokens(const JsonFields& root, TokenizerSpec& spec) {
  const auto* list = root.find("added_tokens");
  if (!list) return;
  if (!list->is_array()) root.reject("added_tokens", "a list");
  const auto limit = static_cast<std::int64_t>(spec.vocabulary.size() + list->size() + 65536);
  for (const json& entry : *list) {
    const JsonFields fields(entry, spec.source, "added_tokens.");
    AddedToken token;
    token.id = static_cast<TokenId>(fields.integer("id", std::nullopt, 0, limit));
    token.text = fields.text("content", std::nullopt);
    token.special = fields.flag("special", false);
    token.single_word = fields.flag("single_word", false);
    token.lstrip = fields.flag("lstrip", false);
    token.rstrip = fields.flag("rstrip", false);
    token.normalized = fields.flag("normalized", !token.special);
    if (token.text.empty()) fields.reject("content", "a text that is not empty");
    place_token(spec, token.id, token.text);
    spec.added.push_back(std::move(token));
  }
}

std::vector<TokenId> special_ids(const json& templates, const std::string& name, const TokenizerSpec& spec) {
  const auto entry = templates.find(name);
  if (entry == templates.end() || !entry->is_object() || !entry->contains("ids") ||
      !(*entry)["ids"].is_array()) {
    fail<IoError>(spec.source, ": post_processor.special_tokens.", name, ".ids: expected a list");
  }
  std::vector<TokenId> ids;
  for (const json& id : (*entry)["ids"]) {
    if (!id.is_number_unsigned() || id.get<std::uint64_t>() >= spec.vocabulary.size()) {
      fail<IoError>(spec.source, ": post_processor.special_tokens.", name, ".ids: ", id.dump(),
                    ": expected an id of the vocabulary");
    }
    ids.push_back(id.get<TokenId>());
  }
  return ids;
}

void read_template(const JsonFields& fields, TokenizerSpec& spec) {
  const auto* single = fields.find("single");
  const auto* tokens = fields.find("special_tokens");
  if (!single || !single->is_array()) fields.reject("single", "a list");
  if (!tokens || !tokens->is_object()) fields.reject("special_tokens", "an object");
  bool after_text = false;
  for (const json& part : *single) {
    if (part.is_object() && part.contains("Sequence")) {
      after_text = true;
      continue;
    }
    if (!part.is_object() || !part.contains("SpecialToken"))
      fields.reject("single", "SpecialToken and Sequence entries");
    const JsonFields token(part["SpecialToken"], spec.source, "post_processor.single.SpecialToken.");
    const auto ids = special_ids(*tokens, token.text("id", std::nullopt), spec);
    auto& target = after_text ? spec.suffix_ids : spec.prefix_ids;
    target.insert(target.end(), ids.begin(), ids.end());
  }
}

void read_post_processor(const json& value, TokenizerSpec& spec) {
  const JsonFields fields(value, spec.source, "post_processor.");
  const std::string type = fields.text("type", std::nullopt);
  if (type == "Sequence") {
    const auto* parts = fields.find("processors");
    if (!parts || !parts->is_array()) fields.reject("processors", "a list");
    for (const json& part : *parts) read_post_processor(part, spec);
  } else if (type == "TemplateProcessing") {
    read_template(fields, spec);
  } else if (type != "ByteLevel") {  // ByteLevel only changes offsets
    fields.reject("type", "Sequence, TemplateProcessing or ByteLevel");
  }
}

// A token of tokenizer_config.json: its text, or an object with the text under "content".
std::optional<std::string> read_token_name(const JsonFields& fields, std::string_view key) {
  const auto* value = fields.find(key);
  if (!value) return std::nullopt;
  if (value->is_object() && value->contains("content") && (*value)["content"].is_string()) {
    return (*value)["content"].get<std::string>();
  }
  return fields.text(key, std::nullopt);
}

std::optional<std::string> read_template_text(const JsonFields& fields) {
  const auto* value = fields.find("chat_template");
  if (!value) return std::nullopt;
  if (!value->is_array()) return fields.text("chat_template", std::nullopt);
  for (const json& entry : *value) {
    const JsonFields named(entry, fields.source(), "chat_template.");
    if (named.text("name", std::nullopt) == "default") return named.text("template", std::nullopt);
  }
  return std::nullopt;
}

void read_tokenizer_config(const std::filesystem::path& folder, TokenizerSpec& spec) {
  for (const char* name : {"special_tokens_map.json", "tokenizer_config.json"}) {
    const auto path = folder / name;
    if (!std::filesystem::exists(path)) continue;
    const json value = read_json_file(path);
    const JsonFields fields(value, path.string());
    if (auto token = read_token_name(fields, "bos_token")) spec.bos_token = token;
    if (auto token = read_token_name(fields, "eos_token")) spec.eos_token = token;
    if (auto token = read_token_name(fields, "pad_token")) spec.pad_token = token;
    if (auto text = read_template_text(fields)) spec.chat_template = text;
  }
  const auto jinja = folder / "chat_template.jinja";
  if (std::filesystem::exists(jinja)) spec.chat_template = read_text_file(jinja);
}

}  // namespace

TokenizerSpec read_tokenizer_json(const std::filesystem::path& file) {
  TokenizerSpec spec;
  spec.source = file.string();
  const json root_value = read_json_file(file);
  const JsonFields root(root_value, spec.source);
  const auto* model = root.find("model");
  if (!model) root.reject("model", "an object");
  read_model(*model, spec);
  read_added_tokens(root, spec);
  if (const auto* normalizer = root.find("normalizer")) read_normalizer(*normalizer, spec);
  const auto* pre_tokenizer = root.find("pre_tokenizer");
  if (!pre_tokenizer || !read_pre_tokenizer(*pre_tokenizer, spec))
    root.reject("pre_tokenizer", "one that holds ByteLevel");
  if (const auto* processor = root.find("post_processor")) read_post_processor(*processor, spec);
  const auto folder = file.has_parent_path() ? file.parent_path() : std::filesystem::path(".");
  read_tokenizer_config(folder, spec);
  spec.folder = folder;
  return spec;
}

}  // namespace rlhf
