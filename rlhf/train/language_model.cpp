#include "rlhf/train/language_model.h"

#include <nlohmann/json.hpp>

#include "rlhf/core/atomic_file.h"
#include "rlhf/core/error.h"
#include "rlhf/model/byte_level.h"
#include "rlhf/model/safetensors.h"
#include "rlhf/model/weight_file.h"

namespace rlhf {
namespace {

TokenizerSpec byte_tokenizer() {
  TokenizerSpec spec;
  spec.source = "built-in byte vocabulary";
  for (int byte = 0; byte < 256; ++byte)
    spec.vocabulary.push_back(byte_level::spell(std::string(1, static_cast<char>(byte))));
  for (const char* token : {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}) {
    AddedToken added;
    added.id = static_cast<TokenId>(spec.vocabulary.size());
    added.text = token;
    added.special = true;
    spec.vocabulary.push_back(token);
    spec.added.push_back(std::move(added));
  }
  spec.eos_token = "<|im_end|>";
  spec.pad_token = "<|endoftext|>";
  spec.chat_template = kChatMl;
  return spec;
}

TokenizerSpec letter_tokenizer() {
  TokenizerSpec spec;
  spec.source = "built-in letter vocabulary";
  for (char letter = 'a'; letter <= 'u'; ++letter) spec.vocabulary.push_back(std::string(1, letter));
  AddedToken end;
  end.id = static_cast<TokenId>(spec.vocabulary.size());
  end.text = "<eos>";
  end.special = true;
  spec.vocabulary.push_back(end.text);
  spec.added.push_back(std::move(end));
  spec.eos_token = "<eos>";
  return spec;
}

}  // namespace

LanguageModel LanguageModel::load(const std::filesystem::path& path, const TrainableOptions& trainable) {
  LanguageModel model;
  const ModelConfig config = load_model_config(path);
  model.parameters_ = std::make_unique<Parameters<float>>(config, trainable, nullptr);
  model.parameters_->load(*WeightFile::open(path));
  const bool has_tokenizer = !std::filesystem::is_directory(path) ||
                             std::filesystem::exists(path / "tokenizer.json") ||
                             !std::filesystem::exists(path / "config.json");
  if (!has_tokenizer) return model;
  model.tokenizer_ = Tokenizer::load(path);
  if (model.tokenizer_->vocab_size() > config.vocab_size)
    fail<IoError>(path.string(), ": the tokenizer has ", model.tokenizer_->vocab_size(),
                  " ids but the model's vocabulary has ", config.vocab_size);
  model.template_.emplace(model.tokenizer_->spec().chat_template.value_or(kChatMl));
  return model;
}

LanguageModel LanguageModel::create(const NewModelOptions& options, const TrainableOptions& trainable,
                                    std::uint64_t seed) {
  LanguageModel model;
  const bool bytes = options.vocabulary == NewModelOptions::Vocabulary::kBytes;
  model.tokenizer_.emplace(bytes ? byte_tokenizer() : letter_tokenizer());
  model.template_.emplace(kChatMl);
  ModelConfig config;
  config.architecture = Architecture::kLlama;
  config.vocab_size = model.tokenizer_->vocab_size();
  config.hidden_size = options.hidden_size;
  config.intermediate_size = options.intermediate_size;
  config.num_layers = options.layers;
  config.num_heads = options.heads;
  config.num_kv_heads = options.kv_heads;
  config.head_dim = options.hidden_size / options.heads;
  config.max_positions = options.max_positions;
  config.norm_eps = 1e-5;
  config.layer_uses_rope.assign(static_cast<std::size_t>(options.layers), 1);
  config.layer_window.assign(static_cast<std::size_t>(options.layers), 0);
  config.attention_scale = 1 / std::sqrt(static_cast<double>(config.head_dim));
  config.tied_embeddings = true;
  config.eos = {*model.tokenizer_->eos()};
  config.pad = model.tokenizer_->pad();
  validate_model_config(config, "model.new");
  model.parameters_ = std::make_unique<Parameters<float>>(config, trainable, nullptr);
  model.parameters_->initialise(seed, options.initial_std);
  return model;
}

const Tokenizer& LanguageModel::tokenizer() const {
  RLHF_CHECK(tokenizer_, "this model has no tokenizer (tokenizer.json): text cannot be used, only token ids");
  return *tokenizer_;
}

const ChatTemplate& LanguageModel::chat_template() const {
  RLHF_CHECK(template_, "this model has no tokenizer and no chat template");
  return *template_;
}

std::string LanguageModel::render_chat(const Chat& chat, bool open_assistant_turn,
                                       const nlohmann::ordered_json& tools) const {
  RLHF_CHECK(template_, "this model has no tokenizer and no chat template");
  RenderOptions options;
  options.tools = tools;
  options.add_generation_prompt = open_assistant_turn;
  if (tokenizer_->bos()) options.bos_token = tokenizer_->token_text(*tokenizer_->bos());
  if (tokenizer_->eos()) options.eos_token = tokenizer_->token_text(*tokenizer_->eos());
  return template_->render(to_json(chat), options);
}

std::vector<TokenId> LanguageModel::encode_chat(const Chat& chat, std::string* rendered) const {
  const std::string text = render_chat(chat, true);
  if (rendered) *rendered = text;
  return tokenizer().encode(text);
}

TokenId LanguageModel::end_token() const {
  RLHF_CHECK(!config().eos.empty(), "the model's configuration names no end token (eos_token_id)");
  return config().eos.front();
}

void LanguageModel::save(const std::filesystem::path& directory) const {
  save(directory, *parameters_);
}

void LanguageModel::save(const std::filesystem::path& directory, const Parameters<float>& parameters) const {
  std::filesystem::create_directories(directory);
  std::vector<std::vector<float>> merged;  // owns the few tensors that differ from the buffer
  std::vector<OutputTensor> tensors;
  merged.reserve(parameters.entries().size());
  const bool lora = parameters.trainable_options().mode == TrainableMode::kLora;
  for (const auto& entry : parameters.entries()) {
    if (entry.spec.name.find(".lora_") != std::string::npos) continue;
    std::span<const float> values(entry.value, static_cast<std::size_t>(entry.spec.num_elements()));
    if (entry.spec.transposed || lora) {
      merged.push_back(parameters.merged(entry));
      values = merged.back();
    }
    tensors.push_back({entry.spec.name, entry.spec.shape, values});
  }
  save_safetensors(directory / "model.safetensors", tensors);
  write_file_atomically(directory / "generation_config.json", to_generation_json(parameters.config()));
  if (tokenizer_) tokenizer_->save(directory, parameters.config().max_positions);
  write_file_atomically(directory / "config.json", to_hf_json(parameters.config()));
}

}  // namespace rlhf
