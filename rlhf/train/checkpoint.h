#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <string>

#include "rlhf/model/parameters.h"
#include "rlhf/train/optimizer.h"
#include "rlhf/train/stage.h"

namespace rlhf {

/// One model whose weights change in a stage.
struct LearningModel {
  std::string name;  ///< "policy", "value", "snapshot"
  Parameters<float>* parameters = nullptr;
  Optimizer<float>* optimizer = nullptr;  ///< null for a copy that lags behind
};

/// State of an unfinished stage: weights that learn, moments, step and a few numbers (controller states).
/// Data order and draws are functions of seed and step, so this is all a run needs to continue bit for bit.
///
/// Two slots are written in turn, or with keep_checkpoints a file a step; the manifest that names the valid
/// one is replaced atomically and last, so a crash or a full disk leaves the earlier checkpoint intact.
///
/// With several ranks every function is called by all of them; rank 0 alone touches the folder. What it
/// writes does not depend on their number.
class StageCheckpoint {
 public:
  StageCheckpoint(const StageContext& context, std::string stage, std::vector<LearningModel> models);

  /// Restores the latest state; for a replay the latest before its step, of those that were kept as well.
  /// @return steps done, 0 when there is no checkpoint or the stage does not resume.
  /// @throws IoError when it was written under another configuration or does not fit the models.
  std::int64_t restore(std::map<std::string, double>& numbers);
  /// Writes a checkpoint when one is due or a stop is requested; a replay writes none.
  /// @throws StageStopped after writing when a stop is requested.
  void after_step(std::int64_t steps_done, std::int64_t total_steps,
                  const std::map<std::string, double>& numbers);
  /// Writes a checkpoint now; nothing without a folder.
  void write(std::int64_t steps_done, const std::map<std::string, double>& numbers);
  /// Removes the state: the stage is complete.
  void remove();

 private:
  std::filesystem::path manifest() const { return folder_ / (stage_ + ".json"); }
  std::string slot_file(int slot) const;
  std::string step_name(std::int64_t steps) const;
  nlohmann::json find_state() const;

  const StageContext& context_;
  std::string stage_;
  std::filesystem::path folder_;
  std::vector<LearningModel> models_;
  int next_slot_ = 0;
};

}  // namespace rlhf
