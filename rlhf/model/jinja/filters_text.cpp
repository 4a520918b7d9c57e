#include <algorithm>
#include <array>
#include <cstdio>
#include <utility>

#include "rlhf/model/jinja/filters.h"

#include "rlhf/model/jinja/python_text.h"
#include "rlhf/model/utf8.h"

namespace rlhf::jinja {
namespace {

template <std::string (*Function)(std::string_view)>
Value text_filter(Interpreter&, Arguments& arguments) {
  return Function(BoundArguments("filter", arguments, {"s"}).text(0, ""));
}

// Jinja's own title(): words begin after white space, hyphens and opening brackets.
std::string title_words(std::string_view text) {
  std::string out, word;
  const auto flush = [&] {
    const std::size_t first = word.empty() ? 0 : utf8::decode(word).size;
    out += python::upper(word.substr(0, first)) + python::lower(word.substr(first));
    word.clear();
  };
  for (const char32_t c : utf8::to_code_points(text)) {
    const bool splits = utf8::is_space(c) || c == '-' || c == '(' || c == '{' || c == '[' || c == '<';
    if (splits) flush();
    utf8::append(splits ? out : word, c);
  }
  flush();
  return out;
}

Value trim(Interpreter&, Arguments& arguments) {
  const BoundArguments bound("trim", arguments, {"value", "chars"});
  const std::string characters = bound.text(1, "");
  const bool given = bound.has(1) && !bound.at(1).is_none();
  return python::strip(bound.text(0, ""), given ? std::optional<std::string_view>(characters) : std::nullopt,
                       python::Side::kBoth);
}

Value replace(Interpreter&, Arguments& arguments) {
  const BoundArguments bound("replace", arguments, {"s", "old", "new", "count"});
  return python::replace(bound.text(0, ""), to_text(bound.at(1)), to_text(bound.at(2)), bound.integer(3, -1));
}

Value indent(Interpreter&, Arguments& arguments) {
  const BoundArguments bound("indent", arguments, {"s", "width", "first", "blank"});
  const Value width = bound.get(1, std::int64_t{4});
  const std::string margin =
      width.is_string() ? width.text() : python::pad_left("", width.to_int("indent(width)"), " ");
  std::vector<std::string> lines = python::split_lines(bound.text(0, "") + "\n");
  const bool blank = bound.flag(3, false);
  std::string out = bound.flag(2, false) ? margin : "";
  for (std::size_t i = 0; i < lines.size(); ++i) {
    if (i > 0) out += "\n";
    if (i > 0 && (blank || !lines[i].empty())) out += margin;
    out += lines[i];
    python::check_size(out.size());
  }
  return out;
}

Value center(Interpreter&, Arguments& arguments) {
  const BoundArguments bound("center", arguments, {"value", "width"});
  return python::center(bound.text(0, ""), bound.integer(1, 80), " ");
}

Value truncate(Interpreter&, Arguments& arguments) {
  const BoundArguments bound("truncate", arguments, {"s", "length", "killwords", "end", "leeway"});
  const std::string text = bound.text(0, ""), end = bound.text(3, "...");
  const std::int64_t limit = bound.integer(1, 255), leeway = bound.integer(4, 5);
  const std::u32string points = utf8::to_code_points(text);
  if (static_cast<std::int64_t>(points.size()) <= limit + leeway) return text;
  const auto end_size = static_cast<std::int64_t>(utf8::length(end));
  if (limit < end_size) fail<TemplateError>("truncate: expected length >= ", end_size, ", got ", limit);
  const std::string cut = utf8::from_code_points(
      std::u32string_view(points).substr(0, static_cast<std::size_t>(limit - end_size)));
  return (bound.flag(2, false) ? cut : python::rsplit(cut, " ", 1).front()) + end;
}

// A paragraph is broken at spaces; words longer than a line are cut, as textwrap does by default.
std::string wrap_line(const std::string& line, std::int64_t width, bool break_long,
                      const std::string& separator) {
  std::string out, current;
  const auto size = [](const std::string& text) { return static_cast<std::int64_t>(utf8::length(text)); };
  const auto flush = [&] {
    current = python::strip(current, std::nullopt, python::Side::kRight);
    if (!current.empty()) out += (out.empty() ? "" : separator) + current;
    current.clear();
  };
  for (std::string word : python::split(line, " ", -1)) {
    if (!current.empty() && size(current) + size(word) > width) flush();
    while (break_long && size(word) > width) {
      const std::u32string points = utf8::to_code_points(word);
      out += (out.empty() ? "" : separator) +
             utf8::from_code_points(std::u32string_view(points).substr(0, static_cast<std::size_t>(width)));
      word = utf8::from_code_points(std::u32string_view(points).substr(static_cast<std::size_t>(width)));
    }
    current += word + " ";
  }
  flush();
  return out;
}

Value wordwrap(Interpreter&, Arguments& arguments) {
  const BoundArguments bound("wordwrap", arguments,
                             {"s", "width", "break_long_words", "wrapstring", "break_on_hyphens"});
  const std::int64_t width = bound.integer(1, 79);
  if (width < 1) fail<TemplateError>("wordwrap: invalid width ", width);
  const std::string separator = bound.has(3) && !bound.at(3).is_none() ? bound.text(3, "\n") : "\n";
  std::string out;
  bool first = true;
  for (const std::string& line : python::split_lines(bound.text(0, ""))) {
    if (!first) out += separator;
    out += wrap_line(line, width, bound.flag(2, true), separator);
    first = false;
  }
  return out;
}

Value wordcount(Interpreter&, Arguments& arguments) {
  const BoundArguments bound("wordcount", arguments, {"s"});
  std::int64_t words = 0;
  bool inside = false;
  for (const char32_t c : utf8::to_code_points(bound.text(0, ""))) {
    std::string one;
    utf8::append(one, c);
    const bool word = c == '_' || python::all_of_class(one, python::CharacterClass::kAlnum);
    words += word && !inside;
    inside = word;
  }
  return words;
}

std::string escape_html(std::string_view text) {
  std::string out;
  for (const char c : text) {
    if (c == '&')
      out += "&amp;";
    else if (c == '<')
      out += "&lt;";
    else if (c == '>')
      out += "&gt;";
    else if (c == '"')
      out += "&#34;";
    else if (c == '\'')
      out += "&#39;";
    else
      out += c;
  }
  return out;
}

std::string strip_tags(std::string_view text) {
  std::string out;
  bool tag = false;
  for (const char c : text) {
    if (c == '<')
      tag = true;
    else if (c == '>' && tag)
      tag = false;
    else if (!tag)
      out += c;
  }
  std::string joined;
  for (const std::string& word : python::split_white_space(out, -1))
    joined += (joined.empty() ? "" : " ") + word;
  return joined;
}

std::string quote_url(std::string_view text, bool keep_slash) {
  constexpr std::string_view kPlain = "-._~";
  std::string out;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    const bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
    if (letter || kPlain.find(c) != std::string_view::npos || (keep_slash && c == '/')) {
      out += c;
    } else {
      char buffer[4];
      std::snprintf(buffer, sizeof(buffer), "%%%02X", byte);
      out += buffer;
    }
  }
  return out;
}

Value urlencode(Interpreter&, Arguments& arguments) {
  const BoundArguments bound("urlencode", arguments, {"value"});
  const Value& value = bound.at(0);
  if (value.is_string() || (!value.is_dict() && !value.as_sequence())) return quote_url(to_text(value), true);
  std::string out;
  const auto add = [&](const Value& key, const Value& item) {
    out +=
        concat(out.empty() ? "" : "&", quote_url(to_text(key), false), "=", quote_url(to_text(item), false));
  };
  if (const Mapping* mapping = value.as_mapping()) {
    for (const auto& [key, item] : mapping->entries) add(key, item);
    return out;
  }
  for (const Value& pair : iterate(value)) {
    const std::vector<Value> parts = iterate(pair);
    if (parts.size() != 2) fail<TemplateError>("urlencode: expected pairs");
    add(parts[0], parts[1]);
  }
  return out;
}

Value format_text(Interpreter&, Arguments& arguments) {
  if (arguments.positional.empty()) fail<TemplateError>("format: expected a text");
  const std::string text = to_text(arguments.positional[0]);
  if (!arguments.named.empty()) {
    auto mapping = std::make_shared<Mapping>();
    for (auto& [name, value] : arguments.named) mapping->set(Value(name), value);
    return python::percent_format(text, Value(std::move(mapping)));
  }
  return python::percent_format(text,
                                Value::tuple({arguments.positional.begin() + 1, arguments.positional.end()}));
}

Value filesizeformat(Interpreter&, Arguments& arguments) {
  const BoundArguments bound("filesizeformat", arguments, {"value", "binary"});
  const double bytes = bound.at(0).to_float();
  const bool binary = bound.flag(1, false);
  const double base = binary ? 1024 : 1000;
  if (bytes == 1) return "1 Byte";
  if (bytes < base) return concat(static_cast<std::int64_t>(bytes), " Bytes");
  constexpr const char* kDecimal[] = {"kB", "MB", "GB", "TB", "PB", "EB", "ZB", "YB"};
  constexpr const char* kBinary[] = {"KiB", "MiB", "GiB", "TiB", "PiB", "EiB", "ZiB", "YiB"};
  double unit = base;
  for (std::size_t i = 0;; ++i) {
    unit *= base;
    if (bytes < unit || i == 7) {
      char buffer[64];
      std::snprintf(buffer, sizeof(buffer), "%.1f %s", base * bytes / unit,
                    binary ? kBinary[i] : kDecimal[i]);
      return std::string(buffer);
    }
  }
}

Value xml_attributes(Interpreter&, Arguments& arguments) {
  const BoundArguments bound("xmlattr", arguments, {"d", "autospace"});
  if (!bound.at(0).is_dict()) fail<TemplateError>("xmlattr: expected a dict");
  std::string out;
  for (const auto& [key, value] : bound.at(0).as_mapping()->entries) {
    if (value.is_none() || value.is_undefined()) continue;
    out +=
        concat(out.empty() ? "" : " ", escape_html(to_text(key)), "=\"", escape_html(to_text(value)), "\"");
  }
  return bound.flag(1, true) && !out.empty() ? " " + out : out;
}

constexpr std::array<std::pair<std::string_view, FilterFunction>, 19> kTextFilters{{
    {"capitalize", text_filter<python::capitalize>},
    {"center", center},
    {"e", text_filter<escape_html>},
    {"escape", text_filter<escape_html>},
    {"filesizeformat", filesizeformat},
    {"forceescape", text_filter<escape_html>},
    {"format", format_text},
    {"indent", indent},
    {"lower", text_filter<python::lower>},
    {"replace", replace},
    {"striptags", text_filter<strip_tags>},
    {"title", text_filter<title_words>},
    {"trim", trim},
    {"truncate", truncate},
    {"upper", text_filter<python::upper>},
    {"urlencode", urlencode},
    {"wordcount", wordcount},
    {"wordwrap", wordwrap},
    {"xmlattr", xml_attributes},
}};

}  // namespace

FilterFunction find_text_filter(std::string_view name) {
  for (const auto& [own, function] : kTextFilters) {
    if (own == name) return function;
  }
  return nullptr;
}

}  // namespace rlhf::jinja
