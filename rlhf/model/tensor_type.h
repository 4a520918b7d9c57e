#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace rlhf {

/// How the numbers of a stored tensor are encoded. The Q types are GGUF's block formats; kOther stands for
/// integer and 8-bit tensors, which are listed but cannot be read as numbers.
enum class TensorType {
  kF64,
  kF32,
  kF16,
  kBf16,
  kQ8_0,
  kQ4_0,
  kQ4_1,
  kQ5_0,
  kQ5_1,
  kQ4_K,
  kQ5_K,
  kQ6_K,
  kOther
};

/// A block of `elements` numbers takes `bytes` bytes (1 element for plain types; both 0 for kOther).
struct BlockLayout {
  std::size_t elements;
  std::size_t bytes;
};
BlockLayout block_layout(TensorType type);

/// "F32", "Q4_K", ...
std::string_view tensor_type_name(TensorType type);

/// Decodes `count` numbers (a multiple of the block size) that start at `data` (any alignment,
/// little-endian). Float results are exactly those of the formulas in ggml's reference code. Thread-safe.
void dequantise(TensorType type, const std::byte* data, std::size_t count, float* out);
/// The same in double precision; F64 values are exact, all others are the float results.
void dequantise(TensorType type, const std::byte* data, std::size_t count, double* out);

float half_to_float(std::uint16_t half);
/// Rounds to nearest, ties to even; overflow gives infinity.
std::uint16_t float_to_half(float value);
float bfloat16_to_float(std::uint16_t value);
/// Rounds to nearest, ties to even; NaN stays NaN.
std::uint16_t float_to_bfloat16(float value);

}  // namespace rlhf
