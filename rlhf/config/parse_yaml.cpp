// The only file that knows yaml-cpp. It works on parser events rather than on YAML::Node, because events
// carry the position of every key, show duplicates, and leave alias expansion (and its limit) to us.
#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/exceptions.h>
#include <yaml-cpp/mark.h>
#include <yaml-cpp/parser.h>

#include <algorithm>
#include <map>
#include <optional>
#include <sstream>
#include <string_view>
#include <utility>

#include "rlhf/config/node.h"
#include "rlhf/core/error.h"

namespace rlhf::config {
namespace {

std::size_t count_nodes(const Node& node) {
  std::size_t count = 1;
  for (const Node& item : node.items) count += count_nodes(item);
  return count;
}

std::size_t depth_of(const Node& node) {
  std::size_t deepest = 0;
  for (const Node& item : node.items) deepest = std::max(deepest, depth_of(item));
  return deepest + 1;
}

// Bounds every recursion over a document, in this file and in others.
constexpr std::size_t kMaxDepth = 64;

class TreeBuilder : public YAML::EventHandler {
 public:
  TreeBuilder(std::string name, const ParseLimits& limits) : name_(std::move(name)), limits_(limits) {}

  Node take_root() { return root_ ? std::move(*root_) : Node::null(); }

  void OnDocumentStart(const YAML::Mark&) override {}
  void OnDocumentEnd() override {}

  void OnNull(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    finish(at(mark), anchor, Node::null());
  }

  void OnAlias(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    const auto found = anchors_.find(anchor);
    if (found == anchors_.end())
      fail<ConfigError>(to_string(at(mark)), ": an alias refers to a value that contains it");
    require_depth(at(mark), levels_.size() + depth_of(found->second));
    num_nodes_ += count_nodes(found->second) - 1;
    finish(at(mark), 0, found->second);
  }

  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                const std::string& value) override {
    // yaml-cpp marks a plain scalar with the tag "?" and a quoted one with "!".
    const bool plain = tag == "?" || tag.empty();
    if (!plain && tag != "!") fail<ConfigError>(to_string(at(mark)), ": tags are not supported, got ", tag);
    const bool null =
        plain && (value.empty() || value == "~" || value == "null" || value == "Null" || value == "NULL");
    Node node = null ? Node::null() : Node::scalar(value);
    node.quoted = !plain;
    if (expects_key()) return begin_entry(at(mark), value);
    finish(at(mark), anchor, std::move(node));
  }

  void OnSequenceStart(const YAML::Mark& mark, const std::string&, YAML::anchor_t anchor,
                       YAML::EmitterStyle::value) override {
    open(at(mark), anchor, Node::sequence());
  }
  void OnSequenceEnd() override { close(); }
  void OnMapStart(const YAML::Mark& mark, const std::string&, YAML::anchor_t anchor,
                  YAML::EmitterStyle::value) override {
    open(at(mark), anchor, Node::mapping());
  }
  void OnMapEnd() override { close(); }

 private:
  struct Level {
    Node node;
    YAML::anchor_t anchor;
    std::optional<Node::Key> key;  // a mapping key whose value is still to come
  };

  Location at(const YAML::Mark& mark) const { return {name_, mark.line + 1, mark.column + 1}; }

  bool expects_key() const {
    return !levels_.empty() && levels_.back().node.kind == Node::Kind::kMapping && !levels_.back().key;
  }

  void begin_entry(Location where, const std::string& key) {
    for (const Node::Key& other : levels_.back().node.keys) {
      if (other.name == key) {
        fail<ConfigError>(to_string(where), ": ", key, ": duplicate key, first given at line ",
                          other.where.line);
      }
    }
    levels_.back().key = Node::Key{key, std::move(where)};
  }

  void require_value_position(const Location& where) const {
    if (expects_key()) fail<ConfigError>(to_string(where), ": malformed key: expected a plain word");
  }

  static void require_depth(const Location& where, std::size_t depth) {
    if (depth > kMaxDepth) fail<ConfigError>(to_string(where), ": nested deeper than ", kMaxDepth, " levels");
  }

  void open(Location where, YAML::anchor_t anchor, Node node) {
    require_value_position(where);
    require_depth(where, levels_.size() + 1);
    node.where = std::move(where);
    levels_.push_back({std::move(node), anchor, std::nullopt});
  }

  void close() {
    Level level = std::move(levels_.back());
    levels_.pop_back();
    const Location where = level.node.where;
    finish(where, level.anchor, std::move(level.node));
  }

  void finish(Location where, YAML::anchor_t anchor, Node node) {
    require_value_position(where);
    if (++num_nodes_ > limits_.max_nodes) {
      fail<ConfigError>(to_string(where), ": more than ", limits_.max_nodes, " values, aliases expanded");
    }
    node.where = std::move(where);
    if (anchor != 0) anchors_[anchor] = node;
    if (levels_.empty()) {
      root_ = std::move(node);
      return;
    }
    Level& parent = levels_.back();
    if (parent.key) {
      parent.node.keys.push_back(std::move(*parent.key));
      parent.key.reset();
    }
    parent.node.items.push_back(std::move(node));
  }

  std::string name_;
  ParseLimits limits_;
  std::size_t num_nodes_ = 0;
  std::vector<Level> levels_;
  std::map<YAML::anchor_t, Node> anchors_;
  std::optional<Node> root_;
};

// Length of the valid UTF-8 sequence at `position`, or 0.
std::size_t sequence_length(std::string_view text, std::size_t position) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char first = byte(position);
  if (first < 0x80) return first == 0 ? 0 : 1;
  const std::size_t length = first >= 0xf0 && first <= 0xf4 ? 4 : first >= 0xe0 ? 3 : first >= 0xc2 ? 2 : 0;
  if (first > 0xf4 || length == 0 || position + length > text.size()) return 0;
  for (std::size_t i = 1; i < length; ++i) {
    if ((byte(position + i) & 0xc0) != 0x80) return 0;
  }
  const unsigned char second = byte(position + 1);
  const bool overlong = (first == 0xe0 && second < 0xa0) || (first == 0xf0 && second < 0x90);
  const bool surrogate_or_above = (first == 0xed && second > 0x9f) || (first == 0xf4 && second > 0x8f);
  return overlong || surrogate_or_above ? 0 : length;
}

void require_utf8(std::string_view text, const std::string& name) {
  int line = 1;
  for (std::size_t position = 0; position < text.size();) {
    const std::size_t length = sequence_length(text, position);
    if (length == 0) fail<ConfigError>(name, ':', line, ": not UTF-8 text at byte offset ", position);
    line += text[position] == '\n';
    position += length;
  }
}

}  // namespace

Node parse_yaml(const std::string& text, const std::string& name, const ParseLimits& limits) {
  if (text.size() > limits.max_bytes) {
    fail<ConfigError>(name, ": ", text.size(), " bytes, more than the limit of ", limits.max_bytes);
  }
  require_utf8(text, name);
  try {
    std::istringstream stream(text);
    YAML::Parser parser(stream);
    TreeBuilder builder(name, limits);
    parser.HandleNextDocument(builder);
    TreeBuilder rest(name, limits);
    if (parser.HandleNextDocument(rest)) fail<ConfigError>(name, ": several YAML documents, expected one");
    return builder.take_root();
  } catch (const YAML::Exception& error) {
    fail<ConfigError>(name, ':', error.mark.line + 1, ':', error.mark.column + 1,
                      ": YAML syntax: ", error.msg);
  }
}

}  // namespace rlhf::config
