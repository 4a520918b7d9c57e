#include "rlhf/verify/record_object.h"

#include <algorithm>
#include <cmath>

#include "rlhf/core/error.h"

namespace rlhf::verify {

RecordObject::RecordObject(GoldenCase& golden, const nlohmann::json& json, std::string label)
    : golden_(golden), json_(json), label_(std::move(label)) {
  RLHF_CHECK(json.is_object(), label_, " is not an object");
}

bool RecordObject::has(const std::string& key) {
  used_.insert(key);
  return json_.contains(key) && !json_[key].is_null();
}

const nlohmann::json& RecordObject::raw(const std::string& key) {
  RLHF_CHECK(has(key), label_, ".", key, " is missing");
  return json_[key];
}

std::vector<RecordObject> record_objects(GoldenCase& golden, const nlohmann::json& list,
                                         const std::string& label) {
  RLHF_CHECK(list.is_array(), label, " is not a list");
  std::vector<RecordObject> objects;
  for (std::size_t i = 0; i < list.size(); ++i)
    objects.emplace_back(golden, list[i], concat(label, "[", i, "]"));
  return objects;
}

std::vector<RecordObject> RecordObject::members(const std::string& key) {
  return record_objects(golden_, raw(key), label_ + "." + key);
}

double RecordObject::number(const std::string& key) {
  const Tensor scalar = tensor(key);
  RLHF_CHECK(scalar.shape.empty(), label_, ".", key, " is a list, expected a number");
  return scalar.values.at(0);
}

std::string RecordObject::text(const std::string& key) {
  const nlohmann::json& json = raw(key);
  RLHF_CHECK(json.is_string(), label_, ".", key, " is ", json.dump(), ", expected a text");
  return json.get<std::string>();
}

void RecordObject::check(const std::string& key, std::span<const double> actual, Tolerance tolerance) {
  golden_.compare(label_ + "." + key, actual, tensor(key).values, tolerance);
}

void RecordObject::check(const std::string& key, double actual, Tolerance tolerance) {
  check(key, std::span(&actual, 1), tolerance);
}

void RecordObject::check_named(const std::string& key, const std::map<std::string, double>& actual,
                               double relative) {
  const nlohmann::json& expected = raw(key);
  RLHF_CHECK(expected.is_object(), label_, ".", key, " is not an object");
  double largest = 0;
  for (const auto& [name, value] : actual) largest = std::max(largest, std::abs(value));
  for (const auto& [name, value] : expected.items()) {
    const auto it = actual.find(name);
    if (it == actual.end()) {
      fail_with(key + "." + name + " is not known");
      continue;
    }
    golden_.compare(concat(label_, ".", key, ".", name), std::span(&it->second, 1), read_tensor(value).values,
                    {relative, 0.1 * relative * largest});
  }
  for (const auto& [name, value] : actual)
    if (!expected.contains(name)) fail_with(key + "." + name + " is missing");
}

void RecordObject::check_each(const std::string& list, const std::string& key, std::span<const double> actual,
                              Tolerance tolerance) {
  std::vector<double> expected;
  for (RecordObject& object : members(list)) expected.push_back(object.number(key));
  golden_.compare(concat(label_, ".", list, ".", key), actual, expected, tolerance);
}

Tolerance record_tolerance(const GoldenCase& golden) {
  RLHF_CHECK(golden.is_float32() || golden.dtype() == "float64", "dtype '", golden.dtype(), "' is not known");
  return golden.is_float32() ? Tolerance{1e-5, 1e-7} : Tolerance{1e-8, 1e-11};
}

void RecordObject::finish() {
  for (const auto& [key, value] : json_.items())
    if (!used_.contains(key)) fail_with("'" + key + "' is not known");
}

}  // namespace rlhf::verify
