#include "rlhf/model/regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <array>

#include "rlhf/core/error.h"

namespace rlhf {
namespace {

// PCRE2's \s also takes U+180E, which left White_Space in Unicode 6.3 and which Oniguruma does not take.
constexpr std::string_view kWhiteSpace =
    "\\x09-\\x0D\\x20\\x85\\xA0\\x{1680}\\x{2000}-\\x{200A}\\x{2028}\\x{2029}\\x{202F}\\x{205F}\\x{3000}";
constexpr std::uint32_t kMatchLimit = 50'000'000;

std::string spell_out_white_space(std::string_view pattern) {
  std::string out;
  bool in_class = false;
  for (std::size_t i = 0; i < pattern.size(); ++i) {
    const char c = pattern[i];
    if (c == '\\' && i + 1 < pattern.size()) {
      const char escaped = pattern[++i];
      if (escaped == 's') {
        out += in_class ? std::string(kWhiteSpace) : concat("[", kWhiteSpace, "]");
      } else if (escaped == 'S' && !in_class) {
        out += concat("[^", kWhiteSpace, "]");
      } else {
        out += {c, escaped};
      }
      continue;
    }
    if (c == '[') in_class = true;
    if (c == ']') in_class = false;
    out += c;
  }
  return out;
}

std::string error_text(int code) {
  std::array<PCRE2_UCHAR, 256> buffer{};
  pcre2_get_error_message(code, buffer.data(), buffer.size());
  return reinterpret_cast<const char*>(buffer.data());
}

struct CodeDeleter {
  void operator()(pcre2_code* code) const { pcre2_code_free(code); }
};
struct ContextDeleter {
  void operator()(pcre2_match_context* context) const { pcre2_match_context_free(context); }
};
struct MatchDeleter {
  void operator()(pcre2_match_data* data) const { pcre2_match_data_free(data); }
};

}  // namespace

struct Regex::Impl {
  std::unique_ptr<pcre2_code, CodeDeleter> code;
  std::unique_ptr<pcre2_match_context, ContextDeleter> context;
  std::string description;

  int match(std::string_view text, std::size_t start, pcre2_match_data* data) const {
    const auto subject = reinterpret_cast<PCRE2_SPTR>(text.data());
    int count = pcre2_match(code.get(), subject, text.size(), start, PCRE2_NO_UTF_CHECK, data, context.get());
    // The interpreter keeps its state on the heap: slower, but long runs of one kind fit.
    if (count == PCRE2_ERROR_JIT_STACKLIMIT) {
      count = pcre2_match(code.get(), subject, text.size(), start, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, data,
                          context.get());
    }
    if (count < 0 && count != PCRE2_ERROR_NOMATCH) {
      fail<IoError>(description, ": offset ", start, " of a text of ", text.size(),
                    " bytes: ", error_text(count));
    }
    return count;
  }
};

Regex::Regex(const std::string& pattern, const std::string& source) : impl_(std::make_unique<Impl>()) {
  impl_->description = concat(source, ": pattern ", pattern);
  const std::string translated = spell_out_white_space(pattern);
  int error = 0;
  PCRE2_SIZE offset = 0;
  impl_->code.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(),
                                  PCRE2_UTF | PCRE2_UCP, &error, &offset, nullptr));
  if (!impl_->code) fail<IoError>(impl_->description, ": ", error_text(error));
  impl_->context.reset(pcre2_match_context_create(nullptr));
  if (!impl_->context) fail<IoError>(impl_->description, ": out of memory");
  pcre2_set_match_limit(impl_->context.get(), kMatchLimit);
  // Machines without JIT support get the interpreter; results are the same.
  pcre2_jit_compile(impl_->code.get(), PCRE2_JIT_COMPLETE);
}

Regex::~Regex() = default;
Regex::Regex(Regex&&) noexcept = default;
Regex& Regex::operator=(Regex&&) noexcept = default;

std::vector<std::pair<std::size_t, std::size_t>> Regex::find_all(std::string_view text) const {
  std::vector<std::pair<std::size_t, std::size_t>> matches;
  const std::unique_ptr<pcre2_match_data, MatchDeleter> data(
      pcre2_match_data_create_from_pattern(impl_->code.get(), nullptr));
  if (!data) fail<IoError>(impl_->description, ": out of memory");
  const PCRE2_SIZE* bounds = pcre2_get_ovector_pointer(data.get());
  for (std::size_t start = 0; start < text.size();) {
    if (impl_->match(text, start, data.get()) < 0) break;
    if (bounds[1] > bounds[0]) {
      matches.emplace_back(bounds[0], bounds[1]);
      start = bounds[1];
      continue;
    }
    // Step over an empty match by one character.
    start = bounds[1] + 1;
    while (start < text.size() && (static_cast<unsigned char>(text[start]) & 0xC0) == 0x80) ++start;
  }
  return matches;
}

}  // namespace rlhf
