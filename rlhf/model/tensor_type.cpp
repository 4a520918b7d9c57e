// The K formats pack super-blocks of 256 numbers: two half-precision super-scales, then 6-bit (Q4_K, Q5_K) or
// 8-bit (Q6_K) scales of the sub-blocks, then the low bits of the numbers (nibbles) and, apart from them,
// their high bits.
#include "rlhf/model/tensor_type.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "rlhf/core/error.h"

static_assert(std::endian::native == std::endian::little, "weight files are little-endian");

namespace rlhf {
namespace {

constexpr std::size_t kSmall = 32;   // numbers in a block of the simple formats
constexpr std::size_t kSuper = 256;  // numbers in a super-block of the K formats

template <typename T>
T load(const std::uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

float load_half(const std::uint8_t* from) {
  return half_to_float(load<std::uint16_t>(from));
}

void decode_q8_0(const std::uint8_t* block, float* out) {
  const float scale = load_half(block);
  for (std::size_t i = 0; i < kSmall; ++i)
    out[i] = scale * static_cast<float>(static_cast<std::int8_t>(block[2 + i]));
}

void decode_q4_0(const std::uint8_t* block, float* out) {
  const float scale = load_half(block);
  for (std::size_t i = 0; i < kSmall / 2; ++i) {
    out[i] = static_cast<float>((block[2 + i] & 15) - 8) * scale;
    out[i + kSmall / 2] = static_cast<float>((block[2 + i] >> 4) - 8) * scale;
  }
}

void decode_q4_1(const std::uint8_t* block, float* out) {
  const float scale = load_half(block), low = load_half(block + 2);
  for (std::size_t i = 0; i < kSmall / 2; ++i) {
    out[i] = static_cast<float>(block[4 + i] & 15) * scale + low;
    out[i + kSmall / 2] = static_cast<float>(block[4 + i] >> 4) * scale + low;
  }
}

// Bit i of `high` is the fifth bit of number i.
void decode_q5_0(const std::uint8_t* block, float* out) {
  const float scale = load_half(block);
  const auto high = load<std::uint32_t>(block + 2);
  for (std::size_t i = 0; i < kSmall / 2; ++i) {
    const int first = static_cast<int>((block[6 + i] & 15) | (((high >> i) & 1) << 4));
    const int second = static_cast<int>((block[6 + i] >> 4) | (((high >> (i + 16)) & 1) << 4));
    out[i] = static_cast<float>(first - 16) * scale;
    out[i + kSmall / 2] = static_cast<float>(second - 16) * scale;
  }
}

void decode_q5_1(const std::uint8_t* block, float* out) {
  const float scale = load_half(block), low = load_half(block + 2);
  const auto high = load<std::uint32_t>(block + 4);
  for (std::size_t i = 0; i < kSmall / 2; ++i) {
    const int first = static_cast<int>((block[8 + i] & 15) | (((high >> i) & 1) << 4));
    const int second = static_cast<int>((block[8 + i] >> 4) | (((high >> (i + 16)) & 1) << 4));
    out[i] = static_cast<float>(first) * scale + low;
    out[i + kSmall / 2] = static_cast<float>(second) * scale + low;
  }
}

struct SubScale {
  float scale;
  float low;
};

// Eight 6-bit scales and eight 6-bit minima in 12 bytes: the first four of each lie in the low bits of bytes
// 0-7, the last four have their low nibble in bytes 8-11 and their high bits on top of bytes 0-7.
SubScale sub_scale(const std::uint8_t* packed, std::size_t index, SubScale super) {
  int scale = 0, low = 0;
  if (index < 4) {
    scale = packed[index] & 63;
    low = packed[index + 4] & 63;
  } else {
    scale = (packed[index + 4] & 15) | ((packed[index - 4] >> 6) << 4);
    low = (packed[index + 4] >> 4) | ((packed[index] >> 6) << 4);
  }
  return {super.scale * static_cast<float>(scale), super.low * static_cast<float>(low)};
}

void decode_q4_k(const std::uint8_t* block, float* out) {
  const SubScale super{load_half(block), load_half(block + 2)};
  const std::uint8_t* numbers = block + 16;
  for (std::size_t pair = 0; pair < 4; ++pair, numbers += 32, out += 64) {
    const SubScale first = sub_scale(block + 4, 2 * pair, super),
                   second = sub_scale(block + 4, 2 * pair + 1, super);
    for (std::size_t i = 0; i < 32; ++i)
      out[i] = first.scale * static_cast<float>(numbers[i] & 15) - first.low;
    for (std::size_t i = 0; i < 32; ++i)
      out[32 + i] = second.scale * static_cast<float>(numbers[i] >> 4) - second.low;
  }
}

void decode_q5_k(const std::uint8_t* block, float* out) {
  const SubScale super{load_half(block), load_half(block + 2)};
  const std::uint8_t* high = block + 16;
  const std::uint8_t* numbers = block + 48;
  for (std::size_t pair = 0; pair < 4; ++pair, numbers += 32, out += 64) {
    const SubScale first = sub_scale(block + 4, 2 * pair, super),
                   second = sub_scale(block + 4, 2 * pair + 1, super);
    for (std::size_t i = 0; i < 32; ++i) {
      const int low_number = (numbers[i] & 15) + (((high[i] >> (2 * pair)) & 1) << 4);
      const int high_number = (numbers[i] >> 4) + (((high[i] >> (2 * pair + 1)) & 1) << 4);
      out[i] = first.scale * static_cast<float>(low_number) - first.low;
      out[32 + i] = second.scale * static_cast<float>(high_number) - second.low;
    }
  }
}

void decode_q6_k(const std::uint8_t* block, float* out) {
  const std::uint8_t* low = block;
  const std::uint8_t* high = block + 128;
  const auto* scales = reinterpret_cast<const std::int8_t*>(block + 192);
  const float super = load_half(block + 208);
  for (std::size_t half = 0; half < 2; ++half, low += 64, high += 32, scales += 8, out += 128) {
    for (std::size_t i = 0; i < 32; ++i) {
      const std::array<int, 4> numbers{
          (low[i] & 15) | ((high[i] & 3) << 4), (low[i + 32] & 15) | (((high[i] >> 2) & 3) << 4),
          (low[i] >> 4) | (((high[i] >> 4) & 3) << 4), (low[i + 32] >> 4) | ((high[i] >> 6) << 4)};
      for (std::size_t quarter = 0; quarter < 4; ++quarter) {
        const float scale = super * static_cast<float>(scales[i / 16 + 2 * quarter]);
        out[i + 32 * quarter] = scale * static_cast<float>(numbers[quarter] - 32);
      }
    }
  }
}

template <void (*Decode)(const std::uint8_t*, float*)>
void decode_blocks(const std::uint8_t* data, BlockLayout layout, std::size_t count, float* out) {
  for (std::size_t done = 0; done < count; done += layout.elements, data += layout.bytes)
    Decode(data, out + done);
}

}  // namespace

BlockLayout block_layout(TensorType type) {
  switch (type) {
    case TensorType::kF64:
      return {1, 8};
    case TensorType::kF32:
      return {1, 4};
    case TensorType::kF16:
      return {1, 2};
    case TensorType::kBf16:
      return {1, 2};
    case TensorType::kQ8_0:
      return {kSmall, 34};
    case TensorType::kQ4_0:
      return {kSmall, 18};
    case TensorType::kQ4_1:
      return {kSmall, 20};
    case TensorType::kQ5_0:
      return {kSmall, 22};
    case TensorType::kQ5_1:
      return {kSmall, 24};
    case TensorType::kQ4_K:
      return {kSuper, 144};
    case TensorType::kQ5_K:
      return {kSuper, 176};
    case TensorType::kQ6_K:
      return {kSuper, 210};
    case TensorType::kOther:
      break;
  }
  return {0, 0};
}

std::string_view tensor_type_name(TensorType type) {
  constexpr std::array<std::string_view, 13> kNames{"F64",  "F32",  "F16",  "BF16", "Q8_0", "Q4_0", "Q4_1",
                                                    "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "other"};
  return kNames[static_cast<std::size_t>(type)];
}

float half_to_float(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  const std::uint32_t rest = half & 0x7fffu;
  // Infinity and NaN keep all-ones exponents.
  if (rest >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  if (rest < 0x0400u)
    return std::bit_cast<float>(sign) + (sign ? -1.0f : 1.0f) * static_cast<float>(rest) * 0x1p-24f;
  return std::bit_cast<float>(sign | ((rest << 13) + (112u << 23)));
}

std::uint16_t float_to_half(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
  // 65520 and more round to infinity.
  if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 moves the 24 bits below 2^-24 out, rounding to even on the way.
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(shifted) - 0x3f000000u));
  }
  const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<std::uint16_t>(sign | ((rounded - (112u << 23)) >> 13));
}

float bfloat16_to_float(std::uint16_t value) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(value) << 16);
}

std::uint16_t float_to_bfloat16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

void dequantise(TensorType type, const std::byte* bytes, std::size_t count, float* out) {
  const auto* data = reinterpret_cast<const std::uint8_t*>(bytes);
  const BlockLayout layout = block_layout(type);
  RLHF_CHECK(layout.elements > 0, "dequantise: this tensor type holds no numbers that can be read");
  RLHF_CHECK(count % layout.elements == 0, "dequantise: ", count, " is no multiple of the block size ",
             layout.elements);
  switch (type) {
    case TensorType::kF64:
      for (std::size_t i = 0; i < count; ++i) out[i] = static_cast<float>(load<double>(data + 8 * i));
      break;
    case TensorType::kF32:
      if (count > 0) std::memcpy(out, data, count * sizeof(float));
      break;
    case TensorType::kF16:
      for (std::size_t i = 0; i < count; ++i) out[i] = load_half(data + 2 * i);
      break;
    case TensorType::kBf16:
      for (std::size_t i = 0; i < count; ++i) out[i] = bfloat16_to_float(load<std::uint16_t>(data + 2 * i));
      break;
    case TensorType::kQ8_0:
      return decode_blocks<decode_q8_0>(data, layout, count, out);
    case TensorType::kQ4_0:
      return decode_blocks<decode_q4_0>(data, layout, count, out);
    case TensorType::kQ4_1:
      return decode_blocks<decode_q4_1>(data, layout, count, out);
    case TensorType::kQ5_0:
      return decode_blocks<decode_q5_0>(data, layout, count, out);
    case TensorType::kQ5_1:
      return decode_blocks<decode_q5_1>(data, layout, count, out);
    case TensorType::kQ4_K:
      return decode_blocks<decode_q4_k>(data, layout, count, out);
    case TensorType::kQ5_K:
      return decode_blocks<decode_q5_k>(data, layout, count, out);
    case TensorType::kQ6_K:
      return decode_blocks<decode_q6_k>(data, layout, count, out);
    case TensorType::kOther:
      break;
  }
}

void dequantise(TensorType type, const std::byte* bytes, std::size_t count, double* out) {
  if (type == TensorType::kF64) {
    if (count > 0) std::memcpy(out, bytes, count * sizeof(double));
    return;
  }
  const BlockLayout layout = block_layout(type);
  RLHF_CHECK(layout.elements > 0, "dequantise: this tensor type holds no numbers that can be read");
  RLHF_CHECK(count % layout.elements == 0, "dequantise: ", count, " is no multiple of the block size ",
             layout.elements);
  std::array<float, 1024> chunk;
  for (std::size_t done = 0; done < count;) {
    const std::size_t now = std::min(chunk.size(), count - done);
    dequantise(type, bytes + done / layout.elements * layout.bytes, now, chunk.data());
    std::copy_n(chunk.data(), now, out + done);
    done += now;
  }
}

}  // namespace rlhf
