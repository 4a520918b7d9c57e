#include "rlhf/train/checkpoint.h"

#include <cstdio>
#include <deque>
#include <limits>
#include <nlohmann/json.hpp>
#include <utility>

#include "rlhf/core/atomic_file.h"
#include "rlhf/core/error.h"
#include "rlhf/model/safetensors.h"
#include "rlhf/model/weight_file.h"

namespace rlhf {

StageCheckpoint::StageCheckpoint(const StageContext& context, std::string stage,
                                 std::vector<LearningModel> models)
    : context_(context), stage_(std::move(stage)), folder_(context.checkpoints), models_(std::move(models)) {}

std::string StageCheckpoint::slot_file(int slot) const {
  return concat(stage_, ".", slot, ".safetensors");
}

std::string StageCheckpoint::step_name(std::int64_t steps) const {
  char number[24];
  std::snprintf(number, sizeof number, "%06lld", static_cast<long long>(steps));
  return stage_ + ".step-" + number;
}

// The latest state that may be started from, and its manifest; null when there is none.
nlohmann::json StageCheckpoint::find_state() const {
  const std::int64_t most_steps =
      context_.replay_step > 0 ? context_.replay_step - 1 : std::numeric_limits<std::int64_t>::max();
  nlohmann::json best;
  const auto consider = [&](const std::filesystem::path& path) {
    try {
      nlohmann::json state = nlohmann::json::parse(read_text_file(path));
      const std::int64_t steps = state.at("steps");
      if (steps > most_steps || (!best.is_null() && steps <= best.at("steps").get<std::int64_t>())) return;
      best = std::move(state);
      best["manifest"] = path.string();
    } catch (const nlohmann::json::exception& error) {
      fail<IoError>(path.string(), ": not a checkpoint manifest: ", error.what());
    }
  };
  if (std::filesystem::exists(manifest())) consider(manifest());
  if (context_.replay_step == 0 || !std::filesystem::exists(folder_)) return best;
  for (const auto& entry : std::filesystem::directory_iterator(folder_)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with(stage_ + ".step-") && name.ends_with(".json")) consider(entry.path());
  }
  return best;
}

std::int64_t StageCheckpoint::restore(std::map<std::string, double>& numbers) {
  if (folder_.empty() || !context_.resume) return 0;
  Collective& collective = *context_.collective;
  const bool first = collective.is_first();
  const auto state =
      nlohmann::json::parse(collective.all_gather_bytes(first ? find_state().dump() : "").front());
  if (state.is_null()) return 0;
  const std::string path = state.at("manifest");
  try {
    const std::string fingerprint = state.at("fingerprint");
    if (fingerprint != context_.fingerprint)
      fail<IoError>(path, ": this checkpoint was written under another configuration (", fingerprint,
                    ", now ", context_.fingerprint,
                    "); resume with the run's config.resolved.yaml or use another run.dir");
    const std::string tensors = state.at("tensors");
    const auto file = first ? WeightFile::open(folder_ / tensors) : nullptr;
    for (const LearningModel& model : models_) {
      const std::span<float> weights = model.parameters->trainable();
      if (first) file->read(model.name + ".weights", weights);
      collective.broadcast(weights, 0);
      if (!model.optimizer) continue;
      const auto read_moment = [&](const char* name, std::span<float> own) {
        if (collective.world_size() == 1) return file->read(model.name + name, own);
        std::vector<float> all(first ? model.optimizer->num_elements() : 0);
        if (first) file->read(model.name + name, std::span(all));
        scatter_slices(collective, all, own, model.optimizer->num_elements());
      };
      read_moment(".first_moment", model.optimizer->first_moment());
      read_moment(".second_moment", model.optimizer->second_moment());
      model.optimizer->set_num_steps(state.at("optimizer_steps").at(model.name));
    }
    for (const auto& [name, value] : state.at("numbers").items()) numbers[name] = value;
    if (tensors == slot_file(0)) next_slot_ = 1;
    return state.at("steps");
  } catch (const nlohmann::json::exception& error) {
    fail<IoError>(path, ": not a checkpoint manifest: ", error.what());
  }
}

void StageCheckpoint::after_step(std::int64_t steps_done, std::int64_t total_steps,
                                 const std::map<std::string, double>& numbers) {
  if (context_.replay_step > 0) return;
  const bool stop = context_.stop_requested();
  if (folder_.empty()) {
    if (stop) throw StageStopped();
    return;
  }
  const bool due = context_.checkpoint_every > 0 && steps_done % context_.checkpoint_every == 0;
  if (steps_done < total_steps && (due || stop)) write(steps_done, numbers);
  if (steps_done < total_steps && stop) throw StageStopped();
}

void StageCheckpoint::write(std::int64_t steps_done, const std::map<std::string, double>& numbers) {
  if (folder_.empty()) return;
  Collective& collective = *context_.collective;
  std::vector<OutputTensor> tensors;
  std::deque<std::vector<float>> gathered;
  const std::string history = step_name(steps_done);
  const std::string file = context_.keep_checkpoints ? history + ".safetensors" : slot_file(next_slot_);
  nlohmann::json state = {{"stage", stage_},
                          {"steps", steps_done},
                          {"tensors", file},
                          {"fingerprint", context_.fingerprint},
                          {"numbers", numbers}};
  const auto add = [&](const std::string& name, std::span<const float> values) {
    tensors.push_back({name, {static_cast<std::int64_t>(values.size())}, values});
  };
  for (const LearningModel& model : models_) {
    add(model.name + ".weights", std::as_const(*model.parameters).trainable());
    if (!model.optimizer) continue;
    const auto add_moment = [&](const char* name, std::span<float> own) {
      add(model.name + name,
          gather_slices(collective, own, model.optimizer->num_elements(), gathered.emplace_back()));
    };
    add_moment(".first_moment", model.optimizer->first_moment());
    add_moment(".second_moment", model.optimizer->second_moment());
    state["optimizer_steps"][model.name] = model.optimizer->num_steps();
  }
  if (!collective.is_first()) return;
  std::filesystem::create_directories(folder_);
  save_safetensors(folder_ / file, tensors);
  if (context_.keep_checkpoints) write_file_atomically(folder_ / (history + ".json"), state.dump(1));
  write_file_atomically(manifest(), state.dump(1));
  next_slot_ = 1 - next_slot_;
}

void StageCheckpoint::remove() {
  if (folder_.empty() || context_.replay_step > 0 || !context_.collective->is_first()) return;
  std::filesystem::remove(manifest());
  for (int slot : {0, 1}) std::filesystem::remove(folder_ / slot_file(slot));
}

}  // namespace rlhf
