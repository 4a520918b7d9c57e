#include "rollout/engine/step_program.h"

#include "rlhf/core/error.h"
#include "rollout/engine/device_step.h"
#include "rollout/engine/host_step.h"
#include "rollout/engine/trunk_store.h"

namespace rlhf {

std::size_t kv_element_bytes(const Compute<float>& compute) {
  return compute.accelerator() ? sizeof(Bfloat16) : sizeof(float);
}

std::size_t slab_bytes_of(const ModelConfig& config, const Compute<float>& compute,
                          std::int64_t trunk_layers) {
  const std::size_t kv = KvStore<float>::block_bytes(config, config.num_layers) / sizeof(float);
  return kv * kv_element_bytes(compute) + TrunkStore::block_bytes(trunk_layers > 0 ? config.hidden_size : 0);
}

std::unique_ptr<StepProgram> make_step_program(const ModelConfig& config, const Compute<float>& compute,
                                               const Arena& arena, std::int64_t trunk_layers) {
  if (!compute.accelerator()) return std::make_unique<HostStep>(config, compute, arena, trunk_layers);
  RLHF_CHECK(trunk_layers == 0, "rollout: states of layers are kept on the CPU only");
  return std::make_unique<DeviceStep>(config, compute, arena);
}

}  // namespace rlhf
