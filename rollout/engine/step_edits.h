#pragma once

#include <bit>
#include <cstdint>
#include <map>
#include <span>
#include <vector>

#include "rlhf/kernels/device_kernels.h"
#include "rlhf/tensor/staging.h"
#include "rollout/engine/draw_token.h"

namespace rlhf {

/// What penalties, biases and constraints change in the rows of a step, as lists for an accelerator's `edit`:
/// it does to a row what draw_token does. Rows that are drawn on the host have none.
class StepEdits {
 public:
  explicit StepEdits(std::int64_t vocab_size) : places_(static_cast<std::size_t>(vocab_size)) {}

  void clear();
  /// Adds a row, in time that grows with its history and lists, not with the vocabulary.
  /// @throws InvalidArgument for a token outside the vocabulary.
  void add(const DrawContext& context);
  /// Whether the row that was added as number `row` changes.
  bool changes(std::size_t row) const { return rows_[row].changes(); }
  bool any() const { return !edits_.empty() || !allowed_.empty(); }
  std::span<const kernels::LogitEdit> edits_of(std::size_t row) const;
  std::span<const TokenId> allowed_of(std::size_t row) const;

  /// Adds the lists to an upload, with rows without edits behind them up to `padded`. Each row has the
  /// addresses of its own lists, so that the table of rows alone must keep its place.
  void stage(Staging& staging, std::int64_t padded);
  /// Fills the addresses in, once they are known and before the upload.
  void fill(Staging& staging) const;
  kernels::RowEdits* device(Staging& staging) const { return staging.device(staged_rows_); }

 private:
  // A part of edits_ or allowed_.
  struct Range {
    std::size_t begin = 0, count = 0;
  };
  struct Row {
    Range edits, allowed;
    bool changes() const { return edits.count > 0 || allowed.count > 0; }
  };

  std::size_t place_of(TokenId token) const;
  void allow(Row& row, std::span<const TokenId> tokens);
  kernels::LogitEdit& edit(Row& row, TokenId token);
  void add_penalties(Row& row, const DrawContext& context);

  std::vector<Row> rows_;
  std::vector<kernels::LogitEdit> edits_;
  std::vector<TokenId> allowed_;
  std::map<const TokenId*, Range> shared_;  ///< allowed tokens that rows of one request share
  /// [V] where a token lies in the list being made, if that is where it lies: a set without clearing.
  std::vector<std::uint32_t> places_;
  std::vector<TokenId> scratch_;
  Staging::Place<kernels::RowEdits> staged_rows_;
  Staging::Place<kernels::LogitEdit> staged_edits_;
  Staging::Place<TokenId> staged_allowed_;
};

/// Bytes on the device that edits of so many rows take, which have up to so many different tokens each.
constexpr std::uint64_t step_edits_bytes(std::int64_t rows, std::int64_t tokens) {
  return std::bit_ceil(static_cast<std::uint64_t>(rows * tokens) * sizeof(kernels::LogitEdit));
}

}  // namespace rlhf
