#include "rlhf/model/pre_tokenizer.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "rlhf/core/error.h"

namespace rlhf {
namespace {

struct Piece {
  std::size_t begin;
  std::size_t end;
  bool delimiter;
};

std::vector<Piece> mark_matches(std::string_view text, const Regex& regex, bool invert) {
  std::vector<Piece> pieces;
  std::size_t position = 0;
  for (const auto& [begin, end] : regex.find_all(text)) {
    if (begin > position) pieces.push_back({position, begin, invert});
    pieces.push_back({begin, end, !invert});
    position = end;
  }
  if (position < text.size()) pieces.push_back({position, text.size(), invert});
  return pieces;
}

void join_pieces(std::vector<Piece>& pieces, SplitBehavior behavior) {
  std::vector<Piece> joined;
  bool merge_next = false;
  for (const Piece& piece : pieces) {
    const bool follows_delimiter = !joined.empty() && joined.back().delimiter;
    bool merge = false;
    switch (behavior) {
      case SplitBehavior::kMergedWithPrevious:
        merge = piece.delimiter && !joined.empty() && !follows_delimiter;
        break;
      case SplitBehavior::kMergedWithNext:
        merge = merge_next;
        merge_next = piece.delimiter;
        // Delimiters in a row: only the last one goes with the text.
        if (piece.delimiter) merge = false;
        break;
      case SplitBehavior::kContiguous:
        merge = !joined.empty() && follows_delimiter == piece.delimiter;
        break;
      default:
        break;
    }
    if (behavior == SplitBehavior::kRemoved && piece.delimiter) continue;
    if (merge) {
      joined.back().end = piece.end;
      // A text piece that took up a delimiter takes no second one.
      joined.back().delimiter = piece.delimiter;
    } else {
      joined.push_back(piece);
    }
  }
  pieces = std::move(joined);
}

bool is_ascii(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return static_cast<unsigned char>(c) < 0x80; });
}

}  // namespace

PreTokenizer::PreTokenizer(const TokenizerSpec& spec) {
  for (const SplitRule& rule : spec.splits) {
    Step& step = steps_.emplace_back();
    step.rule = rule;
    if (!rule.pattern.empty()) step.regex.emplace(rule.pattern, spec.source);
  }
}

std::vector<std::string_view> PreTokenizer::split(std::string_view text,
                                                  std::deque<std::string>& storage) const {
  std::vector<std::string_view> pieces{text};
  for (const Step& step : steps_) {
    std::vector<std::string_view> finer;
    for (std::string_view piece : pieces) {
      if (step.rule.add_prefix_space && !piece.starts_with(' '))
        piece = storage.emplace_back(1, ' ').append(piece);
      if (!step.regex) {
        finer.push_back(piece);
        continue;
      }
      auto parts = mark_matches(piece, *step.regex, step.rule.invert);
      if (step.rule.behavior != SplitBehavior::kIsolated) join_pieces(parts, step.rule.behavior);
      for (const Piece& part : parts) finer.push_back(piece.substr(part.begin, part.end - part.begin));
    }
    pieces = std::move(finer);
  }
  return pieces;
}

std::string normalize_unicode(std::string_view text, UnicodeForm form) {
  if (is_ascii(text)) return std::string(text);
  unsigned options = UTF8PROC_STABLE;
  options |= form == UnicodeForm::kNfc || form == UnicodeForm::kNfkc ? UTF8PROC_COMPOSE : UTF8PROC_DECOMPOSE;
  if (form == UnicodeForm::kNfkc || form == UnicodeForm::kNfkd) options |= UTF8PROC_COMPAT;
  utf8proc_uint8_t* raw = nullptr;
  const utf8proc_ssize_t size =
      utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                   static_cast<utf8proc_ssize_t>(text.size()), &raw, static_cast<utf8proc_option_t>(options));
  const std::unique_ptr<utf8proc_uint8_t, decltype(&std::free)> owner(raw, &std::free);
  RLHF_CHECK(size >= 0, "normalize_unicode: ", utf8proc_errmsg(size));
  return {reinterpret_cast<const char*>(raw), static_cast<std::size_t>(size)};
}

}  // namespace rlhf
