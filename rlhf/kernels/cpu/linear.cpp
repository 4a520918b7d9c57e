// y = x W^T with W row-major as it is stored, so decoding reads the training weights directly: squares of W
// are transposed on the way. Each output is a sum over k in order (over blocks of k, block by block),
// whatever M is: results do not depend on the batch. Many rows share a packed panel; few rows use a
// transposed square at once, while it is in registers. Bound: memory (W once) for M < ~4, then FMA throughput
// and, until the transposition is shared by many rows, shuffles (one for 4 weights).
#include "rlhf/kernels/cpu/kernels.h"
#include "rlhf/kernels/cpu/tile.h"
#include "rlhf/kernels/cpu/transpose.h"

namespace rlhf::kernels::RLHF_ISA {
namespace {

// A square takes L registers, each row of y one more.
#if defined(__AVX512F__)
constexpr int kFewRows = 12;
#else
constexpr int kFewRows = 6;
#endif

template <class T>
using Square = Vec<T>[kLanes<T>];

template <class T>
inline void load_transposed(const T* w, std::int64_t ldw, Square<T>& square) {
  for (int i = 0; i < kLanes<T>; ++i) square[i] = load(w + i * ldw);
  transpose<T>(square);
}

// Element k of `rows` <= L rows of w; lanes beyond are 0.
template <class T>
inline Vec<T> gather_column(const T* w, std::int64_t ldw, std::int64_t rows) {
  alignas(kVecBytes) T column[kLanes<T>] = {};
  for (std::int64_t i = 0; i < rows; ++i) column[i] = w[i * ldw];
  return load(column);
}

template <class T>
void pack(const T* w, std::int64_t ldw, std::int64_t count, std::int64_t columns, T* packed) {
  constexpr int L = kLanes<T>;
  for (int v = 0; v < kPanelVecs; ++v, w += L * ldw, packed += L) {
    const std::int64_t rows = std::clamp<std::int64_t>(columns - v * L, 0, L);
    std::int64_t k = 0;
    if (rows == L)
      for (; k + L <= count; k += L) {
        Square<T> square;
        load_transposed(w + k, ldw, square);
        for (int i = 0; i < L; ++i) store(packed + (k + i) * kPanelColumns<T>, square[i]);
      }
    for (; k < count; ++k) store(packed + k * kPanelColumns<T>, gather_column(w + k, ldw, rows));
  }
}

template <class T>
void many_rows(const LinearArgs<T>& args, std::int64_t m0, std::int64_t m1, std::int64_t n0,
               std::int64_t columns, T* packed) {
  for (std::int64_t k = 0; k == 0 || k < args.K; k += kBlockK) {
    const std::int64_t count = std::min(kBlockK, args.K - k);
    pack(args.w + n0 * args.K + k, args.K, count, columns, packed);
    tiles<T>({args.x + k, args.ldx, 1, packed, count, args.y + n0, args.ldy, columns,
              k == 0 && args.bias ? args.bias + n0 : nullptr, args.accumulate || k > 0,
              args.w + (n0 + kPanelColumns<T>)*args.K + k, args.K, kPanelColumns<T>},
             m0, m1);
  }
}

// Adds the block [k0, k1) of MR rows of x times one vector of columns to `sums`.
template <class T, int MR>
inline void add_block(const T* x, std::int64_t ldx, const T* w, std::int64_t ldw, std::int64_t k0,
                      std::int64_t k1, std::int64_t columns, Vec<T> (&sums)[MR]) {
  constexpr int L = kLanes<T>;
  std::int64_t k = k0;
  if (columns == L)
    for (; k + L <= k1; k += L) {
      Square<T> square;
      load_transposed(w + k, ldw, square);
      // The rows after these: too short for the hardware to see a stream in them.
      for (int i = 0; i < L; ++i) __builtin_prefetch(w + (L + i) * ldw + k, 0, 2);
      for (int i = 0; i < L; ++i)
        for (int m = 0; m < MR; ++m) sums[m] += x[m * ldx + k + i] * square[i];
    }
  for (; k < k1; ++k) {
    const Vec<T> column = gather_column(w + k, ldw, columns);
    for (int m = 0; m < MR; ++m) sums[m] += x[m * ldx + k] * column;
  }
}

template <class T>
inline void put(const LinearArgs<T>& args, std::int64_t m, std::int64_t n, std::int64_t columns, bool first,
                Vec<T> sums) {
  alignas(kVecBytes) T row[kLanes<T>];
  store(row, sums);
  T* y = args.y + m * args.ldy + n;
  for (std::int64_t j = 0; j < columns; ++j) {
    const T sum = first && args.bias ? row[j] + args.bias[n + j] : row[j];
    y[j] = args.accumulate || !first ? y[j] + sum : sum;
  }
}

template <class T, int MR>
void few_rows(const LinearArgs<T>& args, std::int64_t m0, std::int64_t n0, std::int64_t n1) {
  constexpr int L = kLanes<T>;
  for (std::int64_t n = n0; n < n1; n += L) {
    const std::int64_t columns = std::min<std::int64_t>(L, n1 - n);
    for (std::int64_t k = 0; k == 0 || k < args.K; k += kBlockK) {
      Vec<T> sums[MR] = {};
      add_block<T, MR>(args.x + m0 * args.ldx, args.ldx, args.w + n * args.K, args.K, k,
                       std::min(args.K, k + kBlockK), columns, sums);
      for (int m = 0; m < MR; ++m) put<T>(args, m0 + m, n, columns, k == 0, sums[m]);
    }
  }
}

}  // namespace

template <class T>
void linear(const LinearArgs<T>& args, std::int64_t m0, std::int64_t m1, std::int64_t n0, std::int64_t n1,
            T* packed) {
  if (m1 - m0 <= kFewRows)
    return with_count<kFewRows>(m1 - m0, [&]<int MR>() { few_rows<T, MR>(args, m0, n0, n1); });
  for (std::int64_t n = n0; n < n1; n += kPanelColumns<T>)
    many_rows(args, m0, m1, n, std::min<std::int64_t>(kPanelColumns<T>, n1 - n), packed);
}

template void linear<float>(const LinearArgs<float>&, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                            float*);
template void linear<double>(const LinearArgs<double>&, std::int64_t, std::int64_t, std::int64_t,
                             std::int64_t, double*);

}  // namespace rlhf::kernels::RLHF_ISA
