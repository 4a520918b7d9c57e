#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "rlhf/model/json_file.h"

/// What the tests of this folder share: golden files, a scratch folder, the optional large model.
namespace model_test {

inline std::filesystem::path golden(std::string_view name) {
  return std::filesystem::path(RLHF_SOURCE_DIR) / "tests" / "golden" / name;
}

inline std::vector<std::filesystem::path> golden_folders(std::string_view prefix) {
  std::vector<std::filesystem::path> found;
  for (const auto& entry : std::filesystem::directory_iterator(golden(""))) {
    if (entry.is_directory() && entry.path().filename().string().starts_with(prefix))
      found.push_back(entry.path());
  }
  std::sort(found.begin(), found.end());
  return found;
}

/// A folder that is removed at the end of the test.
class ScratchFolder {
 public:
  ScratchFolder() {
    std::string pattern = (std::filesystem::temp_directory_path() / "rlhf-model-test-XXXXXX").string();
    path_ = ::mkdtemp(pattern.data());
  }
  ~ScratchFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  std::filesystem::path operator/(std::string_view name) const { return path_ / name; }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

inline void write_bytes(const std::filesystem::path& path, std::string_view bytes) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;
}

/// The SmolLM2 GGUF: $RLHF_SMOLLM2_GGUF, or what scripts/quickstart.sh fetched.
inline std::optional<std::filesystem::path> smollm2_gguf() {
  if (const char* path = std::getenv("RLHF_SMOLLM2_GGUF")) return path;
  const auto folder = std::filesystem::path(RLHF_SOURCE_DIR) / ".deps" / "models";
  if (!std::filesystem::is_directory(folder)) return std::nullopt;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    if (entry.path().extension() == ".gguf") return entry.path();
  }
  return std::nullopt;
}

/// The message of the E that `action` throws; empty when it does not throw.
template <typename E, typename F>
std::string message_of(F&& action) {
  try {
    action();
  } catch (const E& error) {
    return error.what();
  }
  return "";
}

}  // namespace model_test
