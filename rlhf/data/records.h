#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "rlhf/core/ids.h"
#include "rlhf/data/chat.h"

namespace rlhf {

/// What a plain string under "prompt" means: text the model continues as it stands, or what a user says in a
/// chat.
enum class PromptText { kRaw, kUserMessage };

/// What the model is asked: a chat to be rendered by the template, raw text, or token ids. One of the three
/// is filled.
struct PromptContent {
  Chat messages;
  std::string text;
  std::vector<TokenId> input_ids;
};

/// One demonstration: `{"messages": [...]}` (loss on every assistant turn), or `{"prompt", "response"}` with
/// a string or messages as prompt ("completion" is accepted for "response").
struct SftRecord {
  Chat messages;         ///< chat form, assistant turn(s) included; empty in raw form
  std::string prompt;    ///< raw form
  std::string response;  ///< raw form: text that carries the loss
  std::string task;      ///< optional key "task"
  std::int64_t line = 0;
};

/// One side of a comparison.
struct RankedResponse {
  PromptContent prompt;
  std::string response;
};

/// `{"prompt", "chosen", "rejected", "margin"?}`, sides as strings or message lists; message lists without
/// "prompt"; or the HH format (whole dialogues, no "prompt"). HH sides may differ before the last turn, hence
/// two prompts.
struct PreferencePair {
  RankedResponse chosen;
  RankedResponse rejected;
  double margin = 0;  ///< how much better, for the margin loss; 0 when the file says nothing
  std::string task;
  std::int64_t line = 0;
};

/// `{"prompt", "response", "label"}`: one response, marked desirable (true) or not. "completion" is accepted
/// for "response"; both may be a string or a list of one assistant message.
struct LabelledResponse {
  RankedResponse answer;
  bool desirable = true;
  std::int64_t line = 0;
};

/// `{"prompt", "response"}` ("completion" is accepted for it) with one of "score": x, "scores": [x, ...] (one
/// per objective) and "step_scores": [x, ...] (one per step of the response).
struct RatedResponse {
  RankedResponse answer;
  std::vector<double> scores;
  bool per_step = false;  ///< they came as "step_scores"
  std::int64_t line = 0;
};

/// `{"prompt" | "messages" | "input_ids", "task"?, "reference"?, "id"?, "user_turns"?}`.
struct PromptRecord {
  PromptId id = 0;  ///< key "id", else the record's number from 0
  PromptContent content;
  std::string task;
  std::string reference;                ///< JSON text of "reference"; empty when absent
  std::vector<std::string> user_turns;  ///< what a scripted user says later on; empty when absent
  std::int64_t line = 0;
};

/// Read a whole JSONL file. @throws IoError `path:line: ...` naming key, value and what was expected; an
/// empty file is an error, too.
std::vector<SftRecord> read_sft_records(const std::filesystem::path& path, PromptText prompt_text);
std::vector<PreferencePair> read_preference_pairs(const std::filesystem::path& path, PromptText prompt_text);
std::vector<LabelledResponse> read_labelled_responses(const std::filesystem::path& path,
                                                      PromptText prompt_text);
std::vector<RatedResponse> read_rated_responses(const std::filesystem::path& path, PromptText prompt_text);
std::vector<PromptRecord> read_prompt_records(const std::filesystem::path& path, PromptText prompt_text);

}  // namespace rlhf
