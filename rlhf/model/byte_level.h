#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

/// GPT-2's reversible map from bytes to printable characters: vocabularies spell each byte as one character.
namespace rlhf::byte_level {

/// Printable Latin-1 bytes stand for themselves, the other 68 for U+0100 onwards (a space is U+0120).
const std::array<char32_t, 256>& byte_to_char();
std::optional<std::uint8_t> char_to_byte(char32_t character);

/// Spells bytes as characters (UTF-8).
std::string spell(std::string_view bytes);
/// The bytes that a token of the vocabulary stands for. A token with a character outside the map (an added
/// token with a space, say) stands for its own text, as in the tokenizers package.
std::string unspell(std::string_view token);

}  // namespace rlhf::byte_level
