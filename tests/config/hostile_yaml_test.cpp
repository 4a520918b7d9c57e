#include <filesystem>

#include "rlhf/config/reader.h"
#include "rlhf/core/error.h"
#include "rlhf/core/random.h"
#include "tests/catch.h"
#include "tests/config/example_options.h"

namespace rlhf::config {
namespace {

std::string error_of(const std::string& text) {
  try {
    parse<RunOptions>(text, "run.yaml");
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "no error";
}

std::string repeated(const std::string& piece, int times) {
  std::string text;
  for (int i = 0; i < times; ++i) text += piece;
  return text;
}

TEST_CASE("an alias bomb is an error") {
  std::string text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n";
  for (int i = 1; i < 12; ++i) {
    const std::string before = "*a" + std::to_string(i - 1);
    text += "a" + std::to_string(i) + ": &a" + std::to_string(i) + " [" + before +
            repeated(", " + before, 9) + "]\n";
  }
  CHECK_THAT(error_of(text), ContainsSubstring("more than 100000 values"));
}

TEST_CASE("ordinary aliases work") {
  CHECK(parse<RunOptions>("path: &p models/a\nstages: [*p, *p]", "run.yaml").stages[1] == "models/a");
}

TEST_CASE("deep nesting is an error") {
  CHECK_THAT(error_of("path: " + repeated("[", 50000)), ContainsSubstring("run.yaml:1:"));
  CHECK_THAT(error_of("path: " + repeated("{a: ", 50000)), ContainsSubstring("run.yaml:1:"));
  std::string text = "a0: &a0 [x]\n";
  for (int i = 1; i < 200; ++i) {
    text += concat("a", i, ": &a", i, " [*a", i - 1, "]\n");
  }
  CHECK_THAT(error_of(text), ContainsSubstring("nested deeper than 64 levels"));
}

TEST_CASE("a recursive alias is an error") {
  CHECK_THAT(error_of("path: &a [*a]"), ContainsSubstring("alias refers to a value that contains it"));
}

TEST_CASE("text that is not UTF-8 is an error with its offset") {
  CHECK(error_of("path: a\nmode: \xff\n") == "run.yaml:2: not UTF-8 text at byte offset 14");
  CHECK_THAT(error_of("path: \xc0\xaf"), ContainsSubstring("offset 6"));
  CHECK_THAT(error_of("path: \xed\xa0\x80"), ContainsSubstring("offset 6"));
  CHECK_THAT(error_of("path: \xe2\x82"), ContainsSubstring("offset 6"));
  CHECK_THAT(error_of(std::string("path: a\0b", 9)), ContainsSubstring("offset 7"));
  CHECK(parse<RunOptions>("path: Zürich €", "run.yaml").path == "Zürich €");
}

TEST_CASE("broken syntax, several documents, tags and odd keys are errors") {
  CHECK_THAT(error_of("path: [a"), ContainsSubstring("run.yaml:1:"));
  CHECK_THAT(error_of("path: a\n---\npath: b\n"), ContainsSubstring("several YAML documents"));
  CHECK_THAT(error_of("path: !!python/object a\n"), ContainsSubstring("tags are not supported"));
  CHECK_THAT(error_of("? [a, b]\n: 1\n"), ContainsSubstring("malformed key"));
  CHECK_THAT(error_of("\t- a\n\tb"), ContainsSubstring("run.yaml:"));
}

TEST_CASE("files that cannot be read are configuration errors") {
  CHECK_THROWS_WITH(load<RunOptions>("/nonexistent/run.yaml"),
                    ContainsSubstring("/nonexistent/run.yaml: no such file"));
  CHECK_THROWS_WITH(load<RunOptions>(std::filesystem::temp_directory_path()),
                    ContainsSubstring("regular file"));
  CHECK_THROWS_WITH(load<RunOptions>("/dev/zero"), ContainsSubstring("regular file"));
  CHECK_THAT(error_of(std::string((1 << 20) + 1, '#')), ContainsSubstring("more than the limit"));
}

TEST_CASE("mutated documents give a value or a ConfigError, nothing else") {
  const std::string valid =
      "path: &a x\nppo: {clip_range: 0.1, target_kl: ~}\nstages: [a, \"b\", *a]\nrewards:\n  - {weight: 1}\n "
      " - rule: 'x'\n";
  const std::string pieces = "{}[]:,-*&!#|>'\"%@`~?\n\t ax0.";
  RandomStream random(7);
  int accepted = 0, rejected = 0;
  for (int round = 0; round < 4000; ++round) {
    std::string text = valid;
    for (std::uint64_t edits = 1 + random.below(4); edits > 0; --edits) {
      text[random.below(text.size())] = pieces[random.below(pieces.size())];
    }
    try {
      parse<RunOptions>(text, "run.yaml");
      ++accepted;
    } catch (const ConfigError& error) {
      CHECK(std::string(error.what()).substr(0, 8) == "run.yaml");
      ++rejected;
    }
  }
  CHECK(accepted > 0);
  CHECK(rejected > 0);
}

}  // namespace
}  // namespace rlhf::config
