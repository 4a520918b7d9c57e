#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "reward/remote/http_reward.h"
#include "reward/scoring/term_options.h"
#include "rlhf/config/schema.h"
#include "rlhf/data/finance_desk/desk.h"
#include "rlhf/data/records.h"
#include "rlhf/kernels/open_device.h"
#include "rlhf/train/generation.h"
#include "rlhf/train/language_model.h"
#include "rlhf/train/online_preference.h"
#include "rlhf/train/ppo_options.h"
#include "rlhf/train/preference_options.h"
#include "rlhf/train/rejection_sampling.h"
#include "rlhf/train/reward_model.h"
#include "rlhf/train/schedule_options.h"
#include "rlhf/train/sft.h"

namespace rlhf {

struct RunSection {
  std::string name = "run";
  std::string dir;                     ///< run directory; empty = runs/<name>
  std::uint64_t seed = 1;              ///< every draw of the run is a function of it
  std::int64_t checkpoint_every = 0;   ///< steps; 0 = only at the end of a stage and when stopped
  bool keep_checkpoints = false;       ///< all of checkpoint_every, for `rlhf replay`
  bool record_hashes = true;           ///< hashes.jsonl: of every PPO iteration's samples and weights
  bool export_stages = true;           ///< write a Hugging Face directory after every stage
  std::int64_t trace_iterations = 20;  ///< iterations whose lanes trace.json shows; 0 = no trace

  template <class V>
  void visit_fields(V& v) {
    v.field("name", name, "Name of the run");
    v.field("dir", dir, "Run directory; empty = runs/<name>");
    v.field("seed", seed, "Seed of data order, draws and initial weights");
    v.field("checkpoint_every", checkpoint_every,
            "Steps between checkpoints inside a stage; 0 = only when stopped", {0, 1e9});
    v.field(
        "keep_checkpoints", keep_checkpoints,
        "Keep every checkpoint of checkpoint_every, so that rlhf replay starts close to its step; else the "
        "last two, until the stage is done");
    v.field("record_hashes", record_hashes,
            "Write hashes.jsonl: hashes of every PPO iteration's samples and weights, which rlhf replay "
            "compares");
    v.field("export_stages", export_stages, "Write a Hugging Face directory after every stage");
    v.field("trace_iterations", trace_iterations, "Iterations whose lanes trace.json shows; 0 = no trace",
            {0, 1e9});
  }
};

struct ModelSection {
  std::string path;                          ///< Hugging Face directory or GGUF file
  std::optional<NewModelOptions> new_model;  ///< instead of path: a model made from nothing
  TrainableOptions trainable;

  template <class V>
  void visit_fields(V& v) {
    v.field("path", path, "Hugging Face directory or GGUF file");
    v.group("new", new_model, "Instead of path: a model made from nothing");
    trainable.visit_fields(v);
  }
  void validate(config::Problems& problems) const {
    if (path.empty() == !new_model.has_value())
      problems.add("path", path.empty() ? "give either path or new" : "path and new exclude each other");
  }
};

/// Whose probabilities ppo.algorithm.distillation follows.
struct DistillationSection {
  std::string teacher;  ///< Hugging Face directory or GGUF file; empty = none

  template <class V>
  void visit_fields(V& v) {
    v.field("teacher", teacher,
            "Hugging Face directory or GGUF file of a model with the policy's tokens, for "
            "ppo.algorithm.distillation");
  }
};

enum class DataSource { kFinanceDesk, kRandomWalks, kFiles };

struct DataSection {
  DataSource source = DataSource::kFinanceDesk;
  std::vector<std::string> kinds = {"intent", "gate", "calculation", "clause", "view"};
  std::int64_t sft_cases = 200, pair_cases = 200, held_out_pair_cases = 20, prompt_cases = 1000,
               eval_cases = 200;
  std::string sft_file, pairs_file, held_out_pairs_file, ratings_file, held_out_ratings_file, labels_file,
      prompts_file, eval_file;
  finance::Templates sft_templates = finance::Templates::kHalf;
  PromptText prompt_text = PromptText::kUserMessage;

  template <class V>
  void visit_fields(V& v) {
    v.choice("source", source,
             {{"finance_desk", DataSource::kFinanceDesk},
              {"random_walks", DataSource::kRandomWalks},
              {"files", DataSource::kFiles}},
             "Where prompts, demonstrations and pairs come from");
    v.field("kinds", kinds, "finance_desk: task kinds");
    v.field("sft_cases", sft_cases, "finance_desk: demonstrations per kind; random_walks: walks", {0, 1e7});
    v.choice("sft_templates", sft_templates,
             {{"all", finance::Templates::kAll}, {"half", finance::Templates::kHalf}},
             "finance_desk: training templates that demonstrations use; prompts use all");
    v.field("pair_cases", pair_cases, "finance_desk: cases per kind for preference pairs", {0, 1e7});
    v.field("held_out_pair_cases", held_out_pair_cases,
            "finance_desk: held-out cases per kind for pairs that reward and preference are judged on",
            {0, 1e7});
    v.field("prompt_cases", prompt_cases, "finance_desk: training prompts per kind", {1, 1e7});
    v.field("eval_cases", eval_cases, "finance_desk: held-out cases per kind; random_walks: draws per start",
            {1, 1e6});
    v.field("sft_file", sft_file, "files: JSONL demonstrations");
    v.field("pairs_file", pairs_file, "files: JSONL preference pairs");
    v.field("held_out_pairs_file", held_out_pairs_file,
            "files: JSONL pairs that reward and preference are judged on");
    v.field("ratings_file", ratings_file,
            "files: JSONL responses with scores, for reward.target: scores or steps");
    v.field("held_out_ratings_file", held_out_ratings_file,
            "files: JSONL responses with scores that the reward model is judged on");
    v.field("labels_file", labels_file,
            "files: JSONL responses with labels for preference.unpaired; empty = the sides of pairs_file");
    v.field("prompts_file", prompts_file,
            "files: JSONL prompts for rejection_sampling, online_preference and ppo");
    v.field("eval_file", eval_file, "files: JSONL prompts for eval");
    v.choice("prompt_text", prompt_text,
             {{"raw", PromptText::kRaw}, {"user_message", PromptText::kUserMessage}},
             "files: what a plain string under \"prompt\" is");
  }
};

/// One rule reward. Which numbers apply depends on the type.
struct RewardSection {
  enum class Type {
    kFinance,
    kRandomWalk,
    kExactMatch,
    kF1,
    kNumber,
    kRegex,
    kFormat,
    kLength,
    kEnvironment,
    kHttp
  };
  Type type = Type::kExactMatch;
  TermOptions term;
  double relative_tolerance = 0.005;
  std::string pattern, prefix, suffix;
  std::int64_t min_tokens = 0, max_tokens = 256, slope_tokens = 16;
  std::optional<HttpRewardOptions> http = {};

  template <class V>
  void visit_fields(V& v) {
    v.choice("type", type,
             {{"finance", Type::kFinance},
              {"random_walk", Type::kRandomWalk},
              {"exact_match", Type::kExactMatch},
              {"f1", Type::kF1},
              {"number", Type::kNumber},
              {"regex", Type::kRegex},
              {"format", Type::kFormat},
              {"length", Type::kLength},
              {"environment", Type::kEnvironment},
              {"http", Type::kHttp}},
             "Rule; environment: the sum of what an environment gave for the turns; http: a server's score");
    term.visit_fields(v);
    v.field("relative_tolerance", relative_tolerance, "number: accepted relative error", {0, 1});
    v.field("pattern", pattern, "regex: Perl-compatible pattern");
    v.field("prefix", prefix, "format: text the response starts with");
    v.field("suffix", suffix, "format: text the response ends with");
    v.field("min_tokens", min_tokens, "length: shortest response without penalty", {0, 1e6});
    v.field("max_tokens", max_tokens, "length: longest response without penalty", {1, 1e6});
    v.field("slope_tokens", slope_tokens, "length: tokens outside the range that cost 1", {1, 1e6});
    v.group("http", http, "http: the server, with OpenRLHF's messages");
  }
  void validate(config::Problems& problems) const;
};

enum class Stage {
  kPretrain,
  kSft,
  kReward,
  kPreference,
  kRejectionSampling,
  kOnlinePreference,
  kPpo,
  kEval
};
const char* to_string(Stage stage);

struct EvalSection {
  double temperature = 0;
  std::int64_t max_new_tokens = 0;  ///< 0 = rollout.max_new_tokens
  bool base = true;                 ///< also judge the model before any training
  std::int64_t base_cases = 0;      ///< held-out cases per task that it answers; 0 = all
  std::int64_t transcripts = 2;     ///< per task in the report
  std::int64_t sampled_draws = 0;  ///< also sample so many responses per prompt with rollout.sampling; 0 = no
  std::int64_t kl_cases = 20;      ///< per task, whose KL to the policy before PPO is reported; 0 = all
  std::int64_t reward_model_cases = 40;  ///< per task, scored by the reward model for the report; 0 = all
  bool fail_when_worse = true;           ///< exit non-zero when the final model is worse than SFT

  template <class V>
  void visit_fields(V& v) {
    v.field("temperature", temperature, "0 = greedy", {0, 10});
    v.field("max_new_tokens", max_new_tokens, "0 = rollout.max_new_tokens", {0, 1 << 20});
    v.field("base", base, "Also judge the model before any training");
    v.field("base_cases", base_cases,
            "Held-out cases per task that the model answers before any training; 0 = all", {0, 1e6});
    v.field("transcripts", transcripts, "Before/after transcripts per task in the report", {0, 100});
    v.field("sampled_draws", sampled_draws,
            "Also sample so many responses per prompt with rollout.sampling; 0 = no", {0, 1e5});
    v.field("kl_cases", kl_cases, "Responses per task whose KL to the policy before PPO is reported; 0 = all",
            {0, 1e6});
    v.field("reward_model_cases", reward_model_cases,
            "Responses per task that the reward model scores for the report; 0 = all", {0, 1e6});
    v.field("fail_when_worse", fail_when_worse,
            "Exit with 1 when the final model is worse than the SFT model");
  }
};

enum class RecomputeChoice { kAuto, kNone, kLayers };
enum class Offload { kNone, kOptimizer, kFrozen, kAll };

struct MemorySection {
  config::MemorySize budget{0, 90.0};
  RecomputeChoice recompute = RecomputeChoice::kAuto;
  Offload offload = Offload::kNone;

  MomentPlacement moments() const {
    return {.on_host = offload == Offload::kOptimizer || offload == Offload::kAll};
  }
  FrozenLayers frozen_layers() const {
    return offload == Offload::kFrozen || offload == Offload::kAll ? FrozenLayers::kOnHost
                                                                   : FrozenLayers::kOnDevice;
  }

  template <class V>
  void visit_fields(V& v) {
    v.field("budget", budget,
            "Bytes the run may hold (6GiB), or a share of the memory (80%) of the machine, or of the GPU it "
            "runs on");
    v.choice("recompute", recompute,
             {{"auto", RecomputeChoice::kAuto},
              {"none", RecomputeChoice::kNone},
              {"layers", RecomputeChoice::kLayers}},
             "What training keeps of a layer: none: all that backward needs; layers: its input, and computes "
             "it again, a third more work; auto: layers where the budget is too small for none");
    v.choice(
        "offload", offload,
        {{"none", Offload::kNone},
         {"optimizer", Offload::kOptimizer},
         {"frozen", Offload::kFrozen},
         {"all", Offload::kAll}},
        "What a run on a GPU leaves in the host's memory; optimizer: the moments, 8 bytes a weight, which "
        "pass through the GPU in pieces at every step; frozen: the layers of reference and teacher, as far "
        "as no other model shares them, which come one by one whenever they are used; all: both. On the CPU "
        "it changes nothing");
  }
};

/// What is divided over devices, or processes, instead of copied to each (the stages of ZeRO, Rajbhandari et
/// al. 2020). Each includes those before it. Runs know kOptimizer and kGradients.
enum class Sharding { kNone, kOptimizer, kGradients, kWeights };
/// Returns "none", "optimizer", "gradients" or "weights".
const char* to_string(Sharding sharding);

/// A run of several processes, which a launcher starts.
struct DistributedSection {
  Sharding sharding = Sharding::kOptimizer;
  double timeout_s = 300;

  template <class V>
  void visit_fields(V& v) {
    v.choice("sharding", sharding, {{"zero1", Sharding::kOptimizer}, {"zero2", Sharding::kGradients}},
             "What a process has its part of alone: the optimizer's state (zero1), or the gradient as well "
             "(zero2), which then crosses the network once a micro-batch in place of once a step");
    v.field("timeout_s", timeout_s,
            "Seconds that a process waits for another one before it ends with an error", {1, 1e6});
  }
};

/// Everything in a run file.
struct RunOptions {
  RunSection run;
  Device device = Device::kAuto;
  std::int64_t threads = 0;
  ModelSection model;
  DataSection data;
  std::vector<RewardSection> rewards;
  std::vector<std::string> stages = {"sft", "ppo", "eval"};
  SftOptions pretrain, sft;
  RewardModelOptions reward;
  PreferenceStageOptions preference;
  RejectionSamplingOptions rejection_sampling;
  OnlinePreferenceOptions online_preference;
  RolloutOptions rollout;
  PpoStageOptions ppo;
  DistillationSection distillation;
  EvalSection eval;
  ScheduleOptions schedule;
  MemorySection memory;
  DistributedSection distributed;

  template <class V>
  void visit_fields(V& v) {
    v.group("run", run, "The run");
    v.choice(
        "device", device, {{"auto", Device::kAuto}, {"cpu", Device::kCpu}, {"cuda", Device::kCuda}},
        "Where models run: a GPU where one can be used (auto), cpu, cuda; there in bf16 with fp32 masters");
    v.field("threads", threads, "CPU threads; 0 = one per core", {0, 1024});
    v.group("model", model, "The policy");
    v.group("data", data, "Prompts, demonstrations, pairs");
    v.list("rewards", rewards, "Rule rewards; empty = the rule of data.source");
    v.field("stages", stages,
            "Any of pretrain, sft, reward, preference, rejection_sampling, online_preference, ppo, eval, in "
            "this order");
    v.group("pretrain", pretrain, "Next-token training on raw text");
    v.group("sft", sft, "Supervised fine-tuning");
    v.group("reward", reward, "Reward model");
    v.group("preference", preference, "Offline preference learning (DPO and relatives)");
    v.group("rejection_sampling", rejection_sampling, "SFT on the policy's own best responses (best of n)");
    v.group("online_preference", online_preference,
            "Preference learning on the policy's own responses (online DPO)");
    v.group("rollout", rollout, "Sampling of responses");
    v.group("ppo", ppo, "Policy optimisation");
    v.group("distillation", distillation, "Teacher of an on-policy distillation");
    v.group("eval", eval, "Evaluation");
    v.group("schedule", schedule, "What runs when");
    v.group("memory", memory, "Memory");
    v.group("distributed", distributed, "Several processes");
  }
  void validate(config::Problems& problems) const;

  bool has_stage(Stage stage) const;
  bool needs_pairs() const;
  /// Whether the reward model learns from rated answers.
  bool needs_ratings() const;
  /// Whether a stage samples responses to training prompts.
  bool needs_prompts() const;
  bool has_teacher() const { return ppo.algorithm.distillation.coefficient > 0; }
  /// Path of the option that lets no advantage be known before the last response is scored; "" = none.
  std::string whole_batch_key() const;
  bool has_labels() const { return data.source == DataSource::kFiles && !data.labels_file.empty(); }
  std::string directory() const { return run.dir.empty() ? "runs/" + run.name : run.dir; }

 private:
  void validate_ratings(config::Problems& problems) const;
  void validate_rewards(config::Problems& problems) const;
  void validate_sampling(config::Problems& problems, Stage stage, double reward_model_weight) const;
};

}  // namespace rlhf

extern template rlhf::config::Schema rlhf::config::Schema::of(rlhf::RunOptions&);
