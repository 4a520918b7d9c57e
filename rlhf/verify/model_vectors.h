#pragma once

#include <filesystem>

#include "rlhf/verify/report.h"

namespace rlhf {

/// Runs a folder `model_*` or `gguf_*` of reference outputs (expected.json beside the weights, families
/// `model`, `reward_model`, `gguf`): logits, log-probs, greedy continuations through the cached engine, loss
/// and gradients. config_legacy.json, when present, must give the same model. Never throws for a mismatch; a
/// file that cannot be read is a failure with a message.
VerifyResult verify_model_directory(const std::filesystem::path& directory);

}  // namespace rlhf
