#define PCRE2_CODE_UNIT_WIDTH 8
#include "reward/rules/text_rules.h"

#include <pcre2.h>

#include <algorithm>
#include <cctype>
#include <charconv>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>
#include <utility>

#include "reward/rules/numbers.h"
#include "rlhf/core/error.h"

namespace rlhf {
namespace {

using nlohmann::json;

constexpr std::uint32_t kMaxMatchSteps = 1000000;

void append_answers(const Prompt& prompt, const json& value, std::vector<std::string>& out) {
  if (value.is_string()) {
    out.push_back(value.get<std::string>());
  } else if (value.is_number()) {
    out.push_back(value.dump());
  } else if (value.is_array() && !value.empty()) {
    for (const json& item : value) append_answers(prompt, item, out);
  } else {
    fail<InvalidArgument>("prompt ", prompt.id, ": the reference holds ", value.type_name(),
                          ", expected text, a number, or a list of these");
  }
}

std::map<std::string, int> count_words(const std::string& text) {
  std::map<std::string, int> counts;
  std::istringstream stream(text);
  for (std::string word; stream >> word;) {
    while (!word.empty() && std::string_view(".,;:!?\"'()").find(word.back()) != std::string_view::npos)
      word.pop_back();
    if (!word.empty()) ++counts[word];
  }
  return counts;
}

}  // namespace

std::vector<std::string> gold_answers(const Prompt& prompt) {
  RLHF_CHECK(!prompt.reference.empty(), "prompt ", prompt.id, ": no reference, but its reward needs one");
  json reference = json::parse(prompt.reference, nullptr, false);
  RLHF_CHECK(!reference.is_discarded(), "prompt ", prompt.id,
             ": the reference is not JSON: ", prompt.reference);
  if (reference.is_object()) {
    for (const char* key : {"answer", "label", "value"}) {
      if (!reference.contains(key)) continue;
      reference = json(reference[key]);
      break;
    }
  }
  std::vector<std::string> out;
  append_answers(prompt, reference, out);
  return out;
}

std::string normalise_answer(std::string_view text) {
  std::string out;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (std::isspace(byte)) {
      if (!out.empty() && out.back() != ' ') out += ' ';
    } else {
      out += static_cast<char>(byte < 0x80 ? std::tolower(byte) : byte);
    }
  }
  while (!out.empty() && (out.back() == ' ' || out.back() == '.')) out.pop_back();
  return out;
}

double word_f1(std::string_view answer, std::string_view gold) {
  const auto answer_words = count_words(normalise_answer(answer)),
             gold_words = count_words(normalise_answer(gold));
  int common = 0, num_answer = 0, num_gold = 0;
  for (const auto& [word, count] : answer_words) {
    num_answer += count;
    const auto found = gold_words.find(word);
    if (found != gold_words.end()) common += std::min(count, found->second);
  }
  for (const auto& [word, count] : gold_words) num_gold += count;
  if (num_answer + num_gold == 0) return 1;
  return 2.0 * common / (num_answer + num_gold);
}

double ExactMatch::score(const ScoredSample& scored) const {
  const std::string answer = normalise_answer(scored.text);
  for (const std::string& gold : gold_answers(scored.prompt)) {
    if (answer == normalise_answer(gold)) return 1;
  }
  return 0;
}

double F1Match::score(const ScoredSample& scored) const {
  double best = 0;
  for (const std::string& gold : gold_answers(scored.prompt))
    best = std::max(best, word_f1(scored.text, gold));
  return best;
}

double NumberMatch::score(const ScoredSample& scored) const {
  const std::vector<double> numbers = find_numbers(scored.text);
  bool has_gold = false;
  for (const std::string& gold : gold_answers(scored.prompt)) {
    const std::vector<double> gold_numbers = find_numbers(gold);
    if (gold_numbers.empty()) continue;
    has_gold = true;
    if (!numbers.empty() &&
        is_close(numbers.back(), gold_numbers.back(), tolerance_.relative, tolerance_.absolute)) {
      return 1;
    }
  }
  RLHF_CHECK(has_gold, "prompt ", scored.prompt.id,
             ": the reference holds no number: ", scored.prompt.reference);
  return 0;
}

struct RegexMatch::Impl {
  pcre2_code* code = nullptr;
  pcre2_match_context* context = nullptr;
  ~Impl() {
    pcre2_match_context_free(context);
    pcre2_code_free(code);
  }
};

RegexMatch::RegexMatch(const std::string& pattern) : impl_(std::make_unique<Impl>()) {
  int error = 0;
  PCRE2_SIZE offset = 0;
  impl_->code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                              PCRE2_UTF | PCRE2_UCP, &error, &offset, nullptr);
  if (!impl_->code) {
    PCRE2_UCHAR message[256];
    pcre2_get_error_message(error, message, sizeof message);
    fail<ConfigError>("regular expression ", pattern, ": ", reinterpret_cast<const char*>(message),
                      " at offset ", offset);
  }
  impl_->context = pcre2_match_context_create(nullptr);
  if (!impl_->context) fail<InternalError>("regular expression: out of memory");
  pcre2_set_match_limit(impl_->context, kMaxMatchSteps);
}

RegexMatch::~RegexMatch() = default;

bool RegexMatch::matches(std::string_view text) const {
  const std::unique_ptr<pcre2_match_data, void (*)(pcre2_match_data*)> data(
      pcre2_match_data_create_from_pattern(impl_->code, nullptr), pcre2_match_data_free);
  // Responses may end inside a UTF-8 sequence; such text is not valid for the engine and matches nothing.
  return pcre2_match(impl_->code, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), 0, 0, data.get(),
                     impl_->context) >= 0;
}

double RegexMatch::score(const ScoredSample& scored) const {
  return matches(scored.text) ? 1 : 0;
}

FormatRule::FormatRule(FormatDemands demands) : demands_(std::move(demands)) {
  const bool empty = demands_.prefix.empty() && demands_.suffix.empty() && demands_.max_lines == 0 &&
                     demands_.contains.empty();
  if (empty)
    fail<ConfigError>("format rule: nothing is demanded, expected a prefix, suffix, max_lines or contains");
}

double FormatRule::score(const ScoredSample& scored) const {
  const std::string_view text = scored.text;
  int demanded = 0, met = 0;
  const auto demand = [&](bool holds) {
    ++demanded;
    met += holds;
  };
  if (!demands_.prefix.empty()) demand(text.substr(0, demands_.prefix.size()) == demands_.prefix);
  if (!demands_.suffix.empty()) {
    const bool fits = text.size() >= demands_.suffix.size();
    demand(fits && text.substr(text.size() - demands_.suffix.size()) == demands_.suffix);
  }
  if (demands_.max_lines > 0) {
    const auto lines = 1 + static_cast<std::size_t>(std::count(text.begin(), text.end(), '\n'));
    demand(lines <= demands_.max_lines);
  }
  std::size_t from = 0;
  for (const std::string& part : demands_.contains) {
    const std::size_t first = text.find(part);
    const bool once = first != std::string_view::npos && text.find(part, first + 1) == std::string_view::npos;
    demand(once && first >= from);
    if (once) from = first + part.size();
  }
  return static_cast<double>(met) / demanded;
}

LengthRule::LengthRule(Range range) : range_(range) {
  if (range.min_tokens > range.max_tokens) {
    fail<ConfigError>("length rule: min_tokens ", range.min_tokens, " is above max_tokens ",
                      range.max_tokens);
  }
  if (range.slope_tokens == 0) fail<ConfigError>("length rule: slope_tokens is 0, expected at least 1");
}

double LengthRule::score(const ScoredSample& scored) const {
  const auto& mask = scored.sample.mask;
  const auto length = static_cast<std::size_t>(std::count(mask.begin(), mask.end(), std::uint8_t{1}));
  const std::size_t outside = length < range_.min_tokens   ? range_.min_tokens - length
                              : length > range_.max_tokens ? length - range_.max_tokens
                                                           : 0;
  return -std::min(1.0, static_cast<double>(outside) / static_cast<double>(range_.slope_tokens));
}

}  // namespace rlhf
