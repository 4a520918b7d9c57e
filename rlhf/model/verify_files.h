#pragma once

#include <filesystem>
#include <optional>

#include "rlhf/verify/report.h"

namespace rlhf {

/// Files that golden files speak of but do not contain.
struct VerifyAssets {
  /// SmolLM2-135M-Instruct as GGUF, for tokenizer_smollm2.json and chat_smollm2.json. Unset: their cases
  /// fail.
  std::optional<std::filesystem::path> smollm2_gguf;
};

/// Family `tokenizer`: ids, ids with special tokens, decoded texts of every case, whole and streamed. The
/// tokenizer is tokenizer.json beside the file, or the SmolLM2 GGUF. An unknown key of a case is a failure.
/// @throws IoError
VerifyResult verify_tokenizer(const std::filesystem::path& file, const VerifyAssets& assets);

/// Family `chat_template`: rendered text or raised message of every case; the template is the .jinja file of
/// the same name beside the file. @throws IoError
VerifyResult verify_chat_template(const std::filesystem::path& file);

/// Family `chat`: rendered text and ids of conversations; template and tokenizer come from the SmolLM2 GGUF,
/// or the tokenizer.json beside the file. @throws IoError
VerifyResult verify_chat(const std::filesystem::path& file, const VerifyAssets& assets);

/// Family `gguf`, the part that needs no model: the `dequantised` rows of the GGUF files beside the file.
/// @throws IoError
VerifyResult verify_gguf_rows(const std::filesystem::path& file);

}  // namespace rlhf
