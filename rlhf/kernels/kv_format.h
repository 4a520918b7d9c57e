#pragma once

namespace rlhf {

/// How a generator keeps the K and V of tokens that were computed.
enum class KvFormat {
  kAuto,  ///< as it computes: fp32 on the CPU, bf16 on a GPU
  kFp8,   ///< Float8 (E4M3), with a scale for each token and kv head; on a GPU
};

inline const char* to_string(KvFormat format) {
  return format == KvFormat::kFp8 ? "fp8" : "auto";
}

}  // namespace rlhf
