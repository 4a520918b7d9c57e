#pragma once

#include <filesystem>
#include <memory>

#include "rlhf/model/weight_file.h"

namespace rlhf {

/// Opens a GGUF file as Hugging Face weights: names translated; query and key rows of the llama family put
/// back from llama.cpp's interleaved rotary order; GPT-2's linear weights transposed back to [in, out];
/// Gemma's norm weights without the 1 that the converter adds. Tensors without a Hugging Face name keep their
/// own.
/// @throws IoError, see WeightFile::open.
std::unique_ptr<WeightFile> open_gguf_weights(const std::filesystem::path& path);

}  // namespace rlhf
