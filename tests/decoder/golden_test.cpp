#include <filesystem>

#include "rlhf/verify/model_vectors.h"
#include "tests/catch.h"

using namespace rlhf;

TEST_CASE("every architecture gives the reference logits, greedy tokens, losses and gradients") {
  int directories = 0;
  for (const auto& entry : std::filesystem::directory_iterator(RLHF_SOURCE_DIR "/tests/golden")) {
    if (!entry.is_directory() || !std::filesystem::exists(entry.path() / "expected.json")) continue;
    const std::string name = entry.path().filename().string();
    if (!name.starts_with("model_") && !name.starts_with("gguf_")) continue;
    ++directories;
    const VerifyResult result = verify_model_directory(entry.path());
    INFO(name << ": largest error " << result.largest_error << "\n"
              << (result.messages.empty() ? "" : result.messages.front()));
    CHECK(result.failures == 0);
    CHECK(result.cases > 5);
  }
  CHECK(directories == 16);
}
