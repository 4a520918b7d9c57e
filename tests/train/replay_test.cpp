// An iteration executed again from a run's own records.
#include "rlhf/train/replay.h"

#include "rlhf/core/error.h"
#include "tests/catch.h"
#include "tests/train/tiny_run.h"

using namespace rlhf;
using Start = PipelineSettings::Start;

namespace {

Replay replay(const TinyData& data, const std::string& run, std::int64_t step) {
  return replay_step(data.path(run), step, {});
}

std::vector<std::string> different(const Replay& replay) {
  std::vector<std::string> names;
  for (const auto* checks : {&replay.hashes, &replay.metrics})
    for (const ReplayCheck& check : *checks)
      if (!check.same()) names.push_back(check.name);
  return names;
}

void replace_in(const std::filesystem::path& file, const std::string& from, const std::string& to) {
  std::string text = read_text_file(file);
  const auto place = text.find(from);
  REQUIRE(place != std::string::npos);
  write_file_atomically(file, text.replace(place, from.size(), to));
}

// The value of a key in the line of a step.
std::string value_of(const std::filesystem::path& file, std::int64_t step, const std::string& key) {
  const std::string text = read_text_file(file);
  const auto line = text.find("{\"stage\":\"ppo\",\"step\":" + std::to_string(step) + ",");
  REQUIRE(line != std::string::npos);
  const auto begin = text.find("\"" + key + "\":", line) + key.size() + 3;
  return text.substr(begin, text.find_first_of(",}", begin) - begin);
}

}  // namespace

TEST_CASE("every step of every exact mode comes out again, and the directory is left as it was") {
  const TinyData data;
  for (const std::string mode : {"serial", "streamed", "one_step_off"})
    for (const bool kept : {true, false}) {
      const std::string name = mode + (kept ? "-kept" : "");
      INFO(name);
      std::vector<std::string> overrides = {"threads=2", "schedule.mode=" + mode};
      if (kept) overrides.insert(overrides.end(), {"run.checkpoint_every=1", "run.keep_checkpoints=true"});
      attempt(data.options(name, overrides), Start::kFresh);
      const auto before = files_below(data.path(name));
      for (std::int64_t step = 1; step <= 4; ++step) {
        const Replay result = replay(data, name, step);
        INFO("step " << step);
        CHECK(different(result).empty());
        CHECK(result.same());
        CHECK(result.first == (kept ? step : 1));
        REQUIRE(result.hashes.size() == 3);  // samples, policy, critic
        CHECK(result.metrics.size() > 20);
        CHECK(result.different_before.empty());
      }
      CHECK(files_below(data.path(name)) == before);
    }
}

TEST_CASE("records of different steps differ, those of a resumed run do not") {
  const TinyData data;
  attempt(data.options("whole"), Start::kFresh);
  const auto file = data.path("whole") / "hashes.jsonl";
  for (const char* key : {"samples", "policy", "critic"})
    CHECK(value_of(file, 2, key) != value_of(file, 3, key));
  CHECK(attempt(data.options("stopped"), Start::kFresh, "ppo", 2).stopped);
  // An unfinished run is replayed from its checkpoint where that lies before the step, else from the start.
  CHECK(replay(data, "stopped", 2).same());
  CHECK_FALSE(attempt(data.options("stopped"), Start::kResume).stopped);
  CHECK(read_text_file(data.path("stopped") / "hashes.jsonl") == read_text_file(file));
}

TEST_CASE("an altered record is a mismatch that is named") {
  const TinyData data;
  attempt(data.options("run"), Start::kFresh);
  const auto hashes = data.path("run") / "hashes.jsonl", metrics = data.path("run") / "metrics.jsonl";
  const std::string policy = value_of(hashes, 3, "policy");
  replace_in(hashes, policy, "\"0123456789abcdef\"");
  const Replay altered = replay(data, "run", 3);
  CHECK_FALSE(altered.same());
  CHECK(different(altered) == std::vector<std::string>{"policy"});
  CHECK(altered.hashes[1].recorded == "0123456789abcdef");
  CHECK("\"" + altered.hashes[1].replayed + "\"" == policy);
  // A step after it is the same, and says that something before it is not.
  const Replay after = replay(data, "run", 4);
  CHECK(after.same());
  CHECK(after.different_before == std::vector<std::int64_t>{3});

  const std::string loss = value_of(metrics, 1, "loss/policy");
  replace_in(metrics, "\"loss/policy\":" + loss, "\"loss/policy\":123.5");
  CHECK(different(replay(data, "run", 1)) == std::vector<std::string>{"loss/policy"});
  replace_in(metrics, "\"loss/policy\"", "\"loss/other\"");
  CHECK(different(replay(data, "run", 1)) == std::vector<std::string>{"loss/policy", "loss/other"});
}

TEST_CASE("other weights or data than the run had are a mismatch") {
  const TinyData data;
  attempt(data.options("run"), Start::kFresh);
  attempt(data.options("other", {"run.seed=4"}), Start::kFresh);
  std::filesystem::copy_file(data.path("other") / "checkpoints" / "sft.final.safetensors",
                             data.path("run") / "checkpoints" / "sft.final.safetensors",
                             std::filesystem::copy_options::overwrite_existing);
  const Replay result = replay(data, "run", 1);
  CHECK_FALSE(result.hashes[0].same());
  CHECK_FALSE(result.hashes[1].same());
}

TEST_CASE("what cannot be replayed says why") {
  const TinyData data;
  attempt(data.options("async", {"threads=2", "schedule.mode=async"}), Start::kFresh);
  CHECK_THROWS_WITH(replay(data, "async", 1), ContainsSubstring("schedule.mode async cannot be replayed") &&
                                                  ContainsSubstring("timing"));
  attempt(data.options("sft", {"stages=[sft]"}), Start::kFresh);
  CHECK_THROWS_WITH(replay(data, "sft", 1), ContainsSubstring("stages has no ppo"));
  attempt(data.options("run"), Start::kFresh);
  for (const std::int64_t step : {0, 5})
    CHECK_THROWS_WITH(replay(data, "run", step),
                      ContainsSubstring("ppo.iterations") && ContainsSubstring("is 4"));
  std::filesystem::remove(data.path("run") / "checkpoints" / "reward.final.safetensors");
  CHECK_THROWS_WITH(replay(data, "run", 1), ContainsSubstring("holds no result of the stage reward"));
  attempt(data.options("silent", {"run.record_hashes=false"}), Start::kFresh);
  CHECK_THROWS_WITH(replay(data, "silent", 1), ContainsSubstring("hashes.jsonl"));
}
