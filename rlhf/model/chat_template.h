#pragma once

#include <cstddef>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "rlhf/core/error.h"
#include "rlhf/core/ids.h"
#include "rlhf/model/tokenizer.h"

namespace rlhf {

/// The template of OpenAI's ChatML, used where a model brings none.
extern const char* const kChatMl;

/// A chat template that cannot be parsed, or that raised while rendering (wrong roles, say). The message
/// names the line of the template.
class ChatTemplateError : public Error {
 public:
  ChatTemplateError(const std::string& source, const std::string& message, int line)
      : Error(line > 0 ? concat(source, ": line ", line, ": ", message) : concat(source, ": ", message)),
        message_(message) {}
  /// Without place: what the template gave to raise_exception, or what is wrong.
  const std::string& message() const { return message_; }

 private:
  std::string message_;
};

/// What a template sees beside the messages.
struct RenderOptions {
  /// Ends with the header of an assistant's turn.
  bool add_generation_prompt = false;
  /// List of JSON schemas, or null.
  nlohmann::ordered_json tools = nullptr;
  /// List of {title, text}, or null.
  nlohmann::ordered_json documents = nullptr;
  /// Further variables of the template, such as enable_thinking. They win over bos_token and eos_token below.
  nlohmann::ordered_json variables = nlohmann::ordered_json::object();
  /// Texts of the special tokens; unset ones are undefined in the template.
  std::optional<std::string> bos_token, eos_token;
  /// Seconds since 1970 that strftime_now() shows in local time; unset: now.
  std::optional<std::int64_t> unix_time;
};

struct RenderedChat {
  std::string text;
  /// Byte ranges [begin, end) that the assistant wrote, when the template marks them with {% generation %}.
  std::vector<std::pair<std::size_t, std::size_t>> assistant_spans;
};

/// A Jinja chat template, rendered as transformers renders it (sandboxed jinja2 with trim_blocks,
/// lstrip_blocks, loop controls, its own tojson, raise_exception, strftime_now and generation tag). Time,
/// nesting and text size are bounded, so that a hostile template ends in an error. Immutable; thread-safe;
/// cheap to copy.
class ChatTemplate {
 public:
  /// @param name names the template in messages. @throws ChatTemplateError for a syntax error.
  explicit ChatTemplate(const std::string& source, std::string name = "chat template");

  /// ChatML (<|im_start|>role ... <|im_end|>), for models that bring no template.
  static ChatTemplate chatml();
  /// The tokenizer's own template, else chatml().
  static ChatTemplate of(const Tokenizer& tokenizer);

  /// @param messages list of objects with role and content (and whatever the template reads).
  /// @throws ChatTemplateError when the template raises or fails; InvalidArgument when `messages` is no list
  /// of objects.
  std::string render(const nlohmann::ordered_json& messages, const RenderOptions& options = {}) const;
  RenderedChat render_with_spans(const nlohmann::ordered_json& messages,
                                 const RenderOptions& options = {}) const;

  const std::string& source() const;

 private:
  struct Impl;
  std::shared_ptr<const Impl> impl_;
};

/// A chat as ids.
struct EncodedChat {
  std::string text;
  std::vector<TokenId> ids;
  /// See Encoding::dropped_bytes.
  std::size_t dropped_bytes = 0;
};

/// Whether special tokens written out inside message contents count (as transformers does) or are plain text,
/// which is what contents from strangers need.
enum class ContentTokens { kParsed, kLiteral };

/// Renders with the tokenizer's begin and end tokens filled in (unless given) and encodes the text without
/// adding further special tokens. @throws as ChatTemplate::render
EncodedChat encode_chat(const Tokenizer& tokenizer, const ChatTemplate& chat_template,
                        const nlohmann::ordered_json& messages, RenderOptions options = {},
                        ContentTokens content_tokens = ContentTokens::kParsed);

/// Encodes what the template writes between an assistant's turn and the next one when `messages` (user or
/// tool turns) come between them: the end of the turn, the messages, the header of the next turn. Contents
/// are plain text, so nothing in them becomes a special token. Turns before that are not rendered again: what
/// the model wrote stays as it is.
/// @param written what the model itself has written of it (the text of its end token); it is left out
/// @throws ChatTemplateError when the template raises or leaves the assistant's content out
std::vector<TokenId> encode_continuation(const Tokenizer& tokenizer, const ChatTemplate& chat_template,
                                         const nlohmann::ordered_json& messages, std::string_view written);

}  // namespace rlhf
