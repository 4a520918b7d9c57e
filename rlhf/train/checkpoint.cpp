#include "rlhf/train/checkpoint.h"

#include <nlohmann/json.hpp>

#include "rlhf/core/atomic_file.h"
#include "rlhf/core/error.h"
#include "rlhf/model/safetensors.h"
#include "rlhf/model/weight_file.h"

namespace rlhf {

StageCheckpoint::StageCheckpoint(const StageContext& context, std::string stage,
                                 std::vector<LearningModel> models)
    : context_(context), stage_(std::move(stage)), folder_(context.checkpoints), models_(std::move(models)) {}

std::int64_t StageCheckpoint::restore(std::map<std::string, double>& numbers) {
  if (folder_.empty() || !context_.resume || !std::filesystem::exists(manifest())) return 0;
  nlohmann::json state;
  try {
    state = nlohmann::json::parse(read_text_file(manifest()));
    const std::string fingerprint = state.at("fingerprint");
    if (fingerprint != context_.fingerprint)
      fail<IoError>(manifest().string(), ": this checkpoint was written under another configuration (",
                    fingerprint, ", now ", context_.fingerprint,
                    "); resume with the run's config.resolved.yaml or use another run.dir");
    const int slot = state.at("slot");
    const auto file = WeightFile::open(folder_ / concat(stage_, ".", slot, ".safetensors"));
    for (const LearningModel& model : models_) {
      file->read(model.name + ".weights", model.parameters->trainable());
      if (!model.optimizer) continue;
      file->read(model.name + ".first_moment", model.optimizer->first_moment());
      file->read(model.name + ".second_moment", model.optimizer->second_moment());
      model.optimizer->set_num_steps(state.at("optimizer_steps").at(model.name));
    }
    for (const auto& [name, value] : state.at("numbers").items()) numbers[name] = value;
    next_slot_ = 1 - slot;
    return state.at("steps");
  } catch (const nlohmann::json::exception& error) {
    fail<IoError>(manifest().string(), ": not a checkpoint manifest: ", error.what());
  }
}

void StageCheckpoint::after_step(std::int64_t steps_done, std::int64_t total_steps,
                                 const std::map<std::string, double>& numbers) {
  if (folder_.empty()) {
    if (context_.stop_requested()) throw StageStopped();
    return;
  }
  const bool due = context_.checkpoint_every > 0 && steps_done % context_.checkpoint_every == 0;
  if (steps_done < total_steps && (due || context_.stop_requested())) write(steps_done, numbers);
  if (steps_done < total_steps && context_.stop_requested()) throw StageStopped();
}

void StageCheckpoint::write(std::int64_t steps_done, const std::map<std::string, double>& numbers) {
  if (folder_.empty()) return;
  std::filesystem::create_directories(folder_);
  std::vector<OutputTensor> tensors;
  nlohmann::json state = {{"stage", stage_},
                          {"steps", steps_done},
                          {"slot", next_slot_},
                          {"fingerprint", context_.fingerprint},
                          {"numbers", numbers}};
  const auto add = [&](const std::string& name, std::span<const float> values) {
    tensors.push_back({name, {static_cast<std::int64_t>(values.size())}, values});
  };
  for (const LearningModel& model : models_) {
    add(model.name + ".weights", model.parameters->trainable());
    if (!model.optimizer) continue;
    add(model.name + ".first_moment", model.optimizer->first_moment());
    add(model.name + ".second_moment", model.optimizer->second_moment());
    state["optimizer_steps"][model.name] = model.optimizer->num_steps();
  }
  save_safetensors(folder_ / concat(stage_, ".", next_slot_, ".safetensors"), tensors);
  write_file_atomically(manifest(), state.dump(1));
  next_slot_ = 1 - next_slot_;
}

void StageCheckpoint::remove() {
  if (folder_.empty()) return;
  std::filesystem::remove(manifest());
  for (int slot : {0, 1}) std::filesystem::remove(folder_ / concat(stage_, ".", slot, ".safetensors"));
}

}  // namespace rlhf
