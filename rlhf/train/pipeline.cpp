#include "rlhf/train/pipeline.h"

#include <algorithm>
#include <array>
#include <numeric>

#include "rlhf/core/error.h"
#include "rlhf/kernels/accelerator.h"
#include "rlhf/model/safetensors.h"
#include "rlhf/model/weight_file.h"
#include "rlhf/train/memory_plan.h"
#include "rlhf/train/online_preference.h"
#include "rlhf/train/plan_advice.h"
#include "rlhf/train/ppo_trainer.h"
#include "rlhf/train/preference.h"
#include "rlhf/train/rejection_sampling.h"
#include "rlhf/train/reward_rating.h"

namespace rlhf {
namespace {

constexpr std::array kTrainedStages = {
    Stage::kPretrain,         Stage::kSft, Stage::kReward, Stage::kPreference, Stage::kRejectionSampling,
    Stage::kOnlinePreference, Stage::kPpo};

}  // namespace

Pipeline::Pipeline(RunOptions options, PipelineSettings settings, RunObserver& observer)
    : options_(std::move(options)),
      settings_(std::move(settings)),
      observer_(observer),
      collective_(settings_.collective ? *settings_.collective : one_process()),
      pool_(static_cast<int>(options_.threads)),
      policy_(load_policy(options_)),
      data_(build_task(options_, policy_, settings_.environment)) {
  if (options_.has_stage(Stage::kPpo) && options_.has_teacher())
    teacher_ = std::make_unique<LanguageModel>(load_teacher(options_.distillation.teacher, policy_));
  check_ranks();
  place_models();
  for (const std::string& warning : data_.warnings) observer_.message(LogLevel::kWarning, warning);
  plan_memory();
}

Pipeline::~Pipeline() = default;

void Pipeline::check_ranks() const {
  if (collective_.world_size() == 1) return;
  const auto all = collective_.all_gather_bytes(
      concat(RLHF_VERSION, " ", settings_.fingerprint, " ", to_string(options_.distributed.sharding)));
  for (std::size_t r = 1; r < all.size(); ++r)
    if (all[r] != all[0])
      fail<Error>("rank ", r, " runs ", all[r], " and rank 0 runs ", all[0],
                  " (version, hash of the configuration, what is sharded); all ranks must run the same "
                  "program on the "
                  "same options");
  if (options_.has_stage(Stage::kPpo) && options_.schedule.mode != ScheduleMode::kSerial)
    fail<ConfigError>("schedule.mode: several processes (", collective_.world_size(),
                      " here) train with mode serial only");
}

// Models that are made from these follow them.
void Pipeline::place_models() {
  if (settings_.accelerator)
    place_on(*settings_.accelerator);
  else if (options_.rollout.kv_dtype != KvFormat::kAuto)
    fail<ConfigError>("rollout.kv_dtype: ", to_string(options_.rollout.kv_dtype),
                      " is for a GPU; on the CPU K and V are fp32: leave it out, or set device: cuda");
  if (options_.distributed.sharding == Sharding::kGradients) policy_.parameters().slice_gradient(collective_);
}

void Pipeline::place_on(const Accelerator& accelerator) {
  if (options_.rollout.weights != WeightFormat::kFp32)
    fail<ConfigError>("rollout.weights: ", to_string(options_.rollout.weights), " is for the CPU; on ",
                      accelerator.name, " all weights are bf16: leave it out, or set device: cpu");
  policy_.parameters().place_on(accelerator);
  if (teacher_) teacher_->parameters().place_on(accelerator, options_.memory.frozen_layers());
}

void Pipeline::add_reward(std::unique_ptr<RewardTerm> term, TermOptions options) {
  data_.rules.add(std::move(term), std::move(options));
}

StageContext Pipeline::context() {
  StageContext context(Compute<float>(pool_, kernels::detect_cpu_isa(), settings_.accelerator));
  context.observer = &observer_;
  context.collective = &collective_;
  context.stop = settings_.stop;
  context.seed = options_.run.seed;
  if (!settings_.directory.empty()) context.checkpoints = settings_.directory / "checkpoints";
  context.resume = settings_.start == PipelineSettings::Start::kResume;
  context.checkpoint_every = options_.run.checkpoint_every;
  context.keep_checkpoints = options_.run.keep_checkpoints;
  context.replay_step = settings_.replay_step;
  context.fingerprint = settings_.fingerprint;
  context.memory_budget = memory_budget_;
  context.recompute = recompute_;
  context.moments = options_.memory.moments();
  context.max_blocks = max_blocks_;
  return context;
}

// Who will hold what at the peak, checked against the budget before anything is trained.
void Pipeline::plan_memory() {
  const PlanSetting setting{policy_.config(),
                            std::max(longest_prompt(data_.train_prompts), longest_prompt(data_.eval_prompts)),
                            settings_.accelerator
                                ? settings_.accelerator->bytes
                                : machine_memory_bytes() / static_cast<std::uint64_t>(settings_.ranks_here),
                            settings_.accelerator ? NumberSizes::bf16() : NumberSizes::fp32(),
                            collective_.world_size(),
                            collective_.world_size() > 1 ? options_.distributed.sharding : Sharding::kNone,
                            teacher_ ? std::optional(teacher_->config()) : std::nullopt};
  memory_budget_ = options_.memory.budget.resolve(setting.machine_bytes);
  require_fit(options_, setting, memory_budget_, "memory.budget");
  const RunOptions chosen = with_recompute_chosen(options_, setting, memory_budget_);
  recompute_ = recompute_of(chosen.memory.recompute);
  const MemoryPlan plan = rlhf::plan_memory(chosen, setting);
  std::string list;
  std::uint64_t total = 0;
  for (std::size_t i = 0; i < plan.tenants.size(); ++i) {
    const PlannedTenant& tenant = plan.tenants[i];
    std::uint64_t held = 0;
    for (const Phase phase : kAllPhases) held = std::max(held, plan.held(phase, memory_budget_)[i]);
    memory_.emplace_back(tenant.name, held);
    list += concat("\n  ", memory_text(held), "  ", tenant.name);
    if (held < tenant.peak_bytes()) list += concat(" (wants ", memory_text(tenant.peak_bytes()), ")");
  }
  for (const Phase phase : kAllPhases) {
    const auto held = plan.held(phase, memory_budget_);
    total = std::max(total, std::accumulate(held.begin(), held.end(), std::uint64_t{0}));
  }
  observer_.message(
      LogLevel::kInfo,
      concat("memory: at most ", memory_text(total), " of a budget of ", memory_text(memory_budget_),
             recompute_ == Recompute::kLayers ? ", with layers computed again for backward" : "", list));
  max_blocks_ = blocks_under(chosen, setting, memory_budget_);
  if (setting.sharding == Sharding::kGradients) compare_shardings(chosen, setting);
}

// With few layers or ranks the buffers of zero2 outweigh what it divides.
void Pipeline::compare_shardings(const RunOptions& options, PlanSetting setting) {
  const std::uint64_t sliced = rlhf::plan_memory(options, setting).wanted_bytes();
  setting.sharding = Sharding::kOptimizer;
  const std::uint64_t whole = rlhf::plan_memory(options, setting).wanted_bytes();
  if (sliced > whole)
    observer_.message(LogLevel::kWarning,
                      concat("distributed.sharding: zero2 needs ", memory_text(sliced - whole),
                             " more than zero1 with this model on ", setting.devices, " ranks"));
}

// Two runs must not mix: what an earlier one left is continued, deleted or in the way.
void Pipeline::clear_directory() const {
  using Start = PipelineSettings::Start;
  if (settings_.directory.empty() || settings_.start == Start::kResume || !collective_.is_first()) return;
  const auto checkpoints = settings_.directory / "checkpoints";
  std::error_code code;
  if (settings_.start == Start::kFresh) {
    if (std::filesystem::exists(checkpoints, code) && !std::filesystem::is_empty(checkpoints, code))
      fail<Error>(checkpoints.string(),
                  " holds checkpoints of another run; resume it, overwrite it or choose another directory");
    return;
  }
  for (const char* folder : {"checkpoints", "samples"}) {
    std::filesystem::remove_all(settings_.directory / folder, code);
    if (code) fail<IoError>((settings_.directory / folder).string(), ": cannot be removed: ", code.message());
  }
}

RunReport Pipeline::run() {
  data_.rules.check();
  clear_directory();
  const bool judged = options_.has_stage(Stage::kEval);
  if (judged && options_.eval.base) judge("base");
  for (const Stage stage : kTrainedStages)
    if (options_.has_stage(stage)) run_stage(stage);
  if (reward_model_) {
    // Only now, so that the stages before the reward model have its scores too.
    Stopwatch watch;
    for (Evaluation& evaluation : evaluations_) {
      add_model_scores(evaluation, *reward_model_, data_.reward_reading, options_.eval.reward_model_cases,
                       context());
      if (!settings_.directory.empty() && collective_.is_first())
        save_evaluation(kept_evaluation(evaluation.name), evaluation);
    }
    timings_.push_back({"reward", "score held-out responses", watch.lap()});
  }
  const auto sft = std::ranges::find(evaluations_, std::string("sft"), &Evaluation::name);
  if (sft != evaluations_.end()) final_is_worse_ = mean_score(evaluations_.back()) < mean_score(*sft);
  RunReport report = make_report();
  for (std::size_t i = warnings_.size(); i < report.warnings.size(); ++i)
    observer_.message(LogLevel::kWarning, report.warnings[i]);  // the others are in the log already
  return report;
}

void Pipeline::run_stage(Stage stage) {
  const std::string name = to_string(stage);
  Stopwatch watch;
  train_stage(stage);
  timings_.push_back({name, "train", watch.lap()});
  if (stage != Stage::kReward && options_.has_stage(Stage::kEval)) judge(name);
  reference_.reset();
}

void Pipeline::replay() {
  for (const Stage stage : kTrainedStages) {
    if (!options_.has_stage(stage)) continue;
    const std::string name = to_string(stage);
    if (stage != Stage::kPpo && !is_done(name))
      fail<IoError>((settings_.directory / "checkpoints").string(), ": holds no result of the stage ", name,
                    ", which the stage ppo starts from");
    train_stage(stage);
  }
}

void Pipeline::train_stage(Stage stage) {
  switch (stage) {
    case Stage::kPretrain:
    case Stage::kSft:
      return train_policy_stage(stage);
    case Stage::kReward:
      return train_reward_model();
    case Stage::kPreference:
      return train_preference();
    case Stage::kRejectionSampling:
      return train_rejection_sampling();
    case Stage::kOnlinePreference:
      return train_online_preference();
    case Stage::kPpo:
      return train_ppo();
    case Stage::kEval:
      return;
  }
}

void Pipeline::train_policy_stage(Stage stage) {
  const std::string name = to_string(stage);
  if (is_done(name)) return load_final(name, policy_.parameters());
  run_sft(policy_, data_.demonstrations, stage == Stage::kSft ? options_.sft : options_.pretrain, name,
          context());
  save_final(name, policy_.parameters());
}

void Pipeline::train_reward_model() {
  ModelConfig config = policy_.config();
  config.scalar_head = true;
  config.num_labels = static_cast<std::int64_t>(data_.reward_reading.num_outputs());
  reward_model_ =
      std::make_unique<Parameters<float>>(config, options_.model.trainable, &policy_.parameters());
  reward_model_->initialise_score_head(options_.run.seed);
  if (is_done("reward")) {
    load_final("reward", *reward_model_);
  } else {
    if (options_.reward.reading.target == RewardTarget::kPairs)
      run_reward_model(*reward_model_, data_.train_pairs, options_.reward, context());
    else
      run_reward_rating(*reward_model_, data_.train_ratings, data_.reward_reading, options_.reward,
                        context());
    save_final("reward", *reward_model_);
  }
  judge_reward_model();
}

// Against held-out pairs and ratings, as far as there are any.
void Pipeline::judge_reward_model() {
  SequencePass<float> pass(reward_model_->config(), context().compute);
  if (!data_.held_out_ratings.empty()) {
    const auto quality =
        evaluate_ratings(pass, reward_model_->weights(), data_.reward_reading, data_.held_out_ratings);
    const auto& objectives = options_.reward.reading.objectives;
    for (std::size_t k = 0; k < quality.size(); ++k) {
      const std::string of = objectives.empty() ? "" : "/" + objectives[k].name;
      results_.emplace_back("reward_model/ratings" + of, static_cast<double>(quality[k].count));
      results_.emplace_back("reward_model/squared_error" + of, quality[k].mean_squared_error);
      results_.emplace_back("reward_model/correlation" + of, quality[k].correlation);
      results_.emplace_back("reward_model/rating_calibration_error" + of, quality[k].calibration_error);
      observer_.message(
          LogLevel::kInfo,
          concat("reward model", of, ": squared error ", quality[k].mean_squared_error, ", correlation ",
                 quality[k].correlation, " over ", quality[k].count, " held-out numbers"));
    }
  }
  if (data_.held_out_pairs.empty()) return;
  const PairAccuracy accuracy =
      evaluate_pairs(pass, reward_model_->weights(), data_.reward_reading, data_.held_out_pairs);
  results_.emplace_back("reward_model/pairs", static_cast<double>(accuracy.pairs));
  results_.emplace_back("reward_model/accuracy", accuracy.accuracy);
  results_.emplace_back("reward_model/calibration_error", accuracy.calibration_error);
  observer_.message(LogLevel::kInfo,
                    concat("reward model: orders ", 100 * accuracy.accuracy, " % of ", accuracy.pairs,
                           " held-out pairs rightly, calibration error ", accuracy.calibration_error));
}

void Pipeline::train_preference() {
  const StageContext stage_context = context();
  PreferenceStage stage(policy_, data_, options_.preference, stage_context);
  if (is_done("preference")) {
    load_final("preference", policy_.parameters());
  } else {
    stage.run();
    save_final("preference", policy_.parameters());
  }
  const PairMeasure held_out = stage.judge_held_out();
  if (held_out.pairs == 0) return;
  results_.emplace_back("preference/pairs", static_cast<double>(held_out.pairs));
  results_.emplace_back("preference/loss", held_out.loss);
  for (const auto& [name, value] : held_out.metrics()) results_.emplace_back("preference/" + name, value);
  observer_.message(LogLevel::kInfo, concat("preference: orders ", 100 * held_out.accuracy(), " % of ",
                                            held_out.pairs, " held-out pairs rightly"));
}

void Pipeline::train_rejection_sampling() {
  const std::string name = to_string(Stage::kRejectionSampling);
  if (is_done(name)) return load_final(name, policy_.parameters());
  const StageContext stage_context = context();
  RejectionSampling(policy_, reward_model_.get(), data_, options_.rollout, options_.rejection_sampling,
                    stage_context)
      .run();
  save_final(name, policy_.parameters());
}

void Pipeline::train_online_preference() {
  const std::string name = to_string(Stage::kOnlinePreference);
  if (is_done(name)) return load_final(name, policy_.parameters());
  const StageContext stage_context = context();
  std::optional<Parameters<float>> reference;
  if (ppo::needs_reference(options_.online_preference.loss))
    reference.emplace(policy_.parameters().frozen_copy(options_.memory.frozen_layers()));
  OnlinePreference(policy_, reference ? &*reference : nullptr, reward_model_.get(), data_, options_.rollout,
                   options_.online_preference, stage_context)
      .run();
  save_final(name, policy_.parameters());
}

void Pipeline::train_ppo() {
  if (needs_ppo_reference(options_))
    reference_ = std::make_unique<Parameters<float>>(
        policy_.parameters().frozen_copy(options_.memory.frozen_layers()));
  const bool replays = settings_.replay_step > 0;
  if (!replays && is_done("ppo")) return load_final("ppo", policy_.parameters());
  const Parameters<float>* critic_base =
      options_.ppo.critic_init == CriticInit::kReward ? reward_model_.get() : nullptr;
  const StageContext stage_context = context();
  {
    const PpoSetting setting{data_, options_.rollout, options_.ppo, stage_context, options_.schedule};
    const Parameters<float>* teacher = teacher_ ? &teacher_->parameters() : nullptr;
    PpoTrainer trainer(policy_, {reference_.get(), reward_model_.get(), critic_base, teacher}, setting);
    trainer.run();
    warnings_.insert(warnings_.end(), trainer.warnings().begin(), trainer.warnings().end());
  }
  if (!replays) save_final("ppo", policy_.parameters());
}

std::filesystem::path Pipeline::kept_evaluation(const std::string& name) const {
  return settings_.directory / "samples" / ("eval_" + name + ".jsonl");
}

// Takes the judged responses that an earlier attempt has left. Rank 0 reads and keeps them.
bool Pipeline::load_kept(const std::string& name, std::int64_t cases_per_task) {
  if (settings_.start != PipelineSettings::Start::kResume || settings_.directory.empty()) return false;
  const std::filesystem::path kept = kept_evaluation(name);
  const bool done = name == "base" || is_done(name);
  if (!first_rank_says(collective_, done && std::filesystem::exists(kept))) return false;
  if (collective_.is_first()) evaluations_.push_back(load_evaluation(kept, name, data_, cases_per_task));
  return true;
}

void Pipeline::add_evaluation(const std::string& name, Evaluation evaluation) {
  evaluations_.push_back(std::move(evaluation));
  timings_.push_back({name, "eval", evaluations_.back().seconds});
  if (reference_) {
    Stopwatch watch;
    add_kl(evaluations_.back(), policy_.parameters(), *reference_, options_.eval.kl_cases, context());
    timings_.push_back({name, "KL of held-out responses", watch.lap()});
  }
  if (!settings_.directory.empty()) save_evaluation(kept_evaluation(name), evaluations_.back());
  Metrics metrics;
  for (const TaskScore& task : evaluations_.back().tasks)
    metrics.emplace_back("score/" + task.task, task.score);
  metrics.emplace_back("reward/total", mean_score(evaluations_.back()));
  observer_.step("eval " + name, 1, 1, metrics);
}

// All ranks answer; rank 0 alone keeps what was answered.
void Pipeline::judge(const std::string& name) {
  EvaluationSize size;
  if (name == "base") size.cases_per_task = options_.eval.base_cases;
  RolloutOptions rollout = options_.rollout;
  rollout.sampling = {};
  rollout.sampling.temperature = options_.eval.temperature;
  if (options_.eval.max_new_tokens > 0) rollout.max_new_tokens = options_.eval.max_new_tokens;
  if (!load_kept(name, size.cases_per_task)) {
    observer_.stage_begin("eval " + name, 1);
    Evaluation evaluation = evaluate(name, policy_, data_, rollout, size, context());
    if (collective_.is_first()) add_evaluation(name, std::move(evaluation));
  }
  results_.erase(std::remove_if(results_.begin(), results_.end(),
                                [](const auto& r) { return r.first == "greedy" || r.first == "sampled"; }),
                 results_.end());
  if (options_.eval.temperature == 0 && collective_.is_first())
    results_.emplace_back("greedy", mean_score(evaluations_.back()));
  if (options_.eval.sampled_draws > 0) {
    rollout.sampling = options_.rollout.sampling;
    size.draws = static_cast<std::uint32_t>(options_.eval.sampled_draws);
    const Evaluation sampled = evaluate(name, policy_, data_, rollout, size, context());
    results_.emplace_back("sampled", mean_score(sampled));
  }
}

bool Pipeline::is_done(const std::string& stage) const {
  return settings_.start == PipelineSettings::Start::kResume && !settings_.directory.empty() &&
         first_rank_says(collective_, std::filesystem::exists(settings_.directory / "checkpoints" /
                                                              (stage + ".final.safetensors")));
}

void Pipeline::save_final(const std::string& stage, const Parameters<float>& parameters) {
  if (settings_.directory.empty()) return;
  const std::span<const float> weights = parameters.trainable();  // of all ranks
  if (!collective_.is_first()) return;
  const auto folder = settings_.directory / "checkpoints";
  std::filesystem::create_directories(folder);
  if (options_.run.export_stages) policy_.save(folder / stage, parameters);
  const std::vector<OutputTensor> tensors = {
      {"weights", {static_cast<std::int64_t>(weights.size())}, weights}};
  save_safetensors(folder / (stage + ".final.safetensors"), tensors);
}

void Pipeline::load_final(const std::string& stage, Parameters<float>& parameters) {
  const auto path = settings_.directory / "checkpoints" / (stage + ".final.safetensors");
  const std::span<float> weights = parameters.trainable();
  if (collective_.is_first()) WeightFile::open(path)->read("weights", weights);
  collective_.broadcast(weights, 0);
  observer_.message(LogLevel::kInfo, concat("stage ", stage, " is done already: ", path.string()));
}

TaskReport Pipeline::report_task(const std::string& task) const {
  TaskReport report;
  report.task = task;
  for (const Evaluation& evaluation : evaluations_)
    for (const TaskScore& score : evaluation.tasks)
      if (score.task == task) {
        StageScore stage;
        stage.stage = evaluation.name;
        stage.score = score.score;
        stage.interval = score.interval;
        stage.count = static_cast<std::size_t>(score.count);
        stage.accuracy = score.accuracy;
        stage.well_formed = score.well_formed_rate;
        stage.mean_tokens = score.mean_length;
        stage.reward_model = score.model_score;
        stage.kl = score.kl;
        report.stages.push_back(stage);
      }
  for (const TaskBaseline& baseline : data_.baselines)
    if (baseline.task == task)
      report.baselines.push_back({baseline.name, score_constant_answer(data_, baseline, policy_)});
  for (std::size_t i = 1; i < evaluations_.size(); ++i) {
    const PairedScores pairs = paired_scores(evaluations_[i - 1], evaluations_[i], task);
    report.comparisons.push_back({evaluations_[i - 1].name, evaluations_[i].name, pairs.mean_difference(),
                                  paired_difference_interval(pairs.before, pairs.after, 0xd1ff)});
  }
  return report;
}

RunReport Pipeline::make_report() const {
  RunReport report;
  report.name = options_.run.name;
  report.version = RLHF_VERSION;
  report.seed = options_.run.seed;
  report.metrics = results_;
  report.timings = timings_;
  report.memory_bytes = memory_;
  report.peak_memory_bytes = peak_resident_bytes();
  report.warnings = warnings_;
  if (evaluations_.empty()) return report;
  for (const TaskScore& task : evaluations_.front().tasks) {
    report.tasks.push_back(report_task(task.task));
    const auto& stages = report.tasks.back().stages;
    for (std::size_t i = 1; i < stages.size(); ++i)
      if (proxy_diverges(stages[i - 1], stages[i]))
        report.warnings.push_back(
            concat(task.task, ": from ", stages[i - 1].stage, " to ", stages[i].stage,
                   " the reward model's score rose while the rule reward fell (reward hacking?)"));
    std::int64_t shown = 0;
    for (std::size_t i = 0; i < evaluations_.front().responses.size() && shown < options_.eval.transcripts;
         ++i) {
      const JudgedResponse& first = evaluations_.front().responses[i];
      if (first.prompt->task != task.task) continue;
      Transcript transcript{task.task, first.prompt->text, first.prompt->reference, {}};
      for (const Evaluation& evaluation : evaluations_) {
        const auto same = std::ranges::find(evaluation.responses, first.prompt, &JudgedResponse::prompt);
        transcript.responses.push_back({evaluation.name, same->text, same->score});
      }
      report.transcripts.push_back(std::move(transcript));
      ++shown;
    }
  }
  return report;
}

}  // namespace rlhf
