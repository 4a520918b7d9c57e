// y = x W^T in dot-product form: W stays row-major as it is stored, so decoding reads the training weights
// directly. Each output element is summed over k in one fixed order whatever M is: results do not depend on
// the batch. Bound: memory (W once) for M < ~6, then FMA throughput: 6 x 4 accumulators need 10 loads per 24
// FMAs.
#include <type_traits>

#include "rlhf/kernels/cpu/kernels.h"
#include "rlhf/kernels/cpu/vec.h"

namespace rlhf::kernels::RLHF_ISA {
namespace {

constexpr int kTileN = 4;
#if defined(__AVX512F__)
constexpr int kTileM = 6;
#else
constexpr int kTileM = 3;  // 3 x 4 accumulators of 16 registers
#endif

template <class T>
struct Masks {
  using Index = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;
  typedef Index Vec __attribute__((vector_size(kVecBytes)));
};

// Sums the lanes of four vectors; returns them in lanes 0, L/4, L/2, 3L/4.
template <class T>
inline Vec<T> reduce4(Vec<T> a, Vec<T> b, Vec<T> c, Vec<T> d) {
  constexpr int L = kLanes<T>;
  using M = typename Masks<T>::Vec;
  M half_lo, half_hi, quarter_lo, quarter_hi;
  for (int i = 0; i < L; ++i) {
    const int base = i < L / 2 ? 0 : L;
    half_lo[i] = base + i % (L / 2);
    half_hi[i] = base + i % (L / 2) + L / 2;
    const int group = i / (L / 4), within = i % (L / 4);
    quarter_lo[i] = group * (L / 2) + within;
    quarter_hi[i] = group * (L / 2) + within + L / 4;
  }
  const Vec<T> ab = __builtin_shuffle(a, b, half_lo) + __builtin_shuffle(a, b, half_hi);
  const Vec<T> cd = __builtin_shuffle(c, d, half_lo) + __builtin_shuffle(c, d, half_hi);
  Vec<T> sum = __builtin_shuffle(ab, cd, quarter_lo) + __builtin_shuffle(ab, cd, quarter_hi);
  for (int step = L / 8; step > 0; step /= 2) {
    M rotate;
    for (int i = 0; i < L; ++i) rotate[i] = i ^ step;
    sum += __builtin_shuffle(sum, rotate);
  }
  return sum;
}

template <class T>
inline T reduce(Vec<T> v) {
  alignas(kVecBytes) T lanes[kLanes<T>];
  store(lanes, v);
  for (int width = kLanes<T> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

template <class T>
inline void put(const LinearArgs<T>& args, std::int64_t m, std::int64_t n, T value) {
  T& out = args.y[m * args.ldy + n];
  if (args.bias) value += args.bias[n];
  out = args.accumulate ? out + value : value;
}

template <class T, int MR, int NR>
void tile(const LinearArgs<T>& args, std::int64_t m, std::int64_t n) {
  constexpr int L = kLanes<T>;
  Vec<T> acc[MR][NR] = {};
  const T* x = args.x + m * args.ldx;
  const T* w = args.w + n * args.K;
  std::int64_t k = 0;
  for (; k + L <= args.K; k += L) {
    Vec<T> wk[NR];
    for (int j = 0; j < NR; ++j) wk[j] = load(w + j * args.K + k);
    for (int i = 0; i < MR; ++i) {
      const Vec<T> xk = load(x + i * args.ldx + k);
      for (int j = 0; j < NR; ++j) acc[i][j] += xk * wk[j];
    }
  }
  if (k < args.K) {
    for (int i = 0; i < MR; ++i)
      for (int j = 0; j < NR; ++j)
        acc[i][j] +=
            load_partial(x + i * args.ldx + k, args.K - k) * load_partial(w + j * args.K + k, args.K - k);
  }
  if constexpr (NR == 4 && L >= 4) {
    for (int i = 0; i < MR; ++i) {
      const Vec<T> sums = reduce4<T>(acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
      for (int j = 0; j < 4; ++j) put<T>(args, m + i, n + j, sums[j * (L / 4)]);
    }
  } else {
    for (int i = 0; i < MR; ++i)
      for (int j = 0; j < NR; ++j) put<T>(args, m + i, n + j, reduce<T>(acc[i][j]));
  }
}

template <class T, int MR>
void row_of_tiles(const LinearArgs<T>& args, std::int64_t m, std::int64_t n0, std::int64_t n1) {
  std::int64_t n = n0;
  for (; n + kTileN <= n1; n += kTileN) tile<T, MR, kTileN>(args, m, n);
  for (; n < n1; ++n) tile<T, MR, 1>(args, m, n);
}

template <class T, int MR>
void last_rows(const LinearArgs<T>& args, std::int64_t m, std::int64_t rows, std::int64_t n0,
               std::int64_t n1) {
  if constexpr (MR > 0) {
    if (rows == MR)
      row_of_tiles<T, MR>(args, m, n0, n1);
    else
      last_rows<T, MR - 1>(args, m, rows, n0, n1);
  }
}

}  // namespace

template <class T>
void linear(const LinearArgs<T>& args, std::int64_t m0, std::int64_t m1, std::int64_t n0, std::int64_t n1) {
  std::int64_t m = m0;
  for (; m + kTileM <= m1; m += kTileM) row_of_tiles<T, kTileM>(args, m, n0, n1);
  if (m < m1) last_rows<T, kTileM - 1>(args, m, m1 - m, n0, n1);
}

template void linear<float>(const LinearArgs<float>&, std::int64_t, std::int64_t, std::int64_t, std::int64_t);
template void linear<double>(const LinearArgs<double>&, std::int64_t, std::int64_t, std::int64_t,
                             std::int64_t);

}  // namespace rlhf::kernels::RLHF_ISA
