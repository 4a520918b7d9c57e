#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace rlhf::jinja {

struct Token {
  enum class Kind {
    kData,
    kVariableBegin,
    kVariableEnd,
    kBlockBegin,
    kBlockEnd,
    kName,
    kString,
    kInteger,
    kFloat,
    kOperator,
    kEnd
  };
  Kind kind = Kind::kEnd;
  /// Template text, name, operator, or the value of a string literal.
  std::string text;
  std::int64_t integer = 0;
  double number = 0;
  int line = 1;
};

/// Cuts a template into tokens with trim_blocks and lstrip_blocks on and keep_trailing_newline off, the way
/// transformers sets up jinja2. Comments are left out.
/// @throws TemplateError with the line.
std::vector<Token> tokenize(std::string_view source);

}  // namespace rlhf::jinja
