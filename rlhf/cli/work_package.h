#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "rlhf/data/sample.h"
#include "rlhf/model/model_config.h"
#include "rollout/engine/generation.h"

namespace rlhf::cli {

/// One fixed piece of RLHF work that several programs can be run on; the folder's format is described in
/// benchmarks/README.md. Rollout slots count over the whole measurement.
struct WorkPackage {
  /// How long responses are.
  enum class Mode {
    kFixed,    ///< all of the given length, without an end token
    kNatural,  ///< as recorded, ended by the end token
  };

  std::filesystem::path folder;
  std::string variant;  ///< the maker's name for the shapes; may be empty
  TokenId pad = 0, eos = 0;
  std::vector<Prompt> prompts;
  std::vector<double> fractions;  ///< recorded lengths as shares of the longest response, in (0, 1]

  const Prompt& prompt(std::uint64_t slot) const { return prompts[slot % prompts.size()]; }
  /// Tokens of a slot's response, end token included.
  std::int64_t response_tokens(std::uint64_t slot, Mode mode, std::int64_t longest) const;
  /// Makes a slot's response have that length, whatever is drawn.
  void fix_length(std::uint64_t slot, Mode mode, std::int64_t longest, StopOptions& stop) const;
};

/// The work that a bench is told to do.
struct WorkArguments {
  std::string work, mode = "natural";
  std::int64_t response_tokens = 0;

  WorkPackage::Mode length_mode() const {
    return mode == "natural" ? WorkPackage::Mode::kNatural : WorkPackage::Mode::kFixed;
  }
};
/// Adds --work, which needs --response-tokens, and --mode. @return the option --work
CLI::Option* add_work_options(CLI::App& bench, WorkArguments& arguments);

/// Reads the package's files apart from its models. @throws IoError naming file, key and expectation.
WorkPackage load_work_package(const std::filesystem::path& folder);

/// Checks that prompts and responses of `longest` tokens fit the policy.
/// @throws IoError naming the prompt that does not.
void check_fits(const WorkPackage& work, const ModelConfig& policy, std::int64_t longest);

/// Checks that `other`, read from `folder`/`name`, is a model of the policy's shape with a scalar head.
/// @throws IoError naming the key that differs.
void check_scalar_model(const WorkPackage& work, const std::string& name, const ModelConfig& other,
                        const ModelConfig& policy);

}  // namespace rlhf::cli
