#include <algorithm>
#include <array>
#include <cmath>

#include "rlhf/core/error.h"
#include "rlhf/model/config_limits.h"
#include "rlhf/model/gguf.h"

namespace rlhf {
namespace {

struct NamedArchitecture {
  std::string_view name;
  Architecture architecture;
};
// llama.cpp stores Mistral models under "llama".
constexpr std::array<NamedArchitecture, 6> kArchitectures{{{"llama", Architecture::kLlama},
                                                           {"qwen2", Architecture::kQwen2},
                                                           {"qwen3", Architecture::kQwen3},
                                                           {"gpt2", Architecture::kGpt2},
                                                           {"gemma2", Architecture::kGemma2},
                                                           {"smollm3", Architecture::kSmolLm3}}};

/// Metadata keys of one architecture: "llama.block_count" for key("block_count").
class Keys {
 public:
  Keys(const GgufFile& file, std::string_view architecture)
      : file_(file), prefix_(concat(architecture, ".")) {}

  std::string key(std::string_view name) const { return prefix_ + std::string(name); }
  bool has(std::string_view name) const { return file_.has(key(name)); }
  std::int64_t integer(std::string_view name, std::optional<std::int64_t> fallback, std::int64_t high) const {
    return file_.integer(key(name), fallback, 1, high);
  }
  double number(std::string_view name, std::optional<double> fallback, double low, double high) const {
    const double value = file_.number(key(name), fallback);
    if (value < low || value > high) {
      fail<IoError>(file_.path().string(), ": metadata ", key(name), ": ", value, ": expected a number in [",
                    low, ", ", high, "]");
    }
    return value;
  }

 private:
  const GgufFile& file_;
  std::string prefix_;
};

const NamedArchitecture& read_architecture(const GgufFile& file) {
  const std::string_view name = file.text("general.architecture", std::nullopt);
  std::string known;
  for (const NamedArchitecture& entry : kArchitectures) {
    if (entry.name == name) return entry;
    known += concat(known.empty() ? "" : ", ", entry.name);
  }
  fail<IoError>(file.path().string(), ": metadata general.architecture: ", name, ": expected one of ", known);
}

// The wavelength rule of Llama 3 as llama.cpp's converter applies it: rope_freqs.weight holds divisors per
// frequency.
double llama3_divisor(const RopeOptions& rope, double frequency) {
  const double wavelength = 2 * M_PI / frequency;
  const auto original = static_cast<double>(rope.original_max_positions);
  if (wavelength < original / rope.high_freq_factor) return 1;
  if (wavelength > original / rope.low_freq_factor) return rope.factor;
  const double smooth =
      (original / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor);
  return 1 / ((1 - smooth) / rope.factor + smooth);
}

// The file keeps the divisors only. The published models use the same other three figures; check that they
// fit.
void read_rope_divisors(RopeOptions& rope, const GgufTensor& tensor, const GgufFile& file) {
  std::vector<float> divisors(tensor.data.size() / sizeof(float));
  if (tensor.type != TensorType::kF32 || divisors.empty())
    fail<IoError>(file.path().string(), ": tensor rope_freqs.weight: expected F32");
  dequantise(tensor.type, tensor.data.data(), divisors.size(), divisors.data());
  rope = {rope.theta, RopeScaling::kLlama3, *std::max_element(divisors.begin(), divisors.end()), 1, 4, 8192};
  for (std::size_t i = 0; i < divisors.size(); ++i) {
    const double frequency =
        std::pow(rope.theta, -static_cast<double>(i) / static_cast<double>(divisors.size()));
    if (std::abs(llama3_divisor(rope, frequency) - divisors[i]) > 1e-3 * divisors[i] || !(divisors[i] > 0)) {
      fail<IoError>(file.path().string(), ": tensor rope_freqs.weight: divisor ", i, " is ", divisors[i],
                    ": expected ", llama3_divisor(rope, frequency),
                    " (llama3 scaling with low_freq_factor 1, high_freq_factor 4, 8192 original positions)");
    }
  }
}

RopeOptions read_rope(const GgufFile& file, const Keys& keys, const ModelConfig& config) {
  RopeOptions rope;
  rope.theta = keys.number("rope.freq_base", 10000.0, 1, 1e15);
  if (keys.integer("rope.dimension_count", config.head_dim, kMaxWidth) != config.head_dim) {
    fail<IoError>(file.path().string(), ": metadata ", keys.key("rope.dimension_count"),
                  ": expected the head width ", config.head_dim);
  }
  const std::string_view scaling = file.text(keys.key("rope.scaling.type"), "none");
  if (scaling == "linear") {
    rope.scaling = RopeScaling::kLinear;
    rope.factor = keys.number("rope.scaling.factor", std::nullopt, 1e-3, 1e6);
  } else if (scaling != "none") {
    fail<IoError>(file.path().string(), ": metadata ", keys.key("rope.scaling.type"), ": ", scaling,
                  ": expected none or linear");
  } else if (keys.has("rope.scale_linear")) {
    rope.scaling = RopeScaling::kLinear;
    rope.factor = keys.number("rope.scale_linear", std::nullopt, 1e-3, 1e6);
  }
  if (const GgufTensor* divisors = file.find_tensor("rope_freqs.weight"))
    read_rope_divisors(rope, *divisors, file);
  return rope;
}

void read_sizes(ModelConfig& config, const GgufFile& file, const Keys& keys) {
  config.hidden_size = keys.integer("embedding_length", std::nullopt, kMaxWidth);
  config.intermediate_size = keys.integer("feed_forward_length", std::nullopt, 4 * kMaxWidth);
  config.num_layers = keys.integer("block_count", std::nullopt, kMaxLayers);
  config.num_heads = keys.integer("attention.head_count", std::nullopt, kMaxHeads);
  config.num_kv_heads = keys.integer("attention.head_count_kv", config.num_heads, kMaxHeads);
  config.head_dim = keys.integer("attention.key_length",
                                 std::max<std::int64_t>(1, config.hidden_size / config.num_heads), kMaxWidth);
  if (!keys.has("attention.key_length") && config.hidden_size % config.num_heads != 0) {
    fail<IoError>(file.path().string(), ": metadata ", keys.key("attention.head_count"), ": ",
                  config.num_heads, ": expected a divisor of the width ", config.hidden_size);
  }
  config.max_positions = keys.integer("context_length", std::nullopt, kMaxPositions);
  const GgufTensor* embedding = file.find_tensor("token_embd.weight");
  if (!embedding || embedding->shape.size() != 2 || embedding->shape[0] > kMaxVocabulary) {
    fail<IoError>(file.path().string(), ": tensor token_embd.weight: expected [vocabulary, width]");
  }
  config.vocab_size = embedding->shape[0];
}

void read_kind(ModelConfig& config, const GgufFile& file, const Keys& keys) {
  const auto layers = static_cast<std::size_t>(config.num_layers);
  config.learned_positions = config.architecture == Architecture::kGpt2;
  config.layer_uses_rope.assign(layers, config.learned_positions ? 0 : 1);
  config.layer_window.assign(layers, 0);
  config.attention_scale = 1.0 / std::sqrt(static_cast<double>(config.head_dim));
  config.tied_embeddings = file.find_tensor("output.weight") == nullptr;
  if (config.learned_positions) {
    config.norm = NormKind::kLayer;
    config.norm_eps = keys.number("attention.layer_norm_epsilon", 1e-5, 0, 1);
    config.activation = Activation::kGeluTanh;
    config.gated_mlp = false;
    config.attention_qkv_bias = config.attention_out_bias = config.mlp_bias = true;
    // The converter writes the tied head a second time.
    config.tied_embeddings = true;
    return;
  }
  config.norm_eps = keys.number("attention.layer_norm_rms_epsilon", std::nullopt, 0, 1);
  config.attention_qkv_bias = file.find_tensor("blk.0.attn_q.bias") != nullptr;
  config.attention_out_bias = file.find_tensor("blk.0.attn_output.bias") != nullptr;
  config.mlp_bias = file.find_tensor("blk.0.ffn_up.bias") != nullptr;
  config.qk_norm = config.architecture == Architecture::kQwen3;
  config.rope = read_rope(file, keys, config);
}

void read_gemma2(ModelConfig& config, const Keys& keys) {
  config.norm_plus_one = config.post_norms = true;
  config.activation = Activation::kGeluTanh;
  config.embedding_scale = std::sqrt(static_cast<double>(config.hidden_size));
  config.attention_softcap = keys.number("attn_logit_softcapping", 50.0, 0, 1e6);
  config.final_softcap = keys.number("final_logit_softcapping", 30.0, 0, 1e6);
  // The file does not keep query_pre_attn_scalar; only the 27B model's differs from its head width.
  if (config.num_layers == 46) {
    config.attention_scale =
        1.0 / std::sqrt(static_cast<double>(config.hidden_size) / static_cast<double>(config.num_heads));
  }
  const std::int64_t window = keys.integer("attention.sliding_window", 4096, kMaxPositions);
  for (std::size_t layer = 0; layer < config.layer_window.size(); layer += 2)
    config.layer_window[layer] = window;
}

std::optional<TokenId> read_token(const GgufFile& file, std::string_view key) {
  if (!file.has(key)) return std::nullopt;
  return static_cast<TokenId>(file.integer(key, std::nullopt, 0, kMaxVocabulary));
}

}  // namespace

ModelConfig gguf_model_config(const GgufFile& file) {
  const NamedArchitecture& entry = read_architecture(file);
  const Keys keys(file, entry.name);
  ModelConfig config;
  config.architecture = entry.architecture;
  read_sizes(config, file, keys);
  read_kind(config, file, keys);
  if (config.architecture == Architecture::kGemma2) read_gemma2(config, keys);
  if (config.architecture == Architecture::kSmolLm3) {
    for (std::size_t layer = 3; layer < config.layer_uses_rope.size(); layer += 4)
      config.layer_uses_rope[layer] = 0;
  }
  config.bos = read_token(file, "tokenizer.ggml.bos_token_id");
  config.pad = read_token(file, "tokenizer.ggml.padding_token_id");
  for (const char* key : {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"}) {
    const auto id = read_token(file, key);
    if (id && std::find(config.eos.begin(), config.eos.end(), *id) == config.eos.end())
      config.eos.push_back(*id);
  }
  validate_model_config(config, file.path().string());
  return config;
}

}  // namespace rlhf
