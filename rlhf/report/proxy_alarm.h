#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <string>

namespace rlhf {

/// Watches a proxy reward (a reward model) beside the reward it stands for (rules), step by step, and says
/// when the first rises while the second falls: the sign of reward hacking (Gao et al. 2023, arXiv
/// 2210.10760).
///
/// The last `kWindow` steps are compared with the `kWindow` before them. A mean has moved when the difference
/// is more than three times its standard error (by chance 1 time in 200 where steps are independent). Warns
/// again only after as many steps without the sign.
class ProxyAlarm {
 public:
  static constexpr std::size_t kWindow = 8;

  /// Takes in a step. @return the warning, when there is one
  std::optional<std::string> observe(std::int64_t step, double proxy, double rule);

  /// What it has seen, as numbers under keys that begin with "proxy_alarm/"; a resumed run goes on with them.
  void save(std::map<std::string, double>& numbers) const;
  void restore(const std::map<std::string, double>& numbers);

 private:
  std::deque<double> proxy_, rule_;
  std::size_t quiet_ = kWindow;  ///< steps without the sign
};

}  // namespace rlhf
