// y = x W^T with W and x in int8: integer sums over a group of inputs, exact and so the same bits on every
// instruction set, times the group's scale, added up in order; then times the output's scale. Weights are
// unsigned bytes w + 128, as the multiply-add of VNNI wants one unsigned side; sums start at -128 times the
// row's sum of activations instead. Compiled without contraction. Bound: memory (a quarter of the bytes of
// fp32) for few rows, then the multiply-adds: 64 products an instruction with VNNI, 32 of widened values with
// AVX-512, 16 with AVX2.
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstring>

#include "rlhf/kernels/cpu/packed.h"
#include "rlhf/kernels/cpu/vec.h"

namespace rlhf::kernels::RLHF_ISA {
namespace {

// Each variant has kRows, the most rows of a tile, and kGroup, its columns:
// sum_tile<MR>(x, words, group, sums) with x of MR rows of `words` words sets sums[MR][kGroup] to the
// products with the unsigned weights.
#if defined(__AVX512VNNI__)

constexpr int kRows = 12, kGroup = 32;

// The unrolling is for GCC, which else keeps a copy of the sums in memory up to date.
template <int MR>
inline void sum_tile(const std::uint32_t* x, std::int64_t ldx, std::int64_t words, const std::uint32_t* group,
                     std::int32_t (&sums)[MR][kGroup]) {
  __m512i pairs[MR][2] = {};
  for (std::int64_t k = 0; k < words; ++k, group += kPackedColumns) {
    fetch_ahead(group);
    const __m512i a = _mm512_loadu_si512(group), b = _mm512_loadu_si512(group + 16);
#pragma GCC unroll 12
    for (int m = 0; m < MR; ++m) {
      const __m512i value = _mm512_set1_epi32(static_cast<int>(x[m * ldx + k]));
      pairs[m][0] = _mm512_dpbusd_epi32(pairs[m][0], a, value);
      pairs[m][1] = _mm512_dpbusd_epi32(pairs[m][1], b, value);
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < MR; ++m) {
    _mm512_storeu_si512(sums[m], pairs[m][0]);
    _mm512_storeu_si512(sums[m] + 16, pairs[m][1]);
  }
}

#elif defined(__AVX2__)

// A vector of widened words: two pairs of k for each column.
#if defined(__AVX512BW__)
using Wide16 = __m512i;
constexpr int kRows = 4, kGroup = 32, kWordsOf = 8;
inline Wide16 zero() {
  return _mm512_setzero_si512();
}
inline Wide16 weights(const std::uint32_t* p) {
  return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Wide16 activation(std::uint32_t word) {
  return _mm512_cvtepi8_epi16(_mm256_set1_epi32(static_cast<int>(word)));
}
inline Wide16 multiply_add(Wide16 sum, Wide16 a, Wide16 b) {
  return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
}
#else
using Wide16 = __m256i;
constexpr int kRows = 2, kGroup = 16, kWordsOf = 4;
inline Wide16 zero() {
  return _mm256_setzero_si256();
}
inline Wide16 weights(const std::uint32_t* p) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Wide16 activation(std::uint32_t word) {
  return _mm256_cvtepi8_epi16(_mm_set1_epi32(static_cast<int>(word)));
}
inline Wide16 multiply_add(Wide16 sum, Wide16 a, Wide16 b) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
}
#endif

template <int MR>
inline void sum_tile(const std::uint32_t* x, std::int64_t ldx, std::int64_t words, const std::uint32_t* group,
                     std::int32_t (&sums)[MR][kGroup]) {
  constexpr int V = kGroup / kWordsOf;
  Wide16 pairs[MR][V];
  for (int m = 0; m < MR; ++m)
    for (int v = 0; v < V; ++v) pairs[m][v] = zero();
  for (std::int64_t k = 0; k < words; ++k, group += kPackedColumns) {
    fetch_ahead(group);
    Wide16 value[MR];
    for (int m = 0; m < MR; ++m) value[m] = activation(x[m * ldx + k]);
    for (int v = 0; v < V; ++v) {
      const Wide16 w = weights(group + v * kWordsOf);
      for (int m = 0; m < MR; ++m) pairs[m][v] = multiply_add(pairs[m][v], w, value[m]);
    }
  }
  for (int m = 0; m < MR; ++m) {
    alignas(kVecBytes) std::int32_t halves[2 * kGroup];
    std::memcpy(halves, pairs[m], sizeof halves);
    for (int j = 0; j < kGroup; ++j) sums[m][j] = halves[2 * j] + halves[2 * j + 1];
  }
}

#else

constexpr int kRows = 1, kGroup = 32;

template <int MR>
inline void sum_tile(const std::uint32_t* x, std::int64_t, std::int64_t words, const std::uint32_t* group,
                     std::int32_t (&sums)[MR][kGroup]) {
  for (int j = 0; j < kGroup; ++j) sums[0][j] = 0;
  const auto* q = reinterpret_cast<const std::int8_t*>(x);
  const auto* w = reinterpret_cast<const std::uint8_t*>(group);
  for (std::int64_t k = 0; k < words; ++k, q += kInt8Inputs, w += kInt8Inputs * kPackedColumns)
    for (int j = 0; j < kGroup; ++j)
      for (int i = 0; i < kInt8Inputs; ++i) sums[0][j] += q[i] * w[kInt8Inputs * j + i];
}

#endif

template <int MR>
void tile(const Int8LinearArgs& args, std::int64_t m0, const std::uint32_t* group, std::int64_t n,
          std::int64_t columns) {
  constexpr std::int64_t kWords = kQuantisedInputs / kInt8Inputs;
  const std::int64_t words = (args.K + kInt8Inputs - 1) / kInt8Inputs,
                     num_groups = (words + kWords - 1) / kWords;
  alignas(kVecBytes) std::int32_t sums[MR][kGroup];
  alignas(kVecBytes) float totals[MR][kGroup] = {};
  for (std::int64_t g = 0; g < num_groups; ++g) {
    const std::int64_t k = g * kWords;
    sum_tile<MR>(args.x + m0 * words + k, words, std::min(kWords, words - k), group + k * kPackedColumns,
                 sums);
    for (int m = 0; m < MR; ++m) {
      const float scale = args.x_scales[(m0 + m) * num_groups + g];
      const std::int32_t offset = 128 * args.x_sums[(m0 + m) * num_groups + g];
      for (int j = 0; j < kGroup; ++j) totals[m][j] += static_cast<float>(sums[m][j] - offset) * scale;
    }
  }
  for (int m = 0; m < MR; ++m) {
    float* y = args.y + (m0 + m) * args.ldy + n;
    for (std::int64_t j = 0; j < columns; ++j) {
      float value = totals[m][j] * args.scales[n + j];
      if (args.bias) value += args.bias[n + j];
      y[j] = args.accumulate ? y[j] + value : value;
    }
  }
}

}  // namespace

void linear_int8(const Int8LinearArgs& args, std::int64_t M, std::int64_t p0, std::int64_t p1) {
  const std::int64_t words = (args.K + kInt8Inputs - 1) / kInt8Inputs;
  for (std::int64_t p = p0; p < p1; ++p)
    for (std::int64_t c = 0; c < kPackedColumns; c += kGroup) {
      const std::int64_t n = p * kPackedColumns + c;
      const std::int64_t columns = std::min<std::int64_t>(kGroup, args.N - n);
      if (columns <= 0) break;
      const std::uint32_t* group = args.panels + p * words * kPackedColumns + c;
      for (std::int64_t m = 0; m < M; m += kRows)
        with_count<kRows>(std::min<std::int64_t>(kRows, M - m),
                          [&]<int MR>() { tile<MR>(args, m, group, n, columns); });
    }
}

}  // namespace rlhf::kernels::RLHF_ISA
