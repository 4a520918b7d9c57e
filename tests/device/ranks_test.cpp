// Several processes, each with an accelerator of its own: the emulator in every one, or, with
// RLHF_TEST_DEVICES=cuda, a GPU for each. A rank is this program again, in one of the hidden test cases
// below.
#include <cmath>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>

#include "rlhf/config/writer.h"
#include "rlhf/distributed/device_collective.h"
#include "rlhf/distributed/gloo_collective.h"
#include "rlhf/kernels/float_hash.h"
#include "rlhf/train/language_model.h"
#include "rlhf/train/optimizer.h"
#include "rlhf/train/rank_device.h"
#include "tests/device/accelerators.h"
#include "tests/distributed/processes.h"
#include "tests/distributed/run_results.h"
#include "tests/distributed/silent_rank.h"
#include "tests/train/tiny_run.h"

using namespace rlhf;
using Start = PipelineSettings::Start;

namespace {

// The emulator is slow, and several share a machine's cores.
constexpr std::chrono::milliseconds kPatience = std::chrono::minutes(2);

bool on_gpus() {
  return wants_device("cuda") && !wants_device("emulated");
}

bool is_skipped(int ranks) {
  if (!has_gloo()) WARN("skipped: built without Gloo");
  const std::size_t gpus = on_gpus() ? cuda_gpu_names().size() : 0;
  const bool too_few = on_gpus() && gpus < static_cast<std::size_t>(ranks);
  if (too_few) WARN("skipped: " << ranks << " ranks need as many GPUs, this machine has " << gpus);
  return !has_gloo() || too_few;
}

std::string variable(const char* name) {
  return process_environment(name).value_or("");
}

// This process's accelerator.
class OwnAccelerator {
 public:
  explicit OwnAccelerator(Collective& collective) {
    if (on_gpus()) {
      gpu_.emplace(Device::kCuda, collective,
                   DeviceCollectiveOptions{.is_done = cuda_queue_is_done, .timeout = kPatience});
      return;
    }
    constexpr std::size_t kBytes = std::size_t{1} << 30;
    memory_.emplace(std::make_shared<GuardedSpace>(kBytes));
    if (collective.world_size() > 1) ranks_ = make_staged_collective(collective, *memory_, "emulated", 2000);
    emulated_ = {&emulated_kernels<Bfloat16>(), &*memory_, kBytes, "emulated", 1e9, ranks_.get()};
  }
  const Accelerator& get() const { return gpu_ ? *gpu_->accelerator() : emulated_; }

 private:
  std::optional<RankDevice> gpu_;
  std::optional<LooseQueue> memory_;
  std::unique_ptr<DeviceCollective> ranks_;
  Accelerator emulated_;
};

// The ranks of a hidden test case; what they write is in `folder`.
std::vector<Process> start_test(const TemporaryFolder& folder, const std::string& tag, int ranks,
                                const std::vector<std::string>& variables = {}) {
  std::vector<std::string> words = {"/usr/bin/env"};
  words.insert(words.end(), variables.begin(), variables.end());
  words.push_back(std::filesystem::read_symlink("/proc/self/exe").string());
  words.push_back(tag);
  return start_ranks(folder, words, ranks);
}

void check_success(std::vector<Process>& processes) {
  for (Process& process : processes) {
    const int code = process.wait(240);
    INFO(process.err() << process.out());
    CHECK(code == 0);
  }
}

template <class V>
void write_values(const std::string& file, std::span<const V> values) {
  std::ofstream out(file, std::ios::binary);
  out.write(reinterpret_cast<const char*>(values.data()), static_cast<std::streamsize>(values.size_bytes()));
}
std::vector<float> read_floats(const std::filesystem::path& file) {
  const std::string bytes = read_text_file(file);
  std::vector<float> values(bytes.size() / sizeof(float));
  std::memcpy(values.data(), bytes.data(), bytes.size());
  return values;
}

// The optimizer alone.

LanguageModel make_model() {
  NewModelOptions options;
  options.layers = 1;
  options.hidden_size = 16;
  options.heads = 2;
  options.kv_heads = 1;
  options.intermediate_size = 23;  // so that no slice is as long as another
  options.max_positions = 64;
  options.initial_std = 0.2;
  return LanguageModel::create(options, {}, 4);
}

// Multiples of 1/64 up to 1: sums over ranks, and of squares, are exact in any order.
std::vector<float> gradient_of(int rank, int step, std::size_t count) {
  RandomStream random(17, static_cast<std::uint64_t>(100 * step + rank));
  std::vector<float> values(count);
  for (float& value : values) value = static_cast<float>(static_cast<int>(random.below(129)) - 64) / 64;
  return values;
}

struct Learned {
  std::vector<float> masters, rounded;
  std::vector<double> norms;
};

// Steps with gradients that are put there; `gradient` gives a step's.
template <class Gradient>
Learned take_steps(const Accelerator& accelerator, Collective& collective, MomentPlacement moments,
                   const Gradient& gradient) {
  ThreadPool pool(1);
  const Compute<float> compute(pool, kernels::detect_cpu_isa(), &accelerator);
  LanguageModel model = make_model();
  model.parameters().place_on(accelerator);
  ResidentWeights& weights = *model.parameters().resident();
  ppo::OptimizerOptions options;
  options.max_grad_norm = 1;
  Optimizer<float> optimizer(options, model.parameters().num_trainable(), collective, moments);
  Learned learned;
  for (int step = 0; step < 4; ++step) {
    std::vector<float> values = gradient(step, weights.size());
    if (step == 2) values[5] = std::numeric_limits<float>::infinity();  // skipped, on all ranks
    accelerator.memory->upload(weights.gradient(), values.data(), values.size() * sizeof(float));
    const auto result = optimizer.step(compute, model.parameters(), 0.01, 0.5);
    CHECK(result.skipped == (step == 2));
    if (step != 2) learned.norms.push_back(result.gradient_norm);
  }
  std::vector<Bfloat16> rounded(weights.size());
  accelerator.memory->download(rounded.data(), weights.shadow(), rounded.size() * sizeof(Bfloat16));
  for (const Bfloat16 value : rounded) learned.rounded.push_back(to_float(value));
  const std::uint64_t hash = model.parameters().learned_hash();  // of the ranks' slices
  const auto masters = std::as_const(model).parameters().trainable();
  REQUIRE(hash == kernels::hash_floats(masters));
  learned.masters.assign(masters.begin(), masters.end());
  // Moments of all ranks, behind the masters: what a checkpoint holds.
  for (const auto own : {optimizer.first_moment(), optimizer.second_moment()}) {
    std::vector<float> storage;
    const auto all = gather_slices(collective, own, weights.size(), storage);
    learned.masters.insert(learned.masters.end(), all.begin(), all.end());
  }
  return learned;
}

MomentPlacement moments_of(const std::string& where) {
  // The last piece is shorter than the others, and not the same on all ranks.
  return where == "host" ? MomentPlacement{.on_host = true, .piece_elements = 1000} : MomentPlacement{};
}

// Whole runs.

std::vector<std::string> small(std::vector<std::string> overrides = {}) {
  const std::vector<std::string> sizes = {"stages=[sft, preference, ppo]",    "sft.max_steps=3",
                                          "preference.max_steps=2",           "preference.pairs_per_step=3",
                                          "rollout.max_new_tokens=4",         "ppo.iterations=1",
                                          "ppo.critic_init=policy",           "ppo.reward_model_weight=0",
                                          "ppo.algorithm.prompts_per_step=2", "ppo.algorithm.epochs=1",
                                          "ppo.algorithm.mini_batches=1"};
  overrides.insert(overrides.begin(), sizes.begin(), sizes.end());
  return overrides;
}

std::vector<Process> start_run(const TinyData& data, const RunOptions& options, int ranks,
                               const std::vector<std::string>& variables = {}) {
  const auto file = data.path(std::filesystem::path(options.run.dir).filename().string() + ".yaml");
  config::save_resolved(file, options);
  std::vector<std::string> all = {"RLHF_TEST_RUN=" + file.string()};
  all.insert(all.end(), variables.begin(), variables.end());
  return start_test(data.folder(), "[run-rank]", ranks, all);
}

}  // namespace

TEST_CASE("one rank of an optimizer", "[.][optimizer-rank]") {
  const auto collective = connect(read_launch(), kPatience);
  const OwnAccelerator accelerator(*collective);
  const Learned learned =
      take_steps(accelerator.get(), *collective, moments_of(variable("RLHF_TEST_MOMENTS")),
                 [&](int step, std::size_t count) { return gradient_of(collective->rank(), step, count); });
  const std::string end = "." + std::to_string(collective->rank());
  write_values<float>("masters" + end, learned.masters);
  write_values<float>("rounded" + end, learned.rounded);
  write_values<double>("norms" + end, learned.norms);
}

TEST_CASE("one rank of a run", "[.][run-rank]") {
  const auto options = config::load<RunOptions>(variable("RLHF_TEST_RUN"));
  const auto collective = connect(read_launch(), kPatience);
  const OwnAccelerator accelerator(*collective);
  std::optional<RunDirectory> directory;
  const Start start = variable("RLHF_TEST_RESUME").empty() ? Start::kFresh : Start::kResume;
  if (collective->is_first()) directory.emplace(options, start, Progress::Options{}, [](std::string_view) {});
  Watcher watcher(directory ? &*directory : nullptr);
  watcher.stop_step = std::atoi(variable("RLHF_TEST_STOP_STEP").c_str());
  if (watcher.stop_step > 0) watcher.stop_stage = "sft";
  PipelineSettings settings;
  settings.start = start;
  settings.directory = options.directory();
  settings.stop = &watcher.stop;
  settings.fingerprint = fingerprint_of(options);
  settings.collective = collective.get();
  settings.accelerator = &accelerator.get();
  Pipeline pipeline(options, settings, watcher);
  if (watcher.stop_step > 0) {
    CHECK_THROWS_AS(pipeline.run(), StageStopped);
    return;
  }
  const RunReport report = pipeline.run();
  if (directory) directory->finish(report);
  const auto weights = std::as_const(pipeline.policy()).parameters().trainable();
  write_values<float>((options.directory() + ".weights.") + std::to_string(collective->rank()), weights);
}

TEST_CASE("an optimizer on two and four accelerators is that of one, bit for bit", "[device]") {
  for (const std::string where : {"device", "host"})
    for (const int ranks : {2, 3, 4}) {
      if (is_skipped(ranks)) continue;
      INFO(ranks << " ranks, moments: " << where);
      const OwnAccelerator accelerator(one_process());
      const Learned one =
          take_steps(accelerator.get(), one_process(), moments_of(where), [&](int step, std::size_t count) {
            std::vector<float> sum(count);
            for (int r = 0; r < ranks; ++r) {
              const std::vector<float> part = gradient_of(r, step, count);
              for (std::size_t i = 0; i < count; ++i) sum[i] += part[i];
            }
            return sum;
          });
      const TemporaryFolder folder;
      auto processes = start_test(folder, "[optimizer-rank]", ranks, {"RLHF_TEST_MOMENTS=" + where});
      check_success(processes);
      const std::size_t count = one.rounded.size();
      for (int r = 0; r < ranks; ++r) {
        const std::string end = "." + std::to_string(r);
        std::vector<float> masters = read_floats(folder.path() / ("masters" + end)), expected = one.masters;
        if (r > 0) {  // rank 0 gathers the moments
          masters.resize(count);
          expected.resize(count);
        }
        CHECK((masters == expected));
        CHECK((read_floats(folder.path() / ("rounded" + end)) == one.rounded));
        const std::string norms = read_text_file(folder.path() / ("norms" + end));
        REQUIRE(norms.size() == one.norms.size() * sizeof(double));
        CHECK(std::memcmp(norms.data(), one.norms.data(), norms.size()) == 0);
      }
    }
}

TEST_CASE("runs of two and four accelerators learn what one does, and all ranks the same", "[device]") {
  if (is_skipped(2)) return;
  const TinyData data;
  const std::vector<std::string> overrides = {"sft.optimizer.learning_rate=0.001",
                                              "preference.optimizer.learning_rate=0.001"};
  const OwnAccelerator accelerator(one_process());
  const Attempt one =
      attempt(data.options("one", small(overrides)), Start::kFresh, "", 0, &accelerator.get());
  for (const int ranks : {2, 4}) {
    if (is_skipped(ranks)) continue;
    const std::string name = "run" + std::to_string(ranks);
    INFO(name);
    std::vector<std::string> own = overrides;
    if (ranks == 4) own.push_back("stages=[sft]");  // four emulators take their time
    auto processes = start_run(data, data.options(name, small(own)), ranks);
    check_success(processes);
    const auto steps = read_metrics(data.path(name));
    CHECK(steps.size() == (ranks == 4 ? 3 : one.steps.size()));
    for (const auto& [key, metrics] : one.steps) {
      if (ranks == 4 && key.first != "sft") continue;
      REQUIRE(steps.contains(key));
      if (key.first == "ppo") {  // draws may differ as soon as one weight is rounded the other way
        CHECK(steps.at(key).value("optimizer/skipped_steps", 0.0) == 0);
        CHECK(std::isfinite(steps.at(key).at("loss/policy").get<double>()));
        continue;
      }
      // The first step reads the same weights. Later ones differ by the order of sums of the gradient, and
      // where that rounds a weight the other way by 2^-9 of that weight.
      const double expected = metric(metrics, "loss", -1), found = steps.at(key).at("loss");
      INFO(key.first << " " << key.second << ": " << found << ", one process: " << expected);
      const double tolerance = key == std::pair<std::string, std::int64_t>{"sft", 1} ? 1e-5 : 1e-3;
      CHECK(std::abs(found - expected) < tolerance * (1 + std::abs(expected)));
    }
    CHECK(largest_difference(final_weights(data.path(name), "sft"), final_weights(data.path("one"), "sft")) <
          1e-4);
    const std::vector<float> first = read_floats(data.path(name + ".weights.0"));
    CHECK_FALSE(first.empty());
    for (int r = 1; r < ranks; ++r)
      CHECK((read_floats(data.path(name + ".weights." + std::to_string(r))) == first));
  }
}

TEST_CASE("gradients in slices on accelerators are those of one buffer", "[device]") {
  if (is_skipped(2)) return;
  const TinyData data;
  const auto weights_of = [&](const std::string& name, const char* sharding, int ranks,
                              std::vector<std::string> overrides) {
    overrides.push_back(std::string("distributed.sharding=") + sharding);
    overrides.push_back("sft.optimizer.learning_rate=0.001");
    auto processes = start_run(data, data.options(name, small(overrides)), ranks);
    check_success(processes);
    const std::vector<float> weights = read_floats(data.path(name + ".weights.0"));
    CHECK_FALSE(weights.empty());
    return weights;
  };
  // With one micro-batch a rank and step both add up the same numbers, two of them in either order.
  const std::vector<std::string> whole = {"stages=[sft, ppo]", "sft.max_tokens_per_micro_batch=1000",
                                          "ppo.max_tokens_per_micro_batch=1000"};
  const std::vector<float> sliced = weights_of("slices", "zero2", 2, whole);
  CHECK((sliced == weights_of("buffer", "zero1", 2, whole)));
  // A rank's slice, a layer, and what is in none: 4 bytes for each of so many numbers.
  constexpr std::size_t kLayer = 32 * 16 + 16 * 16 + 2 * 16 + 3 * 16 * 24;
  const std::size_t rest = sliced.size() - 2 * kLayer, slice = sliced.size() / 2 / 64 * 64;
  CHECK(read_metrics(data.path("slices"))
            .at({"ppo", 1})
            .at("memory/peak_bytes/policy gradient")
            .get<std::size_t>() == 4 * (slice + kLayer + rest));
  if (is_skipped(3)) return;
  // Two micro-batches on one rank, one on the others. A sum in another order may round a weight the other
  // way.
  const std::vector<std::string> cut = {"stages=[sft]", "sft.examples_per_step=4",
                                        "sft.max_tokens_per_micro_batch=20"};
  CHECK(largest_difference(weights_of("slices_cut", "zero2", 3, cut),
                           weights_of("buffer_cut", "zero1", 3, cut)) < 1e-4);
}

TEST_CASE("a run of two accelerators that is stopped goes on with one and with three", "[device]") {
  if (is_skipped(2)) return;
  const TinyData data;
  const auto options = [&](const std::string& name, const std::string& sharding = "zero1") {
    return data.options(name, small({"stages=[sft]", "sft.max_steps=4", "sft.optimizer.learning_rate=0.001",
                                     "memory.offload=optimizer", "distributed.sharding=" + sharding}));
  };
  const OwnAccelerator accelerator(one_process());
  attempt(options("whole"), Start::kFresh, "", 0, &accelerator.get());
  auto processes = start_run(data, options("two"), 2, {"RLHF_TEST_STOP_STEP=2"});
  check_success(processes);
  for (const int ranks : {1, 3}) {
    if (is_skipped(ranks)) continue;
    const std::string name = "on" + std::to_string(ranks);
    std::filesystem::copy(data.path("two"), data.path(name), std::filesystem::copy_options::recursive);
    auto resumed = start_run(data, options(name, "zero2"), ranks, {"RLHF_TEST_RESUME=1"});
    check_success(resumed);
    CHECK(read_metrics(data.path(name)).size() == 4);
    CHECK(largest_difference(final_weights(data.path(name), "sft"),
                             final_weights(data.path("whole"), "sft")) < 1e-4);
  }
}

TEST_CASE("a rank with an accelerator that is killed ends the others", "[device]") {
  if (is_skipped(3)) return;
  const TinyData data;
  const std::string sharding = GENERATE("zero1", "zero2");
  const RunOptions options =
      data.options("killed", small({"stages=[sft]", "sft.max_steps=100000", "run.checkpoint_every=2",
                                    "distributed.sharding=" + sharding}));
  auto processes = start_run(data, options, 3);
  const auto manifest = data.path("killed") / "checkpoints" / "sft.json";
  for (int i = 0; i < 4000 && !std::filesystem::exists(manifest); ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  processes[1].signal(SIGKILL);
  for (const std::size_t r : {0u, 2u}) {
    CHECK(processes[r].wait(30) > 0);
    CHECK_THAT(processes[r].out(), ContainsSubstring("of 3 lost rank"));
  }
  CHECK(nlohmann::json::parse(read_text_file(manifest)).at("steps").get<int>() % 2 == 0);
}

TEST_CASE("several ranks on an accelerator that does not reach the others are refused", "[device]") {
  SilentRank two(0, 2);
  const OwnAccelerator accelerator(one_process());
  CHECK_THROWS_WITH(take_steps(accelerator.get(), two, {},
                               [&](int step, std::size_t count) { return gradient_of(0, step, count); }),
                    ContainsSubstring("rank 0 of 2 updates "));
  LanguageModel placed = make_model(), sliced = make_model();
  placed.parameters().place_on(accelerator.get());
  CHECK_THROWS_WITH(placed.parameters().slice_gradient(two), ContainsSubstring("slice_gradient: 2 ranks"));
  sliced.parameters().slice_gradient(two);
  CHECK_THROWS_WITH(sliced.parameters().place_on(accelerator.get()),
                    ContainsSubstring("place_on: comes before slice_gradient"));
}
