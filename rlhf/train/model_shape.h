#pragma once

#include <string>

#include "rlhf/kernels/kv_format.h"
#include "rlhf/model/model_config.h"
#include "rlhf/schedule/roofline.h"

namespace rlhf {

/// A model for predictions: nothing of it need be here.
struct ShapedModel {
  ModelConfig config;
  std::string assumption;  ///< what a few numbers left open; empty when the configuration is known
};

/// Reads "PARAMETERS,LAYERS,HIDDEN,KV_WIDTH" (7.6e9,28,3584,512) or the configuration of a model directory or
/// GGUF file. From the four numbers a llama-like decoder with an untied vocabulary is made whose MLP makes up
/// for the parameters. @throws ConfigError naming the text; IoError as load_model_config.
ShapedModel shaped_model(const std::string& text);
/// What the roofline needs of a model whose generator keeps K and V so.
schedule::ModelShape model_shape(const ModelConfig& config, KvFormat kv);

}  // namespace rlhf
