// What a run does with input it cannot use: the message names the place, and what was there before stays.
#include <sys/mount.h>
#include <sys/resource.h>

#include <csignal>
#include <cstring>
#include <functional>
#include <nlohmann/json.hpp>

#include "rlhf/core/error.h"
#include "rlhf/model/safetensors.h"
#include "rlhf/model/weight_file.h"
#include "tests/catch.h"
#include "tests/train/tiny_run.h"

using namespace rlhf;
using Start = PipelineSettings::Start;
namespace fs = std::filesystem;

namespace {

const std::string kGoldenModel = RLHF_SOURCE_DIR "/tests/golden/model_llama_gqa_untied";

// Sets the model up and reads the data, as far as a run goes before it trains.
void set_up(const RunOptions& options) {
  RunObserver silent;
  Pipeline(options, {}, silent);
}

// The options of a tiny run with another model: overrides cannot take model.new away.
RunOptions with_model_path(const TinyData& data, const fs::path& path) {
  RunOptions options = data.options("run");
  options.model.new_model.reset();
  options.model.path = path.string();
  return options;
}

void replace_in_file(const fs::path& path, const std::string& from, const std::string& to) {
  std::string text = read_text_file(path);
  const auto at = text.find(from);
  REQUIRE(at != std::string::npos);
  text.replace(at, from.size(), to);
  write_file_atomically(path, text);
}

// 0 for every response, but for one call that does what the test says.
class FaultyReward : public RewardTerm {
 public:
  FaultyReward(int call, std::function<double()> fault) : call_(call), fault_(std::move(fault)) {}
  std::string_view name() const override { return "faulty"; }
  double score(const ScoredSample&) const override { return ++calls_ == call_ ? fault_() : 0; }

 private:
  int call_;
  std::function<double()> fault_;
  mutable int calls_ = 0;
};

// A run of the tiny data in run directory `name`; `prepare` may change the pipeline. Returns the message of
// the error that ended it, empty when it ended well.
std::string message_of_run(const RunOptions& options, Start start,
                           const std::function<void(Pipeline&, Watcher&)>& prepare = {},
                           const std::function<void(const std::string&, std::int64_t)>& on_step = {}) {
  class StepWatcher : public Watcher {
   public:
    using Watcher::Watcher;
    std::function<void(const std::string&, std::int64_t)> on_step;
    void step(const std::string& stage, std::int64_t step, std::int64_t count,
              const Metrics& metrics) override {
      if (on_step) on_step(stage, step);
      Watcher::step(stage, step, count, metrics);
    }
  };
  try {
    RunDirectory directory(options, start, {}, [](std::string_view) {});
    StepWatcher watcher(&directory);
    watcher.on_step = on_step;
    PipelineSettings settings;
    settings.start = start;
    settings.directory = directory.path();
    settings.stop = &watcher.stop;
    settings.fingerprint = directory.fingerprint();
    Pipeline pipeline(options, settings, watcher);
    if (prepare) prepare(pipeline, watcher);
    directory.finish(pipeline.run());
    return "";
  } catch (const std::exception& error) {
    return error.what();
  }
}

// While it lives, this process cannot write files longer than `bytes`: the disk is full.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) {
    old_handler_ = std::signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &old_);
    rlimit limit = old_;
    limit.rlim_cur = bytes;
    setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~FileSizeLimit() {
    setrlimit(RLIMIT_FSIZE, &old_);
    std::signal(SIGXFSZ, old_handler_);
  }

 private:
  rlimit old_{};
  void (*old_handler_)(int) = nullptr;
};

void check_same_weights(const TinyData& data, const std::string& name, const std::string& reference) {
  for (const char* stage : {"pretrain", "sft", "reward", "ppo"}) {
    const std::string file = std::string("checkpoints/") + stage + ".final.safetensors";
    INFO(name << "/" << file);
    CHECK(read_text_file(data.path(name) / file) == read_text_file(data.path(reference) / file));
  }
}

}  // namespace

TEST_CASE("missing files are named before anything is trained or written") {
  const TinyData data;
  const std::string none = data.path("none").string();
  for (const char* key : {"sft_file", "pairs_file", "held_out_pairs_file", "prompts_file", "eval_file"}) {
    const auto options = data.options("run", {std::string("data.") + key + "=" + none});
    CHECK_THROWS_WITH(set_up(options), none + ": no such file");
    CHECK(message_of_run(options, Start::kFresh) == none + ": no such file");
    // Nothing stands in the way of the corrected run.
    CHECK_NOTHROW(RunDirectory(options, Start::kFresh, {}, [](std::string_view) {}));
  }
  CHECK_THROWS_WITH(set_up(with_model_path(data, none)), ContainsSubstring(none + ": no such file"));
}

TEST_CASE("a run file whose stages lack their data is refused with the keys") {
  const TinyData data;
  const auto parse = [](const std::string& text) { config::parse<RunOptions>(text, "run.yaml"); };
  const std::string start =
      "model: {new: {vocabulary: bytes}}\ndata: {source: files}\nrewards: [{type: length}]\n";
  for (const auto& [stage, key] : std::vector<std::pair<std::string, std::string>>{{"pretrain", "sft_file"},
                                                                                   {"sft", "sft_file"},
                                                                                   {"reward", "pairs_file"},
                                                                                   {"ppo", "prompts_file"},
                                                                                   {"eval", "eval_file"}}) {
    CHECK_THROWS_WITH(
        parse(start + "stages: [" + stage + "]\n"),
        ContainsSubstring("data." + key) && ContainsSubstring("the stage '" + stage + "' needs this file"));
  }
  CHECK_THROWS_WITH(
      parse("model: {new: {vocabulary: letters}}\ndata: {source: random_walks}\nstages: [reward]\n"),
      ContainsSubstring("stages") && ContainsSubstring("random_walks has no preference pairs"));
}

TEST_CASE("empty and malformed JSONL is named with its line") {
  const TinyData data;
  struct Case {
    std::string text, message;
  };
  const std::vector<Case> cases = {
      {"", ": holds no records"},
      {"\n\n", ": holds no records"},
      {"{\"prompt\": \"a\", \"response\": \"b\"}\n\n{\"prompt\": \n", ":3: not valid JSON"},
      {"{\"prompt\": \"a\", \"response\": \"b\"}\n[1]\n", ":2: got array, expected an object"},
      {"{\"prompt\": \"a\"}\n", ":1: key \"response\" is missing"},
      {"{\"prompt\": 5, \"response\": \"b\"}\n",
       ":1: key \"prompt\": got number, expected text or messages"}};
  for (const Case& c : cases) {
    const auto path = data.folder().write("bad.jsonl", c.text);
    CHECK_THROWS_WITH(set_up(data.options("run", {"data.sft_file=" + path.string()})),
                      ContainsSubstring(path.string() + c.message));
  }
  const auto pairs = data.folder().write("bad.jsonl", "{\"prompt\": \"a\", \"chosen\": \"b\"}\n");
  CHECK_THROWS_WITH(set_up(data.options("run", {"data.pairs_file=" + pairs.string()})),
                    ContainsSubstring(pairs.string() + ":1: key \"rejected\" is missing"));
}

TEST_CASE("text and tokens that do not fit the model are named with file and line") {
  const TinyData data;
  const std::string word(70, 'x');  // the context is 64
  const auto sft = data.folder().write(
      "long_sft.jsonl",
      "{\"prompt\": \"a\", \"response\": \"b\"}\n{\"prompt\": \"a\", \"response\": \"" + word + "\"}\n");
  CHECK_THROWS_WITH(set_up(data.options("run", {"data.sft_file=" + sft.string()})),
                    sft.string() + ":2: has 72 tokens, the model's context is 64");
  const auto pairs = data.folder().write(
      "long_pairs.jsonl", "{\"prompt\": \"a\", \"chosen\": \"b\", \"rejected\": \"" + word + "\"}\n");
  CHECK_THROWS_WITH(set_up(data.options("run", {"data.pairs_file=" + pairs.string()})),
                    pairs.string() + ":1: has 72 tokens, the model's context is 64");
  for (const char* key : {"prompts_file", "eval_file"}) {
    const auto set_up_with = [&](const std::string& text) {
      const auto path = data.folder().write("bad_prompts.jsonl", text);
      set_up(data.options("run", {std::string("data.") + key + "=" + path.string()}));
    };
    const std::string path = data.path("bad_prompts.jsonl").string();
    // 63 tokens leave room for one more, 64 do not.
    CHECK_NOTHROW(set_up_with("{\"prompt\": \"" + word.substr(0, 63) + "\"}\n"));
    CHECK_THROWS_WITH(set_up_with("\n{\"prompt\": \"" + word.substr(0, 64) + "\"}\n"),
                      path + ":2: has 65 tokens, the model's context is 64");
    CHECK_THROWS_WITH(set_up_with("{\"input_ids\": [1, 258]}\n{\"input_ids\": [1, 259]}\n"),
                      path + ":2: token id 259 is outside the model's vocabulary of 259");
  }
}

TEST_CASE("models that do not fit are refused with tensor, shape or vocabulary") {
  const TinyData data;
  const fs::path copy = data.path("model");
  const auto fresh_copy = [&] {
    fs::remove_all(copy);
    fs::copy(kGoldenModel, copy);
  };
  SECTION("shapes") {
    fresh_copy();
    const auto config = nlohmann::json::parse(read_text_file(copy / "config.json"));
    const auto width = config.at("intermediate_size").get<std::int64_t>();
    replace_in_file(copy / "config.json", "\"intermediate_size\": " + std::to_string(width),
                    "\"intermediate_size\": " + std::to_string(width + 1));
    CHECK_THROWS_WITH(set_up(with_model_path(data, copy)),
                      (copy / "model.safetensors").string() +
                          ": tensor model.layers.0.mlp.gate_proj.weight has the shape [64, 32], the "
                          "configuration needs [65, 32]");
  }
  SECTION("a shape with as many elements") {
    fresh_copy();
    const auto file = WeightFile::open(kGoldenModel);
    std::vector<std::vector<float>> values;
    std::vector<OutputTensor> tensors;
    for (const TensorInfo& info : file->tensors()) {
      values.emplace_back(static_cast<std::size_t>(info.num_elements()));
      file->read(info.name, std::span<float>(values.back()));
      auto shape = info.shape;
      if (info.name.ends_with("layers.1.mlp.down_proj.weight")) std::swap(shape[0], shape[1]);
      tensors.push_back({info.name, shape, std::span<const float>(values.back())});
    }
    save_safetensors(copy / "model.safetensors", tensors);
    CHECK_THROWS_WITH(
        set_up(with_model_path(data, copy)),
        ContainsSubstring(
            "layers.1.mlp.down_proj.weight has the shape [64, 32], the configuration needs [32, 64]"));
  }
  SECTION("a tensor is missing") {
    fresh_copy();
    const auto config = nlohmann::json::parse(read_text_file(copy / "config.json"));
    const auto layers = config.at("num_hidden_layers").get<std::int64_t>();
    replace_in_file(copy / "config.json", "\"num_hidden_layers\": " + std::to_string(layers),
                    "\"num_hidden_layers\": " + std::to_string(layers + 1));
    CHECK_THROWS_WITH(
        set_up(with_model_path(data, copy)),
        ContainsSubstring("model.safetensors") && ContainsSubstring("layers." + std::to_string(layers)));
  }
  SECTION("the file is cut") {
    fresh_copy();
    fs::resize_file(copy / "model.safetensors", fs::file_size(copy / "model.safetensors") / 2);
    CHECK_THROWS_WITH(set_up(with_model_path(data, copy)),
                      ContainsSubstring((copy / "model.safetensors").string()));
  }
  SECTION("no tokenizer") {
    fresh_copy();
    CHECK_THROWS_WITH(set_up(with_model_path(data, copy)), ContainsSubstring("this model has no tokenizer"));
  }
  SECTION("the tokenizer of another model") {
    fresh_copy();
    LanguageModel::create({}, {}, 1).save(data.path("bytes"));
    fs::copy(data.path("bytes") / "tokenizer.json", copy / "tokenizer.json");
    CHECK_THROWS_WITH(set_up(with_model_path(data, copy)),
                      copy.string() + ": the tokenizer has 259 ids but the model's vocabulary has 96");
  }
  SECTION("no config") {
    fresh_copy();
    fs::remove(copy / "config.json");
    CHECK_THROWS_WITH(set_up(with_model_path(data, copy)), ContainsSubstring(copy.string()));
  }
  SECTION("weights are not finite") {
    LanguageModel model = LanguageModel::create({}, {}, 1);
    model.parameters().trainable()[300] = std::nanf("");
    model.save(data.path("nan"));
    RunOptions options = with_model_path(data, data.path("nan"));
    options.stages = {"sft"};
    CHECK(message_of_run(options, Start::kFresh) == "sft: the loss of step 1 is nan");
    options = with_model_path(data, data.path("nan"));
    options.stages = {"eval"};
    CHECK_THAT(message_of_run(options, Start::kOverwrite),
               ContainsSubstring("rollout: logits of prompt 0, sample 0, token 0 are not finite"));
  }
}

TEST_CASE("a reward that is not finite or throws names term, prompt and iteration; the run can go on") {
  const TinyData data;
  attempt(data.options("whole"), Start::kFresh);
  struct Fault {
    std::string name, message;
    std::function<double()> fault;
  };
  const std::vector<Fault> faults = {
      {"nan", "the score is nan, expected a finite number", [] { return std::nan(""); }},
      {"inf", "the score is inf, expected a finite number", [] { return INFINITY; }},
      {"thrown", "the judge is away", []() -> double { throw std::runtime_error("the judge is away"); }}};
  for (const Fault& fault : faults) {
    const auto options = data.options(fault.name, {"run.checkpoint_every=1"});
    // Four evaluations of five prompts come at other times: base, pretrain and sft before ppo, each with two
    // more sampled draws; 45 calls. Six responses an iteration: call 60 is in the third iteration.
    const std::string message = message_of_run(options, Start::kFresh, [&](Pipeline& pipeline, Watcher&) {
      pipeline.add_reward(std::make_unique<FaultyReward>(60, fault.fault), {});
    });
    INFO(message);
    CHECK_THAT(message, ContainsSubstring("reward term \"faulty\", prompt ") &&
                            ContainsSubstring(fault.message) && ContainsSubstring("ppo") &&
                            ContainsSubstring("iteration 3"));
    // The checkpoint of the second iteration is there, and the run goes on from it.
    const auto manifest =
        nlohmann::json::parse(read_text_file(data.path(fault.name) / "checkpoints" / "ppo.json"));
    CHECK(manifest.at("steps") == 2);
    CHECK(message_of_run(options, Start::kResume) == "");
    check_same_weights(data, fault.name, "whole");
  }
}

TEST_CASE("a checkpoint of another configuration is refused, and nothing of the run is changed") {
  const TinyData data;
  for (const auto& [name, stage, step] : std::vector<std::tuple<std::string, std::string, std::int64_t>>{
           {"in_ppo", "ppo", 1}, {"in_reward", "reward", 1}}) {
    CHECK(attempt(data.options(name), Start::kFresh, stage, step).stopped);
    const auto before = files_below(data.path(name));
    for (const std::string change :
         {"sft.optimizer.learning_rate=0.5", "model.new.hidden_size=32", "ppo.iterations=9"}) {
      const std::string message = message_of_run(data.options(name, {change}), Start::kResume);
      INFO(message);
      CHECK_THAT(message, ContainsSubstring(data.path(name).string()) &&
                              ContainsSubstring("was started with another configuration") &&
                              ContainsSubstring(change.substr(0, change.find('='))));
      CHECK(files_below(data.path(name)) == before);
    }
    // Where it runs and how often it saves may change.
    CHECK(message_of_run(data.options(name, {"threads=2", "run.checkpoint_every=1", "memory.budget=1GiB"}),
                         Start::kResume) == "");
  }
  attempt(data.options("whole"), Start::kFresh);
  check_same_weights(data, "in_ppo", "whole");
  check_same_weights(data, "in_reward", "whole");
}

TEST_CASE("an embedder's pipeline refuses checkpoints of another fingerprint, and never mixes two runs") {
  const TinyData data;
  const RunOptions options = data.options("run");
  const auto run = [&](Start start, const std::string& fingerprint, std::int64_t stop_after) {
    Watcher watcher(nullptr);
    watcher.stop_stage = "reward";
    watcher.stop_step = stop_after;
    PipelineSettings settings;
    settings.start = start;
    settings.directory = data.path("run");
    settings.stop = &watcher.stop;
    settings.fingerprint = fingerprint;
    Pipeline(options, settings, watcher).run();
    return watcher.steps;
  };
  CHECK_THROWS_AS(run(Start::kFresh, "a", 1), StageStopped);
  const auto before = files_below(data.path("run"));
  CHECK_THROWS_WITH(
      run(Start::kResume, "b", 0),
      ContainsSubstring("reward.json: this checkpoint was written under another configuration"));
  CHECK_THROWS_WITH(
      run(Start::kFresh, "a", 0),
      ContainsSubstring((data.path("run") / "checkpoints").string() + " holds checkpoints of another run"));
  CHECK(files_below(data.path("run")) == before);
  // Overwriting starts from nothing, although the old run's stages are done.
  CHECK_THROWS_AS(run(Start::kOverwrite, "a", 2), StageStopped);
  CHECK(files_below(data.path("run") / "checkpoints").contains("sft.final.safetensors"));
  const auto rest = run(Start::kResume, "a", 0);
  CHECK(rest.contains({"reward", 3}));
  CHECK_FALSE(rest.contains({"reward", 2}));
  attempt(data.options("whole"), Start::kFresh);
  check_same_weights(data, "run", "whole");
}

TEST_CASE("damaged checkpoints are named; earlier stages stay") {
  const TinyData data;
  const RunOptions options = data.options("run");
  CHECK(attempt(options, Start::kFresh, "ppo", 2).stopped);
  const fs::path folder = data.path("run") / "checkpoints";
  const auto intact = files_below(data.path("run"));
  const auto restore = [&] {
    for (const auto& [name, text] : intact) write_file_atomically(data.path("run") / name, text);
  };
  struct Damage {
    std::string file, message;
    std::function<void(const fs::path&)> apply;
  };
  const auto cut = [](const fs::path& path) { fs::resize_file(path, fs::file_size(path) - 7); };
  const auto empty = [](const fs::path& path) { fs::resize_file(path, 0); };
  const auto remove = [](const fs::path& path) { fs::remove(path); };
  const auto text = [](const std::string& content) {
    return [content](const fs::path& path) { write_file_atomically(path, content); };
  };
  const auto shorter = [](const fs::path& path) {
    const std::vector<float> few(5);
    const std::vector<OutputTensor> tensors = {{"weights", {5}, std::span<const float>(few)}};
    save_safetensors(path, tensors);
  };
  const std::vector<Damage> damages = {
      {"ppo.0.safetensors", "", cut},
      {"ppo.0.safetensors", "", empty},
      {"ppo.0.safetensors", "no such file", remove},
      {"ppo.0.safetensors", "policy.weights", shorter},
      {"ppo.json", "not a checkpoint manifest", cut},
      {"ppo.json", "not a checkpoint manifest", empty},
      {"ppo.json", "not a checkpoint manifest", text("[]")},
      {"ppo.json", "not a checkpoint manifest", text("{\"fingerprint\": 3}")},
      {"sft.final.safetensors", "", cut},
      {"sft.final.safetensors", "has 5 elements", shorter},
      {"reward.final.safetensors", "", empty},
  };
  REQUIRE(intact.contains("checkpoints/ppo.0.safetensors"));
  for (const Damage& damage : damages) {
    damage.apply(folder / damage.file);
    const std::string message = message_of_run(options, Start::kResume);
    INFO(damage.file << ": " << message);
    CHECK_THAT(message, ContainsSubstring(folder.string()) && ContainsSubstring(damage.message));
    if (damage.file.ends_with(".safetensors")) CHECK_THAT(message, ContainsSubstring(damage.file));
    for (const char* stage : {"pretrain", "sft", "reward"}) {
      const std::string name = std::string(stage) + ".final.safetensors";
      if (name != damage.file) CHECK(read_text_file(folder / name) == intact.at("checkpoints/" + name));
    }
    restore();
  }
  // The evaluation of an earlier stage is part of the report: damage is an error there, too.
  write_file_atomically(data.path("run") / "samples" / "eval_sft.jsonl", "{\"prompt_id\": 0}\n");
  CHECK_THAT(message_of_run(options, Start::kResume),
             ContainsSubstring("eval_sft.jsonl:1: not a judged response of this run"));
  restore();
  const std::string& eval = intact.at("samples/eval_sft.jsonl");
  write_file_atomically(data.path("run") / "samples" / "eval_sft.jsonl", eval.substr(0, eval.find('\n') + 1));
  CHECK_THAT(message_of_run(options, Start::kResume),
             ContainsSubstring("eval_sft.jsonl: holds 1 responses, the run asks for 5"));
  restore();
  CHECK(message_of_run(options, Start::kResume) == "");
  attempt(data.options("whole"), Start::kFresh);
  check_same_weights(data, "run", "whole");
}

TEST_CASE("prompts that share an id keep their responses apart when a run is resumed") {
  const TinyData data;
  const auto prompts = data.folder().write("same.jsonl",
                                           "{\"id\": 7, \"prompt\": \"a\", \"task\": \"first\"}\n{\"id\": 7, "
                                           "\"prompt\": \"bcd\", \"task\": \"second\"}\n");
  const auto options = [&](const std::string& name) {
    return data.options(name, {"data.eval_file=" + prompts.string()});
  };
  const Attempt whole = attempt(options("whole"), Start::kFresh);
  CHECK(attempt(options("run"), Start::kFresh, "ppo", 1).stopped);
  const Attempt resumed = attempt(options("run"), Start::kResume);
  REQUIRE(resumed.report.tasks.size() == 2);
  REQUIRE(whole.report.tasks.size() == 2);
  for (std::size_t t = 0; t < 2; ++t)
    for (std::size_t s = 0; s < whole.report.tasks[t].stages.size(); ++s)
      CHECK(resumed.report.tasks[t].stages.at(s).score == whole.report.tasks[t].stages[s].score);
}

TEST_CASE("a run directory that cannot be made or written is named") {
  const TinyData data;
  data.folder().write("file", "x");
  const std::string message = message_of_run(data.options("file/run"), Start::kFresh);
  CHECK_THAT(message, ContainsSubstring(data.path("file/run").string()));
  CHECK_THAT(message, ContainsSubstring("cannot be created"));
  CHECK_THAT(message_of_run(data.options("file"), Start::kFresh),
             ContainsSubstring(data.path("file").string()));
  CHECK(read_text_file(data.path("file")) == "x");
}

TEST_CASE("a run is neither overwritten nor resumed by accident") {
  const TinyData data;
  const RunOptions options = data.options("run");
  const std::string path = data.path("run").string();
  CHECK(message_of_run(options, Start::kResume) == path + " holds no run to resume");
  CHECK_FALSE(fs::exists(data.path("run")));
  CHECK(attempt(options, Start::kFresh, "sft", 1).stopped);
  auto before = files_below(path);
  CHECK(message_of_run(options, Start::kFresh) ==
        path + " holds an unfinished run; pass --resume to continue it or --overwrite to replace it");
  CHECK(files_below(path) == before);
  CHECK(message_of_run(options, Start::kResume) == "");
  before = files_below(path);
  CHECK(message_of_run(options, Start::kFresh) ==
        path + " holds a finished run; pass --overwrite to replace it, or set run.dir to another folder");
  CHECK(files_below(path) == before);
  // Overwriting with a run that cannot even start leaves the old one.
  const auto broken = data.options("run", {"data.sft_file=" + data.path("none").string()});
  CHECK_THAT(message_of_run(broken, Start::kOverwrite), ContainsSubstring("no such file"));
  CHECK(files_below(path) == before);
  // A good one replaces it.
  const auto shorter = data.options("run", {"stages=[sft]"});
  CHECK(message_of_run(shorter, Start::kOverwrite) == "");
  const auto after = files_below(path);
  CHECK_FALSE(after.contains("checkpoints/ppo.final.safetensors"));
  CHECK_FALSE(after.contains("samples/eval_base.jsonl"));
  CHECK(after.contains("checkpoints/sft.final.safetensors"));
}

TEST_CASE(
    "a full disk while a checkpoint or a metric is written leaves the last checkpoint, and the run goes on") {
  const TinyData data;
  attempt(data.options("whole"), Start::kFresh);
  struct Case {
    std::string name, stage;
    std::int64_t step;
    std::function<rlim_t()> limit;
    std::string message;
  };
  const auto metrics_size = [&](const std::string& name) {
    return fs::file_size(data.path(name) / "metrics.jsonl");
  };
  const std::vector<Case> cases = {
      {"sft_full", "sft", 3, [] { return 20000; },
       "sft.0.safetensors: cannot write at offset 20000: File too large"},
      {"ppo_full", "ppo", 2, [] { return 40000; },
       "ppo.1.safetensors: cannot write at offset 40000: File too large"},
      {"metrics_full", "ppo", 3, [&] { return metrics_size("metrics_full") + 40; },
       "metrics.jsonl: cannot write the line of stage ppo, step 3"}};
  for (const Case& c : cases) {
    const RunOptions options = data.options(c.name, {"run.checkpoint_every=1"});
    std::string message;
    {
      std::unique_ptr<FileSizeLimit> limit;
      message = message_of_run(options, Start::kFresh, {}, [&](const std::string& stage, std::int64_t step) {
        if (stage == c.stage && step == c.step) limit = std::make_unique<FileSizeLimit>(c.limit());
      });
    }
    CHECK_THAT(message, ContainsSubstring(c.message));
    const auto manifest =
        nlohmann::json::parse(read_text_file(data.path(c.name) / "checkpoints" / (c.stage + ".json")));
    CHECK(manifest.at("steps") == c.step - 1);
    for (const auto& [name, text] : files_below(data.path(c.name)))
      CHECK(name.find(".tmp-") == std::string::npos);
    CHECK(message_of_run(options, Start::kResume) == "");
    check_same_weights(data, c.name, "whole");
    CHECK(files_below(data.path(c.name) / "samples") == files_below(data.path("whole") / "samples"));
  }
}

TEST_CASE("a full file system ends the run with a message that says so") {
  const TinyData data;
  fs::create_directories(data.path("disk"));
  if (mount("tmpfs", data.path("disk").c_str(), "tmpfs", 0, "size=300k") != 0) {
    WARN("skipped: a tiny tmpfs cannot be mounted here: " << std::strerror(errno));
    return;
  }
  const RunOptions options = data.options("disk/run", {"run.checkpoint_every=1"});
  const std::string message = message_of_run(options, Start::kFresh);
  INFO(message);
  CHECK_THAT(message,
             ContainsSubstring("No space left on device (free some space or choose another folder)"));
  // What is there is whole: with more room the run ends as if nothing had been.
  CHECK(mount("tmpfs", data.path("disk").c_str(), "tmpfs", MS_REMOUNT, "size=20m") == 0);
  CHECK(message_of_run(options, Start::kResume) == "");
  attempt(data.options("whole"), Start::kFresh);
  check_same_weights(data, "disk/run", "whole");
  umount(data.path("disk").c_str());
}

TEST_CASE("a budget that cannot hold the run lists who needs what") {
  const TinyData data;
  CHECK_THROWS_WITH(set_up(data.options("run", {"memory.budget=64KiB"})),
                    ContainsSubstring("memory.budget is 64 KiB but the run needs at least ") &&
                        ContainsSubstring("policy weights") && ContainsSubstring("K/V cache") &&
                        ContainsSubstring("what would make it fit:\n  memory.budget: "));
}
