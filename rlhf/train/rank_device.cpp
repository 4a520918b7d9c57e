#include "rlhf/train/rank_device.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "rlhf/core/error.h"

namespace rlhf {
namespace {

RankGpus own_gpus(Device wanted) {
  if (wanted == Device::kCpu) return {machine_id(), {}, "its device is cpu"};
  return {machine_id(), cuda_gpu_names(), cuda_status().text};
}

std::vector<RankGpus> gather_gpus(Collective& collective, const RankGpus& own) {
  const nlohmann::json text = {{"machine", own.machine}, {"names", own.names}, {"problem", own.problem}};
  std::vector<RankGpus> all;
  for (const std::string& said : collective.all_gather_bytes(text.dump())) {
    const auto json = nlohmann::json::parse(said);
    all.push_back({json.at("machine"), json.at("names"), json.at("problem")});
  }
  return all;
}

}  // namespace

std::vector<std::optional<int>> choose_gpus(std::span<const RankGpus> ranks) {
  std::vector<std::optional<int>> chosen;
  std::set<std::pair<std::string, std::string>> taken;  // machine, name
  for (const RankGpus& rank : ranks) {
    const auto free = std::ranges::find_if(rank.names, [&](const std::string& name) {
      return !name.empty() && !taken.contains({rank.machine, name});
    });
    chosen.emplace_back();
    if (free == rank.names.end()) continue;
    chosen.back() = static_cast<int>(free - rank.names.begin());
    taken.emplace(rank.machine, *free);
  }
  return chosen;
}

std::string gpu_problem(std::span<const RankGpus> ranks) {
  const auto chosen = choose_gpus(ranks);
  const auto without = std::ranges::find_if(chosen, [](const auto& gpu) { return !gpu; });
  if (without == chosen.end()) return "";
  const auto r = static_cast<std::size_t>(without - chosen.begin());
  std::set<std::string> seen;
  int ranks_there = 0;
  for (const RankGpus& rank : ranks) {
    if (rank.machine != ranks[r].machine) continue;
    ++ranks_there;
    for (const std::string& name : rank.names)
      if (!name.empty()) seen.insert(name);
  }
  if (std::ranges::all_of(ranks[r].names, &std::string::empty))
    return concat("rank ", r, ": ", ranks[r].problem);
  return concat("rank ", r, " finds no GPU for itself: ", ranks_there, " ranks run on its machine and ",
                seen.size(), " GPU", seen.size() == 1 ? "" : "s",
                " can be used there; every rank needs one of its own");
}

RankDevice::RankDevice(Device wanted, Collective& collective, DeviceCollectiveOptions options) {
  if (collective.world_size() == 1) {
    device_.emplace(wanted);
    text_ = device_->text();
    if (device_->accelerator()) accelerator_ = *device_->accelerator();
    return;
  }
  const std::vector<RankGpus> ranks = gather_gpus(collective, own_gpus(wanted));
  const std::string problem = gpu_problem(ranks);
  if (wanted == Device::kCuda && !problem.empty()) fail<ConfigError>("device: cuda: ", problem);
  if (wanted == Device::kCpu || !problem.empty()) {
    text_ = wanted == Device::kCpu ? "cpu" : "cpu (" + problem + ")";
    return;
  }
  const auto own = static_cast<std::size_t>(collective.rank());
  device_.emplace(Device::kCuda, *choose_gpus(ranks)[own]);
  accelerator_ = *device_->accelerator();
  ranks_ = make_device_collective(collective, *accelerator_->memory, options);
  accelerator_->ranks = ranks_.get();
  text_ = concat(device_->text(), ", ", collective.world_size(), " ranks by ", ranks_->text());
}

}  // namespace rlhf
