#include "rlhf/report/proxy_alarm.h"

#include <vector>

#include "rlhf/core/random.h"
#include "tests/catch.h"

using namespace rlhf;

namespace {

// Steps at which the alarm warns over `steps` steps of a mean that moves at step 40, with noise of
// deviation 1.
std::vector<std::int64_t> warnings(double proxy_jump, double rule_jump, std::int64_t steps = 80,
                                   bool stopped_after_every_step = false) {
  RandomStream random(4);
  ProxyAlarm alarm;
  std::vector<std::int64_t> at;
  for (std::int64_t step = 1; step <= steps; ++step) {
    const double jump = step > 40 ? 1 : 0;
    const double proxy = random.normal() + jump * proxy_jump, rule = random.normal() + jump * rule_jump;
    if (alarm.observe(step, proxy, rule)) at.push_back(step);
    if (!stopped_after_every_step) continue;
    std::map<std::string, double> numbers;
    alarm.save(numbers);
    alarm = ProxyAlarm();
    alarm.restore(numbers);
  }
  return at;
}

}  // namespace

TEST_CASE("the alarm rings once when the proxy rises while the rule reward falls, and only then") {
  const auto hacked = warnings(6, -6);
  REQUIRE(hacked.size() == 1);
  CHECK(hacked[0] > 40);
  CHECK(hacked[0] <= 48);
  CHECK(warnings(6, 6).empty());    // both rise
  CHECK(warnings(-6, -6).empty());  // both fall
  CHECK(warnings(-6, 6).empty());
  CHECK(warnings(0, -6).empty());
  CHECK(warnings(6, 0).empty());
}

TEST_CASE("an alarm that is kept and restored after every step warns at the same steps") {
  REQUIRE(warnings(6, -6).size() == 1);
  CHECK(warnings(6, -6, 80, true) == warnings(6, -6));
}

TEST_CASE("the alarm says what has moved, and is silent before it has two windows") {
  ProxyAlarm alarm;
  for (std::int64_t step = 1; step <= 8; ++step) CHECK_FALSE(alarm.observe(step, 1, 5));
  std::optional<std::string> warning;
  std::int64_t at = 0;
  for (at = 9; at <= 16 && !warning; ++at) warning = alarm.observe(at, 2, 4);
  REQUIRE(warning);
  CHECK(at - 1 == 16);
  CHECK_THAT(*warning,
             ContainsSubstring("step 16: over the last 8 steps the reward model's score rose from 1 to 2 "
                               "while the rule reward fell from 5 to 4"));
}
