// y = x W^T with W in bf16, two k of a column in a 32-bit word: a shift and a mask make two floats of it, so
// the products are exact and nothing is shuffled. The order of summation is that of linear.cpp. Bound: memory
// (half the bytes of fp32) for few rows, then FMA throughput: 4 FMAs a row for 2 loads, 4 integer operations
// and 2 broadcasts a row.
#include <algorithm>

#include "rlhf/kernels/cpu/packed.h"
#include "rlhf/kernels/cpu/tile.h"

namespace rlhf::kernels::RLHF_ISA {
namespace {

constexpr int kVecs = 2;
constexpr int L = kLanes<float>;
#if defined(__AVX512F__)
constexpr int kRows = 12;  // 24 sums, 4 weights and 2 activations of 32 registers
#else
constexpr int kRows = 4;  // 8 sums, 4 weights and 2 activations of 16 registers
#endif

using Words = Vec<std::uint32_t>;

inline Vec<float> as_floats(Words words) {
  return reinterpret_cast<Vec<float>>(words);
}

// Adds the words [k0, k1) of one column group to the sums of MR rows.
template <int MR>
inline void add_words(const Bf16LinearArgs& args, const float* x, const std::uint32_t* group, std::int64_t k0,
                      std::int64_t k1, Vec<float> (&sums)[MR][kVecs]) {
  for (std::int64_t k = k0; k < k1; ++k) {
    fetch_ahead(group + k * kPackedColumns);
    Vec<float> even[kVecs], odd[kVecs];
    for (int v = 0; v < kVecs; ++v) {
      const Words words = load(group + k * kPackedColumns + v * L);
      even[v] = as_floats(words << 16);
      odd[v] = as_floats(words & 0xffff0000U);
    }
    for (int m = 0; m < MR; ++m) {
      const float* pair = x + m * args.ldx + 2 * k;
      for (int v = 0; v < kVecs; ++v) sums[m][v] += pair[0] * even[v];
      for (int v = 0; v < kVecs; ++v) sums[m][v] += pair[1] * odd[v];
    }
  }
}

// K is odd: the last word holds one k.
template <int MR>
inline void add_last(const Bf16LinearArgs& args, const float* x, const std::uint32_t* group,
                     Vec<float> (&sums)[MR][kVecs]) {
  const std::int64_t k = args.K / 2;
  for (int v = 0; v < kVecs; ++v) {
    const Vec<float> even = as_floats(load(group + k * kPackedColumns + v * L) << 16);
    for (int m = 0; m < MR; ++m) sums[m][v] += x[m * args.ldx + 2 * k] * even;
  }
}

template <int MR>
void tile(const Bf16LinearArgs& args, std::int64_t m0, const std::uint32_t* group, std::int64_t n,
          std::int64_t columns) {
  const float* x = args.x + m0 * args.ldx;
  for (std::int64_t k = 0; k == 0 || k < args.K; k += kBlockK) {
    const std::int64_t end = std::min(args.K, k + kBlockK);
    Vec<float> sums[MR][kVecs] = {};
    add_words<MR>(args, x, group, k / 2, end / 2, sums);
    if (end % 2) add_last<MR>(args, x, group, sums);
    const float* bias = k == 0 && args.bias ? args.bias + n : nullptr;
    const bool adds = args.accumulate || k > 0;
    for (int m = 0; m < MR; ++m) {
      alignas(kVecBytes) float row[kVecs * L];
      for (int v = 0; v < kVecs; ++v) store(row + v * L, sums[m][v]);
      float* y = args.y + (m0 + m) * args.ldy + n;
      for (std::int64_t j = 0; j < columns; ++j) {
        const float sum = bias ? row[j] + bias[j] : row[j];
        y[j] = adds ? y[j] + sum : sum;
      }
    }
  }
}

}  // namespace

void linear_bf16(const Bf16LinearArgs& args, std::int64_t M, std::int64_t p0, std::int64_t p1) {
  static_assert(kBlockK % kBf16Inputs == 0);
  const std::int64_t words = (args.K + 1) / 2;
  for (std::int64_t p = p0; p < p1; ++p)
    for (std::int64_t c = 0; c < kPackedColumns; c += kVecs * L) {
      const std::int64_t n = p * kPackedColumns + c;
      const std::int64_t columns = std::min<std::int64_t>(kVecs * L, args.N - n);
      if (columns <= 0) break;
      const std::uint32_t* group = args.panels + p * words * kPackedColumns + c;
      for (std::int64_t m = 0; m < M; m += kRows)
        with_count<kRows>(std::min<std::int64_t>(kRows, M - m),
                          [&]<int MR>() { tile<MR>(args, m, group, n, columns); });
    }
}

}  // namespace rlhf::kernels::RLHF_ISA
