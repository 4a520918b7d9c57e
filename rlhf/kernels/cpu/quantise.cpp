// Rows of floats to signed bytes with one scale, and panels of such rows or of bf16. Compiled without
// contraction: every instruction set rounds the same products.
#include <algorithm>
#include <bit>
#include <limits>

#include "rlhf/kernels/cpu/packed.h"
#include "rlhf/kernels/cpu/vec.h"

namespace rlhf::kernels::RLHF_ISA {
namespace {

constexpr std::int64_t L = kLanes<float>;
constexpr float kLargest = 127;
constexpr float kSmallestRow = 1e-30F;  // 127 / max would not be finite much below
constexpr std::int32_t kInfinity = 0x7f800000;
// Adding it rounds a float of less than 2^22 to an integer, ties to even, in the lower bits.
constexpr float kRounder = 12582912.0F;
constexpr auto kRounderBits = std::bit_cast<std::int32_t>(kRounder);

// Of the magnitudes as integers, whose order is that of the floats, with NaN last.
std::int32_t largest_bits(const float* x, std::int64_t K) {
  typedef Vec<std::int32_t> Ints;
  Ints largest = {};
  std::int64_t k = 0;
  for (; k + L <= K; k += L) {
    const Ints bits = reinterpret_cast<Ints>(load(x + k)) & 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  std::int32_t most = 0;
  for (int i = 0; i < L; ++i) most = std::max(most, largest[i]);
  for (; k < K; ++k) most = std::max(most, std::bit_cast<std::int32_t>(x[k]) & 0x7fffffff);
  return most;
}

// Half of a word, wherever it lies.
typedef std::uint16_t Half __attribute__((may_alias));

void round_row(const float* __restrict x, std::int64_t K, Half* __restrict halves) {
  for (std::int64_t k = 0; k < K; ++k) halves[k] = from_float<Bfloat16>(x[k]).bits;
}

// panel[k][c] = rows[c][k] ^ flip.
void interleave(const std::uint32_t* __restrict rows, std::int64_t words, std::uint32_t flip,
                std::uint32_t* __restrict panel) {
  for (std::int64_t k = 0; k < words; ++k, panel += kPackedColumns)
    for (std::int64_t c = 0; c < kPackedColumns; ++c) panel[c] = rows[c * words + k] ^ flip;
}

}  // namespace

QuantisedRow quantise_row(const float* x, std::int64_t K, std::uint32_t* q) {
  const std::int64_t words = (K + kInt8Inputs - 1) / kInt8Inputs;
  const std::int32_t bits = largest_bits(x, K);
  const auto largest = std::bit_cast<float>(bits);
  if (bits >= kInfinity || largest < kSmallestRow) {
    std::fill_n(q, words, 0U);
    return {bits >= kInfinity ? std::numeric_limits<float>::quiet_NaN() : 0.0F, 0};
  }
  const float factor = kLargest / largest;
  q[words - 1] = 0;
  auto* __restrict bytes = reinterpret_cast<std::int8_t*>(q);
  std::int32_t sum = 0;
  for (std::int64_t k = 0; k < K; ++k) {
    const auto value = std::bit_cast<std::int32_t>(x[k] * factor + kRounder) - kRounderBits;
    bytes[k] = static_cast<std::int8_t>(value);
    sum += value;
  }
  return {largest / kLargest, sum};
}

void pack_bf16(const float* w, std::int64_t N, std::int64_t K, std::int64_t p, std::uint32_t* panel,
               std::uint32_t* rows) {
  const std::int64_t words = (K + kBf16Inputs - 1) / kBf16Inputs, n0 = p * kPackedColumns;
  std::fill_n(rows, words * kPackedColumns, 0U);
  for (std::int64_t c = 0; c < std::min(kPackedColumns, N - n0); ++c)
    round_row(w + (n0 + c) * K, K, reinterpret_cast<Half*>(rows + c * words));
  interleave(rows, words, 0, panel);
}

void pack_int8(const float* w, std::int64_t N, std::int64_t K, std::int64_t p, std::uint32_t* panel,
               float* scales, std::uint32_t* rows) {
  const std::int64_t words = (K + kInt8Inputs - 1) / kInt8Inputs, n0 = p * kPackedColumns;
  std::fill_n(rows, words * kPackedColumns, 0U);
  for (std::int64_t c = 0; c < std::min(kPackedColumns, N - n0); ++c)
    scales[n0 + c] = quantise_row(w + (n0 + c) * K, K, rows + c * words).scale;
  interleave(rows, words, 0x80808080U, panel);
}

}  // namespace rlhf::kernels::RLHF_ISA
