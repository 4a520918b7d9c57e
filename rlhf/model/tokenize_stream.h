#pragma once

#include <cstdint>
#include <iosfwd>
#include <string>

#include "rlhf/model/chat_template.h"
#include "rlhf/model/tokenizer.h"

namespace rlhf {

struct TokenizeOptions {
  EncodeOptions encode;
  /// For lines with `messages`.
  ContentTokens content_tokens = ContentTokens::kParsed;
  /// Names the input in messages.
  std::string source = "input";
};

struct TokenizeSummary {
  std::int64_t lines = 0;
  std::int64_t tokens = 0;
  /// Bytes without a token, see Encoding::dropped_bytes.
  std::int64_t dropped_bytes = 0;
};

/// Reads JSONL and writes one JSON object a line. A line holds `text`, or `messages` with the optional keys
/// `add_generation_prompt`, `tools`, `documents` and `variables`. The result holds `input_ids`, `text` (as
/// given or as rendered), `decoded` (the ids as text again) and, when some bytes had no token,
/// `dropped_bytes`. Empty lines are skipped.
/// @throws IoError naming source and line number: malformed JSON, an unknown key, neither or both of text and
/// messages, a template that raised, or an output that cannot be written. Lines before it have been written.
TokenizeSummary tokenize_jsonl(std::istream& in, std::ostream& out, const Tokenizer& tokenizer,
                               const ChatTemplate& chat_template, const TokenizeOptions& options = {});

}  // namespace rlhf
