#include "rlhf/model/gguf_weights.h"

#include <array>
#include <charconv>
#include <utility>

#include "rlhf/core/error.h"
#include "rlhf/model/gguf.h"

namespace rlhf {
namespace {

using NamePair = std::pair<std::string_view, std::string_view>;  // GGUF, Hugging Face

constexpr std::array<NamePair, 3> kDecoderGlobals{
    {{"token_embd", "model.embed_tokens"}, {"output_norm", "model.norm"}, {"output", "lm_head"}}};
constexpr std::array<NamePair, 11> kDecoderLayer{{{"attn_norm", "input_layernorm"},
                                                  {"attn_q", "self_attn.q_proj"},
                                                  {"attn_k", "self_attn.k_proj"},
                                                  {"attn_v", "self_attn.v_proj"},
                                                  {"attn_output", "self_attn.o_proj"},
                                                  {"attn_q_norm", "self_attn.q_norm"},
                                                  {"attn_k_norm", "self_attn.k_norm"},
                                                  {"ffn_norm", "post_attention_layernorm"},
                                                  {"ffn_gate", "mlp.gate_proj"},
                                                  {"ffn_up", "mlp.up_proj"},
                                                  {"ffn_down", "mlp.down_proj"}}};
// Take precedence over kDecoderLayer: Gemma 2 has norms on both sides of attention and MLP.
constexpr std::array<NamePair, 3> kGemma2Layer{{{"ffn_norm", "pre_feedforward_layernorm"},
                                                {"post_attention_norm", "post_attention_layernorm"},
                                                {"post_ffw_norm", "post_feedforward_layernorm"}}};
constexpr std::array<NamePair, 4> kGpt2Globals{{{"token_embd", "transformer.wte"},
                                                {"position_embd", "transformer.wpe"},
                                                {"output_norm", "transformer.ln_f"},
                                                {"output", "lm_head"}}};
constexpr std::array<NamePair, 6> kGpt2Layer{{{"attn_norm", "ln_1"},
                                              {"attn_qkv", "attn.c_attn"},
                                              {"attn_output", "attn.c_proj"},
                                              {"ffn_norm", "ln_2"},
                                              {"ffn_up", "mlp.c_fc"},
                                              {"ffn_down", "mlp.c_proj"}}};

template <std::size_t N>
std::string_view lookup(const std::array<NamePair, N>& table, std::string_view name) {
  for (const auto& [gguf, hugging_face] : table) {
    if (gguf == name) return hugging_face;
  }
  return {};
}

std::string layer_name(Architecture architecture, std::string_view name) {
  const bool gpt2 = architecture == Architecture::kGpt2;
  std::string_view found;
  if (architecture == Architecture::kGemma2) found = lookup(kGemma2Layer, name);
  if (found.empty()) found = gpt2 ? lookup(kGpt2Layer, name) : lookup(kDecoderLayer, name);
  return std::string(found);
}

// blk.<layer>.<part>.<weight|bias> or <part>.<weight|bias>; anything else keeps its name.
std::string hugging_face_name(Architecture architecture, const std::string& name) {
  const bool gpt2 = architecture == Architecture::kGpt2;
  const std::size_t dot = name.rfind('.');
  if (dot == std::string::npos) return name;
  std::string_view stem = std::string_view(name).substr(0, dot);
  const std::string_view suffix = std::string_view(name).substr(dot);
  if (!stem.starts_with("blk.")) {
    const std::string_view found = gpt2 ? lookup(kGpt2Globals, stem) : lookup(kDecoderGlobals, stem);
    return found.empty() ? name : concat(found, suffix);
  }
  stem.remove_prefix(4);
  int layer = -1;
  const auto [rest, error] = std::from_chars(stem.data(), stem.data() + stem.size(), layer);
  if (error != std::errc() || rest == stem.data() + stem.size() || *rest != '.') return name;
  stem.remove_prefix(static_cast<std::size_t>(rest - stem.data()) + 1);
  const std::string found = layer_name(architecture, stem);
  return found.empty() ? name : concat(gpt2 ? "transformer.h." : "model.layers.", layer, ".", found, suffix);
}

class GgufWeights final : public WeightFile {
 public:
  explicit GgufWeights(const std::filesystem::path& path)
      : WeightFile(path), file_(GgufFile::open(path)), config_(gguf_model_config(*file_)) {
    for (const GgufTensor& tensor : file_->tensors()) {
      TensorInfo info{hugging_face_name(config_.architecture, tensor.name), tensor.type, tensor.shape,
                      tensor.data.size()};
      orders_.push_back(order_of(info));
      if (orders_.back() == Order::kTransposed) std::swap(info.shape[0], info.shape[1]);
      add_tensor(std::move(info));
    }
  }

 private:
  enum class Order { kAsStored, kTransposed, kRotaryQueries, kRotaryKeys, kNormPlusOne };

  Order order_of(const TensorInfo& info) const {
    const std::string_view name = info.name;
    const bool rotated = config_.architecture == Architecture::kLlama ||
                         config_.architecture == Architecture::kMistral ||
                         config_.architecture == Architecture::kSmolLm3;
    if (rotated && name.find(".self_attn.q_proj.") != name.npos)
      return check_heads(info, Order::kRotaryQueries);
    if (rotated && name.find(".self_attn.k_proj.") != name.npos) return check_heads(info, Order::kRotaryKeys);
    if (config_.norm_plus_one && name.ends_with("norm.weight")) return Order::kNormPlusOne;
    const bool conv =
        name.ends_with("c_attn.weight") || name.ends_with("c_proj.weight") || name.ends_with("c_fc.weight");
    if (config_.architecture == Architecture::kGpt2 && conv && info.shape.size() == 2)
      return Order::kTransposed;
    return Order::kAsStored;
  }

  Order check_heads(const TensorInfo& info, Order order) const {
    const std::int64_t rows = order == Order::kRotaryQueries ? config_.query_width() : config_.kv_width();
    if (info.shape[0] != rows) {
      fail<IoError>(path().string(), ": tensor ", info.name, ": ", info.shape[0], " rows: expected ", rows,
                    " (heads times head width)");
    }
    return order;
  }

  void decode(std::size_t index, float* out) const override { decode_into(index, out); }
  void decode(std::size_t index, double* out) const override { decode_into(index, out); }

  template <typename T>
  void decode_into(std::size_t index, T* out) const {
    const GgufTensor& tensor = file_->tensors()[index];
    switch (orders_[index]) {
      case Order::kRotaryQueries:
        return decode_rotary(tensor, config_.num_heads, out);
      case Order::kRotaryKeys:
        return decode_rotary(tensor, config_.num_kv_heads, out);
      case Order::kTransposed:
        return decode_transposed(tensor, out);
      default:
        break;
    }
    const auto count = static_cast<std::size_t>(tensors()[index].num_elements());
    dequantise(tensor.type, tensor.data.data(), count, out);
    if (orders_[index] == Order::kNormPlusOne) {
      for (std::size_t i = 0; i < count; ++i) out[i] -= 1;
    }
  }

  // Row 2j + i of a head in the file is row i * (head width / 2) + j of the checkpoint.
  template <typename T>
  void decode_rotary(const GgufTensor& tensor, std::int64_t heads, T* out) const {
    const auto rows = static_cast<std::size_t>(tensor.shape[0]);
    const std::size_t width = rows / static_cast<std::size_t>(heads), half = width / 2;
    // A bias is a column: its rows have one element, and it is never quantised.
    const std::size_t columns = tensor.shape.size() > 1 ? static_cast<std::size_t>(tensor.shape[1]) : 1;
    const std::size_t row_bytes = tensor.data.size() / rows;
    for (std::size_t row = 0; row < rows; ++row) {
      const std::size_t within = row % width;
      const std::size_t target = row - within + (within % 2) * half + within / 2;
      dequantise(tensor.type, tensor.data.data() + row * row_bytes, columns, out + target * columns);
    }
  }

  template <typename T>
  void decode_transposed(const GgufTensor& tensor, T* out) const {
    const auto rows = static_cast<std::size_t>(tensor.shape[0]),
               columns = static_cast<std::size_t>(tensor.shape[1]);
    const std::size_t row_bytes = tensor.data.size() / rows;
    std::vector<T> line(columns);
    for (std::size_t row = 0; row < rows; ++row) {
      dequantise(tensor.type, tensor.data.data() + row * row_bytes, columns, line.data());
      for (std::size_t column = 0; column < columns; ++column) out[column * rows + row] = line[column];
    }
  }

  std::shared_ptr<const GgufFile> file_;
  ModelConfig config_;
  std::vector<Order> orders_;
};

}  // namespace

std::unique_ptr<WeightFile> open_gguf_weights(const std::filesystem::path& path) {
  return std::make_unique<GgufWeights>(path);
}

}  // namespace rlhf
