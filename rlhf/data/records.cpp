#include "rlhf/data/records.h"

#include <cmath>
#include <nlohmann/json.hpp>
#include <string_view>

#include "rlhf/core/error.h"
#include "rlhf/data/jsonl.h"

namespace rlhf {
namespace {

using nlohmann::json;

bool has(const json& record, const char* key) {
  const auto found = record.find(key);
  return found != record.end() && !found->is_null();
}

std::string text_at(const json& record, const char* key) {
  RLHF_CHECK(has(record, key), "key \"", key, "\" is missing");
  RLHF_CHECK(record[key].is_string(), "key \"", key, "\": got ", record[key].type_name(), ", expected text");
  return record[key].get<std::string>();
}

std::string optional_text(const json& record, const char* key) {
  return has(record, key) ? text_at(record, key) : std::string();
}

std::vector<std::string> texts_at(const json& record, const char* key) {
  const json& texts = record[key];
  RLHF_CHECK(texts.is_array(), "key \"", key, "\": got ", texts.type_name(), ", expected a list of texts");
  std::vector<std::string> out;
  for (const json& text : texts) {
    RLHF_CHECK(text.is_string(), "key \"", key, "\": got ", text.type_name(), " at position ", out.size(),
               ", expected text");
    out.push_back(text.get<std::string>());
  }
  return out;
}

std::vector<TokenId> token_ids(const json& ids) {
  RLHF_CHECK(ids.is_array() && !ids.empty(), "key \"input_ids\": expected a list of token ids");
  std::vector<TokenId> out;
  for (const json& id : ids) {
    const bool valid = id.is_number_integer() && id >= 0 && id <= INT32_MAX;
    RLHF_CHECK(valid, "key \"input_ids\": got ", id.dump(), " at position ", out.size(),
               ", expected a token id");
    out.push_back(id.get<TokenId>());
  }
  return out;
}

PromptContent prompt_content(const json& prompt, PromptText prompt_text) {
  PromptContent content;
  if (prompt.is_array()) {
    content.messages = chat_from_json(prompt);
    return content;
  }
  RLHF_CHECK(prompt.is_string(), "key \"prompt\": got ", prompt.type_name(), ", expected text or messages");
  auto text = prompt.get<std::string>();
  RLHF_CHECK(!text.empty(), "key \"prompt\": the text is empty");
  if (prompt_text == PromptText::kUserMessage) {
    content.messages = {{"user", std::move(text)}};
  } else {
    content.text = std::move(text);
  }
  return content;
}

// Takes the assistant's last turn off a dialogue; the rest is what it answers.
RankedResponse split_last_turn(Chat chat, const char* key) {
  RLHF_CHECK(chat.size() >= 2 && chat.back().role == "assistant", "key \"", key,
             "\": the dialogue must end with an assistant turn after another turn");
  RankedResponse side;
  side.response = std::move(chat.back().content);
  chat.pop_back();
  side.prompt.messages = std::move(chat);
  return side;
}

RankedResponse ranked_side(const json& record, const char* key, PromptText prompt_text) {
  RLHF_CHECK(has(record, key), "key \"", key, "\" is missing");
  const json& side = record[key];
  RLHF_CHECK(side.is_array() || side.is_string(), "key \"", key, "\": got ", side.type_name(),
             ", expected text or messages");
  if (!has(record, "prompt")) {
    return split_last_turn(side.is_array() ? chat_from_json(side) : chat_from_hh(side.get<std::string>()),
                           key);
  }
  RankedResponse out{prompt_content(record["prompt"], prompt_text), ""};
  if (side.is_string()) {
    out.response = side.get<std::string>();
    return out;
  }
  const Chat messages = chat_from_json(side);
  RLHF_CHECK(messages.size() == 1 && messages[0].role == "assistant", "key \"", key,
             "\": beside \"prompt\" expected one assistant message");
  out.response = messages[0].content;
  return out;
}

const char* response_key(const json& record) {
  return has(record, "completion") && !has(record, "response") ? "completion" : "response";
}

SftRecord sft_record(const json& record, PromptText prompt_text) {
  SftRecord out;
  out.task = optional_text(record, "task");
  if (has(record, "messages")) {
    out.messages = chat_from_json(record["messages"]);
    bool answered = false;
    for (const ChatMessage& message : out.messages) answered |= message.role == "assistant";
    RLHF_CHECK(answered, "key \"messages\": no assistant message to learn from");
    return out;
  }
  RLHF_CHECK(has(record, "prompt"), "expected \"messages\", or \"prompt\" and \"response\"");
  out.response = text_at(record, response_key(record));
  PromptContent prompt = prompt_content(record["prompt"], prompt_text);
  if (prompt.messages.empty()) {
    out.prompt = std::move(prompt.text);
    return out;
  }
  out.messages = std::move(prompt.messages);
  out.messages.push_back({"assistant", std::move(out.response)});
  out.response.clear();
  return out;
}

PreferencePair preference_pair(const json& record, PromptText prompt_text) {
  PreferencePair pair;
  pair.chosen = ranked_side(record, "chosen", prompt_text);
  pair.rejected = ranked_side(record, "rejected", prompt_text);
  pair.task = optional_text(record, "task");
  if (has(record, "margin")) {
    const bool finite = record["margin"].is_number() && std::isfinite(record["margin"].get<double>());
    RLHF_CHECK(finite, "key \"margin\": got ", record["margin"].dump(), ", expected a number");
    pair.margin = record["margin"].get<double>();
  }
  return pair;
}

LabelledResponse labelled_response(const json& record, PromptText prompt_text) {
  RLHF_CHECK(has(record, "prompt"), "key \"prompt\" is missing");
  RLHF_CHECK(has(record, "label"), "key \"label\" is missing");
  RLHF_CHECK(record["label"].is_boolean(), "key \"label\": got ", record["label"].dump(),
             ", expected true (desirable) or false");
  LabelledResponse out;
  out.answer = ranked_side(record, response_key(record), prompt_text);
  out.desirable = record["label"].get<bool>();
  return out;
}

double finite_number(const json& value, const char* key) {
  RLHF_CHECK(value.is_number(), "key \"", key, "\": got ", value.dump(), ", expected a number");
  const double number = value.get<double>();
  RLHF_CHECK(std::isfinite(number), "key \"", key, "\": got ", value.dump(), ", expected a finite number");
  return number;
}

RatedResponse rated_response(const json& record, PromptText prompt_text) {
  RLHF_CHECK(has(record, "prompt"), "key \"prompt\" is missing");
  const int given = has(record, "score") + has(record, "scores") + has(record, "step_scores");
  RLHF_CHECK(given == 1, "expected one of \"score\", \"scores\" and \"step_scores\", got ", given);
  RatedResponse out;
  out.answer = ranked_side(record, response_key(record), prompt_text);
  out.per_step = has(record, "step_scores");
  if (has(record, "score")) {
    out.scores = {finite_number(record["score"], "score")};
    return out;
  }
  const char* key = out.per_step ? "step_scores" : "scores";
  RLHF_CHECK(record[key].is_array() && !record[key].empty(), "key \"", key, "\": got ", record[key].dump(),
             ", expected a list of numbers");
  for (const json& value : record[key]) out.scores.push_back(finite_number(value, key));
  return out;
}

PromptRecord prompt_record(const json& record, PromptText prompt_text) {
  PromptRecord out;
  const int given = has(record, "prompt") + has(record, "messages") + has(record, "input_ids");
  RLHF_CHECK(given == 1, "expected one of \"prompt\", \"messages\" and \"input_ids\", got ", given);
  if (has(record, "input_ids")) {
    out.content.input_ids = token_ids(record["input_ids"]);
  } else if (has(record, "messages")) {
    out.content.messages = chat_from_json(record["messages"]);
  } else {
    out.content = prompt_content(record["prompt"], prompt_text);
  }
  out.task = optional_text(record, "task");
  if (has(record, "reference")) out.reference = record["reference"].dump();
  if (has(record, "user_turns")) out.user_turns = texts_at(record, "user_turns");
  return out;
}

PromptId prompt_id(const json& record, std::size_t number) {
  if (!has(record, "id")) return number;
  const bool natural = record["id"].is_number_unsigned();
  RLHF_CHECK(natural, "key \"id\": got ", record["id"].dump(), ", expected a whole number of at least 0");
  return record["id"].get<PromptId>();
}

template <class Record, class Convert>
std::vector<Record> read_records(const std::filesystem::path& path, Convert convert) {
  std::vector<Record> records;
  for_each_json_line(path, [&](const json& record, std::int64_t line) {
    records.push_back(convert(record, records.size()));
    records.back().line = line;
  });
  return records;
}

}  // namespace

std::vector<SftRecord> read_sft_records(const std::filesystem::path& path, PromptText prompt_text) {
  return read_records<SftRecord>(
      path, [&](const json& record, std::size_t) { return sft_record(record, prompt_text); });
}

std::vector<PreferencePair> read_preference_pairs(const std::filesystem::path& path, PromptText prompt_text) {
  return read_records<PreferencePair>(
      path, [&](const json& record, std::size_t) { return preference_pair(record, prompt_text); });
}

std::vector<LabelledResponse> read_labelled_responses(const std::filesystem::path& path,
                                                      PromptText prompt_text) {
  return read_records<LabelledResponse>(
      path, [&](const json& record, std::size_t) { return labelled_response(record, prompt_text); });
}

std::vector<RatedResponse> read_rated_responses(const std::filesystem::path& path, PromptText prompt_text) {
  return read_records<RatedResponse>(
      path, [&](const json& record, std::size_t) { return rated_response(record, prompt_text); });
}

std::vector<PromptRecord> read_prompt_records(const std::filesystem::path& path, PromptText prompt_text) {
  return read_records<PromptRecord>(path, [&](const json& record, std::size_t number) {
    PromptRecord out = prompt_record(record, prompt_text);
    out.id = prompt_id(record, number);
    return out;
  });
}

}  // namespace rlhf
