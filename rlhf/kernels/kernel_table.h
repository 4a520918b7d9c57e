#pragma once
// The CPU kernels as plain functions on raw pointers. One source per operation is compiled once per
// instruction set (baseline, AVX2, AVX-512); a table of function pointers is chosen at run time. Kernels work
// on a range of their parallel index and never start threads themselves: rlhf/kernels/ops.h does.
//
// Shape legend: T tokens (rows), D width, K inputs, N outputs or query heads, G kv heads, H head width, F
// hidden width of the MLP, V vocabulary.

#include <cstdint>

#include "rlhf/core/ids.h"
#include "rlhf/kernels/bfloat16.h"
#include "rlhf/kernels/layout.h"

namespace rlhf::kernels {

struct AdamwFactors;  // rlhf/kernels/adamw.h
template <class T>
struct AdamwBuffers;

/// Y is the type of the result: T, or Wide<T> where T would lose too much.
template <class T, class Y = T>
struct LinearArgs {
  const T* x;  ///< [M, K] with row stride ldx
  std::int64_t ldx;
  const T* w;     ///< [N, K] row-major
  const T* bias;  ///< [N] or null
  Y* y;           ///< [M, N] with row stride ldy
  std::int64_t ldy;
  std::int64_t K;
  bool accumulate;  ///< y += instead of y =
};

/// C[M, N] (+)= A[M, K] B[K, N]; A is read as a[i * row_stride + l * col_stride], so it may be transposed.
template <class T, class C = T>
struct GemmArgs {
  const T* a;
  std::int64_t a_row_stride, a_col_stride;
  const T* b;
  std::int64_t ldb;
  C* c;
  std::int64_t ldc;
  std::int64_t M, N, K;
  bool accumulate;
};

template <class T>
struct NormArgs {
  const T* x;       ///< [T, D]
  const T* weight;  ///< [D]
  const T* bias;    ///< [D] or null (LayerNorm)
  T* y;             ///< [T, D]
  Wide<T>* mean;    ///< [T], LayerNorm only, or null
  Wide<T>* rstd;    ///< [T] or null
  std::int64_t D;
  double eps;
  bool layer_norm;  ///< subtract the mean
  bool plus_one;    ///< scale by (1 + weight), as Gemma does
};

template <class T>
struct NormGradArgs {
  const T* dy;  ///< [T, D]
  const T* x;   ///< [T, D]
  const T* weight;
  const Wide<T>* mean;
  const Wide<T>* rstd;
  T* dx;             ///< [T, D], accumulated into
  Wide<T>* dweight;  ///< [D] accumulated into, or null
  Wide<T>* dbias;    ///< [D] accumulated into, or null
  std::int64_t T_rows, D;
  bool layer_norm, plus_one;
};

template <class T>
struct RopeArgs {
  T* x;                     ///< first head of row 0
  std::int64_t row_stride;  ///< elements between rows
  std::int64_t num_heads, H;
  const T* cos;  ///< [positions, H/2]
  const T* sin;
  const std::int32_t* positions;  ///< [T]
  bool inverse;                   ///< rotate back: the backward pass
};

/// One query row of attention over blocks of keys.
template <class T>
struct AttentionRow {
  const T* q;                  ///< [N, H], roped
  T* out;                      ///< [N, H]
  T* lse;                      ///< [N] log-sum-exp of the scaled scores, or null
  const std::int32_t* blocks;  ///< block table of the sequence
  std::int64_t first_key;      ///< sliding window: keys before are ignored
  std::int64_t num_keys;       ///< keys visible to this query (its own included)
};

/// E: element of K and V (layout.h says where the scales of Float8 lie).
template <class T, class E = T>
struct AttentionArgs {
  const E* k;                 ///< blocks [.][G][H][kBlockTokens]
  const E* v;                 ///< blocks [.][G][kBlockTokens][H]
  std::int64_t block_stride;  ///< elements between blocks (of k and of v)
  std::int64_t N, G, H;
  double scale, softcap;  ///< softcap 0 = none
};

template <class T>
struct AttentionGradRow {
  const T* q;     ///< [N, H]
  const T* out;   ///< [N, H]
  const T* dout;  ///< [N, H]
  const T* lse;   ///< [N]
  T* dq;          ///< [N, H], overwritten
  const std::int32_t* blocks;
  std::int64_t first_key, num_keys;
};

enum class GluKind { kSilu, kGeluTanh, kGeluTanhPlain };

template <class T>
struct ActivationArgs {
  const T* x;  ///< gated: [T, 2F] gate then up; plain: [T, F]
  T* y;        ///< [T, F]
  std::int64_t F;
  GluKind kind;
};

template <class T>
struct ActivationGradArgs {
  const T* x;
  const T* dy;  ///< [T, F]
  T* dx;        ///< shape of x, overwritten
  std::int64_t F;
  GluKind kind;
};

/// Statistics of one row of logits at a temperature.
struct LogitsRow {
  double max = 0, lse = 0, logprob = 0, entropy = 0;
};

/// A row of logits relative to its largest one: sums over e^x and x e^x, x = scale (logit - largest).
struct RowWeights {
  double largest = 0, mass = 0, moment = 0;
};

template <class T>
struct Kernels {
  const char* isa;
  /// Both matrix products need `packed`, scratch of packed_rows * panel_columns elements.
  void (*linear)(const LinearArgs<T>&, std::int64_t m0, std::int64_t m1, std::int64_t n0, std::int64_t n1,
                 T* packed);
  /// Rows [i0, i1) and the panel_columns columns of C from j0 on, or as many as there are.
  void (*gemm_panel)(const GemmArgs<T>&, std::int64_t i0, std::int64_t i1, std::int64_t j0, T* packed);
  std::int64_t panel_columns, packed_rows;
  std::int64_t tile_rows;  ///< blocks of a multiple of so many rows waste nothing
  void (*norm)(const NormArgs<T>&, std::int64_t t0, std::int64_t t1);
  void (*norm_grad_input)(const NormGradArgs<T>&, std::int64_t t0, std::int64_t t1);
  void (*norm_grad_weight)(const NormGradArgs<T>&, std::int64_t d0, std::int64_t d1);
  void (*rope)(const RopeArgs<T>&, std::int64_t t0, std::int64_t t1);
  /// One kv head of `count` query rows. Neighbours with the same `blocks` go through them together.
  void (*attention)(const AttentionArgs<T>&, const AttentionRow<T>* rows, std::int64_t count, std::int64_t g);
  /// Adds to dk, dv (same block layout as k, v); neighbours as above, when their num_keys do not fall.
  void (*attention_grad)(const AttentionArgs<T>&, const AttentionGradRow<T>* rows, std::int64_t count, T* dk,
                         T* dv, std::int64_t g);
  void (*activation)(const ActivationArgs<T>&, std::int64_t t0, std::int64_t t1);
  void (*activation_grad)(const ActivationGradArgs<T>&, std::int64_t t0, std::int64_t t1);
  /// logits[V] (raw): soft-capped in place when softcap > 0; statistics at the temperature given by
  /// inv_temperature.
  LogitsRow (*logits_row)(T* logits, std::int64_t V, double inv_temperature, double softcap, TokenId target);
  /// Overwrites logits with d loss / d raw logits, given d loss / d logprob and d loss / d entropy of the
  /// row.
  void (*logits_row_grad)(T* logits, std::int64_t V, double inv_temperature, double softcap, TokenId target,
                          const LogitsRow& row, double dlogprob, double dentropy);
  /// Writes the weights e^x that `RowWeights` sums, floats within 256 and doubles across; the same bits on
  /// every instruction set. A NaN makes the sums NaN.
  RowWeights (*weigh)(const T* logits, std::int64_t n, T scale, T* weights);
  T (*largest)(const T* x, std::int64_t n);       ///< NaNs are passed over; -inf of none
  void (*add)(T* y, const T* x, std::int64_t n);  ///< y += x
  void (*scale)(T* y, T factor, std::int64_t n);  ///< y *= factor
  double (*sum_squares)(const T* x, std::int64_t n);
  /// One step of AdamW; the same bits on every instruction set. Lengths are not checked.
  void (*adamw)(const AdamwFactors&, double gradient_scale, const AdamwBuffers<T>&);
};

enum class CpuIsa { kBaseline, kAvx2, kAvx512 };
/// Best instruction set of this machine, or the one that the environment variable RLHF_CPU_ISA (baseline,
/// avx2, avx512) names. @throws InvalidArgument for another name or what this machine lacks.
CpuIsa detect_cpu_isa();
/// True when this machine can run the kernels of `isa`.
bool cpu_supports(CpuIsa isa);
/// Kernels of one instruction set; T is float or double.
template <class T>
const Kernels<T>& kernels_for(CpuIsa isa);

}  // namespace rlhf::kernels
