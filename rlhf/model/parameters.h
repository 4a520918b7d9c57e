#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "rlhf/model/decoder_weights.h"
#include "rlhf/model/model_config.h"
#include "rlhf/model/resident_weights.h"
#include "rlhf/model/sliced_gradient.h"
#include "rlhf/tensor/buffer.h"

namespace rlhf {

class WeightFile;

/// Which weights learn.
enum class TrainableMode { kNone, kAll, kLastLayers, kLora };

/// Options of the trainable part of a model.
struct TrainableOptions {
  TrainableMode mode = TrainableMode::kAll;
  std::int64_t last_layers = 4;  ///< kLastLayers: this many layers, the final norm and an untied head
  std::int64_t lora_rank = 8;    ///< kLora: rank r of A [r, K] and B [N, r]
  double lora_alpha = 16;        ///< kLora: the update is scaled by alpha / r
  /// kLora: any of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj (c_attn, c_proj, c_fc for
  /// GPT-2).
  std::vector<std::string> lora_targets = {"q_proj", "v_proj"};

  template <class V>
  void visit_fields(V& v) {
    v.choice("trainable", mode,
             {{"all", TrainableMode::kAll},
              {"last_layers", TrainableMode::kLastLayers},
              {"lora", TrainableMode::kLora}},
             "Which weights learn; the rest is frozen and shared with reference and critic");
    v.field("last_layers", last_layers, "trainable: last_layers - number of layers that learn", {1, 1000});
    v.field("lora_rank", lora_rank, "trainable: lora - rank of the adapters", {1, 1024});
    v.field("lora_alpha", lora_alpha, "trainable: lora - scale; the update is multiplied by alpha / rank",
            {1e-3, 1e4});
    v.field("lora_targets", lora_targets, "trainable: lora - projections that get an adapter");
  }
};

/// Elements of a model's weights, and how many of them learn.
struct ParameterCounts {
  std::int64_t total = 0;                  ///< adapters included
  std::int64_t trainable = 0;              ///< of them
  std::int64_t first_trainable_layer = 0;  ///< backward goes down to it; num_layers = only the head learns
  std::int64_t trainable_in_layers = 0;    ///< without embedding, final norm and head
  std::int64_t largest_trainable_layer = 0;
};
/// Counts what `Parameters(config, trainable, nullptr)` would allocate. @throws InvalidArgument as it.
ParameterCounts count_parameters(const ModelConfig& config, const TrainableOptions& trainable);

/// The weights of one model: flat buffers of frozen and of trainable elements and a flat gradient buffer,
/// with every Hugging Face tensor a view into them. Frozen tensors may be shared between models (actor,
/// critic, reference).
///
/// A model of floats may be placed on an accelerator: then passes and optimizers work there, and the host's
/// copy of what learns is brought up to date when it is read.
template <class T>
class Parameters {
 public:
  struct Entry {
    TensorSpec spec;        ///< name and shape as Hugging Face stores it
    T* value = nullptr;     ///< [out, in] for linear weights, also where spec.transposed
    T* gradient = nullptr;  ///< null when frozen
    bool shared = false;    ///< owned by another model
  };

  /// Allocates all weights (zero) for `config`. Tensors that are frozen here and frozen in `base` are shared
  /// with it, the others start as copies of base's tensor of that name when there is one.
  /// @param base may be null. @param layers of its own frozen ones, where base is on an accelerator
  /// @throws InvalidArgument for a LoRA target that does not exist.
  Parameters(const ModelConfig& config, const TrainableOptions& trainable, const Parameters* base,
             FrozenLayers layers = FrozenLayers::kOnDevice);
  Parameters(Parameters&&) noexcept = default;
  Parameters& operator=(Parameters&&) noexcept = default;

  const ModelConfig& config() const { return config_; }
  const TrainableOptions& trainable_options() const { return options_; }
  const std::vector<Entry>& entries() const { return entries_; }
  const Entry* find(const std::string& name) const;
  const DecoderWeights<T>& weights() const { return weights_; }

  /// Makes passes and optimizers work in this device's memory; models that are made from this one follow it.
  /// Nothing happens when it is there already. @throws MemoryError when there is no room
  void place_on(const Accelerator& accelerator,
                FrozenLayers layers = FrozenLayers::kOnDevice) requires(std::is_same_v<T, float>);
  /// The weights on the accelerator; null on the CPU.
  ResidentWeights* resident() const { return resident_.get(); }

  /// Holds from now on this rank's slice of the gradient alone, and so do models that are made from this one:
  /// passes sum it over the ranks layer by layer, all ranks take part in every backward pass
  /// (SequencePass::skip_backward), and a tensor's gradient is in its place within a pass only. Nothing
  /// happens with one rank, or where nothing learns. A model that belongs on an accelerator is placed first.
  /// @param ranks must outlive the model
  void slice_gradient(Collective& ranks) requires(std::is_same_v<T, float>);
  /// The gradient's slice; null where the whole gradient is held.
  SlicedGradient* sliced_gradient() const { return resident_ ? resident_->sliced_gradient() : sliced_.get(); }

  /// Elements that learn.
  std::size_t num_trainable() const { return trainable_.size(); }
  /// kernels::hash_floats of them, where they are newest; several ranks on accelerators ask together.
  std::uint64_t learned_hash() const requires(std::is_same_v<T, float>);
  /// Flat views of what learns and of its gradient, in the same order. On an accelerator the weights are
  /// copied from there as far as they are newer, and, where the view can be written, are taken as written:
  /// ask again before writing again. The gradient is the host's, and not used there; empty where it is
  /// sliced.
  ///
  /// With several ranks on accelerators each has a part of the newest weights, so all ranks must ask
  /// together after an optimizer step: for these views, for `merged`, and for a model made from this one.
  std::span<T> trainable();
  std::span<const T> trainable() const;
  std::span<T> gradient() { return {gradient_.data(), gradient_.size()}; }
  void zero_gradient();
  /// Takes over what a model of the same shape has learned.
  void copy_learned(const Parameters& other);
  /// Bytes of weights this model owns itself, and of weights it shares, where passes read them.
  std::size_t owned_bytes() const;
  std::size_t shared_bytes() const;
  std::size_t gradient_bytes() const {
    if (resident_) return resident_->gradient_bytes();
    return sliced_ ? sliced_->bytes() : gradient_.bytes();
  }

  /// Reads every tensor from `file`. @throws IoError naming a missing tensor or a wrong shape.
  void load(const WeightFile& file);
  /// Fills all tensors: normal(0, std) for matrices, 1 (or 0 with norm_plus_one) for norms, 0 for biases.
  void initialise(std::uint64_t seed, double std);
  /// Fills the score head with normal(0, 1 / sqrt(D + 1)), OpenRLHF's initial value head.
  void initialise_score_head(std::uint64_t seed);
  /// A frozen copy for use as the reference model: shares what is frozen, copies what learns. With LoRA the
  /// reference is the model without adapters and nothing is copied.
  /// @param layers of the copy, on an accelerator
  Parameters frozen_copy(FrozenLayers layers = FrozenLayers::kOnDevice) const;
  /// A copy for a generator that lags behind: shares what is frozen, copies what learns, has no gradient.
  Parameters snapshot() const;
  /// Elements of one tensor in Hugging Face layout, with LoRA adapters merged in.
  std::vector<T> merged(const Entry& entry) const;

 private:
  /// Frozen weights of types that no accelerator computes with.
  struct HostWeights {
    explicit HostWeights(std::size_t size) : host(size) {}
    Buffer<T> host;
  };

  void place(const Parameters* base);
  enum class GradientHeld { kWhole, kSliced };
  void make_resident(const Accelerator& accelerator, FrozenLayers layers, GradientHeld gradient);
  std::vector<ElementRange> own_frozen_layers() const;
  GradientParts gradient_parts() const;
  void build_weights();
  void update_host() const {
    if (resident_) resident_->update_host();
  }
  void host_written();

  ModelConfig config_;
  TrainableOptions options_;
  std::vector<Entry> entries_;
  using Frozen = std::conditional_t<std::is_same_v<T, float>, FrozenWeights, HostWeights>;
  std::vector<std::shared_ptr<Frozen>> frozen_;  ///< the owned one is the last
  Buffer<T> trainable_, gradient_;
  std::unique_ptr<SlicedGradient> sliced_;  ///< in place of gradient_, on the CPU
  DecoderWeights<T> weights_;
  std::unique_ptr<ResidentWeights> resident_;
};

}  // namespace rlhf
