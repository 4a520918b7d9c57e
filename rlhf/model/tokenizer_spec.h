#pragma once

#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "rlhf/core/ids.h"
#include "rlhf/model/gguf.h"

namespace rlhf {

/// A token that is found in the text before anything else happens to it.
struct AddedToken {
  TokenId id = 0;
  std::string text;
  /// Left out by decode with skip_special; matched only when EncodeOptions::parse_special.
  bool special = false;
  /// Matches only between non-word characters.
  bool single_word = false;
  /// Swallow white space on that side.
  bool lstrip = false, rstrip = false;
  /// Searched in the normalised text instead of the original.
  bool normalized = false;
};

enum class UnicodeForm { kNfc, kNfd, kNfkc, kNfkd };

/// What happens to the matches of a split pattern (tokenizers' SplitDelimiterBehavior).
enum class SplitBehavior { kIsolated, kRemoved, kMergedWithPrevious, kMergedWithNext, kContiguous };

/// One splitting step before byte-pair encoding.
struct SplitRule {
  std::string pattern;
  SplitBehavior behavior = SplitBehavior::kIsolated;
  /// The pattern describes the pieces, not the delimiters.
  bool invert = false;
  /// ByteLevel(add_prefix_space): each piece gets a leading space before this split.
  bool add_prefix_space = false;
};

/// Everything that defines a byte-level BPE tokenizer, independent of the file it came from.
struct TokenizerSpec {
  /// id -> token as the vocabulary spells it; an unused id has an empty text.
  std::vector<std::string> vocabulary;
  std::vector<std::pair<std::string, std::string>> merges;
  /// A pre-token that is itself in the vocabulary is not merged from its bytes.
  bool ignore_merges = false;
  std::optional<std::string> unk_token;
  bool fuse_unk = false;
  std::vector<AddedToken> added;
  std::vector<UnicodeForm> normalizers;
  std::vector<SplitRule> splits;
  /// What add_special_tokens puts around a text.
  std::vector<TokenId> prefix_ids, suffix_ids;
  std::optional<std::string> bos_token, eos_token, pad_token;
  std::optional<std::string> chat_template;
  /// Folder of tokenizer.json, when it came from one.
  std::optional<std::filesystem::path> folder;
  /// The file, for messages.
  std::string source;
};

/// GPT-2's split pattern, which ByteLevel(use_regex) applies.
extern const char* const kGpt2Pattern;

/// @throws IoError naming file, key and value for anything that is not byte-level BPE with the supported
/// parts.
TokenizerSpec read_tokenizer_json(const std::filesystem::path& file);
/// Reads tokenizer.ggml.*: model gpt2 with pre types gpt-2, smollm, llama-bpe, qwen2 and their synonyms.
TokenizerSpec read_gguf_tokenizer(const GgufFile& file);

/// tokenizer.json and tokenizer_config.json texts that describe `spec` to the tokenizers and transformers
/// packages.
std::string to_tokenizer_json(const TokenizerSpec& spec);
std::string to_tokenizer_config_json(const TokenizerSpec& spec, std::int64_t max_positions);

}  // namespace rlhf
