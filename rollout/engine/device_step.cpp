// Shape legend: T rows of a step, n draws of a chunk, D width, V vocabulary.
#include "rollout/engine/device_step.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "rlhf/core/error.h"
#include "rlhf/model/resident_weights.h"
#include "rollout/engine/host_step.h"

namespace rlhf {
namespace {

// Recorded steps that are kept; a long run of changing addresses does not pile them up.
constexpr std::size_t kMostRecordings = 256;

kernels::DrawKey key_of(const DrawContext& context) {
  const GenerationRequest& request = context.request;
  const bool greedy = is_greedy(request.sampling);
  return {request.seed,
          request.prompt_id,
          context.sample_index,
          static_cast<std::uint32_t>(context.generated.size()),
          greedy ? 1 : 1 / request.sampling.temperature,
          greedy};
}

kernels::RowFilter filter_of(const DrawContext& context) {
  const SamplingOptions& sampling = context.request.sampling;
  kernels::RowFilter filter;
  if (is_greedy(sampling) || !draws_on_device(context)) return filter;
  filter.top_k = static_cast<std::int64_t>(std::min<std::size_t>(sampling.top_k, 1U << 30));
  filter.top_p = sampling.top_p;
  if (sampling.min_p) filter.log_min_p = std::log(*sampling.min_p);
  return filter;
}

}  // namespace

std::int64_t padded_decode_rows(std::int64_t rows) {
  if (rows <= 8) return static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(rows)));
  const std::int64_t unit = rows <= 64 ? 8 : 32;
  return kernels::ceil_div(rows, unit) * unit;
}

// Attention's grid has a part of keys for every power of two of them.
std::int64_t padded_decode_keys(std::int64_t max_keys) {
  return kernels::kKeysPerPart * static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(
                                     kernels::ceil_div(max_keys, kernels::kKeysPerPart))));
}

DeviceStep::DeviceStep(const ModelConfig& config, const Compute<float>& compute, const Arena& arena,
                       KvFormat kv)
    : config_(config),
      compute_(compute),
      ops_(*compute.accelerator()->kernels, *compute.accelerator()->memory),
      runner_(config, ops_),
      store_(config, config.num_layers, arena, ops_.memory(), kv),
      staging_(*ops_.memory()),
      edits_(config.vocab_size),
      x_(0, ops_.memory()),
      hidden_(0, ops_.memory()),
      logits_(0, ops_.memory()),
      workspace_(0, ops_.memory()),
      results_(0, ops_.memory()) {}

void DeviceStep::copy_blocks(const std::vector<BlockCache::Move>& moves) {
  for (const auto& [from, to] : moves) store_.copy_block(from, to);
}

void DeviceStep::step(const DecoderWeights<float>& host_weights, const Rows& rows,
                      std::span<const Draw> draws, std::span<DrawnToken> drawn) {
  const DecoderWeights<T>& weights = resident_weights(host_weights);
  RLHF_CHECK(!weights.stream, "rollout: a model whose layers stay on the host is not for generating with");
  if (only_decodes(rows, draws)) return decode(weights, rows, draws, drawn);
  run(weights, rows);
  for (std::size_t begin = 0; begin < draws.size(); begin += kDeviceLogitsRows) {
    const std::size_t n = std::min(to_size(kDeviceLogitsRows), draws.size() - begin);
    const auto part = draws.subspan(begin, n);
    const auto count = static_cast<std::int64_t>(n);
    stage_draws(part, count);
    reserve(count);
    queue_draws(weights, count);
    runner_.count_head(weights, count, 1);
    read_back(part, count, drawn.subspan(begin, n));
  }
}

void DeviceStep::run(const DecoderWeights<T>& weights, const Rows& rows) {
  x_.reserve_discard(to_size(rows.size() * config_.hidden_size));
  runner_.embed(weights, rows, x_.data());
  runner_.forward_layers(weights, rows, 0, config_.num_layers, store_, 0, x_.data(), nullptr);
}

// ---- steps that only decode ----

// Many guesses for one sample are a tile, and kernels are then queued for as many tiles as there are.
bool DeviceStep::only_decodes(const Rows& rows, std::span<const Draw> draws) const {
  return rows.size() == static_cast<std::int64_t>(draws.size()) && rows.size() <= kDeviceLogitsRows &&
         rows.copy_offsets.empty() && find_tiles(rows).tiles.empty();
}

void DeviceStep::decode(const DecoderWeights<T>& weights, const Rows& rows, std::span<const Draw> draws,
                        std::span<DrawnToken> drawn) {
  const std::int64_t count = padded_decode_rows(rows.size());
  // What a repeated row writes is what the row writes itself.
  padded_ = rows;
  padded_.tokens.resize(to_size(count), rows.tokens.back());
  padded_.positions.resize(to_size(count), rows.positions.back());
  padded_.tables.resize(to_size(count), rows.tables.back());
  const std::int64_t max_keys =
      padded_decode_keys(1 + *std::max_element(rows.positions.begin(), rows.positions.end()));
  stage_draws(draws, count);
  reserve(count);
  x_.reserve_discard(to_size(count * config_.hidden_size));
  runner_.upload(padded_, max_keys);

  StepKey key{count, max_keys, has_filters_, edits_.any(), runner_.scratch_addresses()};
  for (const void* address :
       {static_cast<const void*>(weights.embedding), static_cast<const void*>(weights.final_norm.weight),
        static_cast<const void*>(weights.head.weight), static_cast<const void*>(x_.data()),
        static_cast<const void*>(hidden_.data()), static_cast<const void*>(logits_.data()),
        static_cast<const void*>(workspace_.data()), static_cast<const void*>(results_.data()),
        static_cast<const void*>(staging_.device(keys_)),
        static_cast<const void*>(staging_.device(filters_))})
    key.addresses.push_back(address);
  if (edits_.any()) key.addresses.push_back(edits_.device(staging_));
  if (recorded_.size() >= kMostRecordings) recorded_.clear();
  RecordedStep& recorded = recorded_[key];
  const auto work = [&] {
    runner_.embed(weights, padded_, x_.data(), DecoderRunner<T>::Upload::kUnlessThere);
    runner_.forward_layers(weights, padded_, 0, config_.num_layers, store_, 0, x_.data(), nullptr);
    queue_draws(weights, count);
  };
  // Work that makes or moves a buffer changes the key, and begins anew under the next one.
  if (recorded.runs++ > 0 && !recorded.recording) recorded.recording = ops_.memory()->record(work);
  if (recorded.recording) {
    recorded.recording->replay();
    runner_.count_layers(weights, rows);
  } else {
    work();
  }
  runner_.count_head(weights, rows.size(), 1);
  read_back(draws, count, drawn);
}

// ---- draws ----

// Rows, keys and filters of the draws, the last one repeated up to `padded`; edits, which it lacks then.
void DeviceStep::stage_draws(std::span<const Draw> draws, std::int64_t padded) {
  std::vector<std::int64_t> rows;
  std::vector<kernels::DrawKey> keys;
  std::vector<kernels::RowFilter> filters;
  edits_.clear();
  for (const Draw& draw : draws) {
    rows.push_back(draw.row);
    keys.push_back(key_of(draw.context));
    filters.push_back(filter_of(draw.context));
    edits_.add(draw.context);
  }
  has_filters_ = std::ranges::any_of(filters, &kernels::RowFilter::removes);
  rows.resize(to_size(padded), rows.back());
  keys.resize(to_size(padded), keys.back());
  filters.resize(to_size(padded), filters.back());
  staging_.clear();
  staged_rows_ = staging_.add(rows);
  keys_ = staging_.add(keys);
  filters_ = staging_.add(filters);
  if (edits_.any()) {
    edits_.stage(staging_, padded);
    staging_.reserve_spare();
    edits_.fill(staging_);
  }
  staging_.reserve();
  staging_.upload();
}

void DeviceStep::reserve(std::int64_t draws) {
  hidden_.reserve_discard(to_size(draws * config_.hidden_size));
  logits_.reserve_discard(to_size(draws * config_.vocab_size));
  workspace_.reserve_discard(to_size(kernels::logits_workspace(draws, config_.vocab_size)));
  results_.reserve_discard(to_size(draws) * kDrawResultBytes);
}

DeviceStep::Results DeviceStep::results(std::byte* memory, std::int64_t count) {
  auto* const statistics = reinterpret_cast<kernels::LogitsRow*>(memory);
  auto* const lse = reinterpret_cast<double*>(statistics + count);
  return {statistics, lse, lse + count, reinterpret_cast<TokenId*>(lse + 2 * count)};
}

// From x_ to the results; leaves logits_[n, V] soft-capped, edited and filtered.
void DeviceStep::queue_draws(const DecoderWeights<T>& weights, std::int64_t count) {
  const std::int64_t D = config_.hidden_size, V = config_.vocab_size;
  const LinearWeights<T>& head = weights.head;
  const auto [statistics, unfiltered_lse, unedited_logprobs, tokens] = results(results_.data(), count);
  ops_.gather_rows(hidden_.data(), x_.data(), staging_.device(staged_rows_), count, D);
  runner_.final_norm(weights, count, hidden_.data(), hidden_.data(), nullptr, nullptr);
  ops_.linear_wide({hidden_.data(), D, head.weight, head.bias, logits_.data(), V, D, false}, count, V);
  if (config_.final_softcap > 0) {  // in place; its statistics are those of token 0
    ops_.zero(tokens, to_size(count) * sizeof(TokenId));
    ops_.logits({logits_.data(), V, 1, config_.final_softcap, tokens, statistics, nullptr, nullptr,
                 workspace_.data()},
                count);
  }
  const kernels::EditArgs<T> edits{logits_.data(),         V,
                                   staging_.device(keys_), edits_.device(staging_),
                                   unedited_logprobs,      workspace_.data()};
  if (edits_.any()) ops_.edit(edits, count);
  if (has_filters_)
    ops_.filter({logits_.data(), V, staging_.device(keys_), staging_.device(filters_), unfiltered_lse},
                count);
  ops_.draw({logits_.data(), V, staging_.device(keys_), tokens, statistics, workspace_.data()}, count);
  if (edits_.any()) ops_.unedited_logprobs(edits, tokens, count);
}

void DeviceStep::read_back(std::span<const Draw> draws, std::int64_t count, std::span<DrawnToken> drawn) {
  host_results_.resize(to_size(count) * kDrawResultBytes);
  ops_.download(host_results_.data(), results_.data(), host_results_.size());
  const auto [statistics, unfiltered_lse, unedited_logprobs, tokens] = results(host_results_.data(), count);
  for (std::size_t i = 0; i < draws.size(); ++i) {
    DrawnToken& out = drawn[i];
    out = {};
    out.token = tokens[i];
    out.log_prob = out.raw_log_prob = static_cast<float>(statistics[i].logprob);
    if (has_filters_ && filter_of(draws[i].context).removes())
      out.raw_log_prob = static_cast<float>(statistics[i].logprob + statistics[i].lse - unfiltered_lse[i]);
    if (edits_.changes(i)) out.raw_log_prob = static_cast<float>(unedited_logprobs[i]);
    if (is_greedy(draws[i].context.request.sampling))
      out.log_prob = out.raw_log_prob;  // as draw_token
    else
      out.entropy = static_cast<float>(statistics[i].entropy);
  }
  draw_others_on_host(draws, drawn);
}

// Row by row: how a row is drawn does not depend on its neighbours.
void DeviceStep::draw_others_on_host(std::span<const Draw> draws, std::span<DrawnToken> drawn) {
  const std::int64_t V = config_.vocab_size;
  std::vector<std::size_t> others;
  for (std::size_t i = 0; i < draws.size(); ++i)
    if (!draws_on_device(draws[i].context)) others.push_back(i);
  if (others.empty()) return;
  host_logits_.resize(others.size() * to_size(V));
  for (std::size_t k = 0; k < others.size(); ++k)
    ops_.download(host_logits_.data() + k * to_size(V), logits_.data() + others[k] * to_size(V),
                  to_size(V) * sizeof(float));
  compute_.for_rows(static_cast<std::int64_t>(others.size()), 20 * V, [&](std::int64_t k) {
    const std::size_t i = others[to_size(k)];
    drawn[i] = draw_token(compute_.table(), draws[i].context, {host_logits_.data() + k * V, to_size(V)});
  });
}

std::string DeviceStep::first_not_finite(const DecoderWeights<float>& host_weights, const Rows& row) {
  const DecoderWeights<T>& weights = resident_weights(host_weights);
  std::vector<T> x(to_size(config_.hidden_size));
  x_.reserve_discard(x.size());
  return name_first_not_finite(config_.num_layers, [&](std::int64_t layers) {
    if (layers == 0)
      runner_.embed(weights, row, x_.data());
    else
      runner_.forward_layers(weights, row, layers - 1, layers, store_, 0, x_.data(), nullptr);
    ops_.download(x.data(), x_.data(), x.size() * sizeof(T));
    return std::ranges::all_of(x, [](T value) { return std::isfinite(to_float(value)); });
  });
}

std::size_t DeviceStep::workspace_bytes() const {
  return runner_.scratch_bytes() + x_.bytes() + hidden_.bytes() + logits_.bytes() + workspace_.bytes() +
         results_.bytes() + staging_.bytes();
}

}  // namespace rlhf
