#include <algorithm>
#include <cmath>
#include <cstdio>

#include "rlhf/model/jinja/interpreter.h"
#include "rlhf/model/jinja/python_text.h"
#include "rlhf/model/utf8.h"

namespace rlhf::jinja {
namespace {

/// Writes what Python's json.dumps writes.
class JsonWriter {
 public:
  bool ensure_ascii = false;
  bool sort_keys = false;
  std::optional<std::string> indent;
  std::string item_separator = ", ";
  std::string key_separator = ": ";
  std::string out;

  void write(const Value& value, int depth = 0) {
    if (depth > kMaxNesting) fail<TemplateError>("a value is nested deeper than ", kMaxNesting, " levels");
    python::check_size(out.size());
    const Sequence* sequence = value.as_sequence();
    const bool list =
        sequence && (sequence->kind <= Sequence::Kind::kTuple || sequence->kind == Sequence::Kind::kGroup);
    if (value.is_none())
      out += "null";
    else if (const bool* flag = value.get<bool>())
      out += *flag ? "true" : "false";
    else if (value.is_int())
      out += std::to_string(value.to_int(""));
    else if (value.is_float())
      out += float_text(value.to_float());
    else if (value.is_string())
      write_string(value.text());
    else if (list)
      write_list(*sequence, depth);
    else if (value.is_dict())
      write_dict(*value.as_mapping(), depth);
    else
      fail<TemplateError>("Object of type ", type_name(value), " is not JSON serializable");
  }

 private:
  static std::string float_text(double value) {
    if (std::isnan(value)) return "NaN";
    if (std::isinf(value)) return value > 0 ? "Infinity" : "-Infinity";
    return float_repr(value);
  }

  void new_line(int depth) {
    if (!indent) return;
    out += '\n';
    for (int i = 0; i < depth; ++i) out += *indent;
  }

  void escape(char32_t c) {
    char buffer[16];
    if (c > 0xFFFF) {
      std::snprintf(buffer, sizeof(buffer), "\\u%04x\\u%04x",
                    static_cast<unsigned>(0xD800 + ((c - 0x10000) >> 10)),
                    static_cast<unsigned>(0xDC00 + ((c - 0x10000) & 0x3FF)));
    } else {
      std::snprintf(buffer, sizeof(buffer), "\\u%04x", static_cast<unsigned>(c));
    }
    out += buffer;
  }

  void write_string(const std::string& text) {
    out += '"';
    for (const char32_t c : utf8::to_code_points(text)) {
      switch (c) {
        case '"':
          out += "\\\"";
          break;
        case '\\':
          out += "\\\\";
          break;
        case '\n':
          out += "\\n";
          break;
        case '\r':
          out += "\\r";
          break;
        case '\t':
          out += "\\t";
          break;
        case '\f':
          out += "\\f";
          break;
        case '\b':
          out += "\\b";
          break;
        default:
          if (c < 0x20 || (ensure_ascii && c > 0x7E)) {
            escape(c);
          } else {
            utf8::append(out, c);
          }
      }
    }
    out += '"';
  }

  void write_list(const Sequence& sequence, int depth) {
    if (sequence.items.empty()) {
      out += "[]";
      return;
    }
    out += '[';
    for (std::size_t i = 0; i < sequence.items.size(); ++i) {
      if (i > 0) out += item_separator;
      new_line(depth + 1);
      write(sequence.items[i], depth + 1);
    }
    new_line(depth);
    out += ']';
  }

  static std::string key_text(const Value& key) {
    if (key.is_string()) return key.text();
    if (key.is_none()) return "null";
    if (const bool* flag = key.get<bool>()) return *flag ? "true" : "false";
    if (key.is_int()) return std::to_string(key.to_int(""));
    if (key.is_float()) return float_text(key.to_float());
    fail<TemplateError>("keys must be str, int, float, bool or None, not ", type_name(key));
  }

  void write_dict(const Mapping& mapping, int depth) {
    if (mapping.entries.empty()) {
      out += "{}";
      return;
    }
    auto entries = mapping.entries;
    if (sort_keys) {
      std::stable_sort(entries.begin(), entries.end(),
                       [](const auto& a, const auto& b) { return less(a.first, b.first); });
    }
    out += '{';
    for (std::size_t i = 0; i < entries.size(); ++i) {
      if (i > 0) out += item_separator;
      new_line(depth + 1);
      write_string(key_text(entries[i].first));
      out += key_separator;
      write(entries[i].second, depth + 1);
    }
    new_line(depth);
    out += '}';
  }
};

std::string read_indent(const Value& value) {
  if (value.is_string()) return value.text();
  const std::int64_t width = value.to_int("tojson(indent)");
  if (width > 1000) fail<TemplateError>("tojson(indent): ", width, ": expected at most 1000");
  return std::string(static_cast<std::size_t>(std::max<std::int64_t>(width, 0)), ' ');
}

}  // namespace

Value to_json(Interpreter&, Arguments& arguments) {
  const BoundArguments bound("tojson", arguments, {"x", "ensure_ascii", "indent", "separators", "sort_keys"});
  JsonWriter writer;
  writer.ensure_ascii = bound.flag(1, false);
  writer.sort_keys = bound.flag(4, false);
  if (bound.has(2) && !bound.at(2).is_none()) {
    writer.indent = read_indent(bound.at(2));
    writer.item_separator = std::string(1, ',');
  }
  if (bound.has(3) && !bound.at(3).is_none()) {
    const std::vector<Value> separators = iterate(bound.at(3));
    if (separators.size() != 2) fail<TemplateError>("tojson(separators): expected two texts");
    writer.item_separator = to_text(separators[0]);
    writer.key_separator = to_text(separators[1]);
  }
  writer.write(bound.at(0));
  return std::move(writer.out);
}

}  // namespace rlhf::jinja
