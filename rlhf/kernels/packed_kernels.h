#pragma once
// Kernels on matrices of weights in bf16 or int8, in panels of kPackedColumns outputs: the columns of a panel
// are neighbours in memory for every k, so a step reads one stream. Compiled once per instruction set, like
// kernel_table.h, and once more for AVX-512 with VNNI.
//
// Shape legend: M rows of activations, N outputs, K inputs, P panels = ceil(N / kPackedColumns).

#include <cstdint>
#include <vector>

#include "rlhf/kernels/kernel_table.h"

namespace rlhf::kernels {

/// Outputs of a panel; those beyond N have weights of 0.
inline constexpr std::int64_t kPackedColumns = 32;
/// Inputs of a row of activations that share a scale in int8: one large activation costs only its neighbours
/// precision.
inline constexpr std::int64_t kQuantisedInputs = 64;
/// Inputs that lie in one 32-bit word of a panel.
inline constexpr std::int64_t kBf16Inputs = 2, kInt8Inputs = 4;

/// y (+)= x W^T + bias with W in bf16.
struct Bf16LinearArgs {
  const float* x;  ///< [M, K] with row stride ldx
  std::int64_t ldx;
  const std::uint32_t* panels;  ///< [P, ceil(K / 2), kPackedColumns]; the lower half of a word is the even k
  const float* bias;            ///< [N] or null
  float* y;                     ///< [M, N] with row stride ldy
  std::int64_t ldy;
  std::int64_t N, K;
  bool accumulate;  ///< y += instead of y =
};

/// y (+)= scales (sum over groups g of x_scales_g (sum over k in g of q w)) + bias with q and w in int8.
/// Groups are kQuantisedInputs neighbours, G = ceil(K / kQuantisedInputs).
struct Int8LinearArgs {
  const std::uint32_t* x;       ///< [M, ceil(K / 4)]: 4 signed bytes a word, the lowest first
  const float* x_scales;        ///< [M, G]
  const std::int32_t* x_sums;   ///< [M, G]: sum of the group's bytes
  const std::uint32_t* panels;  ///< [P, ceil(K / 4), kPackedColumns]: 4 bytes a word, each w + 128
  const float* scales;          ///< [N]
  const float* bias;            ///< [N] or null
  float* y;                     ///< [M, N] with row stride ldy
  std::int64_t ldy;
  std::int64_t N, K;
  bool accumulate;  ///< y += instead of y =
};

/// A row, or a group of one, in int8 is q[k] * scale, with q = round_to_even(x[k] * (127 / max |x|)) and
/// scale = max |x| / 127.
struct QuantisedRow {
  float scale;       ///< 0 for a row below 1e-30, NaN for one that is not finite (q is 0 then)
  std::int32_t sum;  ///< of q
};

/// An output of `linear_bf16` is summed in the order of Kernels<float>::linear, so it equals, bit for bit on
/// the same instruction set, the fp32 product with W rounded. `linear_int8` sums integers, and groups in
/// order without fused multiply-add: it gives the same bits on all instruction sets. Neither depends on the
/// batch.
struct PackedKernels {
  const char* isa;
  /// All M rows and the outputs of panels [p0, p1).
  void (*linear_bf16)(const Bf16LinearArgs&, std::int64_t M, std::int64_t p0, std::int64_t p1);
  void (*linear_int8)(const Int8LinearArgs&, std::int64_t M, std::int64_t p0, std::int64_t p1);
  /// Fills q[ceil(K / 4)], with zeros behind K.
  QuantisedRow (*quantise_row)(const float* x, std::int64_t K, std::uint32_t* q);
  /// Packs rows [32 p, ...) of w[N, K] into one panel. `rows` is scratch of a panel's size.
  void (*pack_bf16)(const float* w, std::int64_t N, std::int64_t K, std::int64_t p, std::uint32_t* panel,
                    std::uint32_t* rows);
  /// As above, and fills their scales[N].
  void (*pack_int8)(const float* w, std::int64_t N, std::int64_t K, std::int64_t p, std::uint32_t* panel,
                    float* scales, std::uint32_t* rows);
};

/// The fastest packed kernels that this machine runs within an instruction set.
const PackedKernels& packed_kernels_for(CpuIsa isa);
/// All that this machine can run, the plain loops first: for tests.
std::vector<const PackedKernels*> all_packed_kernels();

}  // namespace rlhf::kernels
