#pragma once

#include <atomic>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "rlhf/report/run_report.h"
#include "rlhf/train/build_task.h"
#include "rlhf/train/evaluation.h"
#include "rlhf/train/run_options.h"
#include "rlhf/train/stage.h"
#include "rlhf/train/task_data.h"

namespace rlhf {

struct PlanSetting;

/// What lies around a run's options.
struct PipelineSettings {
  enum class Start { kFresh, kResume, kOverwrite };
  /// kFresh: refused when the directory holds checkpoints; kOverwrite: run() deletes checkpoints and samples.
  Start start = Start::kFresh;
  std::filesystem::path directory;          ///< checkpoints and judged responses; empty = nothing is written
  const std::atomic<bool>* stop = nullptr;  ///< ends the run after the current step
  std::string fingerprint;                  ///< of the resolved configuration
  std::int64_t replay_step = 0;             ///< for replay()
  /// Of the processes that make the run together, each with a pipeline of its own and the same options. Rank
  /// 0 alone writes; the others need no observer. Null = one process.
  Collective* collective = nullptr;
  int ranks_here = 1;  ///< processes of the run on this machine, which share its memory
  /// Where models run; must outlive the pipeline. Null = the CPU. The options' `device` is for whoever opens
  /// it.
  const Accelerator* accelerator = nullptr;
  OwnEnvironment environment = {};  ///< answers the responses of a run on files
};

/// A whole run: loads the model, makes or reads the data and works through the stages. Embedders may add
/// rewards and watch through an observer. Several pipelines can live in one process.
class Pipeline {
 public:
  /// Loads model and data. @throws ConfigError, IoError, MemoryError (a budget that cannot hold the run, with
  /// the list of needs)
  Pipeline(RunOptions options, PipelineSettings settings, RunObserver& observer);
  ~Pipeline();

  /// Adds a reward of the caller's to the rules of the run. Before run().
  void add_reward(std::unique_ptr<RewardTerm> term, TermOptions options);
  LanguageModel& policy() { return policy_; }
  const TaskData& data() const { return data_; }

  /// Runs all stages. Finished ones are skipped when resuming. @throws StageStopped after writing a
  /// checkpoint; Error when the directory holds checkpoints of another run.
  RunReport run();
  /// Runs the PPO iteration `replay_step` again, from the latest state of the directory before it, and the
  /// ones between. Nothing is written. @throws IoError when an earlier stage's result is missing.
  void replay();
  /// Whether the final model's mean held-out score is below the SFT model's. After run().
  bool final_is_worse() const { return final_is_worse_; }

 private:
  void check_ranks() const;
  void clear_directory() const;
  void run_stage(Stage stage);
  void train_stage(Stage stage);
  void train_policy_stage(Stage stage);
  void train_reward_model();
  void judge_reward_model();
  void train_preference();
  void train_rejection_sampling();
  void train_online_preference();
  void train_ppo();
  void judge(const std::string& name);
  bool load_kept(const std::string& name, std::int64_t cases_per_task);
  void add_evaluation(const std::string& name, Evaluation evaluation);
  std::filesystem::path kept_evaluation(const std::string& name) const;
  bool is_done(const std::string& stage) const;
  void save_final(const std::string& stage, const Parameters<float>& parameters);
  void load_final(const std::string& stage, Parameters<float>& parameters);
  void place_models();
  void place_on(const Accelerator& accelerator);
  void plan_memory();
  void compare_shardings(const RunOptions& options, PlanSetting setting);
  RunReport make_report() const;
  TaskReport report_task(const std::string& task) const;
  StageContext context();

  RunOptions options_;
  PipelineSettings settings_;
  RunObserver& observer_;
  Collective& collective_;
  ThreadPool pool_;
  LanguageModel policy_;
  TaskData data_;
  std::unique_ptr<LanguageModel> teacher_;  ///< of distillation
  std::unique_ptr<Parameters<float>> reward_model_;
  std::unique_ptr<Parameters<float>> reference_;  ///< the policy before PPO, until PPO's result is judged
  std::vector<Evaluation> evaluations_;
  std::vector<PhaseTime> timings_;
  std::vector<std::pair<std::string, double>> results_;
  std::vector<std::pair<std::string, std::uint64_t>> memory_;
  std::vector<std::string> warnings_;
  std::uint64_t memory_budget_ = 0;
  Recompute recompute_ = Recompute::kNone;
  std::int64_t max_blocks_ = 0;
  bool final_is_worse_ = false;
};

}  // namespace rlhf
