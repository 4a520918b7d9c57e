// A tool of one's own: a shop's stock, held by the program. A tiny model is shown by demonstrations how to
// ask it and is then trained with the tool in the loop.
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "rlhf/rlhf.h"

namespace {

const std::map<std::string, int> kStock = {{"tea", 7},  {"salt", 3}, {"rice", 9}, {"soap", 0},
                                           {"figs", 4}, {"oats", 6}, {"nuts", 2}, {"milk", 5}};

class StockTool : public rlhf::Tool {
 public:
  StockTool() {
    schema_.name = "stock";
    schema_.description = "How many are left.";
    schema_.parameters = nlohmann::ordered_json::parse(
        R"({"type": "object", "properties": {"item": {"type": "string"}}, "required": ["item"]})");
  }
  const rlhf::ToolSchema& schema() const override { return schema_; }
  bool answers_at_once() const override { return true; }
  rlhf::ToolResult call(const nlohmann::json& arguments, const rlhf::CallLimit&) const override {
    const auto item = kStock.find(arguments.at("item").get<std::string>());
    return item == kStock.end() ? rlhf::ToolResult::error("we do not sell that")
                                : rlhf::ToolResult::ok(std::to_string(item->second));
  }

 private:
  rlhf::ToolSchema schema_;
};

const char* const kRun = R"yaml(
run: {name: embed-tool, export_stages: false}
model: {new: {layers: 2, hidden_size: 64, heads: 4, kv_heads: 2, intermediate_size: 172, max_positions: 1024}}
data: {source: files}
rewards: [{type: exact_match}]
stages: [sft, ppo]
sft: {epochs: 40, examples_per_step: 8, optimizer: {learning_rate: 3.0e-3}}
rollout: {max_new_tokens: 160, max_sequences: 32, environment: {max_turns: 3}}
ppo:
  iterations: 4
  algorithm: {preset: trl-grpo, prompts_per_step: 8, samples_per_prompt: 4, optimizer: {learning_rate: 3.0e-4}}
)yaml";

// One demonstration and one prompt an item, as JSONL.
void write_data(const std::filesystem::path& folder) {
  std::ofstream demonstrations(folder / "demonstrations.jsonl"), prompts(folder / "prompts.jsonl");
  for (const auto& [item, count] : kStock) {
    const std::string call =
        "<tool_call>\n{\"name\": \"stock\", \"arguments\": {\"item\": \"" + item + "\"}}\n</tool_call>";
    const nlohmann::json demonstration = {{"messages",
                                           {{{"role", "user"}, {"content", "Any " + item + "?"}},
                                            {{"role", "assistant"}, {"content", call}},
                                            {{"role", "tool"}, {"content", std::to_string(count)}},
                                            {{"role", "assistant"}, {"content", std::to_string(count)}}}}};
    demonstrations << demonstration.dump() << "\n";
    prompts << nlohmann::json{{"prompt", "Any " + item + "?"}, {"reference", std::to_string(count)}}.dump()
            << "\n";
  }
}

class Watch : public rlhf::RunObserver {
 public:
  void step(const std::string& stage, std::int64_t step, std::int64_t,
            const rlhf::Metrics& metrics) override {
    if (stage != "ppo") return;
    std::printf("iteration %lld: reward %.3f, %.2f turns, %.2f calls, %.0f %% of them errors\n",
                static_cast<long long>(step), rlhf::metric(metrics, "reward/total", 0),
                rlhf::metric(metrics, "episode/turns", 0), rlhf::metric(metrics, "episode/tool_calls", 0),
                100 * rlhf::metric(metrics, "episode/tool_errors", 0));
  }
};

void run(const std::filesystem::path& folder, std::vector<std::string> overrides) {
  write_data(folder);
  rlhf::config::LoadOptions load;
  load.overrides = {"data.sft_file=" + (folder / "demonstrations.jsonl").string(),
                    "data.prompts_file=" + (folder / "prompts.jsonl").string()};
  load.overrides.insert(load.overrides.end(), overrides.begin(), overrides.end());
  const auto options = rlhf::config::parse<rlhf::RunOptions>(kRun, "tool", load);
  Watch watch;
  rlhf::PipelineSettings settings;
  settings.environment.tools = {std::make_shared<StockTool>()};
  rlhf::Pipeline(options, settings, watch).run();
}

}  // namespace

int main(int argc, char** argv) {
  const auto folder = std::filesystem::temp_directory_path() / "rlhf_embed_tool";
  std::filesystem::create_directories(folder);
  try {
    run(folder, {argv + 1, argv + argc});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  std::filesystem::remove_all(folder);
  return 0;
}
