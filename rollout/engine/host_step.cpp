// Shape legend: T rows of a step, S of them sampled, D width, V vocabulary.
#include "rollout/engine/host_step.h"

#include <algorithm>
#include <cmath>

#include "rlhf/core/error.h"

namespace rlhf {
HostStep::HostStep(const ModelConfig& config, const Compute<float>& compute, const Arena& arena,
                   std::int64_t trunk_layers)
    : config_(config),
      trunk_layers_(trunk_layers),
      runner_(config, compute),
      store_(config, config.num_layers, arena, nullptr),
      trunk_(trunk_layers > 0 ? config.hidden_size : 0,
             store_.k(0) + KvStore<float>::block_bytes(config, config.num_layers) / sizeof(float),
             store_.block_stride()) {}

void HostStep::copy_blocks(const std::vector<BlockCache::Move>& moves) {
  for (const auto& [from, to] : moves) {
    store_.copy_block(from, to);
    if (trunk_.keeps()) trunk_.copy_block(from, to);
  }
}

void HostStep::step(const DecoderWeights<float>& weights, const Rows& rows, std::span<const Draw> draws,
                    std::span<DrawnToken> drawn) {
  run(weights, rows);
  draw(weights, draws, drawn);
}

void HostStep::run(const DecoderWeights<float>& weights, const Rows& rows) {
  x_.reserve_discard(to_size(rows.size() * config_.hidden_size));
  runner_.embed(weights, rows, x_.data());
  runner_.forward_layers(weights, rows, 0, trunk_layers_, store_, 0, x_.data(), nullptr);
  if (trunk_.keeps()) trunk_.keep(rows, x_.data());
  runner_.forward_layers(weights, rows, trunk_layers_, config_.num_layers, store_, 0, x_.data(), nullptr);
}

void HostStep::draw(const DecoderWeights<float>& weights, std::span<const Draw> draws,
                    std::span<DrawnToken> drawn) {
  const std::int64_t D = config_.hidden_size, V = config_.vocab_size;
  const auto count = static_cast<std::int64_t>(draws.size());
  hidden_.reserve_discard(to_size(count * D));
  logits_.reserve_discard(to_size(std::min(count, kHostLogitsRows) * V));
  for (std::int64_t i = 0; i < count; ++i)
    std::copy_n(x_.data() + draws[to_size(i)].row * D, D, hidden_.data() + i * D);
  runner_.final_norm(weights, count, hidden_.data(), hidden_.data(), nullptr, nullptr);
  for (std::int64_t begin = 0; begin < count; begin += kHostLogitsRows) {
    const std::int64_t n = std::min(kHostLogitsRows, count - begin);
    runner_.linear(weights.head, n, hidden_.data() + begin * D, logits_.data(), false);
    runner_.compute().for_rows(n, 20 * V, [&](std::int64_t i) {
      const auto& kernels = runner_.compute().table();
      float* row = logits_.data() + i * V;
      if (config_.final_softcap > 0) kernels.logits_row(row, V, 1, config_.final_softcap, 0);
      drawn[to_size(begin + i)] = draw_token(kernels, draws[to_size(begin + i)].context, {row, to_size(V)});
    });
  }
}

std::vector<float> HostStep::kept_states(std::span<const std::int32_t> table, std::int64_t length) const {
  return trunk_.keeps() ? trunk_.gather(table, length) : std::vector<float>();
}

// The row's K/V are only written once more.
std::string HostStep::first_not_finite(const DecoderWeights<float>& weights, const Rows& row) {
  std::vector<float> x(to_size(config_.hidden_size));
  return name_first_not_finite(config_.num_layers, [&](std::int64_t layers) {
    if (layers == 0)
      runner_.embed(weights, row, x.data());
    else
      runner_.forward_layers(weights, row, layers - 1, layers, store_, 0, x.data(), nullptr);
    return std::ranges::all_of(x, [](float value) { return std::isfinite(value); });
  });
}

std::string name_first_not_finite(std::int64_t num_layers,
                                  const std::function<bool(std::int64_t)>& is_finite) {
  if (!is_finite(0)) return "the embedding";
  for (std::int64_t layers = 1; layers <= num_layers; ++layers)
    if (!is_finite(layers)) return concat("layer ", layers, " of ", num_layers);
  return "the head";
}

}  // namespace rlhf
