#pragma once
// Passes over sequences with common heads, with q, k and v of every row, and what attention gives in plain
// loops.

#include <algorithm>
#include <tuple>

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
  /// out [T, N, H], lse [T, N], and what out would be if all values were positive.
  std::vector<double> forward(std::vector<double>* lse, std::vector<double>* magnitudes = nullptr) const {
    std::vector<double> out(q.size());
    if (magnitudes) magnitudes->resize(q.size());
    for (std::int64_t t = 0; t < rows->rows(); ++t)
      for (std::int64_t n = 0; n < shape.N; ++n) {
        const Head at = head(t, n);
        if (lse) lse->push_back(at.lse);
        for (std::size_t j = 0; j < at.keys.size(); ++j)
          for (std::int64_t h = 0; h < shape.H; ++h) {
            const double term = at.p[j] * value(at.keys[j], n / (shape.N / shape.G))[h];
            const std::size_t to = index_of((t * shape.N + n) * shape.H + h);
            out[to] += term;
            if (magnitudes) (*magnitudes)[to] += std::abs(term);
          }
      }
    return out;
  }

  struct Gradients {
    std::vector<double> dq, dk, dv;  ///< [T, N, H], [T, G, H]
  };
  /// @param out what the kernel takes as output, rounded: delta must be computed from the same
  /// @param magnitudes sums of the terms' absolute values
  Gradients backward(const std::vector<double>& out, const std::vector<double>& dout,
                     Gradients* magnitudes = nullptr) const {
    Gradients sums{std::vector<double>(q.size()), std::vector<double>(k.size()),
                   std::vector<double>(v.size())};
    if (magnitudes) *magnitudes = sums;
    const auto add = [&](std::vector<double> Gradients::*which, std::int64_t to, double term) {
      (sums.*which)[index_of(to)] += term;
      if (magnitudes) (magnitudes->*which)[index_of(to)] += std::abs(term);
    };
    for (std::int64_t t = 0; t < rows->rows(); ++t)
      for (std::int64_t n = 0; n < shape.N; ++n) {
        const std::int64_t g = n / (shape.N / shape.G), at = (t * shape.N + n) * shape.H;
        const Head head = this->head(t, n);
        const double delta = dot(dout.data() + at, out.data() + at, shape.H);
        for (std::size_t j = 0; j < head.keys.size(); ++j) {
          const std::int64_t kv = (head.keys[j] * shape.G + g) * shape.H;
          double slope =
              head.p[j] * (dot(dout.data() + at, value(head.keys[j], g), shape.H) - delta) * shape.scale();
          if (shape.softcap > 0) slope *= 1 - std::pow(head.scores[j] / shape.softcap, 2);
          for (std::int64_t h = 0; h < shape.H; ++h) {
            add(&Gradients::dq, at + h, slope * k[index_of(kv + h)]);
            add(&Gradients::dk, kv + h, slope * q[index_of(at + h)]);
            add(&Gradients::dv, kv + h, head.p[j] * dout[index_of(at + h)]);
          }
        }
      }
    return sums;
  }
};

/// q, k and v of every row, random, and what kernels take of them.
template <class T>
struct AttentionInputs {
  AttentionShape shape;
  Values<T> q, k, v;

  AttentionInputs(const AttentionCase& rows, const AttentionShape& s)
      : shape(s),
        q(random_rounded<T>(rows.rows() * s.N * s.H, 1)),
        k(random_rounded<T>(rows.rows() * s.G * s.H, 2)),
        v(random_rounded<T>(rows.rows() * s.G * s.H, 3)) {}
  AttentionReference reference(const AttentionCase& rows) const {
    return {&rows, shape, q.exact, k.exact, v.exact};
  }
  std::vector<T> k_blocks(const AttentionCase& rows, double filler) const {
    return rows.blocks(k.stored, shape, filler, kernels::key_offset);
  }
  std::vector<T> v_blocks(const AttentionCase& rows, double filler) const {
    return rows.blocks(v.stored, shape, filler, [&](std::int64_t slot, std::int64_t h) {
      return kernels::value_offset(slot, h, shape.H);
    });
  }
  kernels::AttentionArgs<T> cache(const DeviceBuffer<T>& k_on_device,
                                  const DeviceBuffer<T>& v_on_device) const {
    return {k_on_device.data(), v_on_device.data(), shape.block_stride(), shape.N, shape.G, shape.H,
            shape.scale(),      shape.softcap};
  }
};

/// Whether a pass may take rows in tiles: on tensor cores, where weights are rounded to bf16.
enum class RowsAre { kSingle, kTiled };

inline kernels::PassRows view_of(const DeviceRows& rows, RowsAre how) {
  kernels::PassRows view = rows.view();
  if (how == RowsAre::kSingle) view.num_tiles = 0;
  return view;
}

template <class T>
struct AttentionResult {
  std::vector<T> out;
  std::vector<float> lse;
};

/// Attention of the rows from `first` on.
template <class T>
AttentionResult<T> run_attention(const TestDevice<T>& device, const AttentionCase& all,
                                 const AttentionInputs<T>& in, RowsAre how, std::int64_t first = 0) {
  const AttentionShape& shape = in.shape;
  const DeviceRows rows(*device.memory, all.rows_from(first));
  const std::int64_t width = shape.N * shape.H, count = rows.view().count;
  auto q = device.put(in.q.stored), k = device.put(in.k_blocks(all, NAN)),
       v = device.put(in.v_blocks(all, NAN)),
       out = device.put(std::vector<T>(index_of(count * width), round_to<T>(NAN)));
  auto lse = device.put(std::vector<float>(index_of(count * shape.N), NAN));
  auto workspace = device.put(std::vector<float>(
      index_of(kernels::attention_workspace(count, shape.N, shape.H, rows.view().max_keys, shape.window)),
      NAN));
  device.ops->attention({in.cache(k, v), q.data() + first * width, width, out.data(), lse.data(),
                         shape.window, workspace.data()},
                        view_of(rows, how), device.queue());
  return {out.values(), lse.values()};
}

/// Gradients of all rows; dk and dv summed over the places that hold a row's key.
template <class T>
struct AttentionGradResult {
  std::vector<T> dq;  ///< with `stride` elements a row, 5 where nothing was written
  std::vector<float> dk, dv;
  bool rest_is_zero = true;  ///< slots of the blocks without a row
};

template <class T>
AttentionGradResult<T> run_attention_grad(const TestDevice<T>& device, const AttentionCase& rows,
                                          const AttentionInputs<T>& in, RowsAre how,
                                          const std::vector<T>& out, const std::vector<T>& dout,
                                          const std::vector<float>& lse, std::int64_t stride) {
  const AttentionShape& shape = in.shape;
  const DeviceRows view(*device.memory, rows.packed().rows());
  const DeviceBlockUses uses(*device.memory, rows.packed());
  auto q = device.put(in.q.stored), k = device.put(in.k_blocks(rows, NAN)),
       v = device.put(in.v_blocks(rows, NAN)), attended = device.put(out), upstream = device.put(dout),
       dq = device.put(std::vector<T>(index_of(rows.rows() * stride), round_to<T>(5)));
  const std::size_t elements = index_of(rows.packed().num_blocks() * shape.block_stride());
  auto lses = device.put(lse), dk = device.put(std::vector<float>(elements, NAN)),
       dv = device.put(std::vector<float>(elements, NAN)),
       workspace = device.put(std::vector<float>(lse.size(), NAN));
  device.ops->attention_grad({in.cache(k, v), q.data(), attended.data(), upstream.data(), lses.data(),
                              dq.data(), stride, dk.data(), dv.data(), shape.window, uses.view(),
                              rows.packed().row_trees(), how == RowsAre::kTiled ? workspace.data() : nullptr},
                             view_of(view, how), device.queue());
  AttentionGradResult<T> result{dq.values(), std::vector<float>(in.k.exact.size()),
                                std::vector<float>(in.v.exact.size())};
  std::vector<float> k_blocks = dk.values(), v_blocks = dv.values();
  rows.for_slots([&](std::int64_t t, std::int64_t block, std::int64_t slot) {
    for (std::int64_t g = 0; g < shape.G; ++g)
      for (std::int64_t h = 0; h < shape.H; ++h) {
        const std::int64_t from = kernels::head_offset(block, shape.block_stride(), g, shape.H);
        const std::size_t to = index_of((t * shape.G + g) * shape.H + h);
        for (auto [sum, blocks, at] :
             {std::tuple(&result.dk, &k_blocks, from + kernels::key_offset(slot, h)),
              {&result.dv, &v_blocks, from + kernels::value_offset(slot, h, shape.H)}}) {
          (*sum)[to] += (*blocks)[index_of(at)];
          (*blocks)[index_of(at)] = 0;
        }
      }
  });
  for (const std::vector<float>* blocks : {&k_blocks, &v_blocks})
    result.rest_is_zero &= std::ranges::all_of(*blocks, [](float value) { return value == 0; });
  return result;
}

}  // namespace rlhf
