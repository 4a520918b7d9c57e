#include "rlhf/config/node.h"

#include <cctype>
#include <cstdio>
#include <string_view>
#include <utility>

#include "rlhf/core/error.h"

namespace rlhf::config {
namespace {

// True for texts that every YAML reader takes as the same plain string.
bool is_plain_text(std::string_view text) {
  if (text.empty()) return false;
  const auto first = static_cast<unsigned char>(text[0]);
  if (!std::isalpha(first) && first != '_' && first != '/') return false;
  for (const unsigned char c : text) {
    if (!std::isalnum(c) && std::string_view("_-./+").find(static_cast<char>(c)) == std::string_view::npos)
      return false;
  }
  for (const std::string_view word : {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}) {
    if (text.size() != word.size()) continue;
    bool equal = true;
    for (std::size_t i = 0; i < word.size(); ++i) {
      equal &= std::tolower(static_cast<unsigned char>(text[i])) == word[i];
    }
    if (equal) return false;
  }
  return true;
}

std::string quote(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (c == '\n') {
      out += "\\n";
    } else if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) {
      char escape[8];
      std::snprintf(escape, sizeof escape, "\\x%02X", static_cast<unsigned>(static_cast<unsigned char>(c)));
      out += escape;
    } else {
      out += c;
    }
  }
  return out + '"';
}

std::string text_to_yaml(const std::string& text) {
  return is_plain_text(text) ? text : quote(text);
}

}  // namespace

std::string to_string(const Location& location) {
  if (location.line == 0) return location.source;
  return concat(location.source, ':', location.line, ':', location.column);
}

Node Node::scalar(std::string text) {
  Node node;
  node.kind = Kind::kScalar;
  node.text = std::move(text);
  return node;
}

Node Node::quoted_scalar(std::string text) {
  Node node = scalar(std::move(text));
  node.quoted = true;
  return node;
}

Node Node::sequence() {
  Node node;
  node.kind = Kind::kSequence;
  return node;
}

Node Node::mapping() {
  Node node;
  node.kind = Kind::kMapping;
  return node;
}

void Node::add(std::string key, Node value) {
  keys.push_back({std::move(key), value.where});
  items.push_back(std::move(value));
}

Node* Node::find(const std::string& key) {
  for (std::size_t i = 0; i < keys.size(); ++i) {
    if (keys[i].name == key) return &items[i];
  }
  return nullptr;
}

std::string describe(const Node& node) {
  constexpr std::size_t kLongest = 60;
  switch (node.kind) {
    case Node::Kind::kNull:
      return "nothing";
    case Node::Kind::kSequence:
      return "a list";
    case Node::Kind::kMapping:
      return "a group of keys";
    case Node::Kind::kScalar:
      break;
  }
  std::string shown = node.text.size() > kLongest ? node.text.substr(0, kLongest) + "..." : node.text;
  return node.quoted ? quote(shown) : shown;
}

std::string to_yaml(const Node& node) {
  switch (node.kind) {
    case Node::Kind::kNull:
      return "null";
    case Node::Kind::kScalar:
      return node.quoted ? text_to_yaml(node.text) : node.text;
    case Node::Kind::kSequence: {
      std::string out = "[";
      for (const Node& item : node.items) out += (out.size() > 1 ? ", " : "") + to_yaml(item);
      return out + "]";
    }
    case Node::Kind::kMapping: {
      std::string out = "{";
      for (std::size_t i = 0; i < node.keys.size(); ++i) {
        out += (i > 0 ? ", " : "") + text_to_yaml(node.keys[i].name) + ": " + to_yaml(node.items[i]);
      }
      return out + "}";
    }
  }
  return "null";
}

}  // namespace rlhf::config
