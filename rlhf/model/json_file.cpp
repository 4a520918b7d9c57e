#include "rlhf/model/json_file.h"

#include <cmath>
#include <fstream>
#include <unordered_set>
#include <vector>

#include "rlhf/core/error.h"

namespace rlhf {
namespace {

constexpr int kMaxJsonDepth = 256;
constexpr std::size_t kShownValue = 80;

template <typename Json>
Json parse_checked(std::string_view text, const std::string& source) {
  std::vector<std::unordered_set<std::string>> keys;
  // nlohmann's callback type: a value is complete (and the callback sees it) only after its nested events.
  typename Json::parser_callback_t check = [&](int depth, typename Json::parse_event_t event, Json& parsed) {
    using Event = typename Json::parse_event_t;
    if (depth > kMaxJsonDepth) {
      fail<IoError>(source, ": JSON is nested deeper than ", kMaxJsonDepth, " levels");
    }
    if (event == Event::object_start) {
      keys.resize(static_cast<std::size_t>(depth) + 1);
      keys.back().clear();
    } else if (event == Event::key) {
      const auto& name = parsed.template get_ref<const std::string&>();
      if (!keys[static_cast<std::size_t>(depth) - 1].insert(name).second) {
        fail<IoError>(source, ": key \"", name, "\" occurs twice in one JSON object");
      }
    }
    return true;
  };
  try {
    return Json::parse(text.begin(), text.end(), check);
  } catch (const nlohmann::json::exception& error) {
    const auto* parse_error = dynamic_cast<const nlohmann::json::parse_error*>(&error);
    fail<IoError>(source, ": offset ", parse_error ? parse_error->byte : 0,
                  ": expected JSON: ", error.what());
  }
}

}  // namespace

nlohmann::json parse_json(std::string_view text, const std::string& source) {
  return parse_checked<nlohmann::json>(text, source);
}

nlohmann::ordered_json parse_ordered_json(std::string_view text, const std::string& source) {
  return parse_checked<nlohmann::ordered_json>(text, source);
}

nlohmann::json read_json_file(const std::filesystem::path& path) {
  return parse_json(read_text_file(path), path.string());
}

JsonFields::JsonFields(const nlohmann::json& object, std::string source, std::string key_prefix)
    : object_(object), source_(std::move(source)), prefix_(std::move(key_prefix)) {
  if (!object_.is_object()) {
    fail<IoError>(source_, ": ", prefix_.empty() ? "the file" : prefix_, ": expected a JSON object");
  }
}

const nlohmann::json* JsonFields::find(std::string_view key) const {
  const auto found = object_.find(key);
  return found == object_.end() || found->is_null() ? nullptr : &*found;
}

bool JsonFields::is_null(std::string_view key) const {
  const auto found = object_.find(key);
  return found != object_.end() && found->is_null();
}

const nlohmann::json* JsonFields::find_any(std::initializer_list<std::string_view> keys) const {
  for (const std::string_view key : keys) {
    if (const auto* value = find(key)) return value;
  }
  return nullptr;
}

void JsonFields::reject(std::string_view key, std::string_view expected) const {
  const auto* value = find(key);
  std::string shown =
      value ? value->dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) : "missing";
  if (shown.size() > kShownValue) shown = shown.substr(0, kShownValue) + "...";
  fail<IoError>(source_, ": ", prefix_, key, ": ", shown, ": expected ", expected);
}

std::int64_t JsonFields::integer(std::string_view key, std::optional<std::int64_t> fallback, std::int64_t low,
                                 std::int64_t high) const {
  const auto* value = find(key);
  if (value == nullptr && fallback) return *fallback;
  const auto in_range = [&] {
    if (!value || !value->is_number_integer()) return false;
    if (value->is_number_unsigned() && value->get<std::uint64_t>() > static_cast<std::uint64_t>(INT64_MAX))
      return false;
    const auto number = value->get<std::int64_t>();
    return number >= low && number <= high;
  };
  if (!in_range()) reject(key, concat("an integer in [", low, ", ", high, "]"));
  return value->get<std::int64_t>();
}

double JsonFields::number(std::string_view key, std::optional<double> fallback, double low,
                          double high) const {
  const auto* value = find(key);
  if (value == nullptr && fallback) return *fallback;
  if (!value || !value->is_number() || !(value->get<double>() >= low && value->get<double>() <= high)) {
    reject(key, concat("a number in [", low, ", ", high, "]"));
  }
  return value->get<double>();
}

bool JsonFields::flag(std::string_view key, bool fallback) const {
  const auto* value = find(key);
  if (value == nullptr) return fallback;
  if (!value->is_boolean()) reject(key, "true or false");
  return value->get<bool>();
}

std::string JsonFields::text(std::string_view key, std::optional<std::string> fallback) const {
  const auto* value = find(key);
  if (value == nullptr && fallback) return *fallback;
  if (!value || !value->is_string()) reject(key, "a string");
  return value->get<std::string>();
}

}  // namespace rlhf
