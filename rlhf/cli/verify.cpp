#include <algorithm>
#include <filesystem>
#include <iostream>
#include <nlohmann/json.hpp>

#include "rlhf/cli/verbs.h"
#include "rlhf/core/atomic_file.h"
#include "rlhf/core/error.h"
#include "rlhf/model/verify_files.h"
#include "rlhf/verify/model_vectors.h"
#include "rlhf/verify/vectors.h"

namespace rlhf::cli {
namespace {

namespace fs = std::filesystem;

constexpr const char* kDefaultGguf = ".deps/models/SmolLM2-135M-Instruct.Q4_1.gguf";

struct VerifyArguments {
  std::string directory, gguf;
  bool json = false;
};

VerifyResult add(VerifyResult a, const VerifyResult& b) {
  a.cases += b.cases;
  a.failures += b.failures;
  a.largest_error = std::max(a.largest_error, b.largest_error);
  a.messages.insert(a.messages.end(), b.messages.begin(), b.messages.end());
  return a;
}

VerifyResult verify_entry(const fs::path& path, const VerifyAssets& assets) {
  try {
    const fs::path file = fs::is_directory(path) ? path / "expected.json" : path;
    const auto head = nlohmann::json::parse(read_text_file(file));
    const std::string family = head.is_object() ? head.value("family", "") : "";
    if (family == "model" || family == "reward_model") return verify_model_directory(path);
    if (family == "gguf") return add(verify_model_directory(path), verify_gguf_rows(file));
    if (family == "tokenizer") return verify_tokenizer(file, assets);
    if (family == "chat_template") return verify_chat_template(file);
    if (family == "chat") return verify_chat(file, assets);
    return verify_vectors(file.string());
  } catch (const std::exception& error) {
    VerifyResult result;
    result.cases = result.failures = 1;
    result.messages.push_back(error.what());
    return result;
  }
}

// Every file and folder of the format: vector files, folders with expected.json, chat_templates/*.json.
std::vector<fs::path> entries_of(const fs::path& directory) {
  std::vector<fs::path> entries;
  for (const auto& entry : fs::directory_iterator(directory)) {
    if (entry.is_directory()) {
      if (fs::exists(entry.path() / "expected.json")) {
        entries.push_back(entry.path());
      } else if (entry.path().filename() == "chat_templates") {
        for (const auto& file : fs::directory_iterator(entry.path()))
          if (file.path().extension() == ".json") entries.push_back(file.path());
      }
    } else if (entry.path().extension() == ".json") {
      entries.push_back(entry.path());
    }
  }
  std::sort(entries.begin(), entries.end());
  return entries;
}

void verify(const VerifyArguments& arguments) {
  const auto entries = entries_of(arguments.directory);
  if (entries.empty()) fail<Error>(arguments.directory, ": holds no vector files");
  VerifyAssets assets;
  if (!arguments.gguf.empty())
    assets.smollm2_gguf = arguments.gguf;
  else if (fs::exists(kDefaultGguf))
    assets.smollm2_gguf = kDefaultGguf;
  std::size_t cases = 0, failures = 0;
  for (const fs::path& path : entries) {
    const VerifyResult result = verify_entry(path, assets);
    cases += result.cases;
    failures += result.failures;
    if (arguments.json) {
      std::cout << nlohmann::json({{"file", fs::relative(path, arguments.directory).string()},
                                   {"cases", result.cases},
                                   {"failures", result.failures},
                                   {"largest_error", result.largest_error},
                                   {"messages", result.messages}})
                       .dump()
                << "\n";
      continue;
    }
    std::cout << (result.failures == 0 ? "ok    " : "MISS  ")
              << fs::relative(path, arguments.directory).string() << ": " << result.cases << " cases, "
              << result.failures << " failed, largest error " << result.largest_error << "\n";
    for (std::size_t i = 0; i < std::min<std::size_t>(5, result.messages.size()); ++i)
      std::cout << "      " << result.messages[i] << "\n";
  }
  if (!arguments.json) std::cout << cases << " cases, " << failures << " failed\n";
  if (failures > 0) throw ExitCode{1};
}

}  // namespace

void add_verify(CLI::App& app) {
  auto* verb = app.add_subcommand("verify", "Check the reference frameworks' vectors against this program");
  auto a = std::make_shared<VerifyArguments>();
  verb->add_option("--vectors", a->directory, "Folder of vector files")
      ->required()
      ->check(CLI::ExistingDirectory);
  verb->add_option("--gguf", a->gguf,
                   "SmolLM2-135M-Instruct GGUF, which some files speak of but do not contain");
  verb->add_flag("--json", a->json, "One JSON object per file");
  verb->callback([a] { verify(*a); });
}

}  // namespace rlhf::cli
