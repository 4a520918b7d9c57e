#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "rlhf/core/ids.h"
#include "rlhf/model/tokenizer_spec.h"

namespace rlhf {

struct EncodeOptions {
  /// Adds what the tokenizer's post-processor adds (such as a begin token). Texts from a chat template hold
  /// their own.
  bool add_special_tokens = false;
  /// Recognises special tokens that are written out in the text. Off: they are encoded as the plain text they
  /// are (what untrusted input needs). Added tokens that are not special are recognised always.
  bool parse_special = true;
  /// Byte offsets that no special token may contain (sorted ascending): marks text inside which special
  /// tokens are plain.
  std::span<const std::size_t> literal_offsets = {};
};

struct DecodeOptions {
  bool skip_special = false;
};

/// Ids of a text, and what could not be encoded.
struct Encoding {
  std::vector<TokenId> ids;
  /// Bytes that the vocabulary has no token for (see Tokenizer::missing_bytes). They are left out of `ids`,
  /// as the tokenizers package does.
  std::size_t dropped_bytes = 0;
};

/// Byte-level BPE tokenizer, equal to the tokenizers package id by id. Immutable apart from an internal word
/// cache; thread-safe; cheap to copy (copies share the tables).
class Tokenizer {
 public:
  /// Reads tokenizer.json (with tokenizer_config.json and chat_template.jinja beside it) from a Hugging Face
  /// directory or by its own path, or the tokenizer inside a GGUF file. A directory may also hold one GGUF
  /// file instead.
  /// @throws IoError naming file, key, value and what is supported.
  static Tokenizer load(const std::filesystem::path& directory_or_file);
  explicit Tokenizer(TokenizerSpec spec);

  /// @throws InvalidArgument when `text` is not UTF-8 (with the byte offset).
  std::vector<TokenId> encode(std::string_view text, const EncodeOptions& options = {}) const;
  /// encode() that also counts the bytes it had to leave out.
  Encoding encode_with_report(std::string_view text, const EncodeOptions& options = {}) const;

  /// The text of ids; ill-formed UTF-8 (a token sequence that ends inside a character) becomes U+FFFD.
  /// @throws InvalidArgument for an id outside the vocabulary.
  std::string decode(std::span<const TokenId> ids, const DecodeOptions& options = {}) const;

  /// Number of ids: the largest one plus 1. A model may have more embedding rows (padding) but not fewer.
  std::int64_t vocab_size() const;
  /// The token as the vocabulary spells it (a space is U+0120). @throws InvalidArgument
  const std::string& token_text(TokenId id) const;
  /// The bytes the token stands for. @throws InvalidArgument
  const std::string& token_bytes(TokenId id) const;
  /// The id of a token in the spelling of the vocabulary.
  std::optional<TokenId> find(std::string_view token) const;
  bool is_special(TokenId id) const;

  std::optional<TokenId> bos() const;
  std::optional<TokenId> eos() const;
  std::optional<TokenId> pad() const;
  /// Bytes that no token of the vocabulary stands for: text that holds them cannot be encoded faithfully.
  /// Worth a warning when a model is loaded. Only bytes that occur in UTF-8 are listed.
  const std::vector<std::uint8_t>& missing_bytes() const;
  const TokenizerSpec& spec() const;

  /// Writes tokenizer.json, tokenizer_config.json and chat_template.jinja for transformers: copies of the
  /// original files when the tokenizer came from a Hugging Face directory, generated ones otherwise.
  /// @param max_positions becomes model_max_length. @throws IoError.
  void save(const std::filesystem::path& directory, std::int64_t max_positions) const;

 private:
  struct Impl;
  std::shared_ptr<const Impl> impl_;
};

/// Decodes ids one at a time: the concatenation of all results and finish() equals Tokenizer::decode of all
/// ids. Bytes of an unfinished character are held back.
class StreamDecoder {
 public:
  explicit StreamDecoder(Tokenizer tokenizer, DecodeOptions options = {});
  /// The text that became complete with this id; often one word, sometimes nothing.
  std::string push(TokenId id);
  /// What was held back (as U+FFFD); the decoder is then ready for a new text.
  std::string finish();

 private:
  Tokenizer tokenizer_;
  DecodeOptions options_;
  std::string pending_;
};

}  // namespace rlhf
