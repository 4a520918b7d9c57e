#pragma once

#include "rlhf/model/model_config.h"
#include "rollout/engine/generation.h"

namespace rlhf {

/// Checks everything about a request that does not depend on the cache.
/// @param has_text whether tokens can be turned into text
/// @throws InvalidArgument naming the prompt, the value and what was expected
void check_request(const GenerationRequest& request, const ModelConfig& config, bool has_text);

}  // namespace rlhf
