#pragma once

namespace rlhf {

/// How a matrix of weights is stored for decoding. Activations, embeddings, norms, biases and attention are
/// fp32 whatever it is.
enum class WeightFormat {
  kFp32,  ///< as it is trained
  kBf16,  ///< rounded to 8 bits of precision; products are exact in fp32
  kInt8,  ///< 8 bits and a scale for each output channel; activations in 8 bits and a scale for each row
};

inline const char* to_string(WeightFormat format) {
  switch (format) {
    case WeightFormat::kBf16:
      return "bf16";
    case WeightFormat::kInt8:
      return "int8";
    default:
      return "fp32";
  }
}

}  // namespace rlhf
