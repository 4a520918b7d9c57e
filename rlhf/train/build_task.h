#pragma once

#include "rlhf/train/run_options.h"
#include "rlhf/train/task_data.h"

namespace rlhf {

/// The run's policy as it starts: loaded or new. @throws IoError
LanguageModel load_policy(const RunOptions& options);

/// Reads or generates all data that the run's stages need and tokenises it for `model`.
/// @throws IoError, InvalidArgument naming file and line, or the case that does not fit the model's context.
TaskData build_task(const RunOptions& options, const LanguageModel& model);

/// Tokens of a demonstration: the prompt without loss, then the response and the end token with loss. Where
/// the response calls the task's tool, the tool's result follows without loss, as in a rollout.
TrainingExample make_example(const LanguageModel& model, const std::vector<TokenId>& prompt,
                             std::string_view response, const ToolCall& tool);

/// The calculator of the finance desk: evaluates the last <calc>...</calc> and writes its result behind it.
ToolCall make_calculator(const LanguageModel& model);

}  // namespace rlhf
