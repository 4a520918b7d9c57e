#include "rlhf/model/byte_level.h"

#include "rlhf/model/utf8.h"

namespace rlhf::byte_level {
namespace {

constexpr char32_t kFirstSubstitute = 0x100;
constexpr std::size_t kNumSubstitutes = 68;

bool stands_for_itself(unsigned byte) {
  return (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
}

struct Tables {
  std::array<char32_t, 256> to_char;
  std::array<std::int16_t, kFirstSubstitute + kNumSubstitutes> to_byte;

  Tables() {
    to_byte.fill(-1);
    char32_t substitute = kFirstSubstitute;
    for (unsigned byte = 0; byte < 256; ++byte) {
      to_char[byte] = stands_for_itself(byte) ? byte : substitute++;
      to_byte[to_char[byte]] = static_cast<std::int16_t>(byte);
    }
  }
};

const Tables& tables() {
  static const Tables kTables;
  return kTables;
}

}  // namespace

const std::array<char32_t, 256>& byte_to_char() {
  return tables().to_char;
}

std::optional<std::uint8_t> char_to_byte(char32_t character) {
  if (character >= tables().to_byte.size() || tables().to_byte[character] < 0) return std::nullopt;
  return static_cast<std::uint8_t>(tables().to_byte[character]);
}

std::string spell(std::string_view bytes) {
  std::string out;
  for (const char byte : bytes) utf8::append(out, byte_to_char()[static_cast<unsigned char>(byte)]);
  return out;
}

std::string unspell(std::string_view token) {
  std::string out;
  for (std::string_view rest = token; !rest.empty();) {
    const utf8::Decoded next = utf8::decode(rest);
    const auto byte = char_to_byte(next.code_point);
    if (!byte) return std::string(token);
    out.push_back(static_cast<char>(*byte));
    rest.remove_prefix(next.size);
  }
  return out;
}

}  // namespace rlhf::byte_level
