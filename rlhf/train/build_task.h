#pragma once

#include <memory>
#include <string_view>
#include <vector>

#include "rlhf/train/run_options.h"
#include "rlhf/train/task_data.h"
#include "rollout/environment/tool.h"

namespace rlhf {

/// What an embedder brings to answer a run's responses.
struct OwnEnvironment {
  std::vector<std::shared_ptr<const Tool>> tools;         ///< beside those of rollout.environment
  std::shared_ptr<const EnvironmentFactory> environment;  ///< instead of tools and user altogether
  bool empty() const { return tools.empty() && !environment; }
};

/// The run's policy as it starts: loaded or new. @throws IoError
LanguageModel load_policy(const RunOptions& options);

/// Reads or generates all data that the run's stages need and tokenises it for `model`.
/// @throws IoError, InvalidArgument naming file and line, or the case that does not fit the model's context.
/// @param own joins rollout.environment, with its limits
TaskData build_task(const RunOptions& options, const LanguageModel& model, const OwnEnvironment& own = {});

/// Tokens of a demonstration: the prompt without loss, then the response and the end token with loss. Where
/// the response holds a text that ends a turn of the task's environment, what the environment says follows
/// without loss, as in a rollout.
/// @param environment null = none
TrainingExample make_example(const LanguageModel& model, const std::vector<TokenId>& prompt,
                             std::string_view response, const EpisodeRunner* environment);

}  // namespace rlhf
