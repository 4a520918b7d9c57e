#pragma once

#include <string>
#include <vector>

#include <nlohmann/json_fwd.hpp>

namespace rlhf {

/// One turn of a conversation. Roles are those of chat templates: system, user, assistant, tool.
struct ChatMessage {
  std::string role;
  std::string content;
  bool operator==(const ChatMessage&) const = default;
};
using Chat = std::vector<ChatMessage>;

/// Returns `[{"role": ..., "content": ...}, ...]`.
nlohmann::ordered_json to_json(const Chat& chat);

/// Reads a `messages` value. @throws InvalidArgument saying which message is wrong and how.
Chat chat_from_json(const nlohmann::json& messages);

/// Splits an Anthropic HH dialogue ("\n\nHuman: ...\n\nAssistant: ...") into turns, texts trimmed.
/// @throws InvalidArgument when the text does not start with a Human turn.
Chat chat_from_hh(const std::string& dialogue);

}  // namespace rlhf
