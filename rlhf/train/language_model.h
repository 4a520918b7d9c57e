#pragma once

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "rlhf/data/chat.h"
#include "rlhf/model/chat_template.h"
#include "rlhf/model/parameters.h"
#include "rlhf/model/tokenizer.h"

namespace rlhf {

/// A model made from nothing, for reference tasks and tests.
struct NewModelOptions {
  enum class Vocabulary { kBytes, kLetters };
  Vocabulary vocabulary = Vocabulary::kBytes;  ///< 256 bytes and chat tokens, or the letters a..u and EOS
  std::int64_t layers = 2;
  std::int64_t hidden_size = 64;
  std::int64_t heads = 4;
  std::int64_t kv_heads = 4;
  std::int64_t intermediate_size = 256;
  std::int64_t max_positions = 512;
  double initial_std = 0.02;

  template <class V>
  void visit_fields(V& v) {
    v.choice("vocabulary", vocabulary, {{"bytes", Vocabulary::kBytes}, {"letters", Vocabulary::kLetters}},
             "bytes: 256 bytes and the ChatML tokens; letters: a to u and an end token");
    v.field("layers", layers, "Decoder layers", {1, 1000});
    v.field("hidden_size", hidden_size, "Width", {1, 65536});
    v.field("heads", heads, "Query heads; hidden_size / heads must be even", {1, 1024});
    v.field("kv_heads", kv_heads, "Key/value heads; divides heads", {1, 1024});
    v.field("intermediate_size", intermediate_size, "Width of the MLP", {1, 1 << 20});
    v.field("max_positions", max_positions, "Longest sequence in tokens", {2, 1 << 20});
    v.field("initial_std", initial_std, "Standard deviation of the initial matrices", {1e-6, 10});
  }
};

/// Weights, tokenizer and chat template of one model.
class LanguageModel {
 public:
  /// Loads a Hugging Face directory or a GGUF file. A directory without tokenizer loads; text then cannot be
  /// encoded.
  /// @throws IoError
  static LanguageModel load(const std::filesystem::path& path, const TrainableOptions& trainable);
  /// A randomly initialised llama-style model.
  static LanguageModel create(const NewModelOptions& options, const TrainableOptions& trainable,
                              std::uint64_t seed);

  const ModelConfig& config() const { return parameters_->config(); }
  Parameters<float>& parameters() { return *parameters_; }
  const Parameters<float>& parameters() const { return *parameters_; }
  bool has_tokenizer() const { return tokenizer_.has_value(); }
  /// @throws InvalidArgument when the model came without one.
  const Tokenizer& tokenizer() const;

  /// Ids of a chat through the model's template, the assistant's turn opened.
  std::vector<TokenId> encode_chat(const Chat& chat, std::string* rendered = nullptr) const;
  /// @param tools list of JSON schemas for the template's `tools`; null = none
  std::string render_chat(const Chat& chat, bool open_assistant_turn,
                          const nlohmann::ordered_json& tools = nullptr) const;
  /// @throws InvalidArgument when the model came without one.
  const ChatTemplate& chat_template() const;
  /// Token that ends an assistant turn: the config's first EOS.
  TokenId end_token() const;
  const std::vector<TokenId>& end_tokens() const { return config().eos; }

  /// Writes a directory that transformers loads: config, generation config, weights (LoRA merged), tokenizer,
  /// template.
  void save(const std::filesystem::path& directory) const;
  /// The same for other weights of this tokenizer (a reward or value model).
  void save(const std::filesystem::path& directory, const Parameters<float>& parameters) const;

 private:
  LanguageModel() = default;

  std::unique_ptr<Parameters<float>> parameters_;
  std::optional<Tokenizer> tokenizer_;
  std::optional<ChatTemplate> template_;
};

}  // namespace rlhf
