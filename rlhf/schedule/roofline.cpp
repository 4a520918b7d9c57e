#include "rlhf/schedule/roofline.h"

#include <array>
#include <string>

#include "rlhf/core/error.h"

namespace rlhf::schedule {
namespace {

// Data sheets: NVIDIA A100 80GB SXM and H100 SXM. NVLink's 600 and 900 GB/s count both directions. Network:
// one card a device as in the DGX A100 (200 Gb/s) and DGX H100 (400 Gb/s). Both have five
// stacks of 16 GiB.
constexpr std::array kAccelerators = {
    Accelerator{"a100-80g", 312e12, 2.039e12, 300e9, 25e9, 8, std::uint64_t{80} << 30},
    Accelerator{"h100-80g", 989e12, 3.35e12, 450e9, 50e9, 8, std::uint64_t{80} << 30},
};

}  // namespace

std::span<const Accelerator> accelerators() {
  return kAccelerators;
}

const Accelerator& find_accelerator(std::string_view name) {
  std::string names;
  for (const Accelerator& accelerator : kAccelerators) {
    if (accelerator.name == name) return accelerator;
    names += concat(names.empty() ? "" : ", ", accelerator.name);
  }
  fail<InvalidArgument>("there is no accelerator '", name, "'; known are ", names);
}

CostModel roofline_costs(const Accelerator& accelerator, const ModelShape& model, const LengthModel& lengths,
                         const Efficiency& efficiency) {
  constexpr double kBytes = 2;  // bf16
  const double flops_per_s = accelerator.flops_per_s * efficiency.forward_flops;
  const double bytes_per_s = accelerator.memory_bytes_per_s * efficiency.memory;
  const double forward_flops = 2 * model.parameters;
  // Scores and weighted sum over half of the tokens in the mean: causal.
  const double context = lengths.prompt_tokens + lengths.mean_tokens;
  const double attention_flops = 4 * model.layers * model.hidden * context / 2;

  CostModel costs;
  costs.lengths = lengths;
  costs.decode.step_s = efficiency.step_s;
  costs.decode.weights_s = kBytes * model.parameters / bytes_per_s;
  costs.decode.sequence_s = forward_flops / flops_per_s;
  costs.decode.context_token_s = 2 * model.kv_bytes * model.layers * model.kv_width / bytes_per_s;
  costs.decode.prefill_token_s = forward_flops / flops_per_s;
  costs.score.token_s = (forward_flops + attention_flops) / flops_per_s;
  costs.train.token_s =
      3 * (forward_flops + attention_flops) / (accelerator.flops_per_s * efficiency.train_flops);
  costs.train.optimize_s = 30 * model.parameters / bytes_per_s;
  costs.train.publish_s = 2 * kBytes * model.parameters / bytes_per_s;
  costs.network.gradient_bytes = kBytes * model.parameters;
  costs.network.devices_per_node = accelerator.devices_per_node;
  costs.network.node_bytes_per_s = accelerator.node_bytes_per_s * efficiency.network;
  costs.network.cluster_bytes_per_s = accelerator.cluster_bytes_per_s * efficiency.network;
  costs.network.hop_s = 1e-5;
  return costs;
}

}  // namespace rlhf::schedule
