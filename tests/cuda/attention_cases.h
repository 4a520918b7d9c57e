#pragma once
// Passes over sequences with common heads, with q, k and v of every row, and what attention gives in plain
// loops.

#include <algorithm>

#include "rlhf/model/device_rows.h"
#include "rlhf/model/packed_rows.h"
#include "tests/cuda/devices.h"

namespace rlhf {

struct AttentionShape {
  std::int64_t N, G, H;
  std::int64_t window = 0;
  double softcap = 0;

  double scale() const { return 1 / std::sqrt(static_cast<double>(H)); }
  std::int64_t block_stride() const { return G * H * kernels::kBlockTokens; }
};

inline std::size_t index_of(std::int64_t i) {
  return static_cast<std::size_t>(i);
}

/// Sequences as lengths of a common head and a tail of their own.
struct Lengths {
  std::int64_t head, tail;
};

class AttentionCase {
 public:
  explicit AttentionCase(const std::vector<Lengths>& lengths)
      : sequences_(make_sequences(lengths)),
        packed_(std::vector<std::span<const TokenId>>(sequences_.begin(), sequences_.end())) {
    for (std::size_t s = 0; s < sequences_.size(); ++s)
      for (std::size_t p = 0; p < sequences_[s].size(); ++p) {
        const auto row = index_of(packed_.row(s, static_cast<std::int64_t>(p)));
        if (keys_of_.size() <= row) keys_of_.resize(row + 1);
        if (!keys_of_[row].empty()) continue;
        for (std::size_t k = 0; k <= p; ++k)
          keys_of_[row].push_back(packed_.row(s, static_cast<std::int64_t>(k)));
      }
  }
  const PackedRows& packed() const { return packed_; }
  std::int64_t rows() const { return packed_.rows().size(); }
  /// The rows from `first` on, as a pass of their own.
  Rows rows_from(std::int64_t first) const {
    const Rows& all = packed_.rows();
    Rows rows;
    rows.tokens.assign(all.tokens.begin() + first, all.tokens.end());
    rows.positions.assign(all.positions.begin() + first, all.positions.end());
    rows.tables.assign(all.tables.begin() + first, all.tables.end());
    return rows;
  }
  /// Rows whose keys row t sees, in a layer with this window.
  std::vector<std::int64_t> keys(std::int64_t t, std::int64_t window) const {
    const auto& all = keys_of_[index_of(t)];
    const std::size_t count = window > 0 ? std::min(all.size(), index_of(window)) : all.size();
    return {all.end() - static_cast<std::ptrdiff_t>(count), all.end()};
  }

  /// Puts the k (or v) of every row, [T, G, H], into blocks as `offset` lays them out. Slots without a token
  /// hold `filler`.
  template <class T, class Offset>
  std::vector<T> blocks(const std::vector<T>& values, const AttentionShape& shape, double filler,
                        const Offset& offset) const {
    std::vector<T> out(index_of(packed_.num_blocks() * shape.block_stride()), round_to<T>(filler));
    for_slots([&](std::int64_t t, std::int64_t block, std::int64_t slot) {
      for (std::int64_t g = 0; g < shape.G; ++g)
        for (std::int64_t h = 0; h < shape.H; ++h)
          out[index_of(kernels::head_offset(block, shape.block_stride(), g, shape.H) + offset(slot, h))] =
              values[index_of((t * shape.G + g) * shape.H + h)];
    });
    return out;
  }
  /// Calls fn(row, block, slot) for every place that holds a row's key.
  template <class Fn>
  void for_slots(const Fn& fn) const {
    const Rows& rows = packed_.rows();
    for (std::size_t t = 0; t < rows.tokens.size(); ++t) {
      const std::int64_t position = rows.positions[t], slot = position % kernels::kBlockTokens;
      fn(static_cast<std::int64_t>(t), rows.tables[t][position / kernels::kBlockTokens], slot);
      for (std::size_t i = rows.copy_offsets[t]; i < rows.copy_offsets[t + 1]; ++i)
        fn(static_cast<std::int64_t>(t), rows.copies[i], slot);
    }
  }

 private:
  static std::vector<std::vector<TokenId>> make_sequences(const std::vector<Lengths>& lengths) {
    std::vector<std::vector<TokenId>> sequences;
    for (std::size_t s = 0; s < lengths.size(); ++s) {
      std::vector<TokenId> tokens(index_of(lengths[s].head), 1);
      tokens.insert(tokens.end(), index_of(lengths[s].tail), static_cast<TokenId>(s + 2));
      sequences.push_back(tokens);
    }
    return sequences;
  }

  std::vector<std::vector<TokenId>> sequences_;
  PackedRows packed_;
  std::vector<std::vector<std::int64_t>> keys_of_;
};

/// q [T, N, H], k and v [T, G, H] of every row, and attention over them in double.
struct AttentionReference {
  const AttentionCase* rows;
  AttentionShape shape;
  std::vector<double> q, k, v;

  struct Head {
    std::vector<std::int64_t> keys;
    std::vector<double> scores, p;
    double lse = 0;
  };
  const double* key(std::int64_t t, std::int64_t g) const { return k.data() + (t * shape.G + g) * shape.H; }
  const double* value(std::int64_t t, std::int64_t g) const { return v.data() + (t * shape.G + g) * shape.H; }
  static double dot(const double* a, const double* b, std::int64_t count) {
    double sum = 0;
    for (std::int64_t i = 0; i < count; ++i) sum += a[i] * b[i];
    return sum;
  }
  Head head(std::int64_t t, std::int64_t n) const {
    const std::int64_t g = n / (shape.N / shape.G);
    Head head;
    head.keys = rows->keys(t, shape.window);
    double largest = -INFINITY, total = 0;
    for (const std::int64_t j : head.keys) {
      double score = dot(q.data() + (t * shape.N + n) * shape.H, key(j, g), shape.H) * shape.scale();
      if (shape.softcap > 0) score = shape.softcap * std::tanh(score / shape.softcap);
      head.scores.push_back(score);
      largest = std::max(largest, score);
    }
    for (const double score : head.scores) total += std::exp(score - largest);
    head.lse = largest + std::log(total);
    for (const double score : head.scores) head.p.push_back(std::exp(score - head.lse));
    return head;
  }
  /// out [T, N, H], and lse [T, N].
  std::vector<double> forward(std::vector<double>* lse) const {
    std::vector<double> out(q.size());
    for (std::int64_t t = 0; t < rows->rows(); ++t)
      for (std::int64_t n = 0; n < shape.N; ++n) {
        const Head at = head(t, n);
        if (lse) lse->push_back(at.lse);
        for (std::size_t j = 0; j < at.keys.size(); ++j)
          for (std::int64_t h = 0; h < shape.H; ++h)
            out[index_of((t * shape.N + n) * shape.H + h)] +=
                at.p[j] * value(at.keys[j], n / (shape.N / shape.G))[h];
      }
    return out;
  }
};

}  // namespace rlhf
