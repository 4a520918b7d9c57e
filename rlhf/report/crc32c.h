#pragma once

#include <cstdint>
#include <string_view>

namespace rlhf {

/// CRC-32C (Castagnoli, reflected polynomial 0x82f63b78) of a byte string.
std::uint32_t crc32c(std::string_view bytes);

/// The masked form that TFRecord files store: rotated right by 15 bits, plus 0xa282ead8.
std::uint32_t masked_crc32c(std::string_view bytes);

}  // namespace rlhf
