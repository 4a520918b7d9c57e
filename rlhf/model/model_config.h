#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "rlhf/core/ids.h"

namespace rlhf {

enum class Architecture { kLlama, kMistral, kQwen2, kQwen3, kGpt2, kGemma2, kSmolLm3 };
enum class NormKind { kRms, kLayer };
/// kGeluTanh is the tanh approximation (`gelu_new`, `gelu_pytorch_tanh`).
enum class Activation { kSilu, kGeluTanh };
enum class RopeScaling { kNone, kLinear, kLlama3 };

/// Rotary position embedding over the whole head width, half-split layout (the one of Hugging Face
/// checkpoints).
struct RopeOptions {
  double theta = 10000;
  RopeScaling scaling = RopeScaling::kNone;
  /// kLinear: positions are divided by it. kLlama3: low frequencies are divided by it.
  double factor = 1;
  /// kLlama3 only: wavelengths above original_max_positions / low_freq_factor are scaled fully, below
  /// original_max_positions / high_freq_factor not at all, between them smoothly.
  double low_freq_factor = 1;
  double high_freq_factor = 4;
  std::int64_t original_max_positions = 8192;
};

/// What a decoder-only transformer computes, independent of the file format it came from. Filled by
/// load_model_config; every size is positive and bounded.
struct ModelConfig {
  Architecture architecture = Architecture::kLlama;
  std::int64_t vocab_size = 0;
  std::int64_t hidden_size = 0;
  std::int64_t intermediate_size = 0;
  std::int64_t num_layers = 0;
  std::int64_t num_heads = 0;
  /// Divides num_heads.
  std::int64_t num_kv_heads = 0;
  /// Width of one head; num_heads * head_dim need not equal hidden_size. Even when rotary positions are used.
  std::int64_t head_dim = 0;
  /// Longest sequence in tokens.
  std::int64_t max_positions = 0;

  NormKind norm = NormKind::kRms;
  double norm_eps = 1e-6;
  /// Gemma: the scale is 1 + weight.
  bool norm_plus_one = false;
  Activation activation = Activation::kSilu;
  /// false: two-layer MLP (GPT-2).
  bool gated_mlp = true;
  bool attention_qkv_bias = false;
  bool attention_out_bias = false;
  bool mlp_bias = false;
  /// RMS norm of each query and key head before the rotation (Qwen3).
  bool qk_norm = false;
  /// Norms of the attention and MLP outputs before they are added to the residual stream (Gemma 2).
  bool post_norms = false;
  /// Learned position embeddings instead of rotation (GPT-2).
  bool learned_positions = false;
  RopeOptions rope;
  /// [num_layers], 0 = this layer does not rotate (SmolLM3: every fourth).
  std::vector<std::uint8_t> layer_uses_rope;
  /// [num_layers], number of latest positions (own included) a token attends to; 0 = all.
  std::vector<std::int64_t> layer_window;
  /// Factor on query-key products.
  double attention_scale = 1;
  /// x -> cap * tanh(x / cap) on attention scores / final logits; 0 = off (Gemma 2).
  double attention_softcap = 0;
  double final_softcap = 0;
  /// Factor on token embeddings (Gemma: sqrt(hidden_size)).
  double embedding_scale = 1;

  /// The output head is the token embedding. Meaningless when scalar_head.
  bool tied_embeddings = false;
  /// `*ForSequenceClassification`: a bias-free score head [num_labels, hidden_size] instead of the language
  /// head.
  bool scalar_head = false;
  /// Outputs of the score head (1 for reward and value models); 0 for language models.
  std::int64_t num_labels = 0;

  std::optional<TokenId> bos;
  /// Every id that ends a text; generation_config.json wins over config.json. May be empty.
  std::vector<TokenId> eos;
  std::optional<TokenId> pad;
  /// Token whose embedding takes no gradient from the input side: the pad_token_id of a Hugging Face
  /// configuration, which transformers hands to torch's Embedding as padding_idx (not for GPT-2).
  std::optional<TokenId> fixed_embedding;

  std::int64_t query_width() const { return num_heads * head_dim; }
  std::int64_t kv_width() const { return num_kv_heads * head_dim; }
};

enum class TensorRole {
  kTokenEmbedding,
  kPositionEmbedding,
  kInputNorm,
  kInputNormBias,
  kQuery,
  kKey,
  kValue,
  kQueryBias,
  kKeyBias,
  kValueBias,
  kFusedQkv,
  kFusedQkvBias,  // GPT-2's c_attn: query, key, value side by side in the output dimension
  kQueryNorm,
  kKeyNorm,
  kAttentionOut,
  kAttentionOutBias,
  kPostAttentionNorm,  // Gemma 2: on the attention output
  kMlpNorm,
  kMlpNormBias,  // on the input of the MLP
  kGate,
  kGateBias,
  kUp,
  kUpBias,
  kDown,
  kDownBias,
  kPostMlpNorm,  // Gemma 2: on the MLP output
  kFinalNorm,
  kFinalNormBias,
  kLmHead,
  kScoreHead,
};

/// One weight tensor of a model under its Hugging Face name.
struct TensorSpec {
  std::string name;
  /// As stored in a Hugging Face safetensors file, slowest dimension first; linear weights are [out, in],
  /// unless...
  std::vector<std::int64_t> shape;
  TensorRole role = TensorRole::kTokenEmbedding;
  /// -1 for tensors outside the layers.
  std::int64_t layer = -1;
  /// ...true: stored [in, out] (GPT-2's Conv1D).
  bool transposed = false;

  std::int64_t num_elements() const;
};

/// Every tensor the model needs, in the order of the flat parameter buffer: token (and position) embedding,
/// per layer input norm, query, key, value, their biases, query and key norm, attention output,
/// post-attention norm, MLP norm, gate, up, down (each followed by its bias), post-MLP norm; then final norm
/// and the untied language or score head.
std::vector<TensorSpec> expected_tensors(const ModelConfig& config);
/// Sum of the elements of expected_tensors.
std::int64_t count_parameters(const ModelConfig& config);

/// Reads the configuration of a Hugging Face directory (config.json, generation_config.json) or of a GGUF
/// file (or of a directory that holds just one GGUF file).
/// @throws IoError naming file, key and value for an unknown model type, an unsupported feature, a missing or
/// out-of-range size.
ModelConfig load_model_config(const std::filesystem::path& directory_or_file);
/// Parses config.json: the `rope_parameters`/`dtype` keys of transformers 5 and the
/// `rope_theta`/`rope_scaling`/ `torch_dtype` keys before. Absent keys take the defaults of the transformers
/// class of that model type.
/// @param source names the file in messages.
ModelConfig parse_hf_config(const nlohmann::json& config, const std::string& source);
/// Checks the fields against one another (used by every reader). @throws IoError naming `source`.
void validate_model_config(const ModelConfig& config, const std::string& source);

/// config.json text that transformers 4 and 5 load. `dtype` is a torch name: float32, bfloat16, float16,
/// float64.
std::string to_hf_json(const ModelConfig& config, std::string_view dtype = "float32");
/// generation_config.json text: begin, end and pad ids.
std::string to_generation_json(const ModelConfig& config);

/// "llama", "mistral", ...: the model_type of config.json.
std::string_view model_type_name(Architecture architecture);

}  // namespace rlhf
