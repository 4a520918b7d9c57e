#include "rlhf/train/build_environment.h"

#include <nlohmann/json.hpp>
#include <utility>

#include "rlhf/core/error.h"
#include "rlhf/model/chat_template.h"
#include "rollout/environment/calculator.h"
#include "rollout/environment/scripted_user.h"
#include "rollout/environment/subprocess_tool.h"
#include "rollout/environment/table_lookup.h"

namespace rlhf {
namespace {

std::shared_ptr<const Tool> build_subprocess(const ToolSection& section) {
  ToolSchema schema;
  schema.name = section.name;
  schema.description = section.description;
  if (section.parameters.empty())
    schema.parameters["additionalProperties"] = true;
  else
    schema.parameters = nlohmann::ordered_json::parse(section.parameters);
  SubprocessLimits limits;
  limits.max_seconds = section.max_seconds;
  limits.max_cpu_seconds = section.max_cpu_seconds;
  limits.max_memory_bytes = section.max_memory.bytes;
  limits.max_output_bytes = static_cast<std::size_t>(section.max_output_bytes);
  return std::make_shared<SubprocessTool>(std::move(schema), section.argv, limits);
}

std::shared_ptr<const Tool> build_tool(const ToolSection& section) {
  switch (section.type) {
    case ToolSection::Type::kCalculator:
      return std::make_shared<CalculatorTool>(section.name, section.description);
    case ToolSection::Type::kTableLookup: {
      TableLookupOptions options;
      if (!section.name.empty()) options.name = section.name;
      options.description = section.description;
      options.file = section.file;
      options.key = section.key;
      return std::make_shared<TableLookupTool>(options);
    }
    case ToolSection::Type::kSubprocess:
      return build_subprocess(section);
  }
  fail<InternalError>("unknown tool type");
}

Chat as_user_turns(Chat messages) {
  for (ChatMessage& message : messages)
    if (message.role == "tool")
      message = {"user", "<tool_response>\n" + message.content + "\n</tool_response>"};
  return messages;
}

// The Hermes form, which the Qwen templates use as well.
std::string announcement(const nlohmann::ordered_json& schemas) {
  std::string text =
      "# Tools\n\nYou may call one or more functions. Signatures are within <tools></tools> tags:\n<tools>";
  for (const auto& schema : schemas) text += "\n" + schema.dump();
  return text +
         "\n</tools>\n\nReply to a call with a json object inside <tool_call></tool_call> "
         "tags:\n<tool_call>\n{\"name\": <name>, \"arguments\": <json>}\n</tool_call>";
}

Chat announced(Chat chat, const nlohmann::ordered_json& schemas) {
  if (chat.empty() || chat.front().role != "system")
    chat.insert(chat.begin(), {"system", announcement(schemas)});
  else
    chat.front().content += "\n\n" + announcement(schemas);
  return chat;
}

// Whether the template has written the tools. A description is no word that a user says by chance.
bool shows(const std::string& text, const nlohmann::ordered_json& schemas) {
  for (const auto& schema : schemas) {
    const auto& function = schema["function"];
    const std::string name = function["name"].dump(), description = function["description"].dump();
    if (text.find(name) == std::string::npos || text.find(description) == std::string::npos) return false;
  }
  return true;
}

}  // namespace

ObservationEncoder observation_encoder(const LanguageModel& model) {
  return [tokenizer = model.tokenizer(), chat_template = model.chat_template()](
             const Observation& observation, TokenId ended_by) -> std::vector<TokenId> {
    if (!observation.tokens.empty()) return observation.tokens;
    EncodeOptions plain;
    plain.parse_special = false;
    if (observation.messages.empty()) return tokenizer.encode(observation.text, plain);
    const std::string written = ended_by >= 0 ? tokenizer.token_text(ended_by) : "";
    try {
      return encode_continuation(tokenizer, chat_template, to_json(observation.messages), written);
    } catch (const ChatTemplateError&) {
      return encode_continuation(tokenizer, chat_template, to_json(as_user_turns(observation.messages)),
                                 written);
    }
  };
}

std::shared_ptr<const ToolEnvironmentFactory> build_environment(
    const EnvironmentOptions& options, const std::vector<std::shared_ptr<const Tool>>& own_tools) {
  std::vector<std::shared_ptr<const Tool>> tools = own_tools;
  RLHF_CHECK(!tools.empty() || !options.tools.empty() || options.scripted_user,
             "environment: there are neither tools nor scripted_user: true");
  for (const ToolSection& section : options.tools) tools.push_back(build_tool(section));
  ToolLimits limits;
  limits.max_calls_per_turn = options.max_calls_per_turn;
  limits.max_result_bytes = static_cast<std::size_t>(options.max_result_bytes);
  std::shared_ptr<const EnvironmentFactory> user;
  if (options.scripted_user) user = std::make_shared<ScriptedUserFactory>();
  return std::make_shared<ToolEnvironmentFactory>(std::move(tools), limits, std::move(user));
}

std::shared_ptr<const EpisodeRunner> build_episodes(const EnvironmentOptions& options,
                                                    std::shared_ptr<const EnvironmentFactory> factory,
                                                    const LanguageModel& model) {
  EpisodeRunnerOptions runner;
  runner.limits = options.limits;
  runner.workers = static_cast<int>(options.workers);
  return std::make_shared<EpisodeRunner>(std::move(factory), observation_encoder(model), runner);
}

std::string render_chat_with_tools(const LanguageModel& model, const Chat& chat, bool open_assistant_turn,
                                   const nlohmann::ordered_json& schemas) {
  if (schemas.empty()) return model.render_chat(chat, open_assistant_turn);
  std::string text = model.render_chat(chat, open_assistant_turn, schemas);
  if (shows(text, schemas)) return text;
  return model.render_chat(announced(chat, schemas), open_assistant_turn);
}

}  // namespace rlhf
