#pragma once

#include <CLI/CLI.hpp>
#include <optional>
#include <string>

#include "rlhf/core/error.h"
#include "rlhf/core/thread_pool.h"
#include "rlhf/kernels/kv_format.h"
#include "rlhf/kernels/open_device.h"
#include "rlhf/kernels/ops.h"
#include "rlhf/model/rollout_weights.h"
#include "rlhf/train/language_model.h"

namespace rlhf::cli {

/// A model loaded for reading only, with threads to compute on.
struct LoadedModel {
  OpenDevice device;
  ThreadPool pool;
  Compute<float> compute;
  LanguageModel model;

  LoadedModel(const std::string& path, int threads, Device wanted = Device::kCpu)
      : device(wanted),
        pool(threads),
        compute(pool, kernels::detect_cpu_isa(), device.accelerator()),
        model(LanguageModel::load(path, frozen())) {
    if (device.accelerator()) model.parameters().place_on(*device.accelerator());
  }

 private:
  static TrainableOptions frozen() {
    TrainableOptions options;
    options.mode = TrainableMode::kNone;
    return options;
  }
};

/// What a loaded model generates with.
class GenerationWeights {
 public:
  GenerationWeights(WeightFormat format, const LoadedModel& loaded)
      : source_(loaded.model.parameters().weights()) {
    RLHF_CHECK(format == WeightFormat::kFp32 || !loaded.compute.accelerator(), "--weights ",
               to_string(format), " is for the CPU; elsewhere all weights are bf16: give --device cpu");
    if (format != WeightFormat::kFp32) packed_.emplace(format, source_, source_, loaded.compute);
  }
  const DecoderWeights<float>& get() const { return packed_ ? packed_->weights() : source_; }

 private:
  const DecoderWeights<float>& source_;
  std::optional<RolloutWeights> packed_;
};

/// --device auto|cpu|cuda.
inline void add_device_option(CLI::App& verb, Device& device) {
  const auto set = [&device](const std::string& name) {
    device = name == "cpu" ? Device::kCpu : name == "cuda" ? Device::kCuda : Device::kAuto;
  };
  verb.add_option_function<std::string>("--device", set,
                                        "Where the model runs: a GPU where there is one (auto), cpu, cuda")
      ->check(CLI::IsMember({"auto", "cpu", "cuda"}))
      ->default_str("auto");
}

/// --kv-dtype auto|fp8.
inline void add_kv_dtype_option(CLI::App& verb, KvFormat& kv) {
  const auto set = [&kv](const std::string& name) { kv = name == "fp8" ? KvFormat::kFp8 : KvFormat::kAuto; };
  verb.add_option_function<std::string>(
          "--kv-dtype", set,
          "How K and V are kept: as they are computed (auto), or in half of bf16's bytes (fp8, on a GPU)")
      ->check(CLI::IsMember({"auto", "fp8"}))
      ->default_str(to_string(kv));
}
/// @throws InvalidArgument where the model runs on the CPU.
inline void check_kv_dtype(KvFormat kv, const LoadedModel& loaded) {
  RLHF_CHECK(kv == KvFormat::kAuto || loaded.compute.accelerator(), "--kv-dtype ", to_string(kv),
             " is for a GPU; on the CPU K and V are fp32: leave it out");
}

/// --weights fp32|bf16|int8.
inline void add_weights_option(CLI::App& verb, WeightFormat& weights) {
  const auto set = [&weights](const std::string& name) {
    for (const WeightFormat format : {WeightFormat::kFp32, WeightFormat::kBf16, WeightFormat::kInt8})
      if (name == to_string(format)) weights = format;
  };
  verb.add_option_function<std::string>("--weights", set,
                                        "Type that projections and head are stored and read in")
      ->check(CLI::IsMember({"fp32", "bf16", "int8"}))
      ->default_str(to_string(weights));
}

}  // namespace rlhf::cli
