// Attention of one query row over blocks of keys with an online softmax (Milakov & Gimelshein 2018; Dao
// 2022). Decoding, prefill and training use this one routine on one K/V block layout, so a token's attention
// is summed in the same order in all three. Each block of a kv head is read once for all query heads of its
// group. Bound: reading K and V once per query row; both stay in cache for short sequences.
#include <cmath>

#include "rlhf/kernels/cpu/exp.h"
#include "rlhf/kernels/cpu/kernels.h"

namespace rlhf::kernels::RLHF_ISA {
namespace {

constexpr std::int64_t kB = kBlockTokens;
constexpr std::int64_t kMaxGroup = 64;

// Scaled, soft-capped scores of one query head against one block; -inf outside [first, last).
template <class T>
inline void block_scores(const AttentionArgs<T>& args, const T* q, const T* k, std::int64_t first,
                         std::int64_t last, T* scores) {
  T s[kB] = {};
  for (std::int64_t h = 0; h < args.H; ++h) {
    const T qh = q[h];
    const T* row = k + h * kB;
#pragma omp simd
    for (std::int64_t j = 0; j < kB; ++j) s[j] += qh * row[j];
  }
  const T scale = static_cast<T>(args.scale), cap = static_cast<T>(args.softcap);
  for (std::int64_t j = 0; j < kB; ++j) scores[j] = s[j] * scale;
  if (cap > 0)
    for (std::int64_t j = 0; j < kB; ++j) scores[j] = cap * tanh_approx(scores[j] / cap);
  if (first > 0 || last < kB)
    for (std::int64_t j = 0; j < kB; ++j)
      if (j < first || j >= last) scores[j] = -INFINITY;
}

struct BlockRange {
  std::int64_t begin, end;  // key positions inside the block
};

inline BlockRange visible(std::int64_t block, std::int64_t first_key, std::int64_t num_keys) {
  const std::int64_t base = block * kB;
  return {first_key > base ? first_key - base : 0, num_keys - base < kB ? num_keys - base : kB};
}

}  // namespace

template <class T>
void attention(const AttentionArgs<T>& args, const AttentionRow<T>& row, std::int64_t g) {
  const std::int64_t H = args.H, group = args.N / args.G;
  T maximum[kMaxGroup], total[kMaxGroup];
  T* out = row.out + g * group * H;
  for (std::int64_t n = 0; n < group; ++n) {
    maximum[n] = -INFINITY;
    total[n] = 0;
  }
  for (std::int64_t i = 0; i < group * H; ++i) out[i] = 0;
  const std::int64_t num_blocks = (row.num_keys + kB - 1) / kB;
  for (std::int64_t b = row.first_key / kB; b < num_blocks; ++b) {
    const std::int64_t offset = row.blocks[b] * args.block_stride + g * H * kB;
    const T* k = args.k + offset;
    const T* v = args.v + offset;
    const BlockRange keys = visible(b, row.first_key, row.num_keys);
    for (std::int64_t n = 0; n < group; ++n) {
      alignas(64) T p[kB];
      block_scores(args, row.q + (g * group + n) * H, k, keys.begin, keys.end, p);
      T block_max = p[0];
      for (std::int64_t j = 1; j < kB; ++j) block_max = p[j] > block_max ? p[j] : block_max;
      T* o = out + n * H;
      if (block_max > maximum[n]) {
        const T correction = exp_approx(maximum[n] - block_max);
        maximum[n] = block_max;
        total[n] *= correction;
#pragma omp simd
        for (std::int64_t h = 0; h < H; ++h) o[h] *= correction;
      }
      T sum = 0;
#pragma omp simd
      for (std::int64_t j = 0; j < kB; ++j) p[j] = exp_approx(p[j] - maximum[n]);
      for (std::int64_t j = keys.begin; j < keys.end; ++j) sum += p[j];
      total[n] += sum;
      for (std::int64_t j = keys.begin; j < keys.end; ++j) {
        const T weight = p[j];
        const T* value = v + j * H;
#pragma omp simd
        for (std::int64_t h = 0; h < H; ++h) o[h] += weight * value[h];
      }
    }
  }
  for (std::int64_t n = 0; n < group; ++n) {
    const T inverse = 1 / total[n];
    for (std::int64_t h = 0; h < H; ++h) out[n * H + h] *= inverse;
    if (row.lse) row.lse[g * group + n] = maximum[n] + std::log(total[n]);
  }
}

template <class T>
void attention_grad(const AttentionArgs<T>& args, const AttentionGradRow<T>& row, T* dk_all, T* dv_all,
                    std::int64_t g) {
  const std::int64_t H = args.H, group = args.N / args.G;
  const T scale = static_cast<T>(args.scale), cap = static_cast<T>(args.softcap);
  const std::int64_t num_blocks = (row.num_keys + kB - 1) / kB;
  for (std::int64_t n = g * group; n < (g + 1) * group; ++n) {
    const T* q = row.q + n * H;
    const T* dout = row.dout + n * H;
    T* dq = row.dq + n * H;
    T delta = 0;
#pragma omp simd reduction(+ : delta)
    for (std::int64_t h = 0; h < H; ++h) delta += dout[h] * row.out[n * H + h];
    for (std::int64_t h = 0; h < H; ++h) dq[h] = 0;
    for (std::int64_t b = row.first_key / kB; b < num_blocks; ++b) {
      const std::int64_t offset = row.blocks[b] * args.block_stride + g * H * kB;
      const T* k = args.k + offset;
      const T* v = args.v + offset;
      T* dk = dk_all + offset;
      T* dv = dv_all + offset;
      const BlockRange keys = visible(b, row.first_key, row.num_keys);
      alignas(64) T s[kB], p[kB], ds[kB];
      block_scores(args, q, k, keys.begin, keys.end, s);
#pragma omp simd
      for (std::int64_t j = 0; j < kB; ++j) p[j] = exp_approx(s[j] - row.lse[n]);
      for (std::int64_t j = 0; j < kB; ++j) ds[j] = 0;
      for (std::int64_t j = keys.begin; j < keys.end; ++j) {
        const T* value = v + j * H;
        T* dvalue = dv + j * H;
        T dot = 0;
        const T weight = p[j];
#pragma omp simd reduction(+ : dot)
        for (std::int64_t h = 0; h < H; ++h) {
          dot += dout[h] * value[h];
          dvalue[h] += weight * dout[h];
        }
        T slope = weight * (dot - delta) * scale;
        if (cap > 0) slope *= 1 - (s[j] / cap) * (s[j] / cap);
        ds[j] = slope;
      }
      for (std::int64_t h = 0; h < H; ++h) {
        const T* krow = k + h * kB;
        T* dkrow = dk + h * kB;
        const T qh = q[h];
        T sum = 0;
#pragma omp simd reduction(+ : sum)
        for (std::int64_t j = 0; j < kB; ++j) {
          sum += ds[j] * krow[j];
          dkrow[j] += ds[j] * qh;
        }
        dq[h] += sum;
      }
    }
  }
}

template void attention<float>(const AttentionArgs<float>&, const AttentionRow<float>&, std::int64_t);
template void attention<double>(const AttentionArgs<double>&, const AttentionRow<double>&, std::int64_t);
template void attention_grad<float>(const AttentionArgs<float>&, const AttentionGradRow<float>&, float*,
                                    float*, std::int64_t);
template void attention_grad<double>(const AttentionArgs<double>&, const AttentionGradRow<double>&, double*,
                                     double*, std::int64_t);

}  // namespace rlhf::kernels::RLHF_ISA
