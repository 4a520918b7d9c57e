#pragma once

#include <memory>
#include <string>

#include "rlhf/core/thread_pool.h"
#include "rlhf/kernels/ops.h"
#include "rlhf/train/language_model.h"

namespace rlhf::cli {

/// A model loaded for reading only, with threads to compute on.
struct LoadedModel {
  ThreadPool pool;
  Compute<float> compute;
  LanguageModel model;

  LoadedModel(const std::string& path, int threads)
      : pool(threads), compute(pool, kernels::detect_cpu_isa()), model(LanguageModel::load(path, frozen())) {}

 private:
  static TrainableOptions frozen() {
    TrainableOptions options;
    options.mode = TrainableMode::kNone;
    return options;
  }
};

}  // namespace rlhf::cli
