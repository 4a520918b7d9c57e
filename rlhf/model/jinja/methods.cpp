#include <algorithm>
#include <array>
#include <utility>

#include "rlhf/model/jinja/interpreter.h"
#include "rlhf/model/jinja/python_text.h"
#include "rlhf/model/utf8.h"

namespace rlhf::jinja {
namespace {

using Method = Value (*)(const Value& self, Arguments& arguments);
struct Entry {
  std::string_view name;
  Method method;
};

const std::string& string_argument(const Value& value, std::string_view method) {
  if (!value.is_string()) fail<TemplateError>(method, "() expects a str, got '", type_name(value), "'");
  return value.text();
}

Value texts(const std::vector<std::string>& parts) {
  std::vector<Value> items;
  for (const std::string& part : parts) items.emplace_back(part);
  return Value::list(std::move(items));
}

// --- str

template <std::string (*Function)(std::string_view)>
Value plain(const Value& self, Arguments& arguments) {
  const BoundArguments bound("str method", arguments, {});
  return Function(self.text());
}

template <bool (*Function)(std::string_view)>
Value predicate(const Value& self, Arguments& arguments) {
  const BoundArguments bound("str method", arguments, {});
  return Function(self.text());
}

template <python::CharacterClass Class>
Value is_class(const Value& self, Arguments& arguments) {
  const BoundArguments bound("str method", arguments, {});
  return python::all_of_class(self.text(), Class);
}

template <python::Side Ends>
Value strip(const Value& self, Arguments& arguments) {
  const BoundArguments bound("strip", arguments, {"chars"});
  if (!bound.has(0) || bound.at(0).is_none()) return python::strip(self.text(), std::nullopt, Ends);
  return python::strip(self.text(), string_argument(bound.at(0), "strip"), Ends);
}

template <bool FromRight>
Value split(const Value& self, Arguments& arguments) {
  const BoundArguments bound("split", arguments, {"sep", "maxsplit"});
  const std::int64_t limit = bound.integer(1, -1);
  if (!bound.has(0) || bound.at(0).is_none()) {
    return texts(FromRight ? python::rsplit_white_space(self.text(), limit)
                           : python::split_white_space(self.text(), limit));
  }
  const std::string& separator = string_argument(bound.at(0), "split");
  if (separator.empty()) fail<TemplateError>("empty separator");
  return texts(FromRight ? python::rsplit(self.text(), separator, limit)
                         : python::split(self.text(), separator, limit));
}

Value split_lines(const Value& self, Arguments& arguments) {
  const BoundArguments bound("splitlines", arguments, {"keepends"});
  return texts(python::split_lines(self.text(), bound.flag(0, false)));
}

// The part of the text that start and end select, as in text.startswith(prefix, start, end).
std::string selected_part(const Value& self, const BoundArguments& bound) {
  if (!bound.has(1)) return self.text();
  return slice(self, bound.at(1), bound.get(2, Value()), Value()).text();
}

template <bool AtStart>
Value has_affix(const Value& self, Arguments& arguments) {
  const BoundArguments bound(AtStart ? "startswith" : "endswith", arguments, {"affix", "start", "end"});
  const std::string text = selected_part(self, bound);
  const auto matches = [&](const Value& affix) {
    const std::string& wanted = string_argument(affix, AtStart ? "startswith" : "endswith");
    return AtStart ? text.starts_with(wanted) : text.ends_with(wanted);
  };
  const Sequence* choices = bound.at(0).as_sequence();
  if (choices && choices->kind == Sequence::Kind::kTuple)
    return std::any_of(choices->items.begin(), choices->items.end(), matches);
  return matches(bound.at(0));
}

Value replace(const Value& self, Arguments& arguments) {
  const BoundArguments bound("replace", arguments, {"old", "new", "count"});
  return python::replace(self.text(), string_argument(bound.at(0), "replace"),
                         string_argument(bound.at(1), "replace"), bound.integer(2, -1));
}

template <bool FromRight, bool MustExist>
Value find(const Value& self, Arguments& arguments) {
  const BoundArguments bound("find", arguments, {"sub", "start", "end"});
  const std::string text = selected_part(self, bound);
  const std::string& part = string_argument(bound.at(0), "find");
  std::int64_t place = FromRight ? python::rfind(text, part) : python::find(text, part);
  if (place < 0 && MustExist) fail<TemplateError>("substring not found");
  if (place >= 0 && bound.has(1)) {
    const std::int64_t start = bound.integer(1, 0);
    place += start < 0 ? std::max<std::int64_t>(0, start + length(self)) : start;
  }
  return place;
}

Value count_text(const Value& self, Arguments& arguments) {
  const BoundArguments bound("count", arguments, {"sub", "start", "end"});
  return python::count(selected_part(self, bound), string_argument(bound.at(0), "count"));
}

Value join(const Value& self, Arguments& arguments) {
  const BoundArguments bound("join", arguments, {"iterable"});
  std::string out;
  bool begun = false;
  for (const Value& item : iterate(bound.at(0))) {
    if (begun) out += self.text();
    begun = true;
    out += string_argument(item, "join");
    python::check_size(out.size());
  }
  return out;
}

template <bool Prefix>
Value remove_affix(const Value& self, Arguments& arguments) {
  const BoundArguments bound(Prefix ? "removeprefix" : "removesuffix", arguments, {"affix"});
  const std::string &text = self.text(), &affix = string_argument(bound.at(0), "removeprefix");
  if (affix.empty() || !(Prefix ? text.starts_with(affix) : text.ends_with(affix))) return text;
  return Prefix ? text.substr(affix.size()) : text.substr(0, text.size() - affix.size());
}

template <bool FromRight>
Value partition(const Value& self, Arguments& arguments) {
  const BoundArguments bound("partition", arguments, {"sep"});
  const std::string &text = self.text(), &separator = string_argument(bound.at(0), "partition");
  if (separator.empty()) fail<TemplateError>("empty separator");
  const std::size_t place = FromRight ? text.rfind(separator) : text.find(separator);
  if (place == std::string::npos)
    return FromRight ? Value::tuple({"", "", text}) : Value::tuple({text, "", ""});
  return Value::tuple({text.substr(0, place), separator, text.substr(place + separator.size())});
}

template <std::string (*Pad)(std::string_view, std::int64_t, std::string_view)>
Value pad(const Value& self, Arguments& arguments) {
  const BoundArguments bound("ljust", arguments, {"width", "fillchar"});
  const std::string fill = bound.text(1, " ");
  if (utf8::length(fill) != 1) fail<TemplateError>("The fill character must be exactly one character long");
  return Pad(self.text(), bound.at(0).to_int("width"), fill);
}

Value zero_fill(const Value& self, Arguments& arguments) {
  const BoundArguments bound("zfill", arguments, {"width"});
  const std::string& text = self.text();
  const bool sign = text.starts_with('-') || text.starts_with('+');
  const std::int64_t width = bound.at(0).to_int("zfill");
  return sign ? text.substr(0, 1) + python::pad_left(text.substr(1), width - 1, "0")
              : python::pad_left(text, width, "0");
}

Value expand_tabs(const Value& self, Arguments& arguments) {
  const BoundArguments bound("expandtabs", arguments, {"tabsize"});
  const std::int64_t size = std::clamp<std::int64_t>(bound.integer(0, 8), 0, 1000);
  std::string out;
  std::int64_t column = 0;
  for (const char32_t c : utf8::to_code_points(self.text())) {
    if (c == '\t' && size > 0) {
      const std::int64_t spaces = size - column % size;
      out.append(static_cast<std::size_t>(spaces), ' ');
      column += spaces;
    } else if (c != '\t') {
      utf8::append(out, c);
      column = c == '\n' || c == '\r' ? 0 : column + 1;
    }
    python::check_size(out.size());
  }
  return out;
}

Value format(const Value& self, Arguments& arguments) {
  return python::brace_format(self.text(), arguments);
}

Value format_map(const Value& self, Arguments& arguments) {
  const BoundArguments bound("format_map", arguments, {"mapping"});
  const Mapping* mapping = bound.at(0).as_mapping();
  if (!mapping) fail<TemplateError>("format_map() expects a dict");
  Arguments named;
  for (const auto& [key, value] : mapping->entries) named.named.emplace_back(to_text(key), value);
  return python::brace_format(self.text(), named);
}

constexpr std::array<Entry, 41> kTextMethods{{
    {"upper", plain<python::upper>},
    {"lower", plain<python::lower>},
    {"casefold", plain<python::lower>},
    {"title", plain<python::title>},
    {"capitalize", plain<python::capitalize>},
    {"swapcase", plain<python::swap_case>},
    {"strip", strip<python::Side::kBoth>},
    {"lstrip", strip<python::Side::kLeft>},
    {"rstrip", strip<python::Side::kRight>},
    {"split", split<false>},
    {"rsplit", split<true>},
    {"splitlines", split_lines},
    {"startswith", has_affix<true>},
    {"endswith", has_affix<false>},
    {"replace", replace},
    {"find", find<false, false>},
    {"rfind", find<true, false>},
    {"index", find<false, true>},
    {"rindex", find<true, true>},
    {"count", count_text},
    {"join", join},
    {"removeprefix", remove_affix<true>},
    {"removesuffix", remove_affix<false>},
    {"partition", partition<false>},
    {"rpartition", partition<true>},
    {"ljust", pad<python::pad_right>},
    {"rjust", pad<python::pad_left>},
    {"center", pad<python::center>},
    {"zfill", zero_fill},
    {"expandtabs", expand_tabs},
    {"format", format},
    {"format_map", format_map},
    {"islower", predicate<python::is_lower>},
    {"isupper", predicate<python::is_upper>},
    {"isalpha", is_class<python::CharacterClass::kAlpha>},
    {"isdigit", is_class<python::CharacterClass::kDigit>},
    {"isdecimal", is_class<python::CharacterClass::kDecimal>},
    {"isnumeric", is_class<python::CharacterClass::kNumeric>},
    {"isalnum", is_class<python::CharacterClass::kAlnum>},
    {"isspace", is_class<python::CharacterClass::kSpace>},
    {"isascii", is_class<python::CharacterClass::kAscii>},
}};

// --- list, tuple, range

Value index_of(const Value& self, Arguments& arguments) {
  const BoundArguments bound("index", arguments, {"value"});
  const auto& items = self.as_sequence()->items;
  const auto found =
      std::find_if(items.begin(), items.end(), [&](const Value& item) { return equal(item, bound.at(0)); });
  if (found == items.end()) fail<TemplateError>(repr(bound.at(0)), " is not in list");
  return static_cast<std::int64_t>(found - items.begin());
}

Value count_items(const Value& self, Arguments& arguments) {
  const BoundArguments bound("count", arguments, {"value"});
  const auto& items = self.as_sequence()->items;
  return static_cast<std::int64_t>(
      std::count_if(items.begin(), items.end(), [&](const Value& item) { return equal(item, bound.at(0)); }));
}

Value copy_list(const Value& self, Arguments&) {
  return Value::list(self.as_sequence()->items);
}

// transformers' sandbox forbids whatever changes a list or dict.
Value forbidden(const Value& self, Arguments&) {
  fail<TemplateError>("access to a method that changes a ", type_name(self),
                      " is unsafe: chat templates may not change their input");
}

constexpr std::array<Entry, 2> kSequenceMethods{{{"index", index_of}, {"count", count_items}}};
constexpr std::array<Entry, 9> kListMethods{{{"copy", copy_list},
                                             {"append", forbidden},
                                             {"extend", forbidden},
                                             {"insert", forbidden},
                                             {"pop", forbidden},
                                             {"remove", forbidden},
                                             {"clear", forbidden},
                                             {"sort", forbidden},
                                             {"reverse", forbidden}}};

// --- dict

template <Sequence::Kind Kind>
Value view(const Value& self, Arguments& arguments) {
  const BoundArguments bound("dict method", arguments, {});
  std::vector<Value> items;
  for (const auto& [key, value] : self.as_mapping()->entries) {
    if (Kind == Sequence::Kind::kItems) {
      items.push_back(Value::tuple({key, value}));
    } else {
      items.push_back(Kind == Sequence::Kind::kKeys ? key : value);
    }
  }
  return Value::sequence(Kind, std::move(items));
}

Value get(const Value& self, Arguments& arguments) {
  const BoundArguments bound("get", arguments, {"key", "default"});
  const Value* found = self.as_mapping()->find(bound.at(0));
  return found ? *found : bound.get(1, Value());
}

Value copy_dict(const Value& self, Arguments&) {
  return std::make_shared<Mapping>(*self.as_mapping());
}

constexpr std::array<Entry, 10> kDictMethods{{{"keys", view<Sequence::Kind::kKeys>},
                                              {"values", view<Sequence::Kind::kValues>},
                                              {"items", view<Sequence::Kind::kItems>},
                                              {"get", get},
                                              {"copy", copy_dict},
                                              {"pop", forbidden},
                                              {"popitem", forbidden},
                                              {"update", forbidden},
                                              {"setdefault", forbidden},
                                              {"clear", forbidden}}};

template <std::size_t N>
Method lookup(const std::array<Entry, N>& table, std::string_view name) {
  for (const Entry& entry : table) {
    if (entry.method && entry.name == name) return entry.method;
  }
  return nullptr;
}

Method lookup_method(const Value& object, std::string_view name) {
  if (object.is_string()) return lookup(kTextMethods, name);
  if (object.is_dict()) return lookup(kDictMethods, name);
  const Sequence* sequence = object.as_sequence();
  if (!sequence || sequence->kind >= Sequence::Kind::kKeys) return nullptr;
  const Method shared = lookup(kSequenceMethods, name);
  return shared || sequence->kind != Sequence::Kind::kList ? shared : lookup(kListMethods, name);
}

}  // namespace

Value find_method(const Value& object, const std::string& name) {
  const Method method = lookup_method(object, name);
  if (!method) return Value::undefined("no such method");
  return Value::callable(
      name, [object, method](Interpreter&, Arguments& arguments) { return method(object, arguments); });
}

}  // namespace rlhf::jinja
