// Runs the library's own conformance check over the copied golden vectors: the same code as `rlhf verify`.
#include <algorithm>
#include <filesystem>
#include <iostream>

#include "rlhf/core/error.h"
#include "rlhf/verify/vectors.h"
#include "tests/catch.h"

namespace fs = std::filesystem;

namespace {

const std::string kGolden = std::string(RLHF_SOURCE_DIR) + "/tests/golden";

// The vector files of this module; other families in the folder have their own tests.
std::vector<std::string> vector_files() {
  std::vector<std::string> files;
  for (const auto& entry : fs::directory_iterator(kGolden)) {
    if (entry.path().extension() == ".json" && rlhf::is_vector_file(entry.path().string())) {
      files.push_back(entry.path().string());
    }
  }
  std::sort(files.begin(), files.end());
  return files;
}

}  // namespace

TEST_CASE("every golden vector matches the framework that computed it") {
  const auto files = vector_files();
  CHECK(files.size() >= 29);
  for (const std::string& file : files) {
    const rlhf::VerifyResult result = rlhf::verify_vectors(file);
    std::cout << fs::path(file).filename().string() << ": " << result.cases << " cases, " << result.failures
              << " failures, largest error " << result.largest_error << "\n";
    CHECK(result.cases > 0);
    for (const std::string& message : result.messages) FAIL_CHECK(file << ": " << message);
    CHECK(result.failures == 0);
  }
}
