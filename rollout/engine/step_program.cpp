#include "rollout/engine/step_program.h"

#include "rlhf/core/error.h"
#include "rollout/engine/device_step.h"
#include "rollout/engine/host_step.h"
#include "rollout/engine/trunk_store.h"

namespace rlhf {

std::size_t activation_bytes_of(const Compute<float>& compute) {
  return compute.accelerator() ? sizeof(Bfloat16) : sizeof(float);
}

std::size_t slab_bytes_of(const ModelConfig& config, const Compute<float>& compute, std::int64_t trunk_layers,
                          KvFormat kv) {
  const std::size_t bytes = compute.accelerator()
                                ? KvStore<Bfloat16>::block_bytes(config, config.num_layers, kv)
                                : KvStore<float>::block_bytes(config, config.num_layers, kv);
  return bytes + TrunkStore::block_bytes(trunk_layers > 0 ? config.hidden_size : 0);
}

std::unique_ptr<StepProgram> make_step_program(const ModelConfig& config, const Compute<float>& compute,
                                               const Arena& arena, std::int64_t trunk_layers, KvFormat kv) {
  if (!compute.accelerator()) {
    RLHF_CHECK(kv == KvFormat::kAuto, "rollout: K and V in ", to_string(kv),
               " are for a GPU; on the CPU they are fp32");
    return std::make_unique<HostStep>(config, compute, arena, trunk_layers);
  }
  RLHF_CHECK(trunk_layers == 0, "rollout: states of layers are kept on the CPU only");
  return std::make_unique<DeviceStep>(config, compute, arena, kv);
}

}  // namespace rlhf
