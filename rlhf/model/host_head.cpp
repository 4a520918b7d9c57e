#include "rlhf/model/host_head.h"

#include <algorithm>

#include "rlhf/core/error.h"

namespace rlhf {
namespace {

// Logits of one chunk. 256 rows of a 49152-word vocabulary: large enough for efficient GEMMs and for the
// responses of most micro-batches, whose logits then need not be computed again in backward.
constexpr std::size_t kHostLogitsBytes = std::size_t{48} << 20;

}  // namespace

template <class T>
HostHead<T>::HostHead(const ModelConfig& config, DeviceOps<T> ops, const Compute<T>& compute)
    : config_(config), ops_(std::move(ops)), compute_(compute) {
  release();
}

template <class T>
std::int64_t HostHead<T>::chunk_rows(const ModelConfig& config) {
  return std::max<std::int64_t>(8,
                                static_cast<std::int64_t>(kHostLogitsBytes / sizeof(T)) / config.vocab_size);
}

template <class T>
void HostHead<T>::begin(const T* hidden, std::int64_t rows, bool keeps_gradient) {
  hidden_ = hidden;
  cached_chunk_ = nullptr;
  if (!keeps_gradient) return;
  dhidden_.reserve_discard(to_size(rows * config_.hidden_size));
  std::fill_n(dhidden_.data(), rows * config_.hidden_size, T(0));
}

template <class T>
void HostHead<T>::chunk_logits(DecoderRunner<T>& runner, const DecoderWeights<T>& weights,
                               std::span<const TokenTarget> chunk) {
  const std::int64_t n = static_cast<std::int64_t>(chunk.size()), D = config_.hidden_size,
                     V = config_.vocab_size;
  gathered_.reserve_discard(to_size(n * D));
  logits_.reserve_discard(to_size(n * V));
  for (std::int64_t i = 0; i < n; ++i) {
    RLHF_CHECK(chunk[to_size(i)].target >= 0 && chunk[to_size(i)].target < V, "token id ",
               chunk[to_size(i)].target, " is outside the vocabulary of ", V);
    std::copy_n(hidden_ + chunk[to_size(i)].row * D, D, gathered_.data() + i * D);
  }
  runner.linear(weights.head, n, gathered_.data(), logits_.data(), false);
}

template <class T>
void HostHead<T>::token_logprobs(DecoderRunner<T>& runner, const DecoderWeights<T>& weights,
                                 std::span<const TokenTarget> targets, double temperature,
                                 std::span<T> logprobs, std::span<T> entropies) {
  const std::int64_t V = config_.vocab_size, chunk = chunk_rows(config_);
  logits_rows_.resize(targets.size());
  for (std::int64_t begin = 0; begin < static_cast<std::int64_t>(targets.size()); begin += chunk) {
    const auto part =
        targets.subspan(to_size(begin), std::min(to_size(chunk), targets.size() - to_size(begin)));
    chunk_logits(runner, weights, part);
    compute_.for_rows(static_cast<std::int64_t>(part.size()), 20 * V, [&](std::int64_t i) {
      const auto row = compute_.table().logits_row(logits_.data() + i * V, V, 1 / temperature,
                                                   config_.final_softcap, part[to_size(i)].target);
      logits_rows_[to_size(begin + i)] = row;
      logprobs[to_size(begin + i)] = static_cast<T>(row.logprob);
      if (!entropies.empty()) entropies[to_size(begin + i)] = static_cast<T>(row.entropy);
    });
    cached_chunk_ = part.data();
  }
}

template <class T>
void HostHead<T>::token_logprobs_backward(DecoderRunner<T>& runner, const DecoderWeights<T>& weights,
                                          std::span<const TokenTarget> targets, double temperature,
                                          std::span<const T> dlogprobs, std::span<const T> dentropies) {
  const std::int64_t V = config_.vocab_size, chunk = chunk_rows(config_);
  RLHF_CHECK(logits_rows_.size() == targets.size(), "token_logprobs_backward: call token_logprobs first");
  // Last chunk first: its logits are still there.
  const std::int64_t count = static_cast<std::int64_t>(targets.size());
  for (std::int64_t begin = count == 0 ? -1 : (count - 1) / chunk * chunk; begin >= 0; begin -= chunk) {
    const auto part =
        targets.subspan(to_size(begin), std::min(to_size(chunk), targets.size() - to_size(begin)));
    const std::int64_t n = static_cast<std::int64_t>(part.size());
    const bool cached = cached_chunk_ == part.data();
    cached_chunk_ = nullptr;
    if (!cached) chunk_logits(runner, weights, part);
    compute_.for_rows(n, 20 * V, [&](std::int64_t i) {
      T* logits = logits_.data() + i * V;
      const auto& table = compute_.table();
      if (!cached && config_.final_softcap > 0)
        table.logits_row(logits, V, 1 / temperature, config_.final_softcap, part[to_size(i)].target);
      table.logits_row_grad(logits, V, 1 / temperature, config_.final_softcap, part[to_size(i)].target,
                            logits_rows_[to_size(begin + i)],
                            static_cast<double>(dlogprobs[to_size(begin + i)]),
                            dentropies.empty() ? 0 : static_cast<double>(dentropies[to_size(begin + i)]));
    });
    add_logits_gradient(runner, weights, part);
  }
}

// From d loss / d logits of a chunk, which is in logits_, to the head and the hidden states.
template <class T>
void HostHead<T>::add_logits_gradient(DecoderRunner<T>& runner, const DecoderWeights<T>& weights,
                                      std::span<const TokenTarget> chunk) {
  const std::int64_t n = static_cast<std::int64_t>(chunk.size()), D = config_.hidden_size;
  dgathered_.reserve_discard(to_size(n * D));
  runner.linear_backward(weights.head, n, gathered_.data(), logits_.data(), dgathered_.data(), false);
  for (std::int64_t i = 0; i < n; ++i)
    compute_.table().add(dhidden_.data() + chunk[to_size(i)].row * D, dgathered_.data() + i * D, D);
}

// Calls fn(index of its first row, targets) for chunks of `rows` while their logits are in logits_.
template <class T>
template <class Fn>
void HostHead<T>::for_logits_chunks(DecoderRunner<T>& runner, const DecoderWeights<T>& weights,
                                    std::span<const std::int64_t> rows, const Fn& fn) {
  std::vector<TokenTarget> targets;
  for (const std::int64_t row : rows) targets.push_back({row, 0});
  cached_chunk_ = nullptr;
  const auto chunk = to_size(chunk_rows(config_));
  for (std::size_t begin = 0; begin < rows.size(); begin += chunk) {
    const auto part =
        std::span<const TokenTarget>(targets).subspan(begin, std::min(chunk, rows.size() - begin));
    chunk_logits(runner, weights, part);
    fn(begin, part);
  }
}

template <class T>
double log_softmax(const Compute<T>& compute, std::span<T> logits, double softcap, std::span<T> log_probs) {
  const double lse =
      compute.table().logits_row(logits.data(), static_cast<std::int64_t>(logits.size()), 1, softcap, 0).lse;
  for (std::size_t v = 0; v < logits.size(); ++v)
    log_probs[v] = static_cast<T>(static_cast<double>(logits[v]) - lse);
  return lse;
}

template <class T>
void distribution_gradient(const Compute<T>& compute, std::size_t i, std::span<T> logits, double softcap,
                           const DistributionGradient<T>& to_gradient) {
  std::vector<T> log_probs(logits.size());
  const double lse = log_softmax(compute, logits, softcap, std::span(log_probs));
  to_gradient(i, log_probs, logits);
  if (softcap <= 0) return;
  for (std::size_t v = 0; v < logits.size(); ++v) {
    const double capped = (static_cast<double>(log_probs[v]) + lse) / softcap;
    logits[v] = static_cast<T>(static_cast<double>(logits[v]) * (1 - capped * capped));
  }
}

void check_distributions(std::size_t rows, std::int64_t V, std::size_t room) {
  RLHF_CHECK(room == rows * to_size(V), "log_distributions: room for ", room, " numbers, needed ",
             rows * to_size(V));
}

template <class T>
void HostHead<T>::distributions_backward(DecoderRunner<T>& runner, const DecoderWeights<T>& weights,
                                         std::span<const std::int64_t> rows,
                                         const DistributionGradient<T>& to_gradient) {
  const std::int64_t V = config_.vocab_size;
  for_logits_chunks(runner, weights, rows, [&](std::size_t begin, std::span<const TokenTarget> part) {
    compute_.for_rows(static_cast<std::int64_t>(part.size()), 20 * V, [&](std::int64_t i) {
      distribution_gradient<T>(compute_, begin + to_size(i), {logits_.data() + i * V, to_size(V)},
                               config_.final_softcap, to_gradient);
    });
    add_logits_gradient(runner, weights, part);
  });
}

template <class T>
void HostHead<T>::log_distributions(DecoderRunner<T>& runner, const DecoderWeights<T>& weights,
                                    std::span<const std::int64_t> rows, std::span<T> out) {
  const std::int64_t V = config_.vocab_size;
  check_distributions(rows.size(), V, out.size());
  for_logits_chunks(runner, weights, rows, [&](std::size_t begin, std::span<const TokenTarget> part) {
    compute_.for_rows(static_cast<std::int64_t>(part.size()), 20 * V, [&](std::int64_t i) {
      log_softmax(compute_, std::span(logits_.data() + i * V, to_size(V)), config_.final_softcap,
                  out.subspan((begin + to_size(i)) * to_size(V), to_size(V)));
    });
  });
}

template <class T>
std::int64_t num_labels(const DecoderWeights<T>& weights, std::size_t rows, std::size_t values) {
  if (rows == 0) return 1;
  const auto labels = static_cast<std::int64_t>(values / rows);
  RLHF_CHECK(values % rows == 0 && labels >= 1 && labels <= weights.head.N, "scalar_outputs: ", values,
             " values for ", rows, " rows of a head with ", weights.head.N, " labels");
  return labels;
}

template <class T>
void HostHead<T>::scalar_outputs(DecoderRunner<T>&, const DecoderWeights<T>& weights,
                                 std::span<const std::int64_t> rows, std::span<T> values) {
  const std::int64_t D = config_.hidden_size, labels = num_labels(weights, rows.size(), values.size());
  compute_.for_rows(static_cast<std::int64_t>(values.size()), 2 * D, [&](std::int64_t i) {
    const T* h = hidden_ + rows[to_size(i / labels)] * D;
    const T* w = weights.head.weight + i % labels * D;
    T sum = 0;
    for (std::int64_t d = 0; d < D; ++d) sum += h[d] * w[d];
    values[to_size(i)] = sum;
  });
}

template <class T>
void HostHead<T>::scalar_outputs_backward(DecoderRunner<T>&, const DecoderWeights<T>& weights,
                                          std::span<const std::int64_t> rows, std::span<const T> dvalues) {
  const std::int64_t D = config_.hidden_size, labels = num_labels(weights, rows.size(), dvalues.size());
  for (std::size_t i = 0; i < dvalues.size(); ++i) {
    const std::int64_t row = rows[i / to_size(labels)], label = static_cast<std::int64_t>(i) % labels;
    const T* h = hidden_ + row * D;
    T* dh = dhidden_.data() + row * D;
    const T* w = weights.head.weight + label * D;
    for (std::int64_t d = 0; d < D; ++d) dh[d] += dvalues[i] * w[d];
    if (T* dw = weights.head.dweight)
      for (std::int64_t d = 0; d < D; ++d) dw[label * D + d] += dvalues[i] * h[d];
  }
}

template <class T>
std::size_t HostHead<T>::held_bytes() const {
  return dhidden_.bytes() + gathered_.bytes() + logits_.bytes() + dgathered_.bytes();
}

template <class T>
void HostHead<T>::release() {
  for (Buffer<T>* b : {&dhidden_, &gathered_, &logits_, &dgathered_}) *b = Buffer<T>(0, ops_.buffers());
  cached_chunk_ = nullptr;
}

template double log_softmax(const Compute<float>&, std::span<float>, double, std::span<float>);
template void distribution_gradient(const Compute<float>&, std::size_t, std::span<float>, double,
                                    const DistributionGradient<float>&);
template class HostHead<float>;
template class HostHead<double>;
template std::int64_t num_labels(const DecoderWeights<float>&, std::size_t, std::size_t);
template std::int64_t num_labels(const DecoderWeights<double>&, std::size_t, std::size_t);
template std::int64_t num_labels(const DecoderWeights<Bfloat16>&, std::size_t, std::size_t);

}  // namespace rlhf
