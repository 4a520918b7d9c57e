#include "rlhf/config/value_codec.h"

#include <array>
#include <charconv>
#include <cmath>
#include <string_view>

#include "rlhf/core/error.h"

namespace rlhf::config {
namespace {

template <class T>
std::string shortest(T value) {
  if (std::isnan(value)) return ".nan";
  if (std::isinf(value)) return value > 0 ? ".inf" : "-.inf";
  std::array<char, 64> buffer;
  const auto end = std::to_chars(buffer.data(), buffer.data() + buffer.size(), value);
  return {buffer.data(), end.ptr};
}

template <class T>
bool parse_whole(std::string_view text, T& value) {
  if (!text.empty() && text[0] == '+') text.remove_prefix(1);
  const auto end = std::from_chars(text.data(), text.data() + text.size(), value);
  return end.ec == std::errc() && end.ptr == text.data() + text.size() && !text.empty();
}

bool is_plain_scalar(const Node& node) {
  return node.kind == Node::Kind::kScalar && !node.quoted;
}

bool inside(const Bounds& bounds, double value) {
  return value >= bounds.min && value <= bounds.max;
}

template <class T>
Expectation decode_integer(const Node& node, T& value, const Bounds& bounds) {
  T parsed = 0;
  const bool fits = is_plain_scalar(node) && parse_whole(node.text, parsed);
  if (!fits || !inside(bounds, static_cast<double>(parsed))) {
    const bool natural = std::is_unsigned_v<T> && std::isinf(bounds.min);
    return "an integer" + (natural ? describe(Bounds{0, bounds.max}) : describe(bounds));
  }
  value = parsed;
  return {};
}

template <class T>
Expectation decode_real(const Node& node, T& value, const Bounds& bounds) {
  T parsed = 0;
  bool fits = is_plain_scalar(node);
  if (fits && (node.text == ".inf" || node.text == "-.inf")) {
    parsed = node.text[0] == '-' ? -std::numeric_limits<T>::infinity() : std::numeric_limits<T>::infinity();
  } else {
    // from_chars would also take "inf" and "nan", which are words in YAML.
    fits = fits && node.text.find_first_of("nN") == std::string::npos && parse_whole(node.text, parsed);
  }
  if (!fits || !inside(bounds, static_cast<double>(parsed))) return "a number" + describe(bounds);
  value = parsed;
  return {};
}

struct Unit {
  std::string_view name;
  double bytes;
};
constexpr std::array<Unit, 9> kUnits = {{{"B", 1},
                                         {"KB", 1e3},
                                         {"MB", 1e6},
                                         {"GB", 1e9},
                                         {"TB", 1e12},
                                         {"KiB", 1024.0},
                                         {"MiB", 1048576.0},
                                         {"GiB", 1073741824.0},
                                         {"TiB", 1099511627776.0}}};

}  // namespace

std::string describe(const Bounds& bounds) {
  const bool has_min = !std::isinf(bounds.min), has_max = !std::isinf(bounds.max);
  const bool open_at_zero = bounds.min == std::numeric_limits<double>::denorm_min();
  if (has_min && has_max) {
    return concat(open_at_zero ? " in (" : " in [", open_at_zero ? "0" : shortest(bounds.min), ", ",
                  shortest(bounds.max), "]");
  }
  if (open_at_zero) return " above 0";
  if (has_min) return " of at least " + shortest(bounds.min);
  if (has_max) return " of at most " + shortest(bounds.max);
  return "";
}

Expectation Codec<bool>::decode(const Node& node, bool& value, const Bounds&) {
  if (!is_plain_scalar(node) || (node.text != "true" && node.text != "false")) return "true or false";
  value = node.text == "true";
  return {};
}

Expectation Codec<std::int64_t>::decode(const Node& node, std::int64_t& value, const Bounds& bounds) {
  return decode_integer(node, value, bounds);
}

Expectation Codec<std::uint64_t>::decode(const Node& node, std::uint64_t& value, const Bounds& bounds) {
  return decode_integer(node, value, bounds);
}

Expectation Codec<double>::decode(const Node& node, double& value, const Bounds& bounds) {
  return decode_real(node, value, bounds);
}
Node Codec<double>::encode(double value) {
  return Node::scalar(shortest(value));
}

Expectation Codec<float>::decode(const Node& node, float& value, const Bounds& bounds) {
  return decode_real(node, value, bounds);
}
Node Codec<float>::encode(float value) {
  return Node::scalar(shortest(value));
}

Expectation Codec<std::string>::decode(const Node& node, std::string& value, const Bounds&) {
  if (node.kind != Node::Kind::kScalar) return "text";
  value = node.text;
  return {};
}

Expectation Codec<MemorySize>::decode(const Node& node, MemorySize& value, const Bounds&) {
  const auto parsed = node.kind == Node::Kind::kScalar ? parse_memory_size(node.text) : std::nullopt;
  if (!parsed) return R"(a memory size such as 6GiB, 512MB or 80%)";
  value = *parsed;
  return {};
}

std::optional<MemorySize> parse_memory_size(const std::string& text) {
  double number = 0;
  const auto end = std::from_chars(text.data(), text.data() + text.size(), number);
  if (end.ec != std::errc() || !std::isfinite(number) || number < 0) return {};
  std::string_view unit(end.ptr, static_cast<std::size_t>(text.data() + text.size() - end.ptr));
  while (!unit.empty() && unit[0] == ' ') unit.remove_prefix(1);
  if (unit == "%") {
    if (number <= 0 || number > 100) return {};
    return MemorySize{0, number};
  }
  if (unit.empty()) unit = "B";
  for (const Unit& known : kUnits) {
    if (known.name != unit) continue;
    const double bytes = number * known.bytes;
    if (bytes >= 0x1p63) return {};
    return MemorySize{static_cast<std::uint64_t>(bytes), {}};
  }
  return {};
}

std::string to_string(const MemorySize& size) {
  if (size.percent) return shortest(*size.percent) + "%";
  for (auto unit = kUnits.rbegin(); unit != kUnits.rend(); ++unit) {
    const auto bytes = static_cast<std::uint64_t>(unit->bytes);
    if (unit->name.find('i') != std::string_view::npos && size.bytes >= bytes && size.bytes % bytes == 0) {
      return concat(size.bytes / bytes, unit->name);
    }
  }
  return std::to_string(size.bytes);
}

}  // namespace rlhf::config
