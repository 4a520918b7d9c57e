#include "rlhf/model/chat_template.h"

#include <algorithm>
#include <ctime>

#include "rlhf/model/jinja/interpreter.h"
#include "rlhf/model/jinja/parser.h"

namespace rlhf {
const char* const kChatMl =
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + "
    "'<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

namespace {

using Json = nlohmann::ordered_json;

// A private-use character that marks where a special token inside a message is broken up; texts that hold it
// already are left alone, which only means that their special tokens stay special.
constexpr std::string_view kBreak = "\xF3\xBF\xBF\xBD";

/// Fields under which reasoning is passed: templates read the first, gpt-oss templates the second.
constexpr const char* kReasoningFields[] = {"reasoning_content", "thinking", "reasoning"};

Json with_reasoning_aliases(const Json& message) {
  for (const char* field : kReasoningFields) {
    const auto found = message.find(field);
    if (found == message.end() || found->is_null()) continue;
    const Json reasoning = *found;
    Json out = {{"thinking", reasoning}};
    for (const auto& [key, value] : message.items()) out[key] = value;
    out["reasoning_content"] = reasoning;
    return out;
  }
  return message;
}

std::tm local_time(const std::optional<std::int64_t>& unix_time) {
  const std::time_t seconds = unix_time ? static_cast<std::time_t>(*unix_time) : std::time(nullptr);
  std::tm time{};
  ::localtime_r(&seconds, &time);
  return time;
}

std::vector<std::pair<std::string, jinja::Value>> make_globals(const Json& messages,
                                                               const RenderOptions& options) {
  std::vector<std::pair<std::string, jinja::Value>> globals;
  Json prepared = Json::array();
  for (const Json& message : messages) prepared.push_back(with_reasoning_aliases(message));
  globals.emplace_back("messages", jinja::Value::from_json(prepared));
  globals.emplace_back("tools", jinja::Value::from_json(options.tools));
  globals.emplace_back("documents", jinja::Value::from_json(options.documents));
  globals.emplace_back("add_generation_prompt", jinja::Value(options.add_generation_prompt));
  const auto add_token = [&](const char* name, const std::optional<std::string>& token) {
    if (token && !options.variables.contains(name)) globals.emplace_back(name, jinja::Value(*token));
  };
  add_token("bos_token", options.bos_token);
  add_token("eos_token", options.eos_token);
  for (const auto& [name, value] : options.variables.items())
    globals.emplace_back(name, jinja::Value::from_json(value));
  return globals;
}

void break_special_tokens(Json& value, const std::vector<std::string>& tokens) {
  if (value.is_string()) {
    std::string text = value.get<std::string>();
    if (text.find(kBreak) != std::string::npos) return;
    for (const std::string& token : tokens) {
      for (std::size_t place = text.find(token); place != std::string::npos;
           place = text.find(token, place + token.size() + kBreak.size())) {
        // Behind the first character, which may be several bytes long.
        std::size_t inside = place + 1;
        while (inside < place + token.size() && (static_cast<unsigned char>(text[inside]) & 0xC0) == 0x80)
          ++inside;
        if (inside < place + token.size()) text.insert(inside, kBreak);
      }
    }
    value = text;
  } else if (value.is_array() || value.is_object()) {
    for (auto& item : value) break_special_tokens(item, tokens);
  }
}

// Takes the marks out again; returns where they were.
std::vector<std::size_t> remove_breaks(std::string& text) {
  std::vector<std::size_t> offsets;
  std::string out;
  std::size_t from = 0;
  for (std::size_t place = text.find(kBreak); place != std::string::npos; place = text.find(kBreak, from)) {
    out.append(text, from, place - from);
    offsets.push_back(out.size());
    from = place + kBreak.size();
  }
  text = out.append(text, from);
  return offsets;
}

std::vector<std::string> special_texts(const Tokenizer& tokenizer) {
  std::vector<std::string> texts;
  for (const AddedToken& token : tokenizer.spec().added) {
    if (token.special) texts.push_back(token.text);
  }
  return texts;
}

}  // namespace

struct ChatTemplate::Impl {
  std::string source;
  std::string name;
  jinja::Block block;
};

ChatTemplate::ChatTemplate(const std::string& source, std::string name) {
  auto impl = std::make_shared<Impl>();
  impl->source = source;
  impl->name = std::move(name);
  try {
    impl->block = jinja::parse_template(source);
  } catch (const jinja::TemplateError& error) {
    throw ChatTemplateError(impl->name, error.message(), error.line());
  }
  impl_ = std::move(impl);
}

ChatTemplate ChatTemplate::chatml() {
  return ChatTemplate(kChatMl, "built-in ChatML template");
}

ChatTemplate ChatTemplate::of(const Tokenizer& tokenizer) {
  const TokenizerSpec& spec = tokenizer.spec();
  return spec.chat_template ? ChatTemplate(*spec.chat_template, spec.source + ": chat template") : chatml();
}

const std::string& ChatTemplate::source() const {
  return impl_->source;
}

RenderedChat ChatTemplate::render_with_spans(const Json& messages, const RenderOptions& options) const {
  const bool valid = messages.is_array() && std::all_of(messages.begin(), messages.end(),
                                                        [](const Json& m) { return m.is_object(); });
  RLHF_CHECK(valid, "chat: expected a list of messages, each an object with role and content");
  RLHF_CHECK(options.variables.is_object(), "chat: expected the template's variables as an object");
  try {
    jinja::Interpreter interpreter(make_globals(messages, options), local_time(options.unix_time));
    RenderedChat chat;
    chat.text = interpreter.render(impl_->block);
    for (const auto& span : interpreter.generation_spans())
      chat.assistant_spans.emplace_back(span.begin, span.end);
    return chat;
  } catch (const jinja::TemplateError& error) {
    throw ChatTemplateError(impl_->name, error.message(), error.line());
  }
}

std::string ChatTemplate::render(const Json& messages, const RenderOptions& options) const {
  return render_with_spans(messages, options).text;
}

EncodedChat encode_chat(const Tokenizer& tokenizer, const ChatTemplate& chat_template, const Json& messages,
                        RenderOptions options, ContentTokens content_tokens) {
  if (!options.bos_token) options.bos_token = tokenizer.spec().bos_token;
  if (!options.eos_token) options.eos_token = tokenizer.spec().eos_token;
  EncodedChat chat;
  std::vector<std::size_t> literal;
  if (content_tokens == ContentTokens::kLiteral) {
    Json broken = messages;
    break_special_tokens(broken, special_texts(tokenizer));
    chat.text = chat_template.render(broken, options);
    literal = remove_breaks(chat.text);
  } else {
    chat.text = chat_template.render(messages, options);
  }
  EncodeOptions encode_options;
  encode_options.literal_offsets = literal;
  Encoding encoding = tokenizer.encode_with_report(chat.text, encode_options);
  chat.ids = std::move(encoding.ids);
  chat.dropped_bytes = encoding.dropped_bytes;
  return chat;
}

std::vector<TokenId> encode_continuation(const Tokenizer& tokenizer, const ChatTemplate& chat_template,
                                         const Json& messages, std::string_view written) {
  const std::string marker = "rlhf-assistant-turn";
  Json broken = messages;
  break_special_tokens(broken, special_texts(tokenizer));
  Json chat =
      Json::array({{{"role", "user"}, {"content", "x"}}, {{"role", "assistant"}, {"content", marker}}});
  for (Json& message : broken) chat.push_back(std::move(message));
  RenderOptions options;
  options.add_generation_prompt = true;
  options.bos_token = tokenizer.spec().bos_token;
  options.eos_token = tokenizer.spec().eos_token;
  std::string text = chat_template.render(chat, options);
  std::vector<std::size_t> literal = remove_breaks(text);
  const std::size_t found = text.find(marker);
  if (found == std::string::npos)
    throw ChatTemplateError("chat template", "leaves out what the assistant says before another turn", 0);
  std::size_t begin = found + marker.size();
  if (std::string_view(text).substr(begin).starts_with(written)) begin += written.size();
  std::erase_if(literal, [&](std::size_t offset) { return offset < begin; });
  for (std::size_t& offset : literal) offset -= begin;
  EncodeOptions encode_options;
  encode_options.literal_offsets = literal;
  return tokenizer.encode(std::string_view(text).substr(begin), encode_options);
}

}  // namespace rlhf
