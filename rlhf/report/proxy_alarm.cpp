#include "rlhf/report/proxy_alarm.h"

#include <cmath>

#include "rlhf/core/error.h"

namespace rlhf {
namespace {

struct WindowMoments {
  double mean = 0;
  double squared_error = 0;  // of the mean
};

WindowMoments moments(const std::deque<double>& values, std::size_t begin, std::size_t count) {
  WindowMoments m;
  const auto n = static_cast<double>(count);
  for (std::size_t i = 0; i < count; ++i) m.mean += values[begin + i] / n;
  for (std::size_t i = 0; i < count; ++i) {
    const double distance = values[begin + i] - m.mean;
    m.squared_error += distance * distance / (n - 1) / n;
  }
  return m;
}

struct Shift {
  double before = 0, after = 0;
  bool significant = false;
};

Shift shift_of(const std::deque<double>& values, std::size_t window) {
  const WindowMoments before = moments(values, 0, window), after = moments(values, window, window);
  const double error = std::sqrt(before.squared_error + after.squared_error);
  return {before.mean, after.mean, std::abs(after.mean - before.mean) > 3 * error};
}

}  // namespace

std::optional<std::string> ProxyAlarm::observe(std::int64_t step, double proxy, double rule) {
  proxy_.push_back(proxy);
  rule_.push_back(rule);
  if (proxy_.size() < 2 * kWindow) return {};
  if (proxy_.size() > 2 * kWindow) {
    proxy_.pop_front();
    rule_.pop_front();
  }
  const Shift model = shift_of(proxy_, kWindow), rules = shift_of(rule_, kWindow);
  const bool sign =
      model.significant && rules.significant && model.after > model.before && rules.after < rules.before;
  const bool warn = sign && quiet_ >= kWindow;
  quiet_ = sign ? 0 : quiet_ + 1;
  if (!warn) return {};
  return concat("step ", step, ": over the last ", kWindow, " steps the reward model's score rose from ",
                model.before, " to ", model.after, " while the rule reward fell from ", rules.before, " to ",
                rules.after, " (reward hacking?)");
}

void ProxyAlarm::save(std::map<std::string, double>& numbers) const {
  for (std::size_t i = 0; i < proxy_.size(); ++i) {
    numbers[concat("proxy_alarm/proxy/", i)] = proxy_[i];
    numbers[concat("proxy_alarm/rule/", i)] = rule_[i];
  }
  numbers["proxy_alarm/quiet"] = static_cast<double>(quiet_);
}

void ProxyAlarm::restore(const std::map<std::string, double>& numbers) {
  *this = ProxyAlarm();
  const auto quiet = numbers.find("proxy_alarm/quiet");
  if (quiet == numbers.end()) return;
  quiet_ = static_cast<std::size_t>(quiet->second);
  for (std::size_t i = 0; i < 2 * kWindow; ++i) {
    const auto proxy = numbers.find(concat("proxy_alarm/proxy/", i));
    if (proxy == numbers.end()) return;
    proxy_.push_back(proxy->second);
    rule_.push_back(numbers.at(concat("proxy_alarm/rule/", i)));
  }
}

}  // namespace rlhf
