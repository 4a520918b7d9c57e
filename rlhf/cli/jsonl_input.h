#pragma once

#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "rlhf/train/language_model.h"

namespace rlhf::cli {

/// Calls fn(line_number, object) for each line of a JSONL file ("-" = standard input).
/// @throws IoError naming file and line for a line that is no JSON object, or a file without lines.
void for_each_json_line(const std::string& path,
                        const std::function<void(std::int64_t, const nlohmann::json&)>& fn);

/// Token ids of an input line that holds `input_ids`, `prompt` or `text`, or `messages`. Messages are
/// rendered by the chat template with the assistant's turn opened when `open_turn`.
enum class Turn { kOpen, kClosed };
std::vector<TokenId> tokens_of_line(const LanguageModel& model, const nlohmann::json& line,
                                    const std::string& where, Turn turn);

/// The text that is encoded for a line without `input_ids`: as it stands, or as the chat template renders it.
std::string text_of_line(const LanguageModel& model, const nlohmann::json& line, const std::string& where,
                         Turn turn);

/// Where results go: a file, written atomically line by line at the end, or standard output for "-".
class LineWriter {
 public:
  explicit LineWriter(std::string path) : path_(std::move(path)) {}
  void write(const nlohmann::json& line);
  /// @throws IoError
  void close();

 private:
  std::string path_, text_;
};

}  // namespace rlhf::cli
