// Shape legend: n targets of a chunk, D width, V vocabulary.
#include "rlhf/model/device_head.h"

#include <algorithm>

#include "rlhf/core/error.h"
#include "rlhf/model/host_head.h"

namespace rlhf {
namespace {

// Logits of one chunk: products with enough rows to keep the device busy, and most micro-batches in one
// chunk.
constexpr std::size_t kDeviceLogitsBytes = std::size_t{1} << 30;
// Rows whose whole distributions the host works on at once.
constexpr std::size_t kHostRows = 64;

}  // namespace

DeviceHead::DeviceHead(const ModelConfig& config, DeviceOps<T> ops, const Compute<float>& compute)
    : config_(config),
      ops_(std::move(ops)),
      compute_(compute),
      chunk_(*ops_.memory()),
      gradients_(*ops_.memory()) {
  release();
}

std::int64_t DeviceHead::chunk_rows(const ModelConfig& config) {
  return std::max<std::int64_t>(
      64, static_cast<std::int64_t>(kDeviceLogitsBytes / sizeof(float)) / config.vocab_size);
}

void DeviceHead::begin(const T* hidden, std::int64_t rows, bool keeps_gradient) {
  hidden_ = hidden;
  num_rows_ = rows;
  cached_chunk_ = nullptr;
  if (!keeps_gradient) return;
  dhidden_sums_.reserve_discard(to_size(rows * config_.hidden_size));
  ops_.zero(dhidden_sums_.data(), to_size(rows * config_.hidden_size) * sizeof(float));
}

const DeviceHead::T* DeviceHead::gradient() {
  const std::int64_t elements = num_rows_ * config_.hidden_size;
  dhidden_.reserve_discard(to_size(elements));
  ops_.narrow(dhidden_.data(), dhidden_sums_.data(), elements);
  return dhidden_.data();
}

// Brings hidden states of `rows` to gathered_. What else was staged in chunk_ goes along.
void DeviceHead::gather(std::span<const std::int64_t> rows) {
  gathered_rows_.assign(rows.begin(), rows.end());
  staged_rows_ = chunk_.add(rows);
  chunk_.reserve();
  chunk_.upload();
  gathered_.reserve_discard(rows.size() * to_size(config_.hidden_size));
  ops_.gather_rows(gathered_.data(), hidden_, chunk_.device(staged_rows_),
                   static_cast<std::int64_t>(rows.size()), config_.hidden_size);
}

void DeviceHead::chunk_logits(const DecoderWeights<T>& weights, std::span<const TokenTarget> chunk) {
  const auto n = static_cast<std::int64_t>(chunk.size()), V = config_.vocab_size;
  std::vector<std::int64_t> rows;
  std::vector<TokenId> targets;
  for (const auto& [row, target] : chunk) {
    RLHF_CHECK(target >= 0 && target < V, "token id ", target, " is outside the vocabulary of ", V);
    rows.push_back(row);
    targets.push_back(target);
  }
  chunk_.clear();
  staged_targets_ = chunk_.add(targets);
  gather(rows);
  logits_.reserve_discard(to_size(n * V));
  workspace_.reserve_discard(to_size(kernels::logits_workspace(n, V)));
  const LinearWeights<T>& head = weights.head;
  ops_.linear_wide({gathered_.data(), head.K, head.weight, head.bias, logits_.data(), V, head.K, false}, n,
                   V);
}

void DeviceHead::token_logprobs(DecoderRunner<T>& runner, const DecoderWeights<T>& weights,
                                std::span<const TokenTarget> targets, double temperature,
                                std::span<float> logprobs, std::span<float> entropies) {
  const std::size_t chunk = to_size(chunk_rows(config_));
  num_statistics_ = targets.size();
  statistics_.reserve_discard(targets.size());
  for (std::size_t begin = 0; begin < targets.size(); begin += chunk) {
    const auto part = targets.subspan(begin, std::min(chunk, targets.size() - begin));
    chunk_logits(weights, part);
    runner.count_head(weights, static_cast<std::int64_t>(part.size()), 1);
    ops_.logits(
        {logits_.data(), config_.vocab_size, 1 / temperature, config_.final_softcap,
         chunk_.device(staged_targets_), statistics_.data() + begin, nullptr, nullptr, workspace_.data()},
        static_cast<std::int64_t>(part.size()));
    cached_chunk_ = part.data();
  }
  std::vector<kernels::LogitsRow> rows(targets.size());
  ops_.download(rows.data(), statistics_.data(), rows.size() * sizeof(kernels::LogitsRow));
  for (std::size_t i = 0; i < rows.size(); ++i) {
    logprobs[i] = static_cast<float>(rows[i].logprob);
    if (!entropies.empty()) entropies[i] = static_cast<float>(rows[i].entropy);
  }
}

void DeviceHead::token_logprobs_backward(DecoderRunner<T>& runner, const DecoderWeights<T>& weights,
                                         std::span<const TokenTarget> targets, double temperature,
                                         std::span<const float> dlogprobs,
                                         std::span<const float> dentropies) {
  RLHF_CHECK(num_statistics_ == targets.size(), "token_logprobs_backward: call token_logprobs first");
  const std::size_t chunk = to_size(chunk_rows(config_));
  // Last chunk first: its logits are still there.
  for (std::size_t chunks = (targets.size() + chunk - 1) / chunk; chunks > 0; --chunks) {
    const std::size_t begin = (chunks - 1) * chunk;
    const auto part = targets.subspan(begin, std::min(chunk, targets.size() - begin));
    const auto n = static_cast<std::int64_t>(part.size());
    const bool cached = cached_chunk_ == part.data();
    cached_chunk_ = nullptr;
    if (!cached) {
      chunk_logits(weights, part);
      runner.count_head(weights, n, 1);
    }
    narrow_.reserve_discard(to_size(n * config_.vocab_size));
    gradients_.clear();
    const auto dlogprob = gradients_.add(dlogprobs.subspan(begin, part.size()));
    const auto dentropy =
        gradients_.add(dentropies.empty() ? dentropies : dentropies.subspan(begin, part.size()));
    gradients_.reserve();
    gradients_.upload();
    const kernels::LogitsArgs<T> args{logits_.data(),
                                      config_.vocab_size,
                                      1 / temperature,
                                      config_.final_softcap,
                                      chunk_.device(staged_targets_),
                                      statistics_.data() + begin,
                                      gradients_.device(dlogprob),
                                      dentropies.empty() ? nullptr : gradients_.device(dentropy),
                                      workspace_.data(),
                                      narrow_.data()};
    if (!cached && config_.final_softcap > 0) ops_.logits(args, n);
    ops_.logits_grad(args, n);
    add_logits_gradient(runner, weights);
  }
}

// From d loss / d logits of a chunk, which is in narrow_, to the head and the hidden states.
void DeviceHead::add_logits_gradient(DecoderRunner<T>& runner, const DecoderWeights<T>& weights) {
  const auto n = static_cast<std::int64_t>(gathered_rows_.size());
  dgathered_.reserve_discard(to_size(n * config_.hidden_size));
  runner.linear_backward(weights.head, n, gathered_.data(), narrow_.data(), dgathered_.data(), false);
  add_gathered_gradient(runner);
}

// Several targets may have one row: responses that begin behind the same prompt.
void DeviceHead::add_gathered_gradient(DecoderRunner<T>& runner) {
  const std::vector<std::int32_t> keys(gathered_rows_.begin(), gathered_rows_.end());
  runner.add_to_table(dhidden_sums_.data(), 1, group_rows(keys), dgathered_.data());
}

// Calls fn(index of its first row, logits [rows of the chunk, V], rows of the chunk) with logits on the host.
template <class Fn>
void DeviceHead::for_host_logits(const DecoderWeights<T>& weights, std::span<const std::int64_t> rows,
                                 const Fn& fn) {
  cached_chunk_ = nullptr;
  for (std::size_t begin = 0; begin < rows.size(); begin += kHostRows) {
    std::vector<TokenTarget> targets;
    for (std::size_t i = begin; i < std::min(rows.size(), begin + kHostRows); ++i)
      targets.push_back({rows[i], 0});
    chunk_logits(weights, targets);
    host_logits_.resize(targets.size() * to_size(config_.vocab_size));
    ops_.download(host_logits_.data(), logits_.data(), host_logits_.size() * sizeof(float));
    fn(begin, host_logits_.data(), static_cast<std::int64_t>(targets.size()));
  }
}

void DeviceHead::log_distributions(DecoderRunner<T>& runner, const DecoderWeights<T>& weights,
                                   std::span<const std::int64_t> rows, std::span<float> out) {
  const std::int64_t V = config_.vocab_size;
  check_distributions(rows.size(), V, out.size());
  runner.count_head(weights, static_cast<std::int64_t>(rows.size()), 1);
  for_host_logits(weights, rows, [&](std::size_t begin, float* logits, std::int64_t count) {
    compute_.for_rows(count, 20 * V, [&](std::int64_t i) {
      log_softmax(compute_, {logits + i * V, to_size(V)}, config_.final_softcap,
                  out.subspan((begin + to_size(i)) * to_size(V), to_size(V)));
    });
  });
}

void DeviceHead::distributions_backward(DecoderRunner<T>& runner, const DecoderWeights<T>& weights,
                                        std::span<const std::int64_t> rows,
                                        const DistributionGradient<float>& to_gradient) {
  const std::int64_t V = config_.vocab_size;
  runner.count_head(weights, static_cast<std::int64_t>(rows.size()), 1);
  for_host_logits(weights, rows, [&](std::size_t begin, float* logits, std::int64_t count) {
    compute_.for_rows(count, 20 * V, [&](std::int64_t i) {
      distribution_gradient<float>(compute_, begin + to_size(i), {logits + i * V, to_size(V)},
                                   config_.final_softcap, to_gradient);
    });
    ops_.upload(logits_.data(), logits, to_size(count * V) * sizeof(float));
    narrow_.reserve_discard(to_size(count * V));
    ops_.narrow(narrow_.data(), logits_.data(), count * V);
    add_logits_gradient(runner, weights);
  });
}

void DeviceHead::scalar_outputs(DecoderRunner<T>&, const DecoderWeights<T>& weights,
                                std::span<const std::int64_t> rows, std::span<float> values) {
  const std::int64_t D = config_.hidden_size, labels = num_labels(weights, rows.size(), values.size());
  if (rows.empty()) return;
  cached_chunk_ = nullptr;
  chunk_.clear();
  gather(rows);
  logits_.reserve_discard(values.size());
  ops_.linear_wide({gathered_.data(), D, weights.head.weight, nullptr, logits_.data(), labels, D, false},
                   static_cast<std::int64_t>(rows.size()), labels);
  ops_.download(values.data(), logits_.data(), values.size_bytes());
}

void DeviceHead::scalar_outputs_backward(DecoderRunner<T>& runner, const DecoderWeights<T>& weights,
                                         std::span<const std::int64_t> rows, std::span<const float> dvalues) {
  if (rows.empty()) return;
  LinearWeights<T> head = weights.head;
  head.N = num_labels(weights, rows.size(), dvalues.size());
  cached_chunk_ = nullptr;
  chunk_.clear();
  std::vector<T> rounded;
  for (const float value : dvalues) rounded.push_back(from_float<T>(value));
  const auto slopes = chunk_.add(rounded);
  gather(rows);
  dgathered_.reserve_discard(rows.size() * to_size(config_.hidden_size));
  runner.linear_backward(head, static_cast<std::int64_t>(rows.size()), gathered_.data(),
                         chunk_.device(slopes), dgathered_.data(), false);
  add_gathered_gradient(runner);
}

std::size_t DeviceHead::held_bytes() const {
  std::size_t total = dhidden_sums_.bytes() + logits_.bytes() + statistics_.bytes() + workspace_.bytes();
  for (const Buffer<T>* b : {&dhidden_, &gathered_, &dgathered_, &narrow_}) total += b->bytes();
  return total;
}

void DeviceHead::release() {
  for (Buffer<T>* b : {&dhidden_, &gathered_, &dgathered_, &narrow_}) *b = Buffer<T>(0, ops_.buffers());
  for (Buffer<float>* b : {&dhidden_sums_, &logits_}) *b = Buffer<float>(0, ops_.buffers());
  statistics_ = Buffer<kernels::LogitsRow>(0, ops_.buffers());
  workspace_ = Buffer<double>(0, ops_.buffers());
  cached_chunk_ = nullptr;
}

}  // namespace rlhf
