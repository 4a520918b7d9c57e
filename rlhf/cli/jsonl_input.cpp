#include "rlhf/cli/jsonl_input.h"

#include <fstream>
#include <iostream>

#include "rlhf/core/atomic_file.h"
#include "rlhf/core/error.h"
#include "rlhf/data/chat.h"

namespace rlhf::cli {

void for_each_json_line(const std::string& path,
                        const std::function<void(std::int64_t, const nlohmann::json&)>& fn) {
  std::ifstream file;
  if (path != "-") {
    file.open(path);
    if (!file) fail<IoError>(path, ": cannot be opened");
  }
  std::istream& in = path == "-" ? std::cin : file;
  std::int64_t number = 0, used = 0;
  for (std::string line; std::getline(in, line);) {
    ++number;
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    nlohmann::json object;
    try {
      object = nlohmann::json::parse(line);
    } catch (const nlohmann::json::exception& error) {
      fail<IoError>(path, ":", number, ": not JSON: ", error.what());
    }
    if (!object.is_object()) fail<IoError>(path, ":", number, ": expected a JSON object");
    fn(number, object);
    ++used;
  }
  if (used == 0) fail<IoError>(path, ": holds no lines");
}

std::string text_of_line(const LanguageModel& model, const nlohmann::json& line, const std::string& where,
                         Turn turn) {
  try {
    for (const char* key : {"prompt", "text"})
      if (line.contains(key)) return line[key].get<std::string>();
    if (line.contains("messages"))
      return model.render_chat(chat_from_json(line["messages"]), turn == Turn::kOpen);
  } catch (const std::exception& error) {
    fail<IoError>(where, ": ", error.what());
  }
  fail<IoError>(where, ": expected one of the keys input_ids, prompt, text, messages");
}

std::vector<TokenId> tokens_of_line(const LanguageModel& model, const nlohmann::json& line,
                                    const std::string& where, Turn turn) {
  try {
    if (line.contains("input_ids")) return line["input_ids"].get<std::vector<TokenId>>();
  } catch (const std::exception& error) {
    fail<IoError>(where, ": ", error.what());
  }
  const std::string text = text_of_line(model, line, where, turn);
  try {
    return model.tokenizer().encode(text);
  } catch (const std::exception& error) {
    fail<IoError>(where, ": ", error.what());
  }
}

void LineWriter::write(const nlohmann::json& line) {
  const std::string text = line.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
  if (path_ == "-")
    std::cout << text << std::flush;
  else
    text_ += text;
}

void LineWriter::close() {
  if (path_ != "-") write_file_atomically(path_, text_);
}

}  // namespace rlhf::cli
