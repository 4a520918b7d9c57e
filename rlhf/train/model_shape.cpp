#include "rlhf/train/model_shape.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <numeric>
#include <sstream>

#include "rlhf/core/error.h"

namespace rlhf {
namespace {

// Of Llama 3 and of Qwen 2.5, rounded.
constexpr std::int64_t kVocabulary = 128'000;
constexpr std::int64_t kHeadWidth = 128;

schedule::ModelShape parse_shape(const std::string& text) {
  schedule::ModelShape shape;
  std::istringstream in(text);
  char comma[3] = {};
  in >> shape.parameters >> comma[0] >> shape.layers >> comma[1] >> shape.hidden >> comma[2] >>
      shape.kv_width;
  const bool positive = std::min({shape.parameters, shape.layers, shape.hidden, shape.kv_width}) > 0;
  if (!in || !in.eof() || std::string(comma, 3) != ",,," || !positive)
    fail<ConfigError>("--model-shape: got '", text,
                      "', expected a model directory or PARAMETERS,LAYERS,HIDDEN,KV_WIDTH, for example "
                      "7.6e9,28,3584,512");
  return shape;
}

}  // namespace

ShapedModel shaped_model(const std::string& text) {
  if (std::filesystem::exists(text)) return {load_model_config(text), ""};
  const schedule::ModelShape shape = parse_shape(text);
  ModelConfig config;
  config.architecture = Architecture::kLlama;
  config.vocab_size = kVocabulary;
  config.num_layers = std::llround(shape.layers);
  config.hidden_size = std::llround(shape.hidden);
  config.head_dim = std::gcd(kHeadWidth, std::gcd(config.hidden_size, std::llround(shape.kv_width)));
  config.num_heads = config.hidden_size / config.head_dim;
  config.num_kv_heads = std::llround(shape.kv_width) / config.head_dim;
  config.max_positions = std::int64_t{1} << 20;
  config.layer_uses_rope.assign(static_cast<std::size_t>(config.num_layers), 1);
  config.layer_window.assign(static_cast<std::size_t>(config.num_layers), 0);
  const double attention = 2 * shape.hidden * (shape.hidden + shape.kv_width);
  const double mlp = (shape.parameters - 2 * kVocabulary * shape.hidden) / shape.layers - attention;
  config.intermediate_size = std::llround(mlp / (3 * shape.hidden));
  if (config.intermediate_size < 1)
    fail<ConfigError>("--model-shape: ", text, ": ", shape.parameters,
                      " parameters leave nothing for the MLP of ", shape.layers, " layers of width ",
                      shape.hidden, " beside a vocabulary of ", kVocabulary,
                      "; give the model's directory instead");
  return {config, concat("a vocabulary of ", kVocabulary, " words, not tied, and gated MLPs of width ",
                         config.intermediate_size, ", which make up for the parameters")};
}

schedule::ModelShape model_shape(const ModelConfig& config, KvFormat kv) {
  schedule::ModelShape shape;
  shape.parameters = static_cast<double>(count_parameters(config));
  shape.layers = static_cast<double>(config.num_layers);
  shape.hidden = static_cast<double>(config.hidden_size);
  shape.kv_width = static_cast<double>(config.kv_width());
  if (kv == KvFormat::kFp8) shape.kv_bytes = 1 + 1 / static_cast<double>(config.head_dim);  // a head's scale
  return shape;
}

}  // namespace rlhf
