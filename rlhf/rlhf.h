#pragma once

/// Everything an embedding program usually needs. Each header below may be included alone.

#include "reward/scoring/composition.h"            // RewardTerm: a reward of your own; weighted composition
#include "rlhf/config/reader.h"                    // options of your own, read as strictly as the library's
#include "rlhf/core/error.h"                       // Error and its kinds
#include "rlhf/kernels/open_device.h"              // where models run
#include "rlhf/train/language_model.h"             // weights, tokenizer, chat template; loading and saving
#include "rlhf/train/pipeline.h"                   // a whole run
#include "rlhf/train/run_options.h"                // everything in a run file
#include "rollout/engine/rollout_engine.h"         // generation by itself
#include "rollout/environment/episode_runner.h"    // environments of your own: turns, tools, users
#include "rollout/environment/tool_environment.h"  // tools of your own
