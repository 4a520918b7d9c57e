#include "rlhf/verify/golden_case.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "rlhf/core/error.h"

namespace rlhf::verify {
namespace {

double read_number(const nlohmann::json& json) {
  if (json.is_boolean()) return json.get<bool>() ? 1 : 0;
  if (json.is_number()) return json.get<double>();
  if (json.is_string()) {
    const auto& text = json.get_ref<const std::string&>();
    if (text == "nan") return std::numeric_limits<double>::quiet_NaN();
    if (text == "inf") return std::numeric_limits<double>::infinity();
    if (text == "-inf") return -std::numeric_limits<double>::infinity();
  }
  fail<InvalidArgument>("expected a number, got ", json.dump());
}

void collect(const nlohmann::json& json, std::size_t depth, Tensor& tensor) {
  if (!json.is_array()) {
    RLHF_CHECK(depth == tensor.shape.size(), "ragged list: a number at depth ", depth);
    tensor.values.push_back(read_number(json));
    return;
  }
  RLHF_CHECK(depth < tensor.shape.size() && json.size() == tensor.shape[depth], "ragged list: ", json.size(),
             " items at depth ", depth);
  for (const auto& item : json) collect(item, depth + 1, tensor);
}

const nlohmann::json& member(const nlohmann::json& json, const char* key) {
  static const nlohmann::json kEmpty = nlohmann::json::object();
  const auto it = json.find(key);
  return it == json.end() || !it->is_object() ? kEmpty : *it;
}

// Absolute difference, with equal infinities and two NaN counting as equal.
double difference(double actual, double expected) {
  if (std::isnan(expected)) return std::isnan(actual) ? 0 : std::numeric_limits<double>::infinity();
  if (std::isinf(expected)) return actual == expected ? 0 : std::numeric_limits<double>::infinity();
  return std::isfinite(actual) ? std::abs(actual - expected) : std::numeric_limits<double>::infinity();
}

}  // namespace

std::span<const double> Tensor::row(std::size_t index) const {
  RLHF_CHECK(!shape.empty() && index < shape[0], "tensor row ", index, " does not exist");
  const std::size_t width = values.size() / shape[0];
  return std::span(values).subspan(index * width, width);
}

Tensor read_tensor(const nlohmann::json& json) {
  Tensor tensor;
  for (const nlohmann::json* level = &json; level->is_array(); level = &level->front()) {
    tensor.shape.push_back(level->size());
    if (level->empty()) break;
  }
  collect(json, 0, tensor);
  return tensor;
}

MatrixRows matrix_rows(const Tensor& mask) {
  RLHF_CHECK(mask.shape.size() == 2, "a mask must have two axes, got ", mask.shape.size());
  MatrixRows rows;
  for (std::size_t row = 0; row <= mask.shape[0]; ++row) rows.offsets.push_back(row * mask.shape[1]);
  for (const double value : mask.values) rows.mask.push_back(value != 0);
  return rows;
}

GoldenCase::GoldenCase(const nlohmann::json& json, std::filesystem::path directory, VerifyResult& result)
    : json_(json),
      params_(member(json, "params")),
      inputs_(member(json, "inputs")),
      outputs_(member(json, "outputs")),
      name_(json.value("name", "unnamed")),
      dtype_(json.value("dtype", "")),
      directory_(std::move(directory)),
      result_(result) {}

Tolerance GoldenCase::tolerance() const {
  return is_float32() ? Tolerance{1e-5, 1e-7} : Tolerance{};
}

Tolerance GoldenCase::at_least(double relative) const {
  Tolerance t = tolerance();
  t.absolute = std::max(t.absolute, relative * 1e-3);
  t.relative = std::max(t.relative, relative);
  return t;
}

bool GoldenCase::has_param(const std::string& key) const {
  used_params_.insert(key);
  return params_.contains(key) && !params_[key].is_null();
}

const nlohmann::json& GoldenCase::param(const std::string& key) {
  RLHF_CHECK(has_param(key), "parameter '", key, "' is missing");
  return params_[key];
}

double GoldenCase::number(const std::string& key) {
  return read_number(param(key));
}
double GoldenCase::number(const std::string& key, double otherwise) {
  return has_param(key) ? number(key) : otherwise;
}
std::size_t GoldenCase::count(const std::string& key) {
  const double value = number(key);
  RLHF_CHECK(value >= 1 && value == std::floor(value), "parameter '", key, "' is ", value,
             ", expected a count");
  return static_cast<std::size_t>(value);
}

std::optional<double> GoldenCase::optional_number(const std::string& key) {
  return has_param(key) ? std::optional(number(key)) : std::nullopt;
}
std::optional<std::pair<double, double>> GoldenCase::optional_range(const std::string& key) {
  if (!has_param(key)) return std::nullopt;
  const Tensor range = read_tensor(param(key));
  RLHF_CHECK(range.values.size() == 2, "parameter '", key, "' must have two numbers");
  return std::pair(range.values[0], range.values[1]);
}
bool GoldenCase::flag(const std::string& key, bool otherwise) {
  return has_param(key) ? number(key) != 0 : otherwise;
}
std::string GoldenCase::text(const std::string& key) {
  const auto& json = param(key);
  RLHF_CHECK(json.is_string(), "parameter '", key, "' is ", json.dump(), ", expected a text");
  return json.get<std::string>();
}
std::string GoldenCase::text(const std::string& key, const std::string& otherwise) {
  return has_param(key) ? text(key) : otherwise;
}

bool GoldenCase::has_input(const std::string& key) const {
  return inputs_.contains(key) && !inputs_[key].is_null();
}

const nlohmann::json& GoldenCase::raw_input(const std::string& key) {
  RLHF_CHECK(has_input(key), "input '", key, "' is missing");
  used_inputs_.insert(key);
  return inputs_[key];
}

Tensor GoldenCase::input(const std::string& key) {
  return read_tensor(raw_input(key));
}

std::optional<std::vector<double>> GoldenCase::optional_values(const std::string& key) {
  used_inputs_.insert(key);
  return has_input(key) ? std::optional(values(key)) : std::nullopt;
}

const nlohmann::json& GoldenCase::output(const std::string& key) {
  used_outputs_.insert(key);
  RLHF_CHECK(outputs_.contains(key), "output '", key, "' is missing");
  return outputs_[key];
}

const nlohmann::json& GoldenCase::outputs() {
  for (const auto& [key, value] : outputs_.items()) used_outputs_.insert(key);
  return outputs_;
}

void GoldenCase::check(const std::string& key, std::span<const double> actual, Tolerance tolerance) {
  compare(key, actual, read_tensor(output(key)).values, tolerance);
}

void GoldenCase::check(const std::string& key, double actual, Tolerance tolerance) {
  check(key, std::span(&actual, 1), tolerance);
}

void GoldenCase::check_metrics(const std::map<std::string, double>& actual) {
  // Scalars that the packages may have computed in float32.
  const Tolerance tolerance = is_float32() ? Tolerance{1e-4, 1e-6} : Tolerance{1e-6, 1e-7};
  for (const auto& [name, expected] : output("metrics").items()) {
    const auto it = actual.find(name);
    if (it == actual.end()) {
      note_failure("metric '" + name + "' is not known");
      continue;
    }
    const double value = read_number(expected);
    compare("metrics." + name, std::span(&it->second, 1), std::span(&value, 1), tolerance);
  }
}

void GoldenCase::compare(const std::string& label, std::span<const double> actual,
                         std::span<const double> expected, Tolerance tolerance) {
  if (actual.size() != expected.size()) {
    note_failure(concat(label, ": ", actual.size(), " values, expected ", expected.size()));
    return;
  }
  double scale = 0;
  for (const double value : expected) {
    if (std::isfinite(value)) scale = std::max(scale, std::abs(value));
  }
  std::size_t worst = 0;
  double largest = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const double error = difference(actual[i], expected[i]);
    if (error > largest) {
      largest = error;
      worst = i;
    }
  }
  if (largest == 0) return;
  const double floor = tolerance.relative > 0 ? tolerance.absolute / tolerance.relative : 0;
  result_.largest_error = std::max(result_.largest_error, largest / (scale + floor));
  if (largest <= tolerance.relative * scale + tolerance.absolute) return;
  std::ostringstream message;
  message.precision(12);
  message << label << "[" << worst << "] is " << actual[worst] << ", expected " << expected[worst]
          << ": error " << largest << " above " << tolerance.relative << " of " << scale;
  note_failure(message.str());
}

void GoldenCase::fail_with(const std::string& message) {
  note_failure(message);
}

void GoldenCase::note_failure(const std::string& message) {
  failed_ = true;
  result_.messages.push_back(name_ + ": " + message);
}

void GoldenCase::finish() {
  const auto report_unused = [&](const nlohmann::json& object, const std::set<std::string>& used,
                                 const char* what) {
    for (const auto& [key, value] : object.items()) {
      if (!used.contains(key)) note_failure(concat(what, " '", key, "' is not known"));
    }
  };
  report_unused(params_, used_params_, "parameter");
  report_unused(inputs_, used_inputs_, "input");
  report_unused(outputs_, used_outputs_, "output");
  ++result_.cases;
  result_.failures += failed_;
}

std::string package_of(const nlohmann::json& source) {
  return source.value("package", "");
}

bool has_function(const nlohmann::json& source, const std::string& text) {
  for (const auto& function : source.value("functions", nlohmann::json::array())) {
    if (function.is_string() && function.get_ref<const std::string&>().find(text) != std::string::npos)
      return true;
  }
  return false;
}

}  // namespace rlhf::verify
