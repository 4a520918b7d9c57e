#include "rollout/engine/step_edits.h"

#include <limits>

#include "rlhf/core/error.h"

namespace rlhf {

void StepEdits::clear() {
  rows_.clear();
  edits_.clear();
  allowed_.clear();
  shared_.clear();
  staged_rows_ = {};
}

void StepEdits::add(const DrawContext& context) {
  Row& row = rows_.emplace_back();
  row.edits.begin = edits_.size();
  if (!draws_on_device(context)) return;
  const TokenLimits limits = limits_of(context, scratch_);
  allow(row, limits.allowed);
  for (const auto& [token, bias] : context.request.constraint.logit_bias) edit(row, token).bias = bias;
  add_penalties(row, context);
  for (const TokenId token : limits.forbidden)
    edit(row, token).bias = -std::numeric_limits<float>::infinity();
}

std::span<const kernels::LogitEdit> StepEdits::edits_of(std::size_t row) const {
  return std::span(edits_).subspan(rows_[row].edits.begin, rows_[row].edits.count);
}
std::span<const TokenId> StepEdits::allowed_of(std::size_t row) const {
  return std::span(allowed_).subspan(rows_[row].allowed.begin, rows_[row].allowed.count);
}

std::size_t StepEdits::place_of(TokenId token) const {
  RLHF_CHECK(token >= 0 && static_cast<std::size_t>(token) < places_.size(), "sampling: token ", token,
             " outside a vocabulary of ", places_.size());
  return static_cast<std::size_t>(token);
}

void StepEdits::allow(Row& row, std::span<const TokenId> tokens) {
  if (tokens.empty()) return;
  const bool is_shared = tokens.data() != scratch_.data();
  if (const auto found = shared_.find(tokens.data()); is_shared && found != shared_.end()) {
    row.allowed = found->second;
    return;
  }
  const std::size_t begin = allowed_.size();
  for (const TokenId token : tokens) {
    std::uint32_t& place = places_[place_of(token)];
    if (place >= begin && place < allowed_.size() && allowed_[place] == token) continue;
    place = static_cast<std::uint32_t>(allowed_.size());
    allowed_.push_back(token);
  }
  row.allowed = {begin, allowed_.size() - begin};
  if (is_shared) shared_.emplace(tokens.data(), row.allowed);
}

kernels::LogitEdit& StepEdits::edit(Row& row, TokenId token) {
  std::uint32_t& place = places_[place_of(token)];
  if (place >= row.edits.begin && place < edits_.size() && edits_[place].token == token) return edits_[place];
  place = static_cast<std::uint32_t>(edits_.size());
  ++row.edits.count;
  return edits_.emplace_back(kernels::LogitEdit{.token = token});
}

void StepEdits::add_penalties(Row& row, const DrawContext& context) {
  const SamplingOptions& sampling = context.request.sampling;
  if (sampling.presence_penalty != 0 || sampling.frequency_penalty != 0) {
    for (const TokenId token : context.generated) ++edit(row, token).penalty;  // a count for now
    for (kernels::LogitEdit& entry : std::span(edits_).subspan(row.edits.begin))
      if (entry.penalty > 0)
        entry.penalty = static_cast<float>(sampling.presence_penalty +
                                           sampling.frequency_penalty * static_cast<double>(entry.penalty));
  }
  if (sampling.repetition_penalty != 1)
    for (const TokenId token : context.tokens)
      edit(row, token).repetition = static_cast<float>(sampling.repetition_penalty);
}

void StepEdits::stage(Staging& staging, std::int64_t padded) {
  staged_rows_ = staging.add(std::vector<kernels::RowEdits>(static_cast<std::size_t>(padded)));
  staged_edits_ = staging.add(edits_);
  staged_allowed_ = staging.add(allowed_);
}

void StepEdits::fill(Staging& staging) const {
  kernels::RowEdits* const to = staging.host(staged_rows_);
  for (std::size_t i = 0; i < rows_.size(); ++i) {
    const auto& [edits, allowed] = rows_[i];
    to[i] = {staging.device(staged_edits_) + edits.begin, static_cast<std::int64_t>(edits.count),
             staging.device(staged_allowed_) + allowed.begin, static_cast<std::int64_t>(allowed.count)};
  }
}

}  // namespace rlhf
