#include "rlhf/model/model_config.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "rlhf/core/error.h"
#include "rlhf/model/config_limits.h"
#include "rlhf/model/gguf.h"
#include "rlhf/model/json_file.h"

namespace rlhf {
namespace {

constexpr std::int64_t kMaxLabels = 1 << 16;

/// Defaults of the transformers configuration class: a key that its own writer leaves out has this value.
struct ModelType {
  std::string_view name;
  std::string_view class_prefix;
  Architecture architecture;
  bool tied;
  double rope_theta;
  std::int64_t max_positions;
  std::int64_t kv_heads;  // 0: as many as heads
  std::int64_t head_dim;  // 0: hidden_size / heads
};
constexpr std::array<ModelType, 7> kModelTypes{{
    {"llama", "Llama", Architecture::kLlama, false, 1e4, 2048, 0, 0},
    {"mistral", "Mistral", Architecture::kMistral, false, 1e4, 4096 * 32, 8, 0},
    {"qwen2", "Qwen2", Architecture::kQwen2, false, 1e4, 32768, 32, 0},
    {"qwen3", "Qwen3", Architecture::kQwen3, false, 1e4, 32768, 32, 128},
    {"gpt2", "GPT2", Architecture::kGpt2, true, 0, 1024, 0, 0},
    {"gemma2", "Gemma2", Architecture::kGemma2, true, 1e4, 8192, 4, 256},
    {"smollm3", "SmolLM3", Architecture::kSmolLm3, true, 2e6, 32768, 4, 0},
}};

const ModelType& type_of(Architecture architecture) {
  return *std::find_if(kModelTypes.begin(), kModelTypes.end(),
                       [&](const ModelType& type) { return type.architecture == architecture; });
}

const ModelType& read_model_type(const JsonFields& fields) {
  const std::string name = fields.text("model_type", std::nullopt);
  std::string known;
  for (const ModelType& type : kModelTypes) {
    if (type.name == name) return type;
    known += concat(known.empty() ? "" : ", ", type.name);
  }
  fields.reject("model_type", concat("one of ", known));
}

TokenId read_token_id(const nlohmann::json& value, const JsonFields& fields, std::string_view key) {
  if (!value.is_number_integer() || value < 0 || value >= kMaxVocabulary) fields.reject(key, "a token id");
  return value.get<TokenId>();
}

// Some published files mark "no such token" with -1.
std::optional<TokenId> read_optional_id(const JsonFields& fields, std::string_view key) {
  const auto* value = fields.find(key);
  if (!value || *value == -1) return std::nullopt;
  return read_token_id(*value, fields, key);
}

std::vector<TokenId> read_eos(const JsonFields& fields) {
  std::vector<TokenId> ids;
  const auto* value = fields.find("eos_token_id");
  if (value && value->is_array()) {
    for (const auto& id : *value) ids.push_back(read_token_id(id, fields, "eos_token_id"));
  } else if (value && *value != -1) {
    ids.push_back(read_token_id(*value, fields, "eos_token_id"));
  }
  return ids;
}

void read_special_ids(ModelConfig& config, const JsonFields& fields) {
  config.bos = read_optional_id(fields, "bos_token_id");
  config.eos = read_eos(fields);
  config.pad = read_optional_id(fields, "pad_token_id");
}

void read_head_kind(ModelConfig& config, const JsonFields& fields, const ModelType& type) {
  const auto* names = fields.find("architectures");
  if (!names) return;
  if (!names->is_array() || names->empty() || !names->front().is_string()) {
    fields.reject("architectures", "a list with one class name");
  }
  const auto name = names->front().get<std::string>();
  const bool language =
      name == concat(type.class_prefix, "ForCausalLM") || name == concat(type.class_prefix, "LMHeadModel");
  config.scalar_head = name == concat(type.class_prefix, "ForSequenceClassification");
  if (!language && !config.scalar_head) {
    fields.reject(
        "architectures",
        concat(type.class_prefix, type.architecture == Architecture::kGpt2 ? "LMHeadModel" : "ForCausalLM",
               " or ", type.class_prefix, "ForSequenceClassification"));
  }
  if (!config.scalar_head) return;
  const auto* labels = fields.find("id2label");
  if (labels && (!labels->is_object() || labels->empty() || labels->size() > kMaxLabels)) {
    fields.reject("id2label", "a non-empty object");
  }
  const std::int64_t default_labels = labels ? static_cast<std::int64_t>(labels->size()) : 2;
  config.num_labels = fields.integer("num_labels", default_labels, 1, kMaxLabels);
}

RopeOptions read_rope(const JsonFields& fields, const ModelType& type) {
  const auto* parameters = fields.find_any({"rope_parameters", "rope_scaling"});
  const nlohmann::json empty = nlohmann::json::object();
  const std::string key = fields.find("rope_parameters") ? "rope_parameters" : "rope_scaling";
  const JsonFields rope(parameters ? *parameters : empty, fields.source(), key + ".");
  RopeOptions options;
  options.theta = fields.number("rope_theta", type.rope_theta, 1, 1e15);
  options.theta = rope.number("rope_theta", options.theta, 1, 1e15);
  for (const JsonFields* where : {&fields, &rope}) {
    if (where->number("partial_rotary_factor", 1.0, 0, 1) != 1.0)
      where->reject("partial_rotary_factor", "1 (rotation of whole heads)");
  }
  const std::string kind = rope.text("rope_type", rope.text("type", "default"));
  if (kind == "default") return options;
  options.factor = rope.number("factor", std::nullopt, 1e-3, 1e6);
  if (kind == "linear") {
    options.scaling = RopeScaling::kLinear;
  } else if (kind == "llama3") {
    options.scaling = RopeScaling::kLlama3;
    options.low_freq_factor = rope.number("low_freq_factor", std::nullopt, 1e-6, 1e6);
    options.high_freq_factor = rope.number("high_freq_factor", std::nullopt, 1e-6, 1e6);
    options.original_max_positions =
        rope.integer("original_max_position_embeddings", std::nullopt, 1, kMaxPositions);
    if (options.high_freq_factor <= options.low_freq_factor)
      rope.reject("high_freq_factor", "more than low_freq_factor");
  } else {
    rope.reject(rope.find("rope_type") ? "rope_type" : "type", "default, linear or llama3");
  }
  return options;
}

Activation read_activation(const JsonFields& fields, std::string_view key, Activation fallback) {
  if (!fields.find(key)) return fallback;
  const std::string name = fields.text(key, std::nullopt);
  if (name == "silu" || name == "swish") return Activation::kSilu;
  if (name == "gelu_new" || name == "gelu_pytorch_tanh") return Activation::kGeluTanh;
  fields.reject(key, "silu, gelu_new or gelu_pytorch_tanh");
}

// The rules by which the configuration classes fill in layer_types when it is absent.
bool slides_by_default(const ModelConfig& config, const JsonFields& fields, std::int64_t layer) {
  switch (config.architecture) {
    case Architecture::kMistral:
      return true;
    case Architecture::kGemma2:
      return layer % 2 == 0;
    case Architecture::kQwen2:
    case Architecture::kQwen3:
      return layer >= fields.integer("max_window_layers", 28, 0, kMaxPositions);
    case Architecture::kSmolLm3:
      return config.layer_uses_rope[static_cast<std::size_t>(layer)] == 0;
    default:
      return false;
  }
}

void read_windows(ModelConfig& config, const JsonFields& fields) {
  const bool switched = config.architecture == Architecture::kQwen2 ||
                        config.architecture == Architecture::kQwen3 ||
                        config.architecture == Architecture::kSmolLm3;
  const bool enabled = !switched || fields.flag("use_sliding_window", false);
  const std::int64_t fallback = config.architecture == Architecture::kGemma2 ? 4096 : 0;
  const bool no_window = config.architecture == Architecture::kLlama || !enabled;
  const std::int64_t window = no_window ? 0 : fields.integer("sliding_window", fallback, 1, kMaxPositions);
  config.layer_window.assign(static_cast<std::size_t>(config.num_layers), 0);
  const auto* types = fields.find("layer_types");
  if (types && (!types->is_array() || types->size() != config.layer_window.size())) {
    fields.reject("layer_types", concat("a list of ", config.num_layers, " names"));
  }
  for (std::int64_t layer = 0; layer < config.num_layers; ++layer) {
    const auto index = static_cast<std::size_t>(layer);
    bool slides = slides_by_default(config, fields, layer);
    // Mistral has one window for all layers and no layer_types.
    if (types && config.architecture != Architecture::kMistral) {
      const auto& type = (*types)[index];
      if (type != "full_attention" && type != "sliding_attention") {
        fields.reject("layer_types", "full_attention or sliding_attention for each layer");
      }
      slides = type == "sliding_attention";
      if (slides && window == 0)
        fields.reject("sliding_window", "a window, because layer_types has sliding_attention");
    }
    if (slides) config.layer_window[index] = window;
  }
}

void read_rope_layers(ModelConfig& config, const JsonFields& fields) {
  config.layer_uses_rope.assign(static_cast<std::size_t>(config.num_layers),
                                config.learned_positions ? 0 : 1);
  if (config.architecture != Architecture::kSmolLm3) return;
  if (const auto* list = fields.find("no_rope_layers")) {
    if (!list->is_array() || list->size() != config.layer_uses_rope.size()) {
      fields.reject("no_rope_layers",
                    concat("a list of ", config.num_layers, " flags (1 = the layer rotates)"));
    }
    for (std::size_t layer = 0; layer < list->size(); ++layer) {
      const auto& flag = (*list)[layer];
      if (flag != 0 && flag != 1) fields.reject("no_rope_layers", "0 or 1 for each layer");
      config.layer_uses_rope[layer] = flag == 1;
    }
    return;
  }
  const std::int64_t interval = fields.integer("no_rope_layer_interval", 4, 1, kMaxLayers);
  for (std::int64_t layer = 0; layer < config.num_layers; ++layer) {
    config.layer_uses_rope[static_cast<std::size_t>(layer)] = (layer + 1) % interval != 0;
  }
}

void read_gpt2(ModelConfig& config, const JsonFields& fields) {
  config.hidden_size = fields.integer("n_embd", 768, 1, kMaxWidth);
  config.num_layers = fields.integer("n_layer", 12, 1, kMaxLayers);
  config.num_heads = config.num_kv_heads = fields.integer("n_head", 12, 1, kMaxHeads);
  if (config.hidden_size % config.num_heads != 0) fields.reject("n_head", "a divisor of n_embd");
  config.head_dim = config.hidden_size / config.num_heads;
  config.intermediate_size = fields.integer("n_inner", 4 * config.hidden_size, 1, 4 * kMaxWidth);
  config.max_positions = fields.integer("n_positions", 1024, 1, kMaxPositions);
  config.norm = NormKind::kLayer;
  config.norm_eps = fields.number("layer_norm_epsilon", 1e-5, 0, 1);
  config.activation = read_activation(fields, "activation_function", Activation::kGeluTanh);
  config.gated_mlp = false;
  config.attention_qkv_bias = config.attention_out_bias = config.mlp_bias = true;
  config.learned_positions = true;
  config.attention_scale = 1.0 / std::sqrt(static_cast<double>(config.head_dim));
  if (!fields.flag("scale_attn_weights", true)) fields.reject("scale_attn_weights", "true");
  if (fields.flag("scale_attn_by_inverse_layer_idx", false))
    fields.reject("scale_attn_by_inverse_layer_idx", "false");
  if (fields.flag("add_cross_attention", false)) fields.reject("add_cross_attention", "false");
  read_rope_layers(config, fields);
  config.layer_window.assign(static_cast<std::size_t>(config.num_layers), 0);
}

void read_sizes(ModelConfig& config, const JsonFields& fields, const ModelType& type) {
  config.hidden_size = fields.integer("hidden_size", std::nullopt, 1, kMaxWidth);
  config.intermediate_size = fields.integer("intermediate_size", std::nullopt, 1, kMaxWidth);
  config.num_layers = fields.integer("num_hidden_layers", std::nullopt, 1, kMaxLayers);
  config.num_heads = fields.integer("num_attention_heads", std::nullopt, 1, kMaxHeads);
  config.num_kv_heads =
      fields.integer("num_key_value_heads", type.kv_heads ? type.kv_heads : config.num_heads, 1, kMaxHeads);
  if (!fields.find("head_dim") && type.head_dim == 0 && config.hidden_size % config.num_heads != 0) {
    fields.reject("num_attention_heads", "a divisor of hidden_size, as head_dim is absent");
  }
  config.head_dim = fields.integer(
      "head_dim", type.head_dim ? type.head_dim : config.hidden_size / config.num_heads, 1, kMaxWidth);
  config.max_positions = fields.integer("max_position_embeddings", type.max_positions, 1, kMaxPositions);
}

void read_gemma2(ModelConfig& config, const JsonFields& fields) {
  config.norm_plus_one = config.post_norms = true;
  config.activation = read_activation(
      fields, fields.find("hidden_activation") ? "hidden_activation" : "hidden_act", Activation::kGeluTanh);
  config.attention_scale = 1.0 / std::sqrt(fields.number("query_pre_attn_scalar", 256.0, 1e-6, 1e6));
  // null switches a cap off; an absent key means the class default.
  config.attention_softcap =
      fields.is_null("attn_logit_softcapping") ? 0 : fields.number("attn_logit_softcapping", 50, 1e-6, 1e6);
  config.final_softcap =
      fields.is_null("final_logit_softcapping") ? 0 : fields.number("final_logit_softcapping", 30, 1e-6, 1e6);
  config.embedding_scale = std::sqrt(static_cast<double>(config.hidden_size));
  if (fields.flag("use_bidirectional_attention", false))
    fields.reject("use_bidirectional_attention", "false");
}

void read_decoder(ModelConfig& config, const JsonFields& fields, const ModelType& type) {
  read_sizes(config, fields, type);
  config.norm_eps = fields.number("rms_norm_eps", 1e-6, 0, 1);
  config.activation = read_activation(fields, "hidden_act", Activation::kSilu);
  config.attention_scale = 1.0 / std::sqrt(static_cast<double>(config.head_dim));
  const bool configurable =
      config.architecture != Architecture::kQwen2 && config.architecture != Architecture::kMistral;
  const bool bias = configurable && fields.flag("attention_bias", false);
  config.attention_qkv_bias = bias || config.architecture == Architecture::kQwen2;
  config.attention_out_bias = bias;
  const bool mlp_bias_key =
      config.architecture == Architecture::kLlama || config.architecture == Architecture::kSmolLm3;
  config.mlp_bias = mlp_bias_key && fields.flag("mlp_bias", false);
  config.qk_norm = config.architecture == Architecture::kQwen3;
  if (config.architecture == Architecture::kGemma2) read_gemma2(config, fields);
  config.rope = read_rope(fields, type);
  read_rope_layers(config, fields);
  read_windows(config, fields);
}

struct SpecBuilder {
  std::vector<TensorSpec> specs;
  std::int64_t layer = -1;
  std::string prefix;

  void add(TensorRole role, std::string_view name, std::vector<std::int64_t> shape) {
    specs.push_back({prefix + std::string(name), std::move(shape), role, layer, false});
  }
  void add_transposed(TensorRole role, std::string_view name, std::vector<std::int64_t> shape) {
    add(role, name, std::move(shape));
    specs.back().transposed = true;
  }
};

void add_gpt2_layer(SpecBuilder& build, const ModelConfig& config) {
  const std::int64_t width = config.hidden_size, inner = config.intermediate_size;
  build.add(TensorRole::kInputNorm, "ln_1.weight", {width});
  build.add(TensorRole::kInputNormBias, "ln_1.bias", {width});
  build.add_transposed(TensorRole::kFusedQkv, "attn.c_attn.weight", {width, 3 * width});
  build.add(TensorRole::kFusedQkvBias, "attn.c_attn.bias", {3 * width});
  build.add_transposed(TensorRole::kAttentionOut, "attn.c_proj.weight", {width, width});
  build.add(TensorRole::kAttentionOutBias, "attn.c_proj.bias", {width});
  build.add(TensorRole::kMlpNorm, "ln_2.weight", {width});
  build.add(TensorRole::kMlpNormBias, "ln_2.bias", {width});
  build.add_transposed(TensorRole::kUp, "mlp.c_fc.weight", {width, inner});
  build.add(TensorRole::kUpBias, "mlp.c_fc.bias", {inner});
  build.add_transposed(TensorRole::kDown, "mlp.c_proj.weight", {inner, width});
  build.add(TensorRole::kDownBias, "mlp.c_proj.bias", {width});
}

void add_attention(SpecBuilder& build, const ModelConfig& config) {
  const std::int64_t width = config.hidden_size, queries = config.query_width(), keys = config.kv_width();
  build.add(TensorRole::kQuery, "self_attn.q_proj.weight", {queries, width});
  build.add(TensorRole::kKey, "self_attn.k_proj.weight", {keys, width});
  build.add(TensorRole::kValue, "self_attn.v_proj.weight", {keys, width});
  if (config.attention_qkv_bias) {
    build.add(TensorRole::kQueryBias, "self_attn.q_proj.bias", {queries});
    build.add(TensorRole::kKeyBias, "self_attn.k_proj.bias", {keys});
    build.add(TensorRole::kValueBias, "self_attn.v_proj.bias", {keys});
  }
  if (config.qk_norm) {
    build.add(TensorRole::kQueryNorm, "self_attn.q_norm.weight", {config.head_dim});
    build.add(TensorRole::kKeyNorm, "self_attn.k_norm.weight", {config.head_dim});
  }
  build.add(TensorRole::kAttentionOut, "self_attn.o_proj.weight", {width, queries});
  if (config.attention_out_bias) build.add(TensorRole::kAttentionOutBias, "self_attn.o_proj.bias", {width});
}

void add_decoder_layer(SpecBuilder& build, const ModelConfig& config) {
  const std::int64_t width = config.hidden_size, inner = config.intermediate_size;
  build.add(TensorRole::kInputNorm, "input_layernorm.weight", {width});
  add_attention(build, config);
  if (config.post_norms) {
    build.add(TensorRole::kPostAttentionNorm, "post_attention_layernorm.weight", {width});
    build.add(TensorRole::kMlpNorm, "pre_feedforward_layernorm.weight", {width});
  } else {
    build.add(TensorRole::kMlpNorm, "post_attention_layernorm.weight", {width});
  }
  build.add(TensorRole::kGate, "mlp.gate_proj.weight", {inner, width});
  if (config.mlp_bias) build.add(TensorRole::kGateBias, "mlp.gate_proj.bias", {inner});
  build.add(TensorRole::kUp, "mlp.up_proj.weight", {inner, width});
  if (config.mlp_bias) build.add(TensorRole::kUpBias, "mlp.up_proj.bias", {inner});
  build.add(TensorRole::kDown, "mlp.down_proj.weight", {width, inner});
  if (config.mlp_bias) build.add(TensorRole::kDownBias, "mlp.down_proj.bias", {width});
  if (config.post_norms) build.add(TensorRole::kPostMlpNorm, "post_feedforward_layernorm.weight", {width});
}

nlohmann::ordered_json eos_json(const ModelConfig& config) {
  if (config.eos.empty()) return nullptr;
  if (config.eos.size() == 1) return config.eos.front();
  return config.eos;
}

template <typename T>
nlohmann::ordered_json optional_json(const std::optional<T>& value) {
  return value ? nlohmann::ordered_json(*value) : nlohmann::ordered_json(nullptr);
}

nlohmann::ordered_json rope_json(const RopeOptions& rope) {
  nlohmann::ordered_json out;
  const bool scaled = rope.scaling != RopeScaling::kNone;
  out["rope_type"] = !scaled ? "default" : rope.scaling == RopeScaling::kLinear ? "linear" : "llama3";
  if (scaled) out["factor"] = rope.factor;
  if (rope.scaling == RopeScaling::kLlama3) {
    out["low_freq_factor"] = rope.low_freq_factor;
    out["high_freq_factor"] = rope.high_freq_factor;
    out["original_max_position_embeddings"] = rope.original_max_positions;
  }
  return out;
}

void write_gpt2(nlohmann::ordered_json& out, const ModelConfig& config) {
  out["n_embd"] = config.hidden_size;
  out["n_layer"] = config.num_layers;
  out["n_head"] = config.num_heads;
  out["n_inner"] = config.intermediate_size;
  out["n_positions"] = config.max_positions;
  out["n_ctx"] = config.max_positions;
  out["layer_norm_epsilon"] = config.norm_eps;
  out["activation_function"] = config.activation == Activation::kSilu ? "silu" : "gelu_new";
}

// The largest window and its layers, in the words of each architecture's configuration class.
void write_windows(nlohmann::ordered_json& out, const ModelConfig& config) {
  const std::int64_t window = *std::max_element(config.layer_window.begin(), config.layer_window.end());
  out["sliding_window"] = window > 0 ? nlohmann::ordered_json(window) : nlohmann::ordered_json(nullptr);
  if (config.architecture == Architecture::kMistral) return;
  if (config.architecture != Architecture::kGemma2) out["use_sliding_window"] = window > 0;
  nlohmann::ordered_json types = nlohmann::ordered_json::array();
  for (const std::int64_t own : config.layer_window)
    types.push_back(own > 0 ? "sliding_attention" : "full_attention");
  out["layer_types"] = std::move(types);
  if (config.architecture == Architecture::kQwen2 || config.architecture == Architecture::kQwen3) {
    const auto first =
        std::find_if(config.layer_window.begin(), config.layer_window.end(), [](auto w) { return w > 0; });
    out["max_window_layers"] = first - config.layer_window.begin();
  }
}

void write_decoder(nlohmann::ordered_json& out, const ModelConfig& config) {
  out["hidden_size"] = config.hidden_size;
  out["intermediate_size"] = config.intermediate_size;
  out["num_hidden_layers"] = config.num_layers;
  out["num_attention_heads"] = config.num_heads;
  out["num_key_value_heads"] = config.num_kv_heads;
  out["head_dim"] = config.head_dim;
  out["max_position_embeddings"] = config.max_positions;
  out["rms_norm_eps"] = config.norm_eps;
  const char* activation = config.activation == Activation::kSilu ? "silu" : "gelu_pytorch_tanh";
  out["hidden_act"] = activation;
  nlohmann::ordered_json rope = rope_json(config.rope);
  // Both spellings: transformers 4 reads rope_theta and rope_scaling, transformers 5 prefers rope_parameters.
  out["rope_theta"] = config.rope.theta;
  out["rope_scaling"] = config.rope.scaling == RopeScaling::kNone ? nlohmann::ordered_json(nullptr) : rope;
  rope["rope_theta"] = config.rope.theta;
  out["rope_parameters"] = rope;
  if (config.architecture != Architecture::kQwen2 && config.architecture != Architecture::kMistral) {
    out["attention_bias"] = config.attention_qkv_bias;
  }
  if (config.architecture == Architecture::kLlama || config.architecture == Architecture::kSmolLm3) {
    out["mlp_bias"] = config.mlp_bias;
  }
  if (config.architecture != Architecture::kLlama) write_windows(out, config);
  if (config.architecture == Architecture::kSmolLm3) out["no_rope_layers"] = config.layer_uses_rope;
  if (config.architecture == Architecture::kGemma2) {
    out["hidden_activation"] = activation;
    out["query_pre_attn_scalar"] = 1.0 / (config.attention_scale * config.attention_scale);
    const auto cap = [](double value) {
      return value > 0 ? nlohmann::ordered_json(value) : nlohmann::ordered_json(nullptr);
    };
    out["attn_logit_softcapping"] = cap(config.attention_softcap);
    out["final_logit_softcapping"] = cap(config.final_softcap);
  }
}

std::filesystem::path only_gguf_in(const std::filesystem::path& directory) {
  std::filesystem::path found;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    if (entry.path().extension() != ".gguf") continue;
    if (!found.empty()) {
      fail<IoError>(directory.string(), ": holds several GGUF files (", found.filename().string(), ", ",
                    entry.path().filename().string(), "): name one of them");
    }
    found = entry.path();
  }
  return found;
}

}  // namespace

std::int64_t TensorSpec::num_elements() const {
  std::int64_t count = 1;
  for (const std::int64_t size : shape) count *= size;
  return count;
}

std::string_view model_type_name(Architecture architecture) {
  return type_of(architecture).name;
}

std::vector<TensorSpec> expected_tensors(const ModelConfig& config) {
  const bool gpt2 = config.architecture == Architecture::kGpt2;
  const std::string base = gpt2 ? "transformer." : "model.";
  SpecBuilder build;
  build.prefix = base;
  build.add(TensorRole::kTokenEmbedding, gpt2 ? "wte.weight" : "embed_tokens.weight",
            {config.vocab_size, config.hidden_size});
  if (config.learned_positions) {
    build.add(TensorRole::kPositionEmbedding, "wpe.weight", {config.max_positions, config.hidden_size});
  }
  for (std::int64_t layer = 0; layer < config.num_layers; ++layer) {
    build.layer = layer;
    build.prefix = concat(base, gpt2 ? "h." : "layers.", layer, ".");
    gpt2 ? add_gpt2_layer(build, config) : add_decoder_layer(build, config);
  }
  build.layer = -1;
  build.prefix = base;
  build.add(TensorRole::kFinalNorm, gpt2 ? "ln_f.weight" : "norm.weight", {config.hidden_size});
  if (config.norm == NormKind::kLayer)
    build.add(TensorRole::kFinalNormBias, "ln_f.bias", {config.hidden_size});
  build.prefix.clear();
  if (config.scalar_head) {
    build.add(TensorRole::kScoreHead, "score.weight", {config.num_labels, config.hidden_size});
  } else if (!config.tied_embeddings) {
    build.add(TensorRole::kLmHead, "lm_head.weight", {config.vocab_size, config.hidden_size});
  }
  return std::move(build.specs);
}

std::int64_t count_parameters(const ModelConfig& config) {
  std::int64_t total = 0;
  for (const TensorSpec& spec : expected_tensors(config)) total += spec.num_elements();
  return total;
}

void validate_model_config(const ModelConfig& config, const std::string& source) {
  if (config.num_heads % config.num_kv_heads != 0) {
    fail<IoError>(source, ": num_key_value_heads: ", config.num_kv_heads, ": expected a divisor of the ",
                  config.num_heads, " attention heads");
  }
  if (config.query_width() > kMaxWidth) {
    fail<IoError>(source, ": head_dim: ", config.head_dim, ": ", config.num_heads,
                  " heads of it are wider than ", kMaxWidth);
  }
  if (!config.learned_positions && config.head_dim % 2 != 0) {
    fail<IoError>(source, ": head_dim: ", config.head_dim, ": expected an even number (rotary positions)");
  }
  if (config.norm_eps <= 0)
    fail<IoError>(source, ": norm epsilon: ", config.norm_eps, ": expected a positive number");
  std::vector<TokenId> ids = config.eos;
  if (config.bos) ids.push_back(*config.bos);
  for (const TokenId id : ids) {
    if (id >= config.vocab_size) {
      fail<IoError>(source, ": bos_token_id or eos_token_id: ", id, ": expected an id below vocab_size ",
                    config.vocab_size);
    }
  }
}

ModelConfig parse_hf_config(const nlohmann::json& json, const std::string& source) {
  const JsonFields fields(json, source);
  const ModelType& type = read_model_type(fields);
  if (fields.find("quantization_config")) fields.reject("quantization_config", "plain float weights");
  ModelConfig config;
  config.architecture = type.architecture;
  config.vocab_size = fields.integer("vocab_size", std::nullopt, 1, kMaxVocabulary);
  config.tied_embeddings = fields.flag("tie_word_embeddings", type.tied);
  type.architecture == Architecture::kGpt2 ? read_gpt2(config, fields) : read_decoder(config, fields, type);
  read_head_kind(config, fields, type);
  read_special_ids(config, fields);
  if (type.architecture != Architecture::kGpt2) config.fixed_embedding = config.pad;
  validate_model_config(config, source);
  return config;
}

ModelConfig load_model_config(const std::filesystem::path& path) {
  if (!std::filesystem::exists(path)) fail<IoError>(path.string(), ": no such file or directory");
  if (!std::filesystem::is_directory(path)) return gguf_model_config(*GgufFile::open(path));
  if (!std::filesystem::exists(path / "config.json")) {
    const auto gguf = only_gguf_in(path);
    if (gguf.empty()) fail<IoError>(path.string(), ": expected config.json or a GGUF file in this directory");
    return gguf_model_config(*GgufFile::open(gguf));
  }
  ModelConfig config = parse_hf_config(read_json_file(path / "config.json"), (path / "config.json").string());
  const auto generation_path = path / "generation_config.json";
  if (std::filesystem::exists(generation_path)) {
    const nlohmann::json generation = read_json_file(generation_path);
    const JsonFields fields(generation, generation_path.string());
    if (auto eos = read_eos(fields); !eos.empty()) config.eos = std::move(eos);
    if (!config.pad) config.pad = read_optional_id(fields, "pad_token_id");
    validate_model_config(config, generation_path.string());
  }
  return config;
}

std::string to_hf_json(const ModelConfig& config, std::string_view dtype) {
  const ModelType& type = type_of(config.architecture);
  const bool gpt2 = config.architecture == Architecture::kGpt2;
  nlohmann::ordered_json out;
  const char* head = config.scalar_head ? "ForSequenceClassification" : gpt2 ? "LMHeadModel" : "ForCausalLM";
  out["architectures"] = {concat(type.class_prefix, head)};
  out["model_type"] = type.name;
  out["vocab_size"] = config.vocab_size;
  gpt2 ? write_gpt2(out, config) : write_decoder(out, config);
  out["tie_word_embeddings"] = config.tied_embeddings;
  out["bos_token_id"] = optional_json(config.bos);
  out["eos_token_id"] = eos_json(config);
  out["pad_token_id"] = optional_json(config.pad);
  if (config.scalar_head) {
    nlohmann::ordered_json names = nlohmann::ordered_json::object(), ids = names;
    for (std::int64_t label = 0; label < config.num_labels; ++label) {
      names[std::to_string(label)] = concat("LABEL_", label);
      ids[concat("LABEL_", label)] = label;
    }
    out["id2label"] = names;
    out["label2id"] = ids;
  }
  out["dtype"] = dtype;
  out["torch_dtype"] = dtype;
  out["use_cache"] = true;
  return out.dump(2) + "\n";
}

std::string to_generation_json(const ModelConfig& config) {
  nlohmann::ordered_json out;
  out["_from_model_config"] = true;
  out["bos_token_id"] = optional_json(config.bos);
  out["eos_token_id"] = eos_json(config);
  out["pad_token_id"] = optional_json(config.pad);
  return out.dump(2) + "\n";
}

}  // namespace rlhf
