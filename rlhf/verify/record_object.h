#pragma once

#include <nlohmann/json.hpp>
#include <set>
#include <string>

#include "rlhf/verify/golden_case.h"

namespace rlhf::verify {

/// Learning rates are computed in double whatever the model is.
inline constexpr Tolerance kRateTolerance{1e-10, 0};

/// An object nested in the outputs of a case. Remembers which members were used, so that finish() can report
/// the others: nothing in a record may be passed over silently.
class RecordObject {
 public:
  /// @param label how messages name the object, such as "updates[0]"
  RecordObject(GoldenCase& golden, const nlohmann::json& json, std::string label);

  const std::string& label() const { return label_; }
  bool has(const std::string& key);  ///< present and not null; marks it used
  const nlohmann::json& raw(const std::string& key);
  RecordObject member(const std::string& key) { return {golden_, raw(key), label_ + "." + key}; }
  /// The objects of a list.
  std::vector<RecordObject> members(const std::string& key);
  Tensor tensor(const std::string& key) { return read_tensor(raw(key)); }
  double number(const std::string& key);
  std::string text(const std::string& key);
  void ignore(const std::string& key) { used_.insert(key); }

  void check(const std::string& key, std::span<const double> actual, Tolerance tolerance);
  void check(const std::string& key, double actual, Tolerance tolerance);
  /// Compares numbers that have no rounding: ids, flags, counts.
  void check_exact(const std::string& key, std::span<const double> actual) { check(key, actual, {0, 0}); }
  void check_exact(const std::string& key, double actual) { check(key, actual, {0, 0}); }
  /// Compares an object of numbers by name. The tolerance of each is relative to its own magnitude plus a
  /// tenth of the largest, since all of them pass through the same sums.
  void check_named(const std::string& key, const std::map<std::string, double>& actual, double relative);
  /// Compares one scalar of each object of a list; they share a scale.
  void check_each(const std::string& list, const std::string& key, std::span<const double> actual,
                  Tolerance tolerance);
  void fail_with(const std::string& message) { golden_.fail_with(label_ + ": " + message); }
  void finish();

 private:
  GoldenCase& golden_;
  const nlohmann::json& json_;
  std::string label_;
  std::set<std::string> used_;
};

/// What trainer records are compared with: 1e-5 in float32, 1e-8 in float64. The runs of the package itself
/// with another attention kernel differ by 2e-7 and 5e-11 in their weights. @throws InvalidArgument for
/// another dtype.
Tolerance record_tolerance(const GoldenCase& golden);

/// The objects of a list in the outputs of a case, labelled "label[i]".
std::vector<RecordObject> record_objects(GoldenCase& golden, const nlohmann::json& list,
                                         const std::string& label);

}  // namespace rlhf::verify
