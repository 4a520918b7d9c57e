#pragma once
// A tiny model on an accelerator and engines for it.

#include <memory>
#include <utility>
#include <vector>

#include "tests/device/accelerators.h"
#include "tests/rollout/support.h"

namespace rlhf {

struct DeviceSetup {
  const Accelerator& accelerator;
  LanguageModel model;
  ThreadPool pool{1};

  explicit DeviceSetup(const Accelerator& device, LanguageModel chosen = make_model())
      : accelerator(device), model(std::move(chosen)) {
    model.parameters().place_on(device);
  }
  Compute<float> compute() { return {pool, kernels::detect_cpu_isa(), &accelerator}; }
  std::unique_ptr<RolloutEngine> engine(RolloutEngineOptions options) {
    if (options.num_blocks == 0) options.num_blocks = 64;
    return std::make_unique<RolloutEngine>(model.config(), compute(), options,
                                           [this](TokenId id) { return model.tokenizer().token_bytes(id); });
  }
};

// The emulator runs a kernel's threads one by one.
inline std::vector<GenerationRequest> few_requests() {
  auto requests = mixed_requests();
  requests.resize(8);
  return requests;
}

inline bool is_plain(const GenerationRequest& request) {
  return keeps_all(request.sampling) && request.sampling.repetition_penalty == 1;
}

}  // namespace rlhf
