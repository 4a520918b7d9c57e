#include "rlhf/config/writer.h"

#include <sys/resource.h>

#include <csignal>
#include <filesystem>
#include <limits>

#include "rlhf/core/atomic_file.h"
#include "rlhf/core/error.h"
#include "tests/catch.h"
#include "tests/config/example_options.h"

namespace rlhf::config {
namespace {

TEST_CASE("resolved text is in declaration order and carries the help") {
  RunOptions run;
  run.path = "models/a b";
  run.rewards = {{"number", 0.1}};
  const std::string text = to_yaml_document(Schema::of(run));
  CHECK(text.rfind(
            "path: \"models/a b\"  # Model folder\nseed: 1  # Run seed\nbatch: 8  # Prompts per step\n", 0) ==
        0);
  CHECK_THAT(text,
             ContainsSubstring("ppo:  # Policy optimisation\n  clip_range: 0.2  # Ratio clip epsilon\n"));
  CHECK_THAT(text, ContainsSubstring("lora: null  # Adapters; null = off\n"));
  CHECK_THAT(text,
             ContainsSubstring("rewards:  # Reward terms\n  -\n    rule: number  # Name of the rule\n"));
}

TEST_CASE("whatever is written reads back equal") {
  RunOptions run;
  run.path = "tab\there \"quoted\" back\\slash\nnewline # no comment Zürich \x01 : {";
  run.seed = UINT64_MAX;
  run.offset = INT64_MIN;
  run.mode = Mode::kStreamed;
  run.stages = {"", "null", "yes", "12", "1e3", "- a", "a: b", "~"};
  run.weights = {{"a key", 1.0 / 3.0}, {"true", 1e300}, {"", 5e-324}};
  run.memory = {(std::uint64_t{3} << 20) + 1, {}};
  run.ppo.target_kl = 0.1 + 0.2;
  run.ppo.entropy = 1.0F / 3.0F;
  run.ppo.max_ratio = std::numeric_limits<double>::infinity();
  run.lora = LoraOptions{3};
  run.rewards = {{"x", 1}, {"", 0}};
  const auto path = std::filesystem::temp_directory_path() / "rlhf_writer_test" / "config.resolved.yaml";
  save_resolved(path, run);
  const auto read = load<RunOptions>(path);
  CHECK(read.path == run.path);
  CHECK(read.stages == run.stages);
  CHECK(read.weights == run.weights);
  CHECK(read.memory == run.memory);
  CHECK(read.ppo.target_kl == run.ppo.target_kl);
  CHECK(read.ppo.entropy == run.ppo.entropy);
  CHECK(read.ppo.max_ratio == run.ppo.max_ratio);
  CHECK(read.rewards.size() == 2);
  std::filesystem::remove_all(path.parent_path());
}

TEST_CASE("a value that its own bounds reject is not written") {
  RunOptions run;
  run.path = "a";
  run.ppo.clip_range = 3;
  CHECK_THROWS_AS(save_resolved("unused.yaml", run), ConfigError);
  CHECK_FALSE(std::filesystem::exists("unused.yaml"));
}

TEST_CASE("an atomic file leaves the old content until commit") {
  const auto path = std::filesystem::temp_directory_path() / "rlhf_atomic_test" / "a.txt";
  write_file_atomically(path, "old");
  {
    AtomicFile file(path);
    file.write("half");
  }
  CHECK(read_text_file(path, 100) == "old");
  CHECK(std::distance(std::filesystem::directory_iterator(path.parent_path()), {}) == 1);
  write_file_atomically(path, "new");
  CHECK(read_text_file(path, 100) == "new");
  CHECK_THROWS_WITH(read_text_file(path, 2), ContainsSubstring("larger than the limit of 2 bytes"));
  std::filesystem::remove_all(path.parent_path());
  CHECK_THROWS_WITH(AtomicFile(path), ContainsSubstring("cannot create"));
}

TEST_CASE("a write that the system refuses is an IoError with the offset, and the old content stays") {
  const auto path = std::filesystem::temp_directory_path() / "rlhf_full_test" / "a.txt";
  write_file_atomically(path, "old");
  // A file size limit stands in for a full disk: write(2) fails part of the way in the same manner.
  rlimit before{};
  REQUIRE(getrlimit(RLIMIT_FSIZE, &before) == 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  rlimit limited = before;
  limited.rlim_cur = 1000;
  REQUIRE(setrlimit(RLIMIT_FSIZE, &limited) == 0);
  std::string message;
  try {
    write_file_atomically(path, std::string(5000, 'x'));
  } catch (const IoError& error) {
    message = error.what();
  }
  setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  CHECK_THAT(message, ContainsSubstring("a.txt: cannot write at offset 1000"));
  CHECK(read_text_file(path, 100) == "old");
  CHECK(std::distance(std::filesystem::directory_iterator(path.parent_path()), {}) == 1);
  std::filesystem::remove_all(path.parent_path());
  CHECK_THROWS_AS(write_file_atomically("/proc/rlhf_no_such_folder/file", "x"), IoError);
}

}  // namespace
}  // namespace rlhf::config
