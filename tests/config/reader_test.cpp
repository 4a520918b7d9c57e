#include "rlhf/config/reader.h"

#include <algorithm>
#include <filesystem>

#include "rlhf/config/nearest.h"
#include "rlhf/config/presets.h"
#include "rlhf/core/atomic_file.h"
#include "rlhf/core/error.h"
#include "tests/catch.h"
#include "tests/config/example_options.h"
#include "tests/data/temporary_folder.h"

namespace rlhf::config {
namespace {

std::string error_of(const std::string& text, const LoadOptions& options = {}) {
  try {
    parse<RunOptions>(text, "run.yaml", options);
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "no error";
}

TEST_CASE("every field type is read") {
  const auto run = parse<RunOptions>(R"(
path: models/a
seed: 18446744073709551615
batch: 64
offset: -9223372036854775808
verbose: true
mode: streamed
stages: [sft, "reward", ppo]
layers:
  - 0
  - 2
weights: {intent: 1, gate: 0.5}
memory: 6GiB
ppo: {clip_range: 0.1, target_kl: 0.02, entropy: 1e-3}
lora: {rank: 4}
rewards:
  - {rule: number, weight: 2}
  - {}
)",
                                     "run.yaml");
  CHECK(run.path == "models/a");
  CHECK(run.seed == UINT64_MAX);
  CHECK(run.batch == 64);
  CHECK(run.offset == INT64_MIN);
  CHECK(run.verbose);
  CHECK(run.mode == Mode::kStreamed);
  CHECK(run.stages == std::vector<std::string>{"sft", "reward", "ppo"});
  CHECK(run.layers == std::vector<int>{0, 2});
  CHECK(run.weights == std::map<std::string, double>{{"intent", 1.0}, {"gate", 0.5}});
  CHECK(run.memory.bytes == 6ULL << 30);
  CHECK(run.ppo.clip_range == 0.1);
  CHECK(run.ppo.target_kl == 0.02);
  CHECK(run.ppo.entropy == 1e-3F);
  REQUIRE(run.lora);
  CHECK(run.lora->rank == 4);
  REQUIRE(run.rewards.size() == 2);
  CHECK(run.rewards[0].rule == "number");
  CHECK(run.rewards[1].weight == 1.0);
}

TEST_CASE("absent keys keep their defaults") {
  const auto run = parse<RunOptions>("path: a", "run.yaml");
  CHECK(run.batch == 8);
  CHECK(run.stages.size() == 2);
  CHECK_FALSE(run.lora);
  CHECK(parse<RunOptions>("{path: a, ppo: , lora: ~}", "run.yaml").ppo.clip_range == 0.2);
}

TEST_CASE("an unknown key names place, full path and nearest key") {
  CHECK(error_of("path: a\nppo:\n  clip_rnage: 0.1\n") ==
        "run.yaml:3:3: ppo.clip_rnage: unknown key; nearest key is ppo.clip_range");
  CHECK_THAT(error_of("path: a\nclip_range: 0.1\n"), ContainsSubstring("nearest key is ppo.clip_range"));
  CHECK_THAT(error_of("path: a\nrewards: [{wieght: 1}]\n"),
             ContainsSubstring("nearest key is rewards.0.weight"));
}

TEST_CASE("wrong types and values name what was expected") {
  CHECK(error_of("path: a\nbatch: many\n") ==
        "run.yaml:2:8: batch: got many, expected an integer of at least 1");
  CHECK(error_of("path: a\nbatch: 0\n") == "run.yaml:2:8: batch: got 0, expected an integer of at least 1");
  CHECK(error_of("path: a\nbatch: 1.5\n") ==
        "run.yaml:2:8: batch: got 1.5, expected an integer of at least 1");
  CHECK(error_of("path: a\nbatch: '3'\n") ==
        "run.yaml:2:8: batch: got \"3\", expected an integer of at least 1");
  CHECK(error_of("path: a\nverbose: yes\n") == "run.yaml:2:10: verbose: got yes, expected true or false");
  CHECK(error_of("path: a\nppo: {clip_range: 1.5}\n") ==
        "run.yaml:2:19: ppo.clip_range: got 1.5, expected a number in [0, 1]");
  CHECK_THAT(error_of("path: a\nppo: {clip_range: .nan}\n"),
             ContainsSubstring("expected a number in [0, 1]"));
  CHECK_THAT(error_of("path: a\nppo: {min_ratio: 0}\n"), ContainsSubstring("expected a number above 0"));
  CHECK_THAT(error_of("path: a\nppo: {target_kl: x}\n"), ContainsSubstring("a number of at least 0 or null"));
  CHECK_THAT(error_of("path: a\nppo: 3\n"), ContainsSubstring("ppo: got 3, expected a group of keys"));
  CHECK_THAT(error_of("path: [a]\n"), ContainsSubstring("path: got a list, expected text"));
  CHECK_THAT(error_of("path: a\nseed: -1\n"), ContainsSubstring("got -1, expected an integer of at least 0"));
  CHECK_THAT(error_of("path: a\nseed: 99999999999999999999\n"), ContainsSubstring("expected an integer"));
  CHECK_THAT(error_of("path: a\nsmall: 4294967296\n"), ContainsSubstring("an integer of 32 bits"));
  CHECK_THAT(error_of("path: a\nstages: sft\n"), ContainsSubstring("expected a list of text"));
  CHECK_THAT(error_of("path: a\nlayers: [1, -1]\n"), ContainsSubstring("(item 2 is -1)"));
  CHECK_THAT(error_of("path: a\nweights: {intent: a}\n"), ContainsSubstring("(intent is a)"));
  CHECK_THAT(error_of("path: a\nrewards: {rule: x}\n"), ContainsSubstring("expected a list of groups"));
  CHECK_THAT(error_of("path: a\nmemory: 6 gigs\n"), ContainsSubstring("expected a memory size such as 6GiB"));
  CHECK(error_of("path: a\nmode: seriall\n") ==
        "run.yaml:2:7: mode: got seriall, expected one of serial, streamed; nearest is serial");
  CHECK(error_of("- a\n") ==
        "run.yaml:1:1: got a list, expected a group of keys\nrun.yaml: path: missing, expected text");
}

TEST_CASE("all problems are reported at once, with contradictions and missing keys") {
  const std::string error = error_of("batch: 0\nvrbose: true\nppo:\n  min_ratio: 3\n  clip_range: 2\n");
  CHECK(error ==
        "run.yaml:1:8: batch: got 0, expected an integer of at least 1\n"
        "run.yaml:2:1: vrbose: unknown key; nearest key is verbose\n"
        "run.yaml:5:15: ppo.clip_range: got 2, expected a number in [0, 1]\n"
        "run.yaml: path: missing, expected text\n"
        "run.yaml:4:3: ppo.min_ratio: must not exceed max_ratio");
}

TEST_CASE("duplicate keys are errors") {
  CHECK_THAT(error_of("path: a\nseed: 1\nseed: 2\n"),
             ContainsSubstring("run.yaml:3:1: seed: duplicate key, first given at line 2"));
}

TEST_CASE("overrides replace, add and index, and are reported as --set") {
  const auto run = parse<RunOptions>("path: a\nrewards: [{weight: 1}, {weight: 2}]\n", "run.yaml",
                                     {{"path=b", "ppo.clip_range=0.3", "stages=[eval]", "rewards.1.weight=5",
                                       "weights.gate=2", "lora.rank=2"}});
  CHECK(run.path == "b");
  CHECK(run.ppo.clip_range == 0.3);
  CHECK(run.stages == std::vector<std::string>{"eval"});
  CHECK(run.rewards[0].weight == 1);
  CHECK(run.rewards[1].weight == 5);
  CHECK(run.weights.at("gate") == 2);
  CHECK(run.lora->rank == 2);

  CHECK(error_of("path: a", {{"ppo.clip_range=7"}}) ==
        "--set: ppo.clip_range: got 7, expected a number in [0, 1]");
  CHECK_THAT(error_of("path: a", {{"ppo.clip=0.1"}}), ContainsSubstring("--set: ppo.clip: unknown key"));
  CHECK_THAT(error_of("path: a", {{"seed"}}), ContainsSubstring("expected key.path=value"));
  CHECK_THAT(error_of("path: a", {{"rewards.3.weight=1"}}),
             ContainsSubstring("rewards: got a group of keys"));
  CHECK_THAT(error_of("path: a\nrewards: []", {{"rewards.3.weight=1"}}),
             ContainsSubstring("got item 3, expected an index below 0"));
  CHECK_THAT(error_of("path: a", {{"stages=[a"}}), ContainsSubstring("--set stages:1:"));
  CHECK(parse<RunOptions>("", "run.yaml", {{"path=x"}}).path == "x");
}

TEST_CASE("a preset lies below the explicit keys of its group") {
  const TemporaryFolder folder;
  folder.write("wide.yaml", "clip_range: 0.4\nmin_ratio: 0.1\n");
  folder.write("wider.yaml", "preset: wide.yaml\nclip_range: 0.9\n");
  folder.write("loop.yaml", "preset: loop.yaml\n");
  folder.write("wrong.yaml", "clip_rang: 1\n");
  const std::string name = (folder.path() / "run.yaml").string();
  const auto run = [&](const std::string& ppo, const LoadOptions& options = {}) {
    return parse_traced<RunOptions>("path: a\nppo: {" + ppo + "}\n", name, options);
  };
  const auto wide = run("min_ratio: 0.2, preset: wide.yaml");
  CHECK(wide.value.ppo.clip_range == 0.4);
  CHECK(wide.value.ppo.min_ratio == 0.2);
  CHECK(wide.value.ppo.max_ratio == 2.0);
  CHECK(to_string(wide.origins.at("ppo.clip_range")) == (folder.path() / "wide.yaml").string() + ":1:1");
  CHECK(to_string(wide.origins.at("ppo.min_ratio")) == name + ":2:7");
  CHECK(wide.origins.count("ppo.max_ratio") == 0);
  CHECK(run("preset: wider.yaml").value.ppo.clip_range == 0.9);
  CHECK(run("preset: wider.yaml").value.ppo.min_ratio == 0.1);
  // An override may choose the preset; its path then starts in the working directory.
  const LoadOptions chosen{{"ppo.preset=" + (folder.path() / "wide.yaml").string()}};
  CHECK(run("preset: wider.yaml", chosen).value.ppo.clip_range == 0.4);

  const auto error = [&](const std::string& ppo) {
    try {
      run(ppo);
    } catch (const ConfigError& e) {
      return std::string(e.what());
    }
    return std::string("no error");
  };
  CHECK_THAT(error("preset: loop.yaml"), ContainsSubstring("presets include one another without end"));
  CHECK_THAT(error("preset: wrong.yaml"),
             ContainsSubstring("wrong.yaml:1:1: ppo.clip_rang: unknown key; nearest key is ppo.clip_range"));
  CHECK_THAT(error("preset: none.yaml"),
             ContainsSubstring(name + ":2:15: ppo.preset: ") && ContainsSubstring("none.yaml: no such file"));
  CHECK_THAT(error("preset: [wide]"), ContainsSubstring("expected the name of a preset or a YAML file"));
}

TEST_CASE("built-in presets are the files of configs/presets") {
  std::size_t files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(RLHF_SOURCE_DIR "/configs/presets")) {
    const Preset* preset = find_preset(entry.path().stem().string());
    INFO(entry.path());
    REQUIRE(preset);
    CHECK(preset->yaml == read_text_file(entry.path()));
    ++files;
  }
  CHECK(presets().size() == files);
  CHECK(std::ranges::is_sorted(preset_names()));
  CHECK_FALSE(find_preset("dap"));
  CHECK(error_of("path: a\nppo: {preset: dap}") ==
        "run.yaml:2:15: ppo.preset: unknown preset dap; nearest preset is dapo");
}

TEST_CASE("memory sizes") {
  CHECK(parse_memory_size("1.5 GiB")->bytes == 1610612736);
  CHECK(parse_memory_size("12")->bytes == 12);
  CHECK(parse_memory_size("2MB")->bytes == 2000000);
  CHECK(parse_memory_size("80%")->resolve(1000) == 800);
  for (const char* bad : {"", "GiB", "-1GiB", "6gib", "101%", "0%", "1e300TiB", "inf", "nan%"}) {
    INFO(bad);
    CHECK_FALSE(parse_memory_size(bad));
  }
}

TEST_CASE("edit distance") {
  CHECK(edit_distance("", "abc") == 3);
  CHECK(edit_distance("kitten", "sitting") == 3);
  CHECK(edit_distance("clip_rnage", "clip_range") == 1);
  CHECK(edit_distance("ca", "abc") == 3);
  CHECK(nearest("sedd", {"batch", "seed"}) == "seed");
  CHECK(nearest("x", {}).empty());
}

}  // namespace
}  // namespace rlhf::config
