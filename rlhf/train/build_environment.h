#pragma once

#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "rlhf/train/environment_options.h"
#include "rlhf/train/language_model.h"
#include "rollout/environment/episode_runner.h"
#include "rollout/environment/tool_environment.h"

namespace rlhf {

/// Writes observations as the model's chat template does (encode_continuation), plain texts as they are.
/// Nothing in a text becomes a special token. Where the template refuses the role `tool`, results become user
/// turns in <tool_response> tags. Holds copies of the model's tokenizer and template.
ObservationEncoder observation_encoder(const LanguageModel& model);

/// The tools of a configuration, further ones, and the user of the data when the configuration says so. Reads
/// the tools' tables.
/// @throws IoError for a table; InvalidArgument where there is neither a tool nor a user, or a name occurs
/// twice
std::shared_ptr<const ToolEnvironmentFactory> build_environment(
    const EnvironmentOptions& options, const std::vector<std::shared_ptr<const Tool>>& own_tools = {});
/// Runs a factory's episodes with the limits of a configuration.
std::shared_ptr<const EpisodeRunner> build_episodes(const EnvironmentOptions& options,
                                                    std::shared_ptr<const EnvironmentFactory> factory,
                                                    const LanguageModel& model);

/// A chat that announces tools: through the template's `tools` where it knows them, else in a system message
/// in the form of the Hermes templates. @param schemas ToolEnvironmentFactory::schemas; empty = as without
std::string render_chat_with_tools(const LanguageModel& model, const Chat& chat, bool open_assistant_turn,
                                   const nlohmann::ordered_json& schemas);

}  // namespace rlhf
