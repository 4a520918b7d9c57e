#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "rlhf/model/jinja/python_text.h"
#include "rlhf/model/utf8.h"

namespace rlhf::jinja::python {

double round_half_even(double value, std::int64_t decimals) {
  if (!std::isfinite(value) || decimals > 300) return value;
  if (decimals < 0) {
    const double unit = std::pow(10.0, static_cast<double>(-std::max<std::int64_t>(decimals, -308)));
    return std::nearbyint(value / unit) * unit;
  }
  // printf rounds the exact binary value correctly, as Python does; dividing and multiplying would not.
  char buffer[1024];
  std::snprintf(buffer, sizeof(buffer), "%.*f", static_cast<int>(decimals), value);
  return std::strtod(buffer, nullptr);
}

namespace {

std::string group_digits(const std::string& digits) {
  std::string out;
  for (std::size_t i = 0; i < digits.size(); ++i) {
    if (i > 0 && (digits.size() - i) % 3 == 0) out += ',';
    out += digits[i];
  }
  return out;
}

/// [[fill]align][sign][#][0][width][,][.precision][type], of both kinds of formatting.
struct FormatSpec {
  std::string fill = " ";
  char align = 0;
  char sign = '-';
  bool alternate = false;
  bool grouped = false;
  std::int64_t width = 0;
  std::int64_t precision = -1;
  char type = 0;
};

constexpr std::int64_t kMaxWidth = 100000;

std::int64_t read_count(std::string_view& text, std::int64_t missing) {
  std::int64_t value = missing;
  while (!text.empty() && text[0] >= '0' && text[0] <= '9') {
    value = std::max<std::int64_t>(value, 0) * 10 + (text[0] - '0');
    if (value > kMaxWidth) fail<TemplateError>("format width or precision: expected at most ", kMaxWidth);
    text.remove_prefix(1);
  }
  return value;
}

bool take(std::string_view& text, char c) {
  if (text.empty() || text[0] != c) return false;
  text.remove_prefix(1);
  return true;
}

bool is_align(char c) {
  return c == '<' || c == '>' || c == '^' || c == '=';
}

FormatSpec parse_spec(std::string_view text) {
  FormatSpec spec;
  if (!text.empty()) {
    const std::size_t first = utf8::decode(text).size;
    if (text.size() > first && is_align(text[first])) {
      spec.fill = text.substr(0, first);
      spec.align = text[first];
      text.remove_prefix(first + 1);
    } else if (is_align(text[0])) {
      spec.align = text[0];
      text.remove_prefix(1);
    }
  }
  if (!text.empty() && (text[0] == '+' || text[0] == '-' || text[0] == ' ')) {
    spec.sign = text[0];
    text.remove_prefix(1);
  }
  spec.alternate = take(text, '#');
  if (!text.empty() && text[0] == '0' && spec.align == 0) {
    spec.fill = "0";
    spec.align = '=';
  }
  spec.width = read_count(text, 0);
  spec.grouped = take(text, ',');
  if (take(text, '.')) spec.precision = read_count(text, 0);
  if (!text.empty()) {
    spec.type = text[0];
    text.remove_prefix(1);
  }
  if (!text.empty()) fail<TemplateError>("Invalid format specifier");
  return spec;
}

std::string padding(const FormatSpec& spec, std::int64_t width) {
  return pad_left("", width, spec.fill);
}

std::string place(const std::string& sign, const std::string& body, const FormatSpec& spec,
                  char default_align) {
  const char align = spec.align ? spec.align : default_align;
  const auto used = static_cast<std::int64_t>(utf8::length(sign) + utf8::length(body));
  if (align == '=') return sign + padding(spec, spec.width - used) + body;
  const std::string whole = sign + body;
  if (align == '<') return pad_right(whole, spec.width, spec.fill);
  if (align == '>') return pad_left(whole, spec.width, spec.fill);
  const std::int64_t missing = std::max<std::int64_t>(0, spec.width - used);
  return padding(spec, missing / 2) + whole + padding(spec, missing - missing / 2);
}

std::string sign_text(bool negative, char rule) {
  return negative ? "-" : rule == '+' ? "+" : rule == ' ' ? " " : "";
}

std::string format_integer(std::int64_t value, const FormatSpec& spec) {
  const auto magnitude =
      value < 0 ? 0 - static_cast<std::uint64_t>(value) : static_cast<std::uint64_t>(value);
  const bool octal = spec.type == 'o', hex = spec.type == 'x' || spec.type == 'X';
  char buffer[80];
  std::snprintf(buffer, sizeof(buffer),
                octal              ? "%lo"
                : spec.type == 'x' ? "%lx"
                : spec.type == 'X' ? "%lX"
                                   : "%lu",
                static_cast<unsigned long>(magnitude));
  std::string digits = buffer;
  if (spec.type == 'b') {
    digits.clear();
    for (std::uint64_t rest = magnitude; rest > 0; rest >>= 1)
      digits.insert(digits.begin(), static_cast<char>('0' + (rest & 1)));
    if (digits.empty()) digits = "0";
  }
  if (spec.precision > static_cast<std::int64_t>(digits.size()))
    digits = pad_left(digits, spec.precision, "0");
  if (spec.grouped) digits = group_digits(digits);
  std::string sign = sign_text(value < 0, spec.sign);
  if (spec.alternate && (octal || hex || spec.type == 'b'))
    sign += octal ? "0o" : spec.type == 'b' ? "0b" : spec.type == 'x' ? "0x" : "0X";
  return place(sign, digits, spec, '>');
}

std::string format_float(double value, const FormatSpec& spec) {
  const double magnitude = std::fabs(value);
  char type = spec.type == '%' ? 'f' : spec.type;
  std::string body;
  if (type == 0 && spec.precision < 0) {
    body = float_repr(magnitude);
  } else {
    if (type == 0) type = 'g';
    if (std::string_view("eEfFgG").find(type) == std::string_view::npos)
      fail<TemplateError>("Unknown format code '", type, "' for a float");
    const std::string pattern = concat("%", spec.alternate ? "#" : "", ".*", type);
    const int precision = static_cast<int>(spec.precision < 0 ? 6 : spec.precision);
    const double shown = spec.type == '%' ? magnitude * 100 : magnitude;
    const int size = std::snprintf(nullptr, 0, pattern.c_str(), precision, shown);
    std::vector<char> buffer(static_cast<std::size_t>(size) + 1);
    std::snprintf(buffer.data(), buffer.size(), pattern.c_str(), precision, shown);
    body = buffer.data();
  }
  if (spec.grouped) {
    const std::size_t digits = std::min(body.find_first_not_of("0123456789"), body.size());
    body = group_digits(body.substr(0, digits)) + body.substr(digits);
  }
  if (spec.type == '%') body += "%";
  return place(sign_text(std::signbit(value), spec.sign), body, spec, '>');
}

std::string format_text(std::string text, const FormatSpec& spec) {
  if (spec.precision >= 0) {
    const std::u32string points = utf8::to_code_points(text);
    text = utf8::from_code_points(
        std::u32string_view(points).substr(0, static_cast<std::size_t>(spec.precision)));
  }
  return place("", text, spec, '<');
}

std::string format_value(const Value& value, const FormatSpec& spec) {
  const bool integer_type =
      spec.type == 0 || std::string_view("dboxXn").find(spec.type) != std::string_view::npos;
  if (value.is_int() || (value.is_bool() && spec.type != 0)) {
    if (integer_type) return format_integer(value.to_int(""), spec);
    if (spec.type == 'c')
      return format_text(utf8::from_code_points(std::u32string(1, static_cast<char32_t>(value.to_int("")))),
                         spec);
    return format_float(value.to_float(), spec);
  }
  if (value.is_float()) return format_float(value.to_float(), spec);
  if (spec.type != 0 && spec.type != 's')
    fail<TemplateError>("Unknown format code '", spec.type, "' for '", type_name(value), "'");
  return format_text(to_text(value), spec);
}

/// Hands out the arguments of a % format: a tuple one by one, a dict by name, anything else once.
class PercentArguments {
 public:
  explicit PercentArguments(const Value& value) : value_(value) {
    const Sequence* sequence = value.as_sequence();
    if (sequence && sequence->kind == Sequence::Kind::kTuple)
      items_ = sequence->items;
    else
      items_ = {value};
  }
  Value next() {
    if (used_ == items_.size()) fail<TemplateError>("not enough arguments for format string");
    return items_[used_++];
  }
  Value named(std::string_view name) {
    const Mapping* mapping = value_.as_mapping();
    if (!mapping) fail<TemplateError>("format requires a mapping");
    const Value* found = mapping->find_text(name);
    if (!found) fail<TemplateError>("key '", name, "' of a format is missing");
    used_ = items_.size();
    return *found;
  }
  void require_all_used() const {
    if (used_ != items_.size() && !value_.is_dict())
      fail<TemplateError>("not all arguments converted during string formatting");
  }

 private:
  const Value& value_;
  std::vector<Value> items_;
  std::size_t used_ = 0;
};

std::string percent_field(std::string_view& format, PercentArguments& arguments) {
  std::optional<std::string> name;
  if (take(format, '(')) {
    const std::size_t end = format.find(')');
    if (end == std::string_view::npos) fail<TemplateError>("incomplete format key");
    name = format.substr(0, end);
    format.remove_prefix(end + 1);
  }
  FormatSpec spec;
  bool left = false, zero = false;
  for (; !format.empty() && std::string_view("-+ 0#").find(format[0]) != std::string_view::npos;
       format.remove_prefix(1)) {
    if (format[0] == '-')
      left = true;
    else if (format[0] == '0')
      zero = true;
    else if (format[0] == '#')
      spec.alternate = true;
    else
      spec.sign = format[0];
  }
  spec.width = read_count(format, 0);
  if (take(format, '.')) spec.precision = read_count(format, 0);
  if (format.empty()) fail<TemplateError>("incomplete format");
  spec.type = format[0];
  format.remove_prefix(1);
  if (spec.type == '%') return "%";
  spec.align = left ? '<' : '>';
  const Value value = name ? arguments.named(*name) : arguments.next();
  if (spec.type == 's') return format_text(to_text(value), spec);
  if (spec.type == 'r') return format_text(repr(value), spec);
  if (!value.is_number())
    fail<TemplateError>("%", spec.type, " format: a number is required, not ", type_name(value));
  if (zero && !left) {
    spec.fill = "0";
    spec.align = '=';
  }
  if (spec.type == 'i' || spec.type == 'u') spec.type = 'd';
  if (spec.type == 'd' && value.is_float())
    return format_integer(static_cast<std::int64_t>(value.to_float()), spec);
  return format_value(value.is_bool() ? Value(value.to_int("")) : value, spec);
}

/// Resolves the field names of one brace format: counts automatic positions.
class BraceArguments {
 public:
  explicit BraceArguments(const Arguments& arguments) : arguments_(arguments) {}

  Value find(std::string_view name) {
    if (name.empty()) return position(next_++);
    if (name.find_first_not_of("0123456789") == std::string_view::npos) {
      return position(name.size() > 6 ? SIZE_MAX : static_cast<std::size_t>(std::stoul(std::string(name))));
    }
    for (const auto& [own, value] : arguments_.named) {
      if (own == name) return value;
    }
    fail<TemplateError>("format field '", name, "' has no argument");
  }

 private:
  Value position(std::size_t index) const {
    if (index >= arguments_.positional.size())
      fail<TemplateError>("format: no argument for position ", index);
    return arguments_.positional[index];
  }
  const Arguments& arguments_;
  std::size_t next_ = 0;
};

Value follow_item(const Value& value, std::string_view key) {
  if (const Mapping* mapping = value.as_mapping()) {
    if (const Value* found = mapping->find_text(key)) return *found;
  }
  const Sequence* sequence = value.as_sequence();
  if (sequence && !key.empty() && key.size() < 7 &&
      key.find_first_not_of("0123456789") == std::string_view::npos) {
    const auto index = static_cast<std::size_t>(std::stoul(std::string(key)));
    if (index < sequence->items.size()) return sequence->items[index];
  }
  fail<TemplateError>("format: '", type_name(value), "' has no item ", key);
}

Value find_field(BraceArguments& arguments, std::string_view name) {
  const std::size_t bracket = std::min(name.find('['), name.size());
  Value value = arguments.find(name.substr(0, bracket));
  for (std::string_view rest = name.substr(bracket); !rest.empty();) {
    const std::size_t end = rest.find(']');
    if (rest[0] != '[' || end == std::string_view::npos) fail<TemplateError>("format: bad field name ", name);
    value = follow_item(value, rest.substr(1, end - 1));
    rest.remove_prefix(end + 1);
  }
  return value;
}

std::string brace_field(std::string_view field, BraceArguments& arguments) {
  const std::size_t colon = std::min(field.find(':'), field.size());
  std::string_view name = field.substr(0, colon);
  char conversion = 0;
  if (const std::size_t mark = name.find('!'); mark != std::string_view::npos) {
    conversion = mark + 1 < name.size() ? name[mark + 1] : '?';
    name = name.substr(0, mark);
  }
  Value value = find_field(arguments, name);
  if (conversion == 'r')
    value = repr(value);
  else if (conversion == 's')
    value = to_text(value);
  else if (conversion != 0)
    fail<TemplateError>("format: unknown conversion !", conversion);
  const std::string_view spec = colon < field.size() ? field.substr(colon + 1) : "";
  return spec.empty() ? to_text(value) : format_value(value, parse_spec(spec));
}

}  // namespace

std::string percent_format(std::string_view format, const Value& value) {
  std::string out;
  PercentArguments arguments(value);
  while (!format.empty()) {
    const std::size_t mark = std::min(format.find('%'), format.size());
    out += format.substr(0, mark);
    format.remove_prefix(mark);
    if (take(format, '%')) out += percent_field(format, arguments);
    check_size(out.size());
  }
  arguments.require_all_used();
  return out;
}

std::string brace_format(std::string_view format, const Arguments& given) {
  std::string out;
  BraceArguments arguments(given);
  while (!format.empty()) {
    const char c = format[0];
    format.remove_prefix(1);
    if ((c == '{' || c == '}') && take(format, c)) {
      out += c;
    } else if (c == '{') {
      const std::size_t end = format.find('}');
      if (end == std::string_view::npos) fail<TemplateError>("expected '}' before end of string");
      out += brace_field(format.substr(0, end), arguments);
      format.remove_prefix(end + 1);
    } else if (c == '}') {
      fail<TemplateError>("Single '}' encountered in format string");
    } else {
      out += c;
    }
    check_size(out.size());
  }
  return out;
}

}  // namespace rlhf::jinja::python
