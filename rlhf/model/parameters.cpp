#include "rlhf/model/parameters.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <iterator>
#include <map>
#include <unordered_map>

#include "rlhf/core/error.h"
#include "rlhf/core/random.h"
#include "rlhf/kernels/float_hash.h"
#include "rlhf/model/weight_file.h"

namespace rlhf {
namespace {

bool is_norm(TensorRole role) {
  switch (role) {
    case TensorRole::kInputNorm:
    case TensorRole::kQueryNorm:
    case TensorRole::kKeyNorm:
    case TensorRole::kPostAttentionNorm:
    case TensorRole::kMlpNorm:
    case TensorRole::kPostMlpNorm:
    case TensorRole::kFinalNorm:
      return true;
    default:
      return false;
  }
}

// Weights before biases inside a fused projection, so that [q; k; v] and [gate; up] are one matrix each.
int fused_rank(TensorRole role) {
  switch (role) {
    case TensorRole::kGateBias:
      return 1;
    case TensorRole::kUpBias:
      return 1;
    default:
      return 0;
  }
}

std::vector<TensorSpec> flat_order(const ModelConfig& config) {
  std::vector<TensorSpec> specs = expected_tensors(config);
  const auto is_mlp_input = [](const TensorSpec& s) {
    return s.role == TensorRole::kGate || s.role == TensorRole::kGateBias || s.role == TensorRole::kUp ||
           s.role == TensorRole::kUpBias;
  };
  for (auto begin = specs.begin(); begin != specs.end();) {
    begin = std::find_if(begin, specs.end(), is_mlp_input);
    auto end = std::find_if_not(begin, specs.end(), is_mlp_input);
    std::stable_sort(begin, end,
                     [](const auto& a, const auto& b) { return fused_rank(a.role) < fused_rank(b.role); });
    begin = end;
  }
  return specs;
}

std::string lora_name(const std::string& tensor, const char* part) {
  const std::string suffix = ".weight";
  return tensor.substr(0, tensor.size() - suffix.size()) + ".lora_" + part + ".weight";
}

bool is_adapter(const TensorSpec& spec) {
  return spec.name.find(".lora_") != std::string::npos;
}

std::vector<TensorSpec> lora_tensors(const std::vector<TensorSpec>& specs, const TrainableOptions& options) {
  std::vector<TensorSpec> adapters;
  for (const std::string& target : options.lora_targets) {
    bool found = false;
    for (const TensorSpec& spec : specs) {
      if (spec.layer < 0 || spec.shape.size() != 2 ||
          spec.name.find("." + target + ".weight") == std::string::npos)
        continue;
      found = true;
      const std::int64_t n = spec.shape[spec.transposed ? 1 : 0], k = spec.shape[spec.transposed ? 0 : 1];
      for (const char* part : {"A", "B"}) {
        TensorSpec low{lora_name(spec.name, part), {}, spec.role, spec.layer, false};
        low.shape = *part == 'A' ? std::vector<std::int64_t>{options.lora_rank, k}
                                 : std::vector<std::int64_t>{n, options.lora_rank};
        adapters.push_back(std::move(low));
      }
    }
    RLHF_CHECK(found, "model.lora_targets: this model has no projection named '", target, "'");
  }
  return adapters;
}

// Every tensor of the model, adapters last.
std::vector<TensorSpec> all_tensors(const ModelConfig& config, const TrainableOptions& options) {
  RLHF_CHECK(options.mode != TrainableMode::kLastLayers || options.last_layers <= config.num_layers,
             "model.last_layers is ", options.last_layers, " but the model has ", config.num_layers,
             " layers");
  std::vector<TensorSpec> specs = flat_order(config);
  if (options.mode == TrainableMode::kLora) {
    std::vector<TensorSpec> adapters = lora_tensors(specs, options);
    specs.insert(specs.end(), std::make_move_iterator(adapters.begin()),
                 std::make_move_iterator(adapters.end()));
  }
  return specs;
}

bool learns(const ModelConfig& config, const TrainableOptions& options, const TensorSpec& spec) {
  switch (options.mode) {
    case TrainableMode::kNone:
      return false;
    case TrainableMode::kAll:
      return true;
    case TrainableMode::kLastLayers:
      if (spec.layer >= 0) return spec.layer >= config.num_layers - options.last_layers;
      return spec.role != TensorRole::kTokenEmbedding && spec.role != TensorRole::kPositionEmbedding;
    case TrainableMode::kLora:
      return spec.role == TensorRole::kScoreHead || is_adapter(spec);
  }
  return false;
}

}  // namespace

ParameterCounts count_parameters(const ModelConfig& config, const TrainableOptions& trainable) {
  ParameterCounts counts;
  counts.first_trainable_layer = config.num_layers;
  std::vector<std::int64_t> by_layer(static_cast<std::size_t>(config.num_layers));
  for (const TensorSpec& spec : all_tensors(config, trainable)) {
    counts.total += spec.num_elements();
    if (!learns(config, trainable, spec)) continue;
    counts.trainable += spec.num_elements();
    if (spec.layer >= 0) by_layer[static_cast<std::size_t>(spec.layer)] += spec.num_elements();
    const bool embeds =
        spec.role == TensorRole::kTokenEmbedding || spec.role == TensorRole::kPositionEmbedding;
    if (embeds || spec.layer >= 0)
      counts.first_trainable_layer =
          std::min(counts.first_trainable_layer, std::max<std::int64_t>(0, spec.layer));
  }
  for (const std::int64_t elements : by_layer) {
    counts.trainable_in_layers += elements;
    counts.largest_trainable_layer = std::max(counts.largest_trainable_layer, elements);
  }
  return counts;
}

template <class T>
Parameters<T>::Parameters(const ModelConfig& config, const TrainableOptions& trainable,
                          const Parameters* base, FrozenLayers layers)
    : config_(config), options_(trainable) {
  for (TensorSpec& spec : all_tensors(config, trainable))
    entries_.push_back({std::move(spec), nullptr, nullptr, false});
  if (base) base->update_host();
  place(base);
  build_weights();
  if constexpr (std::is_same_v<T, float>) {
    if (!base) return;
    SlicedGradient* const sliced = base->sliced_gradient();
    if (base->resident_)
      make_resident(base->resident_->accelerator(), layers,
                    sliced ? GradientHeld::kSliced : GradientHeld::kWhole);
    else if (sliced)
      slice_gradient(sliced->ranks());
  }
}

template <class T>
void Parameters<T>::place_on(const Accelerator& accelerator,
                             FrozenLayers layers) requires(std::is_same_v<T, float>) {
  if (resident_) return;
  RLHF_CHECK(!sliced_, "place_on: comes before slice_gradient");
  make_resident(accelerator, layers, GradientHeld::kWhole);
}

template <class T>
void Parameters<T>::make_resident(const Accelerator& accelerator, FrozenLayers layers,
                                  GradientHeld gradient) {
  if constexpr (std::is_same_v<T, float>) {
    ResidentWeights::Host host;
    host.frozen = frozen_;
    host.learning = {trainable_.data(), trainable_.size()};
    host.gradient = this->gradient();
    if (layers == FrozenLayers::kOnHost) host.host_layers = own_frozen_layers();
    if (gradient == GradientHeld::kSliced && num_trainable() > 0) host.gradient_parts = gradient_parts();
    resident_ = std::make_unique<ResidentWeights>(accelerator, weights_, std::move(host));
    weights_.resident = resident_.get();
  }
}

template <class T>
void Parameters<T>::slice_gradient(Collective& ranks) requires(std::is_same_v<T, float>) {
  if (sliced_gradient() || ranks.world_size() == 1 || num_trainable() == 0) return;
  if (resident_) {
    RLHF_CHECK(resident_->accelerator().ranks, "slice_gradient: ", ranks.world_size(),
               " ranks, and the model's accelerator knows of no other one (Accelerator::ranks)");
    return resident_->slice_gradient(weights_, gradient_parts());
  }
  sliced_ = std::make_unique<SlicedGradient>(gradient_parts(), ranks);
  for (Entry& entry : entries_)
    if (entry.gradient)
      entry.gradient = sliced_->address(static_cast<std::size_t>(entry.value - trainable_.data()));
  gradient_ = {};
  build_weights();
}

template <class T>
GradientParts Parameters<T>::gradient_parts() const {
  GradientParts parts;
  parts.layers.resize(static_cast<std::size_t>(config_.num_layers));
  for (const Entry& entry : entries_) {
    if (!entry.gradient) continue;
    auto& places =
        entry.spec.layer < 0 ? parts.rest : parts.layers[static_cast<std::size_t>(entry.spec.layer)];
    const auto begin = static_cast<std::size_t>(entry.value - trainable_.data());
    if (places.empty() || places.back().end != begin) places.push_back({begin, begin});
    places.back().end += static_cast<std::size_t>(entry.spec.num_elements());
  }
  return parts;
}

// Where the tensors of each layer lie in the owned frozen buffer.
template <class T>
std::vector<ElementRange> Parameters<T>::own_frozen_layers() const {
  const auto& own = frozen_.back()->host;
  std::vector<ElementRange> layers(static_cast<std::size_t>(config_.num_layers));
  for (const Entry& entry : entries_) {
    if (entry.gradient || entry.shared || entry.spec.layer < 0) continue;
    const auto begin = static_cast<std::size_t>(entry.value - own.data()),
               end = begin + static_cast<std::size_t>(entry.spec.num_elements());
    ElementRange& range = layers[static_cast<std::size_t>(entry.spec.layer)];
    range = {range.size() == 0 ? begin : std::min(range.begin, begin), std::max(range.end, end)};
  }
  return layers;
}

template <class T>
std::span<T> Parameters<T>::trainable() {
  update_host();
  if (resident_) resident_->host_written();
  return {trainable_.data(), trainable_.size()};
}

template <class T>
std::span<const T> Parameters<T>::trainable() const {
  update_host();
  return {trainable_.data(), trainable_.size()};
}

// All tensors of its own have been written on the host.
template <class T>
void Parameters<T>::host_written() {
  if constexpr (std::is_same_v<T, float>) frozen_.back()->device_is_old = true;
  if (resident_) resident_->host_written();
}

template <class T>
void Parameters<T>::copy_learned(const Parameters& other) {
  if (resident_ && other.resident_) return resident_->copy_from(*other.resident_);
  RLHF_CHECK(num_trainable() == other.num_trainable(), "a model with ", num_trainable(),
             " learning weights cannot take those of one with ", other.num_trainable());
  std::ranges::copy(other.trainable(), trainable().begin());
}

template <class T>
void Parameters<T>::place(const Parameters* base) {
  std::unordered_map<std::string, const Entry*> existing;
  if (base)
    for (const Entry& entry : base->entries_) existing.emplace(entry.spec.name, &entry);
  const auto source = [&](const Entry& entry) -> const Entry* {
    const auto found = existing.find(entry.spec.name);
    return found != existing.end() && found->second->spec.shape == entry.spec.shape ? found->second : nullptr;
  };
  std::size_t frozen = 0, learning = 0;
  for (const Entry& entry : entries_) {
    const Entry* from = source(entry);
    const auto size = static_cast<std::size_t>(entry.spec.num_elements());
    if (learns(config_, options_, entry.spec))
      learning += size;
    else if (!from || from->gradient)
      frozen += size;
  }
  if (base)
    for (const auto& buffer : base->frozen_) {
      const auto holds = [&](const Entry& entry) {
        const Entry* from = learns(config_, options_, entry.spec) ? nullptr : source(entry);
        return from && !from->gradient && !std::less<>()(from->value, buffer->host.begin()) &&
               std::less<>()(from->value, buffer->host.end());
      };
      if (std::ranges::any_of(entries_, holds)) frozen_.push_back(buffer);
    }
  frozen_.push_back(std::make_shared<Frozen>(frozen));
  trainable_ = Buffer<T>(learning);
  gradient_ = Buffer<T>(learning);
  T* next_frozen = frozen_.back()->host.data();
  std::size_t next_learning = 0;
  RandomStream random(0x10a4, 0);
  for (Entry& entry : entries_) {
    const Entry* from = source(entry);
    const auto size = static_cast<std::size_t>(entry.spec.num_elements());
    if (learns(config_, options_, entry.spec)) {
      entry.value = trainable_.data() + next_learning;
      entry.gradient = gradient_.data() + next_learning;
      next_learning += size;
    } else if (from && !from->gradient) {
      entry.value = from->value;
      entry.shared = true;
      continue;
    } else {
      entry.value = next_frozen;
      next_frozen += size;
    }
    if (from) std::copy_n(from->value, size, entry.value);
    // LoRA starts as the identity: A random, B zero.
    const bool is_lora_a = entry.spec.name.find(".lora_A.") != std::string::npos;
    if (!from && is_lora_a)
      for (std::size_t i = 0; i < size; ++i)
        entry.value[i] =
            static_cast<T>(random.normal() / std::sqrt(static_cast<double>(entry.spec.shape[1])));
  }
}

template <class T>
void Parameters<T>::build_weights() {
  weights_ = DecoderWeights<T>();
  weights_.config = config_;
  weights_.layers.resize(static_cast<std::size_t>(config_.num_layers));
  const std::int64_t D = config_.hidden_size, F = config_.intermediate_size;
  const std::int64_t qkv = config_.query_width() + 2 * config_.kv_width();
  for (LayerWeights<T>& layer : weights_.layers) {
    layer.qkv.N = qkv;
    layer.out.N = layer.down.N = layer.qkv.K = layer.gate_up.K = D;
    layer.out.K = config_.query_width();
    layer.gate_up.N = config_.gated_mlp ? 2 * F : F;
    layer.down.K = F;
  }
  const auto adapter = [&](LinearWeights<T>& linear, const Entry& a, const Entry& b, std::int64_t first_row) {
    linear.adapters.push_back(
        {a.value, b.value, a.gradient, b.gradient, first_row, b.spec.shape[0], options_.lora_rank,
         static_cast<T>(options_.lora_alpha / static_cast<double>(options_.lora_rank))});
  };
  std::int64_t first_trainable = config_.num_layers;
  for (const Entry& entry : entries_) {
    const TensorSpec& spec = entry.spec;
    if (entry.gradient && spec.layer >= 0) first_trainable = std::min(first_trainable, spec.layer);
    LayerWeights<T>* layer =
        spec.layer >= 0 ? &weights_.layers[static_cast<std::size_t>(spec.layer)] : nullptr;
    if (spec.name.find(".lora_B.") != std::string::npos) continue;
    if (spec.name.find(".lora_A.") != std::string::npos) {
      std::string b_name = spec.name;
      b_name.replace(b_name.find(".lora_A."), 8, ".lora_B.");
      const Entry& b = *find(b_name);
      switch (spec.role) {
        case TensorRole::kFusedQkv:
        case TensorRole::kQuery:
          adapter(layer->qkv, entry, b, 0);
          break;
        case TensorRole::kKey:
          adapter(layer->qkv, entry, b, config_.query_width());
          break;
        case TensorRole::kValue:
          adapter(layer->qkv, entry, b, config_.query_width() + config_.kv_width());
          break;
        case TensorRole::kAttentionOut:
          adapter(layer->out, entry, b, 0);
          break;
        case TensorRole::kGate:
          adapter(layer->gate_up, entry, b, 0);
          break;
        case TensorRole::kUp:
          adapter(layer->gate_up, entry, b, config_.gated_mlp ? F : 0);
          break;
        case TensorRole::kDown:
          adapter(layer->down, entry, b, 0);
          break;
        default:
          fail<InternalError>("LoRA on a tensor that is no projection: ", spec.name);
      }
      continue;
    }
    T* value = entry.value;
    T* gradient = entry.gradient;
    const auto weight = [&](auto& target) {
      target.weight = value;
      target.dweight = gradient;
    };
    const auto bias = [&](auto& target) {
      target.bias = value;
      target.dbias = gradient;
    };
    switch (spec.role) {
      case TensorRole::kTokenEmbedding:
        weights_.embedding = value;
        weights_.dembedding = gradient;
        break;
      case TensorRole::kPositionEmbedding:
        weights_.positions = value;
        weights_.dpositions = gradient;
        break;
      case TensorRole::kInputNorm:
        weight(layer->attention_norm);
        break;
      case TensorRole::kInputNormBias:
        bias(layer->attention_norm);
        break;
      case TensorRole::kFusedQkv:
      case TensorRole::kQuery:
        weight(layer->qkv);
        break;
      case TensorRole::kFusedQkvBias:
      case TensorRole::kQueryBias:
        bias(layer->qkv);
        break;
      case TensorRole::kKey:
      case TensorRole::kValue:
      case TensorRole::kKeyBias:
      case TensorRole::kValueBias:
        break;  // follow the query's in the buffer
      case TensorRole::kQueryNorm:
        weight(layer->q_norm);
        break;
      case TensorRole::kKeyNorm:
        weight(layer->k_norm);
        break;
      case TensorRole::kAttentionOut:
        weight(layer->out);
        break;
      case TensorRole::kAttentionOutBias:
        bias(layer->out);
        break;
      case TensorRole::kPostAttentionNorm:
        weight(layer->post_attention_norm);
        break;
      case TensorRole::kMlpNorm:
        weight(layer->mlp_norm);
        break;
      case TensorRole::kMlpNormBias:
        bias(layer->mlp_norm);
        break;
      case TensorRole::kGate:
        weight(layer->gate_up);
        break;
      case TensorRole::kGateBias:
        bias(layer->gate_up);
        break;
      case TensorRole::kUp:
        if (!config_.gated_mlp) weight(layer->gate_up);
        break;
      case TensorRole::kUpBias:
        if (!config_.gated_mlp) bias(layer->gate_up);
        break;
      case TensorRole::kDown:
        weight(layer->down);
        break;
      case TensorRole::kDownBias:
        bias(layer->down);
        break;
      case TensorRole::kPostMlpNorm:
        weight(layer->post_mlp_norm);
        break;
      case TensorRole::kFinalNorm:
        weight(weights_.final_norm);
        break;
      case TensorRole::kFinalNormBias:
        bias(weights_.final_norm);
        break;
      case TensorRole::kLmHead:
      case TensorRole::kScoreHead:
        weight(weights_.head);
        break;
    }
  }
  weights_.head.N = config_.scalar_head ? config_.num_labels : config_.vocab_size;
  weights_.head.K = D;
  if (!weights_.head.weight) {
    weights_.head.weight = weights_.embedding;
    weights_.head.dweight = weights_.dembedding;
  }
  weights_.embedding_trainable = weights_.dembedding || weights_.dpositions;
  weights_.first_trainable_layer = weights_.embedding_trainable ? 0 : first_trainable;
  weights_.gradient_sink = sliced_.get();
}

template <class T>
const typename Parameters<T>::Entry* Parameters<T>::find(const std::string& name) const {
  for (const Entry& entry : entries_)
    if (entry.spec.name == name) return &entry;
  return nullptr;
}

template <class T>
std::uint64_t Parameters<T>::learned_hash() const requires(std::is_same_v<T, float>) {
  return resident_ ? resident_->learned_hash() : kernels::hash_floats({trainable_.data(), trainable_.size()});
}

template <class T>
void Parameters<T>::zero_gradient() {
  if (resident_) return resident_->zero_gradient();
  if (sliced_) return sliced_->zero();
  std::fill(gradient_.begin(), gradient_.end(), T(0));
}

template <class T>
std::size_t Parameters<T>::owned_bytes() const {
  if (resident_) return resident_->frozen_bytes() + resident_->learning_bytes();
  return (frozen_.back()->host.size() + trainable_.size()) * sizeof(T);
}

template <class T>
std::size_t Parameters<T>::shared_bytes() const {
  std::size_t elements = 0;
  for (const Entry& entry : entries_)
    if (entry.shared) elements += static_cast<std::size_t>(entry.spec.num_elements());
  return elements * (resident_ ? sizeof(Bfloat16) : sizeof(T));
}

namespace {
std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string text = "[";
  for (std::int64_t size : shape) text += concat(text.size() > 1 ? ", " : "", size);
  return text + "]";
}
}  // namespace

template <class T>
void Parameters<T>::load(const WeightFile& file) {
  update_host();
  host_written();
  std::vector<T> transposed;
  for (Entry& entry : entries_) {
    const TensorSpec& spec = entry.spec;
    if (is_adapter(spec)) continue;
    const auto size = static_cast<std::size_t>(spec.num_elements());
    const TensorInfo* info = file.find(spec.name);
    if (info && info->shape != spec.shape)
      fail<IoError>(file.path().string(), ": tensor ", spec.name, " has the shape ", shape_text(info->shape),
                    ", the configuration needs ", shape_text(spec.shape));
    if (!spec.transposed) {
      file.read(spec.name, std::span<T>(entry.value, size));
      continue;
    }
    transposed.resize(size);
    file.read(spec.name, std::span<T>(transposed));
    const std::int64_t in = spec.shape[0], out = spec.shape[1];
    for (std::int64_t i = 0; i < in; ++i)
      for (std::int64_t o = 0; o < out; ++o)
        entry.value[o * in + i] = transposed[static_cast<std::size_t>(i * out + o)];
  }
}

template <class T>
void Parameters<T>::initialise(std::uint64_t seed, double std) {
  update_host();
  host_written();
  for (std::size_t e = 0; e < entries_.size(); ++e) {
    const TensorSpec& spec = entries_[e].spec;
    if (entries_[e].shared || is_adapter(spec)) continue;
    RandomStream random(seed, e);
    const auto size = static_cast<std::size_t>(spec.num_elements());
    const T one = config_.norm_plus_one ? 0 : 1;
    for (std::size_t i = 0; i < size; ++i)
      entries_[e].value[i] = spec.shape.size() == 2 ? static_cast<T>(std * random.normal())
                             : is_norm(spec.role)   ? one
                                                    : 0;
  }
}

template <class T>
void Parameters<T>::initialise_score_head(std::uint64_t seed) {
  update_host();
  host_written();
  for (Entry& entry : entries_) {
    if (entry.spec.role != TensorRole::kScoreHead) continue;
    RandomStream random(seed, 0x5c0e);
    const double std = 1 / std::sqrt(static_cast<double>(config_.hidden_size) + 1);
    for (std::int64_t i = 0; i < entry.spec.num_elements(); ++i)
      entry.value[i] = static_cast<T>(std * random.normal());
  }
}

template <class T>
Parameters<T> Parameters<T>::frozen_copy(FrozenLayers layers) const {
  TrainableOptions none;
  none.mode = TrainableMode::kNone;
  return Parameters(config_, none, this, layers);
}

template <class T>
Parameters<T> Parameters<T>::snapshot() const {
  Parameters copy(config_, options_, this);
  copy.gradient_ = {};
  for (Entry& entry : copy.entries_) entry.gradient = nullptr;
  copy.resident_.reset();
  copy.sliced_.reset();
  copy.build_weights();
  if constexpr (std::is_same_v<T, float>)
    if (resident_) copy.place_on(resident_->accelerator());
  return copy;
}

template <class T>
std::vector<T> Parameters<T>::merged(const Entry& entry) const {
  update_host();
  const TensorSpec& spec = entry.spec;
  const auto size = static_cast<std::size_t>(spec.num_elements());
  std::vector<T> result(entry.value, entry.value + size);
  const bool is_matrix = spec.shape.size() == 2;
  const std::int64_t n = is_matrix ? spec.shape[spec.transposed ? 1 : 0] : 0,
                     k = is_matrix ? spec.shape[spec.transposed ? 0 : 1] : 0;
  const Entry* a = is_matrix && spec.layer >= 0 ? find(lora_name(spec.name, "A")) : nullptr;
  if (a) {
    const Entry* b = find(lora_name(spec.name, "B"));
    const double scale = options_.lora_alpha / static_cast<double>(options_.lora_rank);
    for (std::int64_t i = 0; i < n; ++i)
      for (std::int64_t j = 0; j < k; ++j) {
        double sum = 0;
        for (std::int64_t r = 0; r < options_.lora_rank; ++r)
          sum += static_cast<double>(b->value[i * options_.lora_rank + r]) *
                 static_cast<double>(a->value[r * k + j]);
        result[static_cast<std::size_t>(i * k + j)] += static_cast<T>(scale * sum);
      }
  }
  if (!spec.transposed) return result;
  std::vector<T> out(size);
  for (std::int64_t i = 0; i < n; ++i)
    for (std::int64_t j = 0; j < k; ++j)
      out[static_cast<std::size_t>(j * n + i)] = result[static_cast<std::size_t>(i * k + j)];
  return out;
}

template class Parameters<float>;
template class Parameters<double>;

}  // namespace rlhf
