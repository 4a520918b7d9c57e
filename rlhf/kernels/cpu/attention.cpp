// Attention of query rows over blocks of keys with an online softmax (Milakov & Gimelshein 2018; Dao 2022).
// Decoding, prefill and training use this one routine on one K/V block layout, and a row's result does not
// depend on the rows beside it, so a token's attention is summed in the same order in all three. Rows that
// share a block table go through a block together, with all query heads of the group: keys and values are
// then read from registers and L1. Bound: reading K and V for single rows, FMA throughput for many.
#include <algorithm>
#include <cmath>
#include <vector>

#include "rlhf/kernels/cpu/attention_tile.h"
#include "rlhf/kernels/cpu/kernels.h"

namespace rlhf::kernels::RLHF_ISA {
namespace {

// Up to kQueries (row, head) pairs of one sequence and one K/V head on their way through the blocks.
template <class T>
struct Queries {
  const T* q[kQueries];
  T* out[kQueries];
  std::int64_t first_key[kQueries], num_keys[kQueries];
  T maximum[kQueries];
  Vec<T> totals[kQueries][kKeyVecs<T>];  // sums of weights by position in the block
  std::int64_t count = 0;
};

// Rescales what was summed when the block holds a larger score; p: scores in, weights out.
template <class T>
inline void soften(const AttentionArgs<T>& args, T* p, T& maximum, Vec<T> (&totals)[kKeyVecs<T>], T* out) {
  const T block_max = largest<T>(p);
  if (block_max > maximum) {
    const T correction = exp_approx(maximum - block_max);
    maximum = block_max;
    for (auto& total : totals) total *= correction;
#pragma omp simd
    for (std::int64_t h = 0; h < args.H; ++h) out[h] *= correction;
  }
  const T top = maximum;
#pragma omp simd
  for (std::int64_t j = 0; j < kB; ++j) p[j] = exp_approx(p[j] - top);
  for (int v = 0; v < kKeyVecs<T>; ++v) totals[v] += load(p + v * kLanes<T>);
}

// out[H] += sum of p[j] v[j] over the visible keys, in their order.
template <class T>
inline void add_values(const T* p, const T* v, std::int64_t H, KeyRange keys, T* out) {
  if (keys.begin == 0 && keys.end == kB) return add_weighted_rows<T>(p, v, H, out);
  for (std::int64_t j = keys.begin; j < keys.end; ++j) {
    const T weight = p[j];
    const T* value = v + j * H;
#pragma omp simd
    for (std::int64_t h = 0; h < H; ++h) out[h] += weight * value[h];
  }
}

template <class T, int QN>
void attend(const AttentionArgs<T>& args, const std::int32_t* blocks, std::int64_t g, Queries<T>& queries) {
  const std::int64_t begin = *std::min_element(queries.first_key, queries.first_key + QN) / kB;
  const std::int64_t end = (*std::max_element(queries.num_keys, queries.num_keys + QN) + kB - 1) / kB;
  for (std::int64_t b = begin; b < end; ++b) {
    const auto offset_of = [&](std::int64_t at) { return blocks[at] * args.block_stride + g * args.H * kB; };
    const std::int64_t offset = offset_of(b), next = offset_of(std::min(b + 1, end - 1));
    alignas(kVecBytes) T p[QN][kB];
    dot_keys<T, QN>(queries.q, args.H, args.k + offset, p, {args.k + next, args.v + next});
    for (int i = 0; i < QN; ++i) {
      const KeyRange keys = visible(b, queries.first_key[i], queries.num_keys[i]);
      if (keys.begin >= keys.end) continue;
      finish_scores(args, keys, p[i]);
      soften(args, p[i], queries.maximum[i], queries.totals[i], queries.out[i]);
      add_values(p[i], args.v + offset, args.H, keys, queries.out[i]);
    }
  }
}

}  // namespace

template <class T>
void attention(const AttentionArgs<T>& args, const AttentionRow<T>* rows, std::int64_t count,
               std::int64_t g) {
  const std::int64_t H = args.H, group = args.N / args.G;
  Queries<T> queries;
  const AttentionRow<T>* of[kQueries];
  std::int64_t heads[kQueries];
  for (std::int64_t query = 0; query < count * group; ++query) {
    const AttentionRow<T>& row = rows[query / group];
    const std::int64_t n = g * group + query % group, i = queries.count++;
    of[i] = &row;
    heads[i] = n;
    queries.q[i] = row.q + n * H;
    queries.out[i] = row.out + n * H;
    queries.first_key[i] = row.first_key;
    queries.num_keys[i] = row.num_keys;
    queries.maximum[i] = -INFINITY;
    for (auto& total : queries.totals[i]) total = Vec<T>{};
    std::fill_n(queries.out[i], H, T(0));
    const bool last = query + 1 == count * group;
    if (!last && queries.count < kQueries && rows[(query + 1) / group].blocks == row.blocks) continue;
    with_count<kQueries>(queries.count, [&]<int QN>() { attend<T, QN>(args, row.blocks, g, queries); });
    for (std::int64_t j = 0; j < queries.count; ++j) {
      const T total = sum_of_lanes<T>(queries.totals[j]), inverse = 1 / total;
      for (std::int64_t h = 0; h < H; ++h) queries.out[j][h] *= inverse;
      if (of[j]->lse) of[j]->lse[heads[j]] = queries.maximum[j] + std::log(total);
    }
    queries.count = 0;
  }
}

template void attention<float>(const AttentionArgs<float>&, const AttentionRow<float>*, std::int64_t,
                               std::int64_t);
template void attention<double>(const AttentionArgs<double>&, const AttentionRow<double>*, std::int64_t,
                                std::int64_t);

}  // namespace rlhf::kernels::RLHF_ISA
