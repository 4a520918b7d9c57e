#include "rlhf/model/added_tokens.h"

#include <utf8proc.h>

#include <algorithm>

#include "rlhf/model/utf8.h"

namespace rlhf {
namespace {

// \w of Rust's regex package: letters, marks, decimal digits, connectors, joiners.
bool is_word(char32_t code_point) {
  if (code_point == 0x200C || code_point == 0x200D) return true;
  switch (utf8proc_category(static_cast<utf8proc_int32_t>(code_point))) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC:
      return true;
    default:
      return false;
  }
}

// Start of the last character of a non-empty text.
std::size_t last_character(std::string_view text) {
  std::size_t start = text.size() - 1;
  while (start > 0 && (static_cast<unsigned char>(text[start]) & 0xC0) == 0x80) --start;
  return start;
}

bool ends_with_word(std::string_view text) {
  return !text.empty() && is_word(utf8::decode(text.substr(last_character(text))).code_point);
}

bool starts_with_word(std::string_view text) {
  return !text.empty() && is_word(utf8::decode(text).code_point);
}

std::size_t trailing_space_begin(std::string_view text) {
  while (!text.empty()) {
    const std::size_t start = last_character(text);
    if (!utf8::is_white_space(utf8::decode(text.substr(start)).code_point)) break;
    text = text.substr(0, start);
  }
  return text.size();
}

std::size_t leading_space_bytes(std::string_view text) {
  std::size_t size = 0;
  while (size < text.size()) {
    const utf8::Decoded next = utf8::decode(text.substr(size));
    if (!utf8::is_white_space(next.code_point)) break;
    size += next.size;
  }
  return size;
}

bool contains_offset(std::span<const std::size_t> sorted, std::size_t begin, std::size_t end) {
  const auto first = std::upper_bound(sorted.begin(), sorted.end(), begin);
  return first != sorted.end() && *first < end;
}

}  // namespace

AddedTokenFinder::AddedTokenFinder(std::vector<AddedToken> tokens) : tokens_(std::move(tokens)), nodes_(1) {
  for (std::size_t i = 0; i < tokens_.size(); ++i) {
    if (tokens_[i].text.empty()) continue;
    std::uint32_t node = 0;
    for (const char c : tokens_[i].text) {
      const auto byte = static_cast<unsigned char>(c);
      const auto [child, inserted] =
          nodes_[node].children.emplace(byte, static_cast<std::uint32_t>(nodes_.size()));
      node = child->second;
      if (inserted) nodes_.emplace_back();
    }
    nodes_[node].token = static_cast<std::int32_t>(i);
    first_bytes_[static_cast<unsigned char>(tokens_[i].text[0])] = true;
  }
}

std::int32_t AddedTokenFinder::longest_match(std::string_view text) const {
  std::int32_t best = -1;
  std::uint32_t node = 0;
  for (const char byte : text) {
    const auto child = nodes_[node].children.find(static_cast<unsigned char>(byte));
    if (child == nodes_[node].children.end()) break;
    node = child->second;
    if (nodes_[node].token >= 0) best = nodes_[node].token;
  }
  return best;
}

std::vector<TextPart> AddedTokenFinder::split(std::string_view text, const Rules& rules) const {
  std::vector<TextPart> parts;
  std::size_t plain_from = 0;
  for (std::size_t position = 0; position < text.size();) {
    const bool possible = first_bytes_[static_cast<unsigned char>(text[position])];
    const std::int32_t match = possible ? longest_match(text.substr(position)) : -1;
    if (match < 0) {
      ++position;
      continue;
    }
    const AddedToken& token = tokens_[static_cast<std::size_t>(match)];
    std::size_t begin = position, end = position + token.text.size();
    // A match that is turned down still consumes its text.
    position = end;
    if (token.special && !rules.match_special) continue;
    if (token.special && contains_offset(rules.literal_offsets, begin, end)) {
      // Literal text is a part of its own, so that it is encoded alike whatever stands around it.
      if (begin > plain_from) parts.push_back({plain_from, begin, -1});
      parts.push_back({begin, end, -1});
      plain_from = end;
      continue;
    }
    if (token.single_word && (ends_with_word(text.substr(0, begin)) || starts_with_word(text.substr(end))))
      continue;
    if (token.lstrip) begin = std::max(trailing_space_begin(text.substr(0, begin)), plain_from);
    if (token.rstrip) end += leading_space_bytes(text.substr(end));
    if (begin < plain_from) continue;
    if (begin > plain_from) parts.push_back({plain_from, begin, -1});
    parts.push_back({begin, end, token.id});
    plain_from = end;
    position = std::max(position, end);
  }
  if (plain_from < text.size()) parts.push_back({plain_from, text.size(), -1});
  return parts;
}

}  // namespace rlhf
