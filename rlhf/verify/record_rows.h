#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "rlhf/model/decoder.h"
#include "rlhf/model/sequence_pass.h"
#include "rlhf/verify/golden_case.h"

namespace rlhf::verify {

/// Ragged rows and the padded matrix of a record: row b fills the first columns of row b, flat positions
/// [offsets[b], offsets[b + 1]).
struct PaddedRows {
  std::size_t width = 0;
  std::vector<std::size_t> offsets{0};

  std::size_t rows() const { return offsets.size() - 1; }
  std::size_t length(std::size_t row) const { return offsets[row + 1] - offsets[row]; }
  /// Appends a row. @throws InvalidArgument when it is wider than the matrix.
  void add_row(std::size_t length);

  /// Flat values in row-major order of the matrix, `fill` beyond the rows.
  std::vector<double> pad(std::span<const double> flat, double fill) const;
  /// The matrix without what lies beyond the rows. @throws InvalidArgument on another shape.
  std::vector<double> strip(const Tensor& matrix) const;
  /// The first positions of each row of `wide` (flat, in rows of another length that is not shorter).
  std::vector<double> narrow(const PaddedRows& wide, std::span<const double> flat) const;
  /// The inverse: rows of this layout with the values of the shorter ones of `narrow` first, then 0.
  std::vector<double> widen(const PaddedRows& narrow, std::span<const double> flat) const;

  /// Layout of some of the rows, and their values.
  PaddedRows select(const std::vector<std::size_t>& chosen) const;
  template <class V>
  std::vector<V> take(const std::vector<V>& flat, const std::vector<std::size_t>& chosen) const {
    std::vector<V> values;
    for (const std::size_t row : chosen)
      values.insert(values.end(), flat.begin() + static_cast<std::ptrdiff_t>(offsets[row]),
                    flat.begin() + static_cast<std::ptrdiff_t>(offsets[row + 1]));
    return values;
  }
};

/// A prompt and its response without padding.
struct RecordResponse {
  std::vector<TokenId> prompt;
  std::vector<TokenId> response;
};

/// Token ids of one row of a matrix.
std::vector<TokenId> token_row(const Tensor& matrix, std::size_t row);

/// Sequences of one forward pass, with all tokens of the responses as targets. Keeps its tokens.
class SequenceBatch {
 public:
  explicit SequenceBatch(const std::vector<RecordResponse>& responses);

  const PackedRows& packed() const { return packed_; }
  const std::vector<TokenTarget>& targets() const { return targets_; }
  /// Row of the hidden state before response token `t` of sequence `s`; t = length: after the last one.
  std::int64_t row_before(std::size_t s, std::size_t t) const {
    return packed_.row(s, prompt_lengths_[s] + static_cast<std::int64_t>(t) - 1);
  }

 private:
  std::vector<std::vector<TokenId>> tokens_;
  PackedRows packed_;
  std::vector<std::int64_t> prompt_lengths_;
  std::vector<TokenTarget> targets_;
};

}  // namespace rlhf::verify
