#include <algorithm>
#include <array>

#include "rlhf/core/error.h"
#include "rlhf/model/tokenizer_spec.h"

namespace rlhf {
namespace {

constexpr std::int64_t kControl = 3;      // tokenizer.ggml.token_type of special tokens
constexpr std::int64_t kUserDefined = 4;  // added, not special
constexpr std::int64_t kMaxType = 6;

constexpr const char* kDigit = R"(\p{N})";
constexpr const char* kLlama3Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kQwen2Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

enum class PreType { kGpt2, kSingleDigits, kLlama3, kQwen2 };

// The names under which llama.cpp's converter files these four ways of splitting.
constexpr std::array<std::pair<std::string_view, PreType>, 20> kPreTypes{{
    {"gpt-2", PreType::kGpt2},
    {"phi-2", PreType::kGpt2},
    {"jina-es", PreType::kGpt2},
    {"jina-de", PreType::kGpt2},
    {"smollm", PreType::kSingleDigits},
    {"starcoder", PreType::kSingleDigits},
    {"refact", PreType::kSingleDigits},
    {"command-r", PreType::kSingleDigits},
    {"codeshell", PreType::kSingleDigits},
    {"exaone", PreType::kSingleDigits},
    {"llama-bpe", PreType::kLlama3},
    {"llama3", PreType::kLlama3},
    {"llama-v3", PreType::kLlama3},
    {"smaug-bpe", PreType::kLlama3},
    {"dbrx", PreType::kLlama3},
    {"falcon3", PreType::kLlama3},
    {"qwen2", PreType::kQwen2},
    {"deepseek-r1-qwen", PreType::kQwen2},
    {"stablelm2", PreType::kQwen2},
    {"megrez", PreType::kQwen2},
}};

PreType read_pre_type(const GgufFile& file) {
  const std::string_view name = file.text("tokenizer.ggml.pre", "gpt-2");
  std::string known;
  for (const auto& [candidate, type] : kPreTypes) {
    if (candidate == name) return type;
    known += concat(known.empty() ? "" : ", ", candidate);
  }
  fail<IoError>(file.path().string(), ": metadata tokenizer.ggml.pre: ", name, ": expected one of ", known);
}

void set_splits(TokenizerSpec& spec, PreType type) {
  switch (type) {
    case PreType::kSingleDigits:
      spec.splits = {{kDigit, SplitBehavior::kIsolated, false, false},
                     {kGpt2Pattern, SplitBehavior::kIsolated, false, false}};
      break;
    case PreType::kLlama3:
      spec.splits = {{kLlama3Pattern, SplitBehavior::kIsolated, false, false}};
      spec.ignore_merges = true;
      break;
    case PreType::kQwen2:
      spec.splits = {{kQwen2Pattern, SplitBehavior::kIsolated, false, false}};
      spec.normalizers = {UnicodeForm::kNfc};
      break;
    case PreType::kGpt2:
      spec.splits = {{kGpt2Pattern, SplitBehavior::kIsolated, false, false}};
      break;
  }
}

void read_vocabulary(const GgufFile& file, TokenizerSpec& spec) {
  const auto tokens = file.strings("tokenizer.ggml.tokens");
  const auto types = file.integers("tokenizer.ggml.token_type");
  if (tokens.empty())
    fail<IoError>(spec.source, ": metadata tokenizer.ggml.tokens: missing: expected the vocabulary");
  if (!types.empty() && types.size() != tokens.size()) {
    fail<IoError>(spec.source, ": metadata tokenizer.ggml.token_type: has ", types.size(),
                  " entries: expected ", tokens.size());
  }
  for (std::size_t id = 0; id < tokens.size(); ++id) {
    spec.vocabulary.emplace_back(tokens[id]);
    const std::int64_t type = types.empty() ? 1 : types[id];
    if (type < 0 || type > kMaxType)
      fail<IoError>(spec.source, ": metadata tokenizer.ggml.token_type: ", type, ": expected 0 to ",
                    kMaxType);
    if (tokens[id].empty() || (type != kControl && type != kUserDefined)) continue;
    AddedToken token;
    token.id = static_cast<TokenId>(id);
    token.text = tokens[id];
    token.special = type == kControl;
    spec.added.push_back(std::move(token));
  }
}

void read_merges(const GgufFile& file, TokenizerSpec& spec) {
  for (const std::string_view merge : file.strings("tokenizer.ggml.merges")) {
    // The left part may begin with the separator itself only in vocabularies that are not byte-level.
    const std::size_t space = merge.find(' ', 1);
    if (space == std::string_view::npos || space + 1 == merge.size()) {
      fail<IoError>(spec.source, ": metadata tokenizer.ggml.merges: \"", merge,
                    "\": expected \"left right\"");
    }
    spec.merges.emplace_back(merge.substr(0, space), merge.substr(space + 1));
  }
}

std::optional<TokenId> read_id(const GgufFile& file, std::string_view key, const TokenizerSpec& spec) {
  if (!file.has(key)) return std::nullopt;
  return static_cast<TokenId>(
      file.integer(key, std::nullopt, 0, static_cast<std::int64_t>(spec.vocabulary.size()) - 1));
}

std::optional<std::string> read_token(const GgufFile& file, std::string_view key, const TokenizerSpec& spec) {
  const auto id = read_id(file, key, spec);
  return id ? std::optional(spec.vocabulary[static_cast<std::size_t>(*id)]) : std::nullopt;
}

}  // namespace

TokenizerSpec read_gguf_tokenizer(const GgufFile& file) {
  TokenizerSpec spec;
  spec.source = file.path().string();
  const std::string_view model = file.text("tokenizer.ggml.model", std::nullopt);
  if (model != "gpt2") {
    fail<IoError>(spec.source, ": metadata tokenizer.ggml.model: ", model,
                  ": expected gpt2 (byte-level BPE)");
  }
  const PreType type = read_pre_type(file);
  set_splits(spec, type);
  if (file.flag("tokenizer.ggml.add_space_prefix", false)) spec.splits.front().add_prefix_space = true;
  read_vocabulary(file, spec);
  read_merges(file, spec);
  spec.bos_token = read_token(file, "tokenizer.ggml.bos_token_id", spec);
  spec.eos_token = read_token(file, "tokenizer.ggml.eos_token_id", spec);
  spec.pad_token = read_token(file, "tokenizer.ggml.padding_token_id", spec);
  const auto bos = read_id(file, "tokenizer.ggml.bos_token_id", spec),
             eos = read_id(file, "tokenizer.ggml.eos_token_id", spec);
  if (bos && file.flag("tokenizer.ggml.add_bos_token", type == PreType::kLlama3)) spec.prefix_ids = {*bos};
  if (eos && file.flag("tokenizer.ggml.add_eos_token", false)) spec.suffix_ids = {*eos};
  if (file.has("tokenizer.chat_template"))
    spec.chat_template = file.text("tokenizer.chat_template", std::nullopt);
  return spec;
}

}  // namespace rlhf
