// Gradient of attention. Rows of one sequence go through a block together, as small matrix products over
// tiles of queries; K and V of the block are transposed once for all of them. Bound: FMA throughput, five
// products of [queries, H] x [H, 16] a block.
#include <algorithm>
#include <vector>

#include "rlhf/kernels/cpu/attention_tile.h"
#include "rlhf/kernels/cpu/kernels.h"

namespace rlhf::kernels::RLHF_ISA {
namespace {

template <class T>
struct GradQuery {
  const T* q;
  const T* dout;
  T* dq;
  T lse, delta;  // delta: dout . out
  std::int64_t first_key, num_keys;
};

// One block of one K/V head. The transposed copies hold zeros for keys that no row of the run sees.
template <class T>
struct Block {
  const T* k;                                 // [H][16]
  std::vector<T> v_transposed, k_transposed;  // [H][16], [16][H]
  T* dk;
  T* dv;

  void transpose(const T* keys, const T* values, std::int64_t H, std::int64_t num_keys) {
    k = keys;
    v_transposed.assign(static_cast<std::size_t>(H * kB), T(0));
    k_transposed.assign(static_cast<std::size_t>(H * kB), T(0));
    for (std::int64_t j = 0; j < num_keys; ++j)
      for (std::int64_t h = 0; h < H; ++h) {
        v_transposed[static_cast<std::size_t>(h * kB + j)] = values[j * H + h];
        k_transposed[static_cast<std::size_t>(j * H + h)] = keys[h * kB + j];
      }
  }
};

// p: scores in, weights out; ds: d loss / d weight in, d loss / d score out.
template <class T>
inline void score_gradient(const AttentionArgs<T>& args, const GradQuery<T>& query, KeyRange keys, T* p,
                           T* ds) {
  finish_scores(args, keys, p);
  const T scale = static_cast<T>(args.scale), cap = static_cast<T>(args.softcap);
  alignas(kVecBytes) T slope[kB];
  for (std::int64_t j = 0; j < kB; ++j) slope[j] = scale;
  if (cap > 0)
    for (std::int64_t j = keys.begin; j < keys.end; ++j) slope[j] *= 1 - (p[j] / cap) * (p[j] / cap);
#pragma omp simd
  for (std::int64_t j = 0; j < kB; ++j) p[j] = exp_approx(p[j] - query.lse);
  for (std::int64_t j = 0; j < kB; ++j) ds[j] = p[j] * (ds[j] - query.delta) * slope[j];
}

template <class T, int QN>
void add_tile(const AttentionArgs<T>& args, const GradQuery<T>* queries, std::int64_t b, Block<T>& block) {
  const std::int64_t H = args.H;
  const T *q[QN], *dout[QN];
  for (int i = 0; i < QN; ++i) {
    q[i] = queries[i].q;
    dout[i] = queries[i].dout;
  }
  alignas(kVecBytes) T p[QN][kB], ds[QN][kB];
  dot_keys<T, QN>(q, H, block.k, p);
  dot_keys<T, QN>(dout, H, block.v_transposed.data(), ds);
  for (int i = 0; i < QN; ++i) {
    const KeyRange keys = visible(b, queries[i].first_key, queries[i].num_keys);
    if (keys.begin < keys.end)
      score_gradient(args, queries[i], keys, p[i], ds[i]);
    else
      for (std::int64_t j = 0; j < kB; ++j) p[i][j] = ds[i][j] = 0;
  }
  for (std::int64_t j = 0; j < kB; ++j) {
    T* dv = block.dv + j * H;
#pragma omp simd
    for (std::int64_t h = 0; h < H; ++h) {
      T sum = dv[h];
      for (int i = 0; i < QN; ++i) sum += p[i][j] * dout[i][h];
      dv[h] = sum;
    }
  }
  for (int v = 0; v < kKeyVecs<T>; ++v) {
    Vec<T> slopes[QN];
    for (int i = 0; i < QN; ++i) slopes[i] = load(ds[i] + v * kLanes<T>);
    T* dk = block.dk + v * kLanes<T>;
    for (std::int64_t h = 0; h < H; ++h, dk += kB) {
      Vec<T> sum = load(dk);
      for (int i = 0; i < QN; ++i) sum += q[i][h] * slopes[i];
      store(dk, sum);
    }
  }
  for (int i = 0; i < QN; ++i) add_weighted_rows<T>(ds[i], block.k_transposed.data(), H, queries[i].dq);
}

// All queries of one sequence and one K/V head, ordered by their number of keys.
template <class T>
void add_run(const AttentionArgs<T>& args, const std::vector<GradQuery<T>>& queries,
             const std::int32_t* blocks, std::int64_t g, Block<T>& block, T* dk, T* dv) {
  const auto count = static_cast<std::int64_t>(queries.size());
  const std::int64_t keys = queries.back().num_keys;
  std::int64_t begin = 0, first_key = keys;
  for (const GradQuery<T>& query : queries) first_key = std::min(first_key, query.first_key);
  for (std::int64_t b = first_key / kB; b * kB < keys; ++b) {
    while (queries[static_cast<std::size_t>(begin)].num_keys <= b * kB)
      ++begin;  // those behind see the block or more
    const std::int64_t offset = blocks[b] * args.block_stride + g * args.H * kB;
    block.transpose(args.k + offset, args.v + offset, args.H, std::min(kB, keys - b * kB));
    block.dk = dk + offset;
    block.dv = dv + offset;
    for (std::int64_t i = begin; i < count; i += kQueries)
      with_count<kQueries>(std::min<std::int64_t>(kQueries, count - i),
                           [&]<int QN>() { add_tile<T, QN>(args, queries.data() + i, b, block); });
  }
}

}  // namespace

template <class T>
void attention_grad(const AttentionArgs<T>& args, const AttentionGradRow<T>* rows, std::int64_t count, T* dk,
                    T* dv, std::int64_t g) {
  const std::int64_t H = args.H, group = args.N / args.G;
  static thread_local std::vector<GradQuery<T>> queries;
  static thread_local Block<T> block;
  queries.clear();
  for (std::int64_t t = 0; t < count; ++t) {
    const AttentionGradRow<T>& row = rows[t];
    for (std::int64_t n = g * group; n < (g + 1) * group; ++n) {
      T delta = 0;
#pragma omp simd reduction(+ : delta)
      for (std::int64_t h = 0; h < H; ++h) delta += row.dout[n * H + h] * row.out[n * H + h];
      std::fill_n(row.dq + n * H, H, T(0));
      queries.push_back(
          {row.q + n * H, row.dout + n * H, row.dq + n * H, row.lse[n], delta, row.first_key, row.num_keys});
    }
    if (t + 1 < count && rows[t + 1].blocks == row.blocks && rows[t + 1].num_keys >= row.num_keys) continue;
    add_run(args, queries, row.blocks, g, block, dk, dv);
    queries.clear();
  }
}

template void attention_grad<float>(const AttentionArgs<float>&, const AttentionGradRow<float>*, std::int64_t,
                                    float*, float*, std::int64_t);
template void attention_grad<double>(const AttentionArgs<double>&, const AttentionGradRow<double>*,
                                     std::int64_t, double*, double*, std::int64_t);

}  // namespace rlhf::kernels::RLHF_ISA
