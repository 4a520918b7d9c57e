#pragma once

#include <concepts>
#include <cstdint>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "rlhf/config/field.h"
#include "rlhf/config/node.h"

/// Between document nodes and typed values. `decode` returns nothing when it has set `value`, else what it
/// expected; `value` is then unchanged. `encode` writes a node that `decode` reads back to an equal value.
/// `type_name` is what `rlhf config` shows.
namespace rlhf::config {

using Expectation = std::optional<std::string>;

/// Returns " in [0, 1]", " above 0", " of at least 1", or "" for infinite bounds.
std::string describe(const Bounds& bounds);

template <class T>
struct Codec;

template <>
struct Codec<bool> {
  static Expectation decode(const Node& node, bool& value, const Bounds& bounds);
  static Node encode(bool value) { return Node::scalar(value ? "true" : "false"); }
  static std::string type_name() { return "bool"; }
};

template <>
struct Codec<std::int64_t> {
  static Expectation decode(const Node& node, std::int64_t& value, const Bounds& bounds);
  static Node encode(std::int64_t value) { return Node::scalar(std::to_string(value)); }
  static std::string type_name() { return "integer"; }
};

template <>
struct Codec<std::uint64_t> {
  static Expectation decode(const Node& node, std::uint64_t& value, const Bounds& bounds);
  static Node encode(std::uint64_t value) { return Node::scalar(std::to_string(value)); }
  static std::string type_name() { return "integer"; }
};

template <>
struct Codec<double> {
  static Expectation decode(const Node& node, double& value, const Bounds& bounds);
  static Node encode(double value);
  static std::string type_name() { return "number"; }
};

template <>
struct Codec<float> {
  static Expectation decode(const Node& node, float& value, const Bounds& bounds);
  static Node encode(float value);
  static std::string type_name() { return "number"; }
};

template <>
struct Codec<std::string> {
  static Expectation decode(const Node& node, std::string& value, const Bounds& bounds);
  static Node encode(const std::string& value) { return Node::quoted_scalar(value); }
  static std::string type_name() { return "text"; }
};

template <>
struct Codec<MemorySize> {
  static Expectation decode(const Node& node, MemorySize& value, const Bounds& bounds);
  static Node encode(const MemorySize& value) { return Node::scalar(to_string(value)); }
  static std::string type_name() { return "memory size"; }
};

/// Every other integer type goes through the 64-bit one of its signedness, with its own limits.
template <std::integral T>
struct Codec<T> {
  using Wide = std::conditional_t<std::signed_integral<T>, std::int64_t, std::uint64_t>;
  static Expectation decode(const Node& node, T& value, const Bounds& bounds) {
    Wide wide = 0;
    if (auto expected = Codec<Wide>::decode(node, wide, bounds)) return expected;
    if (wide < static_cast<Wide>(std::numeric_limits<T>::min()) ||
        wide > static_cast<Wide>(std::numeric_limits<T>::max())) {
      return "an integer of " + std::to_string(8 * sizeof(T)) + " bits";
    }
    value = static_cast<T>(wide);
    return {};
  }
  static Node encode(T value) { return Codec<Wide>::encode(static_cast<Wide>(value)); }
  static std::string type_name() { return "integer"; }
};

template <class T>
struct Codec<std::vector<T>> {
  static Expectation decode(const Node& node, std::vector<T>& value, const Bounds& bounds) {
    if (node.kind != Node::Kind::kSequence) return "a " + type_name();
    std::vector<T> parsed;
    for (const Node& item : node.items) {
      T element{};
      if (auto expected = Codec<T>::decode(item, element, bounds)) {
        return "each item to be " + *expected + " (item " + std::to_string(parsed.size() + 1) + " is " +
               describe(item) + ")";
      }
      parsed.push_back(std::move(element));
    }
    value = std::move(parsed);
    return {};
  }
  static Node encode(const std::vector<T>& value) {
    Node node = Node::sequence();
    for (const T& element : value) node.items.push_back(Codec<T>::encode(element));
    return node;
  }
  static std::string type_name() { return "list of " + Codec<T>::type_name(); }
};

template <class T>
struct Codec<std::optional<T>> {
  static Expectation decode(const Node& node, std::optional<T>& value, const Bounds& bounds) {
    if (node.kind == Node::Kind::kNull) {
      value.reset();
      return {};
    }
    T inner{};
    if (auto expected = Codec<T>::decode(node, inner, bounds)) return *expected + " or null";
    value = std::move(inner);
    return {};
  }
  static Node encode(const std::optional<T>& value) {
    return value ? Codec<T>::encode(*value) : Node::null();
  }
  static std::string type_name() { return Codec<T>::type_name() + " or null"; }
};

template <class T>
struct Codec<std::map<std::string, T>> {
  static Expectation decode(const Node& node, std::map<std::string, T>& value, const Bounds& bounds) {
    if (node.kind != Node::Kind::kMapping) return "a " + type_name();
    std::map<std::string, T> parsed;
    for (std::size_t i = 0; i < node.items.size(); ++i) {
      T element{};
      if (auto expected = Codec<T>::decode(node.items[i], element, bounds)) {
        return "each value to be " + *expected + " (" + node.keys[i].name + " is " + describe(node.items[i]) +
               ")";
      }
      parsed[node.keys[i].name] = std::move(element);
    }
    value = std::move(parsed);
    return {};
  }
  static Node encode(const std::map<std::string, T>& value) {
    Node node = Node::mapping();
    for (const auto& [key, element] : value) node.add(key, Codec<T>::encode(element));
    return node;
  }
  static std::string type_name() { return "map from text to " + Codec<T>::type_name(); }
};

}  // namespace rlhf::config
