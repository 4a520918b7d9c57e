#include "rlhf/cli/generation_fields.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <map>

#include "rlhf/config/nearest.h"
#include "rlhf/core/error.h"

namespace rlhf::cli {
namespace {

using nlohmann::json;

constexpr double kAnyNumber = std::numeric_limits<double>::max();

// One value of a line, read strictly.
struct Value {
  const json& value;
  std::string where;  // file, line and key

  [[noreturn]] void refuse(const std::string& expected) const {
    fail<IoError>(where, ": got ", value.dump(), ", expected ", expected);
  }
  double number(double least, double most) const {
    const std::string expected = least == -kAnyNumber ? "a number"
                                 : most == kAnyNumber ? concat("a number of at least ", least)
                                                      : concat("a number from ", least, " to ", most);
    if (!value.is_number()) refuse(expected);
    const auto number = value.get<double>();
    if (!(number >= least && number <= most)) refuse(expected);
    return number;
  }
  std::int64_t integer(std::int64_t least, std::int64_t most) const {
    const std::string expected = concat("an integer from ", least, " to ", most);
    if (!value.is_number_integer()) refuse(expected);
    const bool too_large =
        value.is_number_unsigned() &&
        value.get<std::uint64_t>() > std::uint64_t{std::numeric_limits<std::int64_t>::max()};
    if (too_large || value.get<std::int64_t>() < least || value.get<std::int64_t>() > most) refuse(expected);
    return value.get<std::int64_t>();
  }
  bool flag() const {
    if (!value.is_boolean()) refuse("true or false");
    return value.get<bool>();
  }
  std::vector<TokenId> token_ids() const {
    const auto is_id = [](const json& id) {
      return id.is_number_integer() && id >= 0 && id <= std::numeric_limits<TokenId>::max();
    };
    if (!value.is_array() || !std::all_of(value.begin(), value.end(), is_id)) refuse("an array of token ids");
    return value.get<std::vector<TokenId>>();
  }
  std::vector<std::string> strings() const {
    if (value.is_string()) return {value.get<std::string>()};
    const auto is_string = [](const json& text) { return text.is_string(); };
    if (!value.is_array() || !std::all_of(value.begin(), value.end(), is_string))
      refuse("a string or an array of strings");
    return value.get<std::vector<std::string>>();
  }
  std::unordered_map<TokenId, float> biases() const {
    const std::string expected = "an object of token ids and numbers, e.g. {\"17\": -2.5}";
    if (!value.is_object()) refuse(expected);
    std::unordered_map<TokenId, float> biases;
    for (const auto& [id, bias] : value.items()) {
      const bool is_id =
          !id.empty() && id.size() < 10 && id.find_first_not_of("0123456789") == std::string::npos;
      if (!is_id || !bias.is_number()) refuse(expected);
      biases[std::stoi(id)] = bias.get<float>();
    }
    return biases;
  }
};

using Setter = std::function<void(const Value&, GenerationRequest&)>;

constexpr std::int64_t kMostTokens = 1 << 30;

const std::map<std::string, Setter>& setters() {
  using V = const Value&;
  using R = GenerationRequest&;
  static const std::map<std::string, Setter> all = {
      {"n", [](V v, R r) { r.num_samples = static_cast<std::uint32_t>(v.integer(1, 100000)); }},
      {"seed",
       [](V v, R r) {
         r.seed = static_cast<std::uint64_t>(v.integer(0, std::numeric_limits<std::int64_t>::max()));
       }},
      {"priority", [](V v, R r) { r.priority = static_cast<int>(v.integer(-1000, 1000)); }},
      {"deadline_steps", [](V v, R r) { r.deadline.steps = v.integer(0, kMostTokens); }},
      {"deadline_s", [](V v, R r) { r.deadline.seconds = v.number(0, kAnyNumber); }},
      {"max_new_tokens", [](V v, R r) { r.stop.max_new_tokens = v.integer(1, kMostTokens); }},
      {"min_new_tokens", [](V v, R r) { r.stop.min_new_tokens = v.integer(0, kMostTokens); }},
      {"stop", [](V v, R r) { r.stop.strings = v.strings(); }},
      {"temperature", [](V v, R r) { r.sampling.temperature = v.number(0, kAnyNumber); }},
      {"top_k", [](V v, R r) { r.sampling.top_k = static_cast<std::size_t>(v.integer(0, kMostTokens)); }},
      {"top_p", [](V v, R r) { r.sampling.top_p = v.number(0, 1); }},
      {"min_p", [](V v, R r) { r.sampling.min_p = v.number(0, 1); }},
      {"repetition_penalty",
       [](V v, R r) {
         r.sampling.repetition_penalty = v.number(0, kAnyNumber);
         if (r.sampling.repetition_penalty == 0) v.refuse("a number above 0");
       }},
      {"presence_penalty", [](V v, R r) { r.sampling.presence_penalty = v.number(-kAnyNumber, kAnyNumber); }},
      {"frequency_penalty",
       [](V v, R r) { r.sampling.frequency_penalty = v.number(-kAnyNumber, kAnyNumber); }},
      {"logit_bias", [](V v, R r) { r.constraint.logit_bias = v.biases(); }},
      {"allowed_token_ids", [](V v, R r) { r.constraint.allowed_tokens = v.token_ids(); }},
      {"raw_logprobs", [](V v, R r) { r.output.raw_logprobs = v.flag(); }},
      {"entropies", [](V v, R r) { r.output.entropies = v.flag(); }},
      {"top_logprobs", [](V v, R r) { r.output.top_logprobs = v.integer(0, 1 << 20); }},
  };
  return all;
}

// ignore_eos drops the model's end tokens, stop_token_ids adds to what is left.
void apply_stop_tokens(const json& line, const std::string& where, GenerationRequest& request) {
  if (line.contains("ignore_eos") && Value{line["ignore_eos"], where + ": ignore_eos"}.flag())
    request.stop.tokens.clear();
  if (!line.contains("stop_token_ids")) return;
  for (TokenId token : Value{line["stop_token_ids"], where + ": stop_token_ids"}.token_ids())
    request.stop.tokens.push_back(token);
}

void apply_choices(const LanguageModel& model, const json& choices, const std::string& where,
                   GenerationRequest& request) {
  const Value value{choices, where + ": choices"};
  const std::string expected = "an array of strings or of arrays of token ids, at least one";
  if (!choices.is_array() || choices.empty()) value.refuse(expected);
  request.constraint.choices.clear();
  for (const json& choice : choices) {
    if (!choice.is_string() && !choice.is_array()) value.refuse(expected);
    request.constraint.choices.push_back(choice.is_string()
                                             ? choice_tokens(model, choice.get<std::string>(), value.where)
                                             : Value{choice, value.where}.token_ids());
  }
}

void refuse_misspelt(const json& line, const std::string& where) {
  std::vector<std::string> known = {"input_ids",  "prompt",         "text",   "messages",
                                    "ignore_eos", "stop_token_ids", "choices"};
  for (const auto& [key, setter] : setters()) known.push_back(key);
  for (const auto& [key, value] : line.items()) {
    const std::string meant = config::nearest(key, known);
    // Short words are near too many others.
    if (key != meant && key.size() > 4 && config::edit_distance(key, meant) <= 2)
      fail<IoError>(where, ": ", key, ": unknown key; nearest key is ", meant);
  }
}

}  // namespace

std::vector<TokenId> choice_tokens(const LanguageModel& model, const std::string& text,
                                   const std::string& where) {
  try {
    return model.tokenizer().encode(text);
  } catch (const std::exception& error) {
    fail<IoError>(where, ": ", error.what());
  }
}

void apply_generation_fields(const LanguageModel& model, const json& line, const std::string& where,
                             GenerationRequest& request) {
  refuse_misspelt(line, where);
  for (const auto& [key, set] : setters())
    if (line.contains(key)) set(Value{line[key], concat(where, ": ", key)}, request);
  apply_stop_tokens(line, where, request);
  if (line.contains("choices")) apply_choices(model, line["choices"], where, request);
}

}  // namespace rlhf::cli
