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

// Every output is summed from the lanes of one vector in the same order, in tiles and in their tails:
// lanes[i] += lanes[i + width] for width L/2, L/4, ... 1.
template <class T>
inline T reduce(Vec<T> v) {
  alignas(kVecBytes) T lanes[kLanes<T>];
  store(lanes, v);
  for (int width = kLanes<T> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// Halves the lanes of a and b: groups of `width` lanes, a's and b's alternating by group.
template <class T>
inline Vec<T> fold(Vec<T> a, Vec<T> b, int width) {
  constexpr int L = kLanes<T>;
  typename Masks<T>::Vec low, high;
  for (int i = 0; i < L; ++i) {
    // Group g of the result is the folded group g/2 of a (even g) or of b (odd g).
    const int group = i / width, from = (group % 2 ? L : 0) + group / 2 * 2 * width + i % width;
    low[i] = from;
    high[i] = from + width;
  }
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
}

// v[j] holds groups of 4 lanes; group g of the result holds the sums of group g of v[0] .. v[3].
template <class T>
inline Vec<T> sum_groups_of_4(const Vec<T> (&v)[4]) {
  constexpr int L = kLanes<T>;
  typename Masks<T>::Vec low, high, even, odd;
  for (int i = 0; i < L; ++i) {
    const int group = i / 4 * 4, lane = i % 4;
    low[i] = (lane % 2 ? L : 0) + group + lane / 2;
    high[i] = low[i] + 2;
    even[i] = (lane < 2 ? 0 : L) + group + lane % 2;
    odd[i] = even[i] + 2;
  }
  const Vec<T> a = __builtin_shuffle(v[0], v[1], low) + __builtin_shuffle(v[0], v[1], high);
  const Vec<T> b = __builtin_shuffle(v[2], v[3], low) + __builtin_shuffle(v[2], v[3], high);
  return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
}

template <class T>
inline void put(const LinearArgs<T>& args, std::int64_t m, std::int64_t n, T value) {
  T& out = args.y[m * args.ldy + n];
  if (args.bias) value += args.bias[n];
  out = args.accumulate ? out + value : value;
}

// Stores rows [m, m + MR) and columns [n, n + 4) from their accumulators.
template <class T, int MR>
inline void put_tile(const LinearArgs<T>& args, std::int64_t m, std::int64_t n, const Vec<T> (&acc)[MR][4]) {
  constexpr int L = kLanes<T>, kRows = L / 4;  // output rows that one vector holds
  for (int first = 0; first < MR; first += kRows) {
    const auto row = [&](int r) { return first + r < MR ? first + r : MR - 1; };
    Vec<T> folded[4];
    for (int j = 0; j < 4; ++j) {
      if constexpr (kRows == 4)
        folded[j] = fold<T>(fold<T>(acc[row(0)][j], acc[row(2)][j], L / 2),
                            fold<T>(acc[row(1)][j], acc[row(3)][j], L / 2), L / 4);
      else if constexpr (kRows == 2)
        folded[j] = fold<T>(acc[row(0)][j], acc[row(1)][j], L / 2);
      else
        folded[j] = acc[row(0)][j];
    }
    alignas(kVecBytes) T sums[L];
    store(sums, sum_groups_of_4<T>(folded));
    for (int r = 0; r < kRows && first + r < MR; ++r) {
      T* out = args.y + (m + first + r) * args.ldy + n;
      T* sum = sums + r * 4;
      if (args.bias)
        for (int j = 0; j < 4; ++j) sum[j] += args.bias[n + j];
      if (args.accumulate)
        for (int j = 0; j < 4; ++j) sum[j] += out[j];
      std::memcpy(out, sum, 4 * sizeof(T));
    }
  }
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
  if constexpr (NR == 4 && L >= 4 && L <= 16) {
    put_tile<T, MR>(args, m, n, acc);
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
