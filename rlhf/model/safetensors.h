#pragma once

#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "rlhf/model/weight_file.h"

namespace rlhf {

/// Opens safetensors files that together hold one model. @param name what messages call the whole.
/// @throws IoError, see WeightFile::open.
std::unique_ptr<WeightFile> open_safetensors(const std::vector<std::filesystem::path>& files,
                                             const std::filesystem::path& name);
/// Opens model.safetensors.index.json and the shards it lists, which must hold just the tensors it says.
/// @throws IoError, see WeightFile::open.
std::unique_ptr<WeightFile> open_sharded_safetensors(const std::filesystem::path& index);

/// One tensor to be written. The values must outlive the call.
struct OutputTensor {
  std::string name;
  std::vector<std::int64_t> shape;
  /// Row-major; as many as the shape says.
  std::variant<std::span<const float>, std::span<const double>> values;
  /// kF64, kF32, kF16 or kBf16 (rounded to nearest, ties to even).
  TensorType type = TensorType::kF32;
};

/// Writes a safetensors file atomically: under a temporary name, synced, then renamed, so that a crash or a
/// full disk leaves an earlier file intact.
/// @throws InvalidArgument for duplicate names, wrong element counts or a type that cannot be written;
/// IoError.
void save_safetensors(const std::filesystem::path& path, std::span<const OutputTensor> tensors);

}  // namespace rlhf
