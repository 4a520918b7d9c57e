#include "rlhf/data/chat.h"

#include <nlohmann/json.hpp>
#include <string_view>

#include "rlhf/core/error.h"

namespace rlhf {
namespace {

std::string trim(std::string_view text) {
  constexpr std::string_view kSpace = " \t\r\n";
  const std::size_t begin = text.find_first_not_of(kSpace);
  if (begin == std::string_view::npos) return "";
  return std::string(text.substr(begin, text.find_last_not_of(kSpace) - begin + 1));
}

struct Marker {
  std::string_view text;
  const char* role;
};
constexpr Marker kMarkers[] = {{"\n\nHuman:", "user"}, {"\n\nAssistant:", "assistant"}};

// Position of the next turn at or after `from`, and its marker; npos when there is none.
std::size_t find_marker(std::string_view text, std::size_t from, const Marker*& found) {
  std::size_t best = std::string_view::npos;
  for (const Marker& marker : kMarkers) {
    const std::size_t position = text.find(marker.text, from);
    if (position < best) {
      best = position;
      found = &marker;
    }
  }
  return best;
}

}  // namespace

nlohmann::ordered_json to_json(const Chat& chat) {
  auto out = nlohmann::ordered_json::array();
  for (const ChatMessage& message : chat)
    out.push_back({{"role", message.role}, {"content", message.content}});
  return out;
}

Chat chat_from_json(const nlohmann::json& messages) {
  RLHF_CHECK(messages.is_array(), "messages: got ", messages.type_name(), ", expected a list");
  RLHF_CHECK(!messages.empty(), "messages: the list is empty");
  Chat chat;
  for (const auto& message : messages) {
    const std::size_t number = chat.size() + 1;
    for (const char* key : {"role", "content"}) {
      const bool is_text = message.is_object() && message.contains(key) && message[key].is_string();
      RLHF_CHECK(is_text, "messages: message ", number, " has no text under \"", key, '"');
    }
    chat.push_back({message["role"].get<std::string>(), message["content"].get<std::string>()});
  }
  return chat;
}

Chat chat_from_hh(const std::string& dialogue) {
  const std::string_view text = dialogue;
  const Marker* marker = nullptr;
  std::size_t position = find_marker(text, 0, marker);
  RLHF_CHECK(position == 0 && marker == &kMarkers[0], "dialogue does not start with \"\\n\\nHuman:\"");
  Chat chat;
  while (position != std::string_view::npos) {
    const std::size_t begin = position + marker->text.size();
    const char* role = marker->role;
    position = find_marker(text, begin, marker);
    const std::size_t length = position == std::string_view::npos ? position : position - begin;
    chat.push_back({role, trim(text.substr(begin, length))});
  }
  return chat;
}

}  // namespace rlhf
