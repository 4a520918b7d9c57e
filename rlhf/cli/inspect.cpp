#include <iostream>

#include <nlohmann/json.hpp>
#include "rlhf/cli/verbs.h"
#include "rlhf/core/error.h"
#include "rlhf/model/model_config.h"
#include "rlhf/model/tokenizer.h"
#include "rlhf/model/weight_file.h"

namespace rlhf::cli {
namespace {

struct InspectArguments {
  std::string model;
  bool json = false, tensors = false;
};

nlohmann::ordered_json describe(const InspectArguments& arguments) {
  const ModelConfig config = load_model_config(arguments.model);
  const auto file = WeightFile::open(arguments.model);
  const std::int64_t parameters = count_parameters(config);
  nlohmann::ordered_json out;
  out["architecture"] = model_type_name(config.architecture);
  out["scalar_head"] = config.scalar_head;
  out["parameters"] = parameters;
  out["layers"] = config.num_layers;
  out["hidden_size"] = config.hidden_size;
  out["intermediate_size"] = config.intermediate_size;
  out["heads"] = config.num_heads;
  out["kv_heads"] = config.num_kv_heads;
  out["head_dim"] = config.head_dim;
  out["vocab_size"] = config.vocab_size;
  out["max_positions"] = config.max_positions;
  out["tied_embeddings"] = config.tied_embeddings;
  out["eos_token_ids"] = config.eos;
  std::uint64_t bytes = 0;
  for (const TensorInfo& tensor : file->tensors()) bytes += tensor.bytes;
  out["file_bytes"] = bytes;
  out["memory_bytes"] = {{"fp32", parameters * 4}, {"bf16", parameters * 2}, {"int8", parameters}};
  out["training_bytes_fp32"] = parameters * 16;
  for (const TensorSpec& spec : expected_tensors(config))
    if (!file->find(spec.name)) out["missing_tensors"].push_back(spec.name);
  if (arguments.tensors)
    for (const TensorInfo& tensor : file->tensors())
      out["tensors"].push_back({{"name", tensor.name}, {"shape", tensor.shape}, {"bytes", tensor.bytes}});
  try {
    const Tokenizer tokenizer = Tokenizer::load(arguments.model);
    out["tokenizer"] = {{"ids", tokenizer.vocab_size()},
                        {"chat_template", tokenizer.spec().chat_template.has_value()},
                        {"missing_bytes", tokenizer.missing_bytes().size()}};
  } catch (const Error& error) {
    out["tokenizer"] = {{"problem", error.what()}};
  }
  return out;
}

void inspect(const InspectArguments& arguments) {
  const nlohmann::ordered_json out = describe(arguments);
  if (arguments.json) {
    std::cout << out.dump(1) << "\n";
    return;
  }
  for (const auto& [key, value] : out.items()) {
    if (key == "tensors" || key == "missing_tensors") {
      std::cout << key << ":\n";
      for (const auto& entry : value) std::cout << "  " << entry.dump() << "\n";
    } else {
      std::cout << key << ": " << (value.is_string() ? value.get<std::string>() : value.dump()) << "\n";
    }
  }
}

}  // namespace

void add_inspect(CLI::App& app) {
  auto* verb = app.add_subcommand("inspect", "Architecture, tensors, tokenizer and memory of a model");
  auto a = std::make_shared<InspectArguments>();
  verb->add_option("model", a->model, "Hugging Face directory or GGUF file")->required();
  verb->add_flag("--tensors", a->tensors, "List all tensors");
  verb->add_flag("--json", a->json, "One JSON object");
  verb->callback([a] { inspect(*a); });
}

}  // namespace rlhf::cli
