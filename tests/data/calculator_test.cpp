#include "rlhf/data/calculator.h"

#include <cmath>

#include "rlhf/core/random.h"
#include "tests/catch.h"

namespace rlhf {
namespace {

double value_of(const char* expression) {
  const Calculation result = calculate(expression);
  INFO(expression << ": " << result.error);
  REQUIRE(result.value);
  return *result.value;
}

TEST_CASE("precedence, associativity and functions") {
  CHECK(value_of("100000*0.015*2") == Approx(3000));
  CHECK(value_of("1+2*3") == 7);
  CHECK(value_of("(1+2)*3") == 9);
  CHECK(value_of("10-4-3") == 3);
  CHECK(value_of("16/4/2") == 2);
  CHECK(value_of("2^3^2") == 512);
  CHECK(value_of("-2^2") == -4);
  CHECK(value_of("(-2)^2") == 4);
  CHECK(value_of("2^-1") == 0.5);
  CHECK(value_of("2*-3") == -6);
  CHECK(value_of(" 1 + .5 ") == 1.5);
  CHECK(value_of("min(3, 1, 2)+max(4,9)") == 10);
  CHECK(value_of("round(2.5)+round(1.234, 2)") == Approx(4.23));
  CHECK(value_of("500*(1-(1+5/100)^-3)/(5/100)") == Approx(500 * (1 - std::pow(1.05, -3)) / 0.05));
}

TEST_CASE("everything else is an error with a reason") {
  for (const char* bad :
       {"",      " ",   "1+",   "(1",  "1)",  "1 2",    "1e5",      "a",           "foo(1)",       "min()",
        "min(1", "1,2", "2**3", "1/0", "0/0", "10^999", "(-1)^0.5", "round(1,99)", "round(1,2,3)", "0x10",
        "1..2",  "inf", "nan",  "%",   "\xff"}) {
    INFO(bad);
    const Calculation result = calculate(bad);
    CHECK_FALSE(result.value);
    CHECK_FALSE(result.error.empty());
  }
  CHECK(calculate("1/0").error == "division by zero at 3");
}

TEST_CASE("nesting and length are bounded") {
  CHECK_FALSE(calculate(std::string(100, '(') + "1" + std::string(100, ')')).value);
  CHECK_FALSE(calculate(std::string(200, '-') + "1").value);
  CHECK_FALSE(calculate("1" + std::string(300, ' ')).value);
  CHECK(calculate(std::string(20, '(') + "1" + std::string(20, ')')).value);
  std::string power = "1";
  for (int i = 0; i < 100; ++i) power += "^1";
  CHECK_FALSE(calculate(power).value);
}

TEST_CASE("random text never does harm") {
  const std::string letters = "0123456789+-*/^()., minaxroud";
  RandomStream random(11);
  int evaluated = 0;
  for (int round = 0; round < 20000; ++round) {
    std::string text;
    for (std::uint64_t n = random.below(24); n > 0; --n) text += letters[random.below(letters.size())];
    const Calculation result = calculate(text);
    if (result.value) {
      CHECK(std::isfinite(*result.value));
      ++evaluated;
    }
    CHECK(result.value.has_value() == result.error.empty());
  }
  CHECK(evaluated > 20);
}

TEST_CASE("finding the call and writing its result") {
  CHECK(find_calculation("a <calc>1+1</calc>=2") == "1+1");
  CHECK(find_calculation("<calc>1</calc> <calc>2</calc>") == "2");
  CHECK(find_calculation("<calc><calc>3</calc>") == "3");
  CHECK_FALSE(find_calculation("<calc>1"));
  CHECK_FALSE(find_calculation("1</calc>"));
  CHECK_FALSE(find_calculation("</calc><calc>"));
  CHECK(tool_result(calculate("100000*0.015*2")) == "=3000");
  CHECK(tool_result(calculate("1/3")) == "=0.3333333333");
  CHECK(tool_result(calculate("0*-1")) == "=0");
  CHECK(tool_result(calculate("1/0")) == "=error");
}

}  // namespace
}  // namespace rlhf
