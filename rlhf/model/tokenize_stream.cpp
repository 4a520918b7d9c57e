#include "rlhf/model/tokenize_stream.h"

#include <algorithm>
#include <array>
#include <istream>
#include <ostream>
#include <string_view>

#include "rlhf/core/error.h"
#include "rlhf/model/json_file.h"
#include "rlhf/model/utf8.h"

namespace rlhf {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::array<std::string_view, 6> kKeys{"text",  "messages",  "add_generation_prompt",
                                                "tools", "documents", "variables"};

void check_line(const Json& line, const std::string& where) {
  if (!line.is_object()) fail<IoError>(where, ": expected a JSON object");
  for (const auto& [key, value] : line.items()) {
    if (std::find(kKeys.begin(), kKeys.end(), key) == kKeys.end()) {
      fail<IoError>(where, ": unknown key ", key,
                    ": expected text, messages, add_generation_prompt, tools, documents or variables");
    }
  }
  if (line.contains("text") == line.contains("messages"))
    fail<IoError>(where, ": expected either text or messages");
  if (line.contains("text") && (!line["text"].is_string() || line.size() > 1)) {
    fail<IoError>(where, ": text: expected a string, and no other keys");
  }
  if (line.contains("add_generation_prompt") && !line["add_generation_prompt"].is_boolean()) {
    fail<IoError>(where, ": add_generation_prompt: expected true or false");
  }
}

EncodedChat encode_line(const Json& line, const Tokenizer& tokenizer, const ChatTemplate& chat_template,
                        const TokenizeOptions& options) {
  if (line.contains("text")) {
    EncodedChat result;
    result.text = line["text"].get<std::string>();
    Encoding encoding = tokenizer.encode_with_report(result.text, options.encode);
    result.ids = std::move(encoding.ids);
    result.dropped_bytes = encoding.dropped_bytes;
    return result;
  }
  RenderOptions render;
  render.add_generation_prompt = line.value("add_generation_prompt", false);
  if (line.contains("tools")) render.tools = line["tools"];
  if (line.contains("documents")) render.documents = line["documents"];
  if (line.contains("variables")) render.variables = line["variables"];
  return encode_chat(tokenizer, chat_template, line["messages"], std::move(render), options.content_tokens);
}

}  // namespace

TokenizeSummary tokenize_jsonl(std::istream& in, std::ostream& out, const Tokenizer& tokenizer,
                               const ChatTemplate& chat_template, const TokenizeOptions& options) {
  TokenizeSummary summary;
  std::int64_t number = 0;
  for (std::string text; std::getline(in, text);) {
    const std::string where = concat(options.source, ":", ++number);
    if (text.find_first_not_of(" \t\r") == std::string::npos) continue;
    const Json line = parse_ordered_json(text, where);
    check_line(line, where);
    EncodedChat encoded;
    try {
      encoded = encode_line(line, tokenizer, chat_template, options);
    } catch (const Error& error) {
      fail<IoError>(where, ": ", error.what());
    }
    Json result = {
        {"input_ids", encoded.ids}, {"text", encoded.text}, {"decoded", tokenizer.decode(encoded.ids)}};
    if (encoded.dropped_bytes > 0) result["dropped_bytes"] = encoded.dropped_bytes;
    out << result.dump() << '\n';
    if (!out) fail<IoError>(where, ": cannot write the result");
    ++summary.lines;
    summary.tokens += static_cast<std::int64_t>(encoded.ids.size());
    summary.dropped_bytes += static_cast<std::int64_t>(encoded.dropped_bytes);
  }
  if (in.bad()) fail<IoError>(options.source, ":", number + 1, ": cannot read");
  out.flush();
  return summary;
}

}  // namespace rlhf
