#pragma once
// What a device computes, over whole passes: one table of functions for the CPU, one for CUDA. `queue` says
// where: on the CPU a `const Compute<T>*`, on CUDA a cudaStream_t, in which calls run in order and return
// before they are done. All pointers are of the device. Every output element is summed in an order that does
// not depend on how many rows the pass has, except in products of matrices on CUDA (docs/design/cuda.md).
//
// T is float or double on the CPU, float or Bfloat16 on CUDA. Shape legend as in kernel_table.h.

#include <cstdint>

#include "rlhf/core/ids.h"
#include "rlhf/kernels/kernel_table.h"

namespace rlhf::kernels {

/// The rows of one pass: row t is one token of some sequence.
struct PassRows {
  std::int64_t count = 0;
  const TokenId* tokens = nullptr;              ///< [T]
  const std::int32_t* positions = nullptr;      ///< [T]
  const std::int32_t* const* tables = nullptr;  ///< [T] block table of the row's sequence
  const std::size_t* copy_offsets = nullptr;    ///< [T + 1], or null: no row has copies
  const std::int32_t* copies = nullptr;         ///< further blocks that take a row's K and V
  std::int64_t max_keys = 0;                    ///< largest position + 1; known to the host
  /// Rows that a GPU may take together: tile i is rows [tiles[2 i], tiles[2 i] + tiles[2 i + 1]), at most
  /// kTileRows of one table with ascending positions. No tiles: every row by itself.
  const std::int32_t* tiles = nullptr;
  std::int64_t num_tiles = 0;
  const std::int32_t* single_rows = nullptr;  ///< the rows in no tile, where there are tiles
  std::int64_t num_single_rows = 0;
};

template <class T>
struct EmbedArgs {
  const T* table;      ///< [V, D]
  const T* positions;  ///< [max_positions, D] or null
  T* x;                ///< [T, D]
  std::int64_t D;
  double scale;  ///< of the token's row
};

/// d table[keys[s]] += scale * sum of dx over rows order[offsets[s]] .. order[offsets[s + 1]).
template <class T>
struct EmbedGradArgs {
  const T* dx;      ///< [T, D]
  Wide<T>* dtable;  ///< [., D]
  std::int64_t D;
  double scale;
  std::int64_t num_keys;
  const std::int32_t* keys;
  const std::int64_t* offsets;
  const std::int64_t* order;
};

/// q/k norm (where there is one), rotary embedding (where there is one), K and V into their blocks. E as in
/// AttentionArgs; in Float8 a head of a row has a scale of its own, so that nothing is clipped, and one with
/// a NaN or an infinity is NaN.
template <class T, class E = T>
struct AppendArgs {
  T* qkv;  ///< [T, (N + 2 G) H]; q and k are normed and rotated in place
  T* q;    ///< [T, N H] copy of the rotated q, or null
  E* k;    ///< blocks of one layer
  E* v;
  std::int64_t block_stride;
  std::int64_t N, G, H;
  const T* q_norm;  ///< [H] or null
  const T* k_norm;
  double eps;
  bool plus_one;
  const Wide<T>* cos;  ///< [positions, H / 2]; null = no rotation
  const Wide<T>* sin;
};

/// Backward of AppendArgs: collects dK and dV of every row from its blocks, rotates back, and goes through
/// the norms.
template <class T>
struct AppendGradArgs {
  T* dqkv;            ///< [T, (N + 2 G) H]; the q part holds d loss / d q already
  const T* raw;       ///< [T, (N + 2 G) H] qkv before norm and rotation; only with norms
  const Wide<T>* dk;  ///< blocks
  const Wide<T>* dv;
  std::int64_t block_stride;
  std::int64_t N, G, H;
  const T* q_norm;
  const T* k_norm;
  Wide<T>* dq_norm;  ///< [H] accumulated into, or null
  Wide<T>* dk_norm;
  double eps;
  bool plus_one;
  const Wide<T>* cos;
  const Wide<T>* sin;
  Wide<T>* workspace;  ///< head_norm_workspace() elements where there are norms; the CPU needs none
};

template <class T, class E = T>
struct PassAttentionArgs {
  AttentionArgs<T, E> cache;
  const T* q;  ///< [T, N, H] with row stride q_stride
  std::int64_t q_stride;
  T* out;               ///< [T, N, H]
  Wide<T>* lse;         ///< [T, N] or null
  std::int64_t window;  ///< keys that a query sees; 0 = all
  Wide<T>* workspace;   ///< attention_workspace() elements for the rows in no tile; the CPU needs none
};

/// Which rows see a block: rows [ranges[2 r], ranges[2 r + 1]) for r in [offsets[block], offsets[block + 1]),
/// each of one sequence in whose table the block is number first_keys[block] / kBlockTokens. The rows of a
/// range have ascending positions.
struct BlockUses {
  std::int64_t num_blocks = 0;
  const std::int64_t* offsets = nullptr;     ///< [num_blocks + 1]
  const std::int64_t* ranges = nullptr;      ///< [offsets[num_blocks], 2]
  const std::int32_t* first_keys = nullptr;  ///< [num_blocks]
  /// On a GPU: [ceil(num_blocks / kBlocksPerGroup)], runs of so many blocks, those that most rows see first.
  const std::int32_t* groups = nullptr;
};

/// The rows, grouped so that the block tables of different groups have no block in common: group i is
/// rows[offsets[i]] .. rows[offsets[i + 1]). The CPU's unit of parallel work.
struct RowTrees {
  std::int64_t count = 0;
  const std::int64_t* offsets = nullptr;
  const std::int64_t* rows = nullptr;
};

template <class T>
struct PassAttentionGradArgs {
  AttentionArgs<T> cache;
  const T* q;  ///< [T, N, H]
  const T* out;
  const T* dout;
  const Wide<T>* lse;  ///< [T, N]
  T* dq;               ///< [T, N, H] with row stride dq_stride, overwritten
  std::int64_t dq_stride;
  Wide<T>* dk;  ///< [uses.num_blocks] blocks, overwritten
  Wide<T>* dv;
  std::int64_t window;
  BlockUses uses;                ///< read on a GPU
  RowTrees trees;                ///< read on the CPU
  Wide<T>* workspace = nullptr;  ///< [T, N], for tensor cores on a GPU; null does without both
};

/// Rows up to which few_rows_linear computes a product.
inline constexpr std::int64_t kFewRows = 16;

/// y (+)= f(norm(x)) with f the product with weights: what a decode step of few sequences consists of.
template <class T>
struct FewRowsArgs {
  LinearArgs<T> product;  ///< gated: w is [2 N, K] and y is [M, N]
  std::int64_t M = 0;
  NormArgs<T> norm = {};  ///< of x before the product; x, y, mean, rstd and D are not read. No weight: none
  bool gated = false;     ///< y = activation(first half of the product) * second half; not with accumulate
  GluKind activation = GluKind::kSilu;
};

template <class T>
struct LogitsArgs {
  Wide<T>* logits;  ///< [rows, V]
  std::int64_t V;
  double inv_temperature, softcap;  ///< softcap 0 = none
  const TokenId* targets;           ///< [rows]
  LogitsRow* statistics;            ///< [rows]: written by logits, read by logits_grad
  const Wide<T>* dlogprobs;         ///< [rows], logits_grad only
  const Wide<T>* dentropies;        ///< [rows] or null
  double* workspace;                ///< logits_workspace() elements; the CPU and logits_grad need none
  T* rounded = nullptr;             ///< [rows, V]: where logits_grad writes; null = over the logits
};

/// Coordinates of one draw, as uniform_at takes them.
struct DrawKey {
  std::uint64_t seed, a;
  std::uint32_t b, c;
  double inv_temperature;
  bool greedy;  ///< the largest logit, the lowest token among equals
};

/// Draws by inversion from softmax(logits * inv_temperature): the first token, in ascending order, at which
/// the cumulative probability exceeds the uniform number. What a sampler keeps of the row comes out of the
/// same passes over it.
template <class T>
struct DrawArgs {
  const Wide<T>* logits;  ///< [rows, V], after the soft cap
  std::int64_t V;
  const DrawKey* keys;  ///< [rows]
  TokenId* tokens;      ///< [rows]; -1 where the row has a NaN or no finite maximum
  /// [rows] at the row's temperature (1 when greedy), of the drawn token; NaN where that is -1. Or null.
  LogitsRow* statistics;
  double* workspace;  ///< logits_workspace() elements; the CPU needs none
};

/// One token whose logit changes before its row is drawn from.
struct LogitEdit {
  TokenId token = 0;
  float bias = 0;        ///< added; -inf rules the token out. `edit` leaves the logit as it was here
  float penalty = 0;     ///< then taken off
  float repetition = 1;  ///< then a divisor of what is not negative, a factor of what is
};
template <class V>
RLHF_HOST_DEVICE constexpr V edited_logit(const LogitEdit& edit, V logit) {
  logit += static_cast<V>(edit.bias);
  logit -= static_cast<V>(edit.penalty);
  const V repetition = static_cast<V>(edit.repetition);
  return logit < 0 ? logit * repetition : logit / repetition;
}

/// What changes in one row. The tokens of a list differ from one another and lie in [0, V).
struct RowEdits {
  LogitEdit* edits = nullptr;
  std::int64_t num_edits = 0;
  const TokenId* allowed = nullptr;  ///< all other tokens become -inf
  std::int64_t num_allowed = 0;      ///< 0 = every token is

  RLHF_HOST_DEVICE constexpr bool changes() const { return num_edits > 0 || num_allowed > 0; }
};

/// Edits of rows before filters and draws, and what a draw from the unedited row would have reported.
template <class T>
struct EditArgs {
  Wide<T>* logits;  ///< [rows, V], after the soft cap
  std::int64_t V;
  const DrawKey* keys;    ///< [rows]: of the draws that follow, for their temperature (1 when greedy)
  const RowEdits* edits;  ///< [rows]
  /// [rows], where a row changes: `edit` leaves the unedited row's log-sum-exp, `unedited_logprobs` makes it
  /// the drawn token's log-prob.
  double* unedited;
  double* workspace;  ///< logits_workspace() elements; the CPU needs none
};

/// Which tokens of a row a draw may take: the top_k largest logits and all that tie with the last of them; of
/// these the smallest set of largest probabilities whose sum reaches top_p, the lower token first among
/// equals; of these the ones of at least e^log_min_p times the largest. -inf is never taken, the largest
/// always.
struct RowFilter {
  std::int64_t top_k = 0;  ///< 0 = off
  double top_p = 1;        ///< 1 = off
  double log_min_p = -__builtin_inf();

  RLHF_HOST_DEVICE constexpr bool removes() const {
    return top_k > 0 || top_p < 1 || log_min_p > -__builtin_inf();
  }
};

template <class T>
struct FilterArgs {
  Wide<T>* logits;  ///< [rows, V], after the soft cap; removed tokens become -inf
  std::int64_t V;
  const DrawKey*
      keys;  ///< [rows]: of the draws that follow, for their temperature; none that removes is greedy
  const RowFilter* filters;  ///< [rows]
  double* lse;  ///< [rows]: log-sum-exp of the unfiltered row at its temperature, where one removes
};

/// One AdamW update of a flat buffer (rlhf/kernels/adamw.h) that also writes the weights the passes read.
template <class T>
struct OptimizerArgs {
  Wide<T>* master;
  T* shadow;  ///< rounded copy of master, or null
  const Wide<T>* gradient;
  Wide<T>* first_moment;
  Wide<T>* second_moment;
  Wide<T>* max_second_moment;  ///< null unless AMSGrad is wanted
  std::int64_t count;
  const double* gradient_scale;  ///< one number on the device, or null = 1
};

template <class T>
struct DeviceKernels {
  const char* name;
  void (*linear)(const LinearArgs<T>&, std::int64_t M, std::int64_t N, void* queue);
  void (*linear_wide)(const LinearArgs<T, Wide<T>>&, std::int64_t M, std::int64_t N, void* queue);
  void (*gemm)(const GemmArgs<T>&, void* queue);
  void (*gemm_wide)(const GemmArgs<T, Wide<T>>&, void* queue);
  /// Of args.M rows, for which takes_few_rows(args); N outputs are written.
  void (*few_rows_linear)(const FewRowsArgs<T>& args, std::int64_t N, void* queue);
  /// few_rows_linear is to be used where that gains: bits then depend on how many rows there are.
  bool prefers_few_rows;
  void (*norm)(const NormArgs<T>&, std::int64_t rows, void* queue);
  void (*norm_grad)(const NormGradArgs<T>&, void* queue);
  void (*activation)(const ActivationArgs<T>&, std::int64_t rows, void* queue);
  void (*activation_grad)(const ActivationGradArgs<T>&, std::int64_t rows, void* queue);
  void (*add)(T* y, const T* x, std::int64_t n, void* queue);
  void (*add_wide)(Wide<T>* y, const Wide<T>* x, std::int64_t n, void* queue);
  void (*scale)(T* y, double factor, std::int64_t n, void* queue);
  /// Adds the column sums of x[rows, n] to out[n].
  void (*add_column_sums)(Wide<T>* out, const T* x, std::int64_t rows, std::int64_t n, void* queue);
  void (*embed)(const EmbedArgs<T>&, const PassRows&, void* queue);
  void (*embed_grad)(const EmbedGradArgs<T>&, void* queue);
  void (*append)(const AppendArgs<T>&, const PassRows&, void* queue);
  void (*append_fp8)(const AppendArgs<T, Float8>&, const PassRows&, void* queue);
  void (*append_grad)(const AppendGradArgs<T>&, const PassRows&, void* queue);
  void (*attention)(const PassAttentionArgs<T>&, const PassRows&, void* queue);
  void (*attention_fp8)(const PassAttentionArgs<T, Float8>&, const PassRows&, void* queue);
  void (*attention_grad)(const PassAttentionGradArgs<T>&, const PassRows&, void* queue);
  /// to[i] = from[index[i]] for rows of D elements.
  void (*gather_rows)(T* to, const T* from, const std::int64_t* index, std::int64_t rows, std::int64_t D,
                      void* queue);
  /// to[index[i]] += from[i]; indices differ from one another.
  void (*add_to_rows)(T* to, const T* from, const std::int64_t* index, std::int64_t rows, std::int64_t D,
                      void* queue);
  /// Copies blocks pairs[2 i] to pairs[2 i + 1] in every layer of one buffer.
  void (*copy_blocks)(T* base, std::int64_t layers, std::int64_t layer_stride, std::int64_t block_stride,
                      const std::int32_t* pairs, std::int64_t num_pairs, void* queue);
  /// Soft-caps logits in place, where there is a cap, and writes the statistics of every row.
  void (*logits)(const LogitsArgs<T>&, std::int64_t rows, void* queue);
  /// From (soft-capped) logits to d loss / d raw logits.
  void (*logits_grad)(const LogitsArgs<T>&, std::int64_t rows, void* queue);
  void (*edit)(const EditArgs<T>&, std::int64_t rows, void* queue);
  /// Log-probs of the drawn tokens in their rows as they were before `edit`; NaN where a token is -1.
  void (*unedited_logprobs)(const EditArgs<T>&, const TokenId* tokens, std::int64_t rows, void* queue);
  void (*filter)(const FilterArgs<T>&, std::int64_t rows, void* queue);
  void (*draw)(const DrawArgs<T>&, std::int64_t rows, void* queue);
  /// to = from, rounded to T.
  void (*narrow)(T* to, const Wide<T>* from, std::int64_t n, void* queue);
  void (*adamw)(const AdamwFactors&, const OptimizerArgs<T>&, void* queue);
  /// *result = sum of x^2 in double; `workspace` holds kSumPartials doubles.
  void (*sum_squares)(double* result, double* workspace, const Wide<T>* x, std::int64_t n, void* queue);
  /// *result = sum of float_hash_term(first + i, bits of x[i]); `workspace` holds kSumPartials numbers.
  void (*hash_floats)(std::uint64_t* result, std::uint64_t* workspace, const float* x, std::int64_t n,
                      std::uint64_t first, void* queue);
  /// *scale = clip_scale(sqrt(*square), max_norm), without the host.
  void (*clip)(double* scale, const double* square, double max_norm, void* queue);
};

inline constexpr std::int64_t kSumPartials = 256;

/// Elements of PassAttentionArgs::workspace on a GPU.
constexpr std::int64_t attention_workspace(std::int64_t rows, std::int64_t N, std::int64_t H,
                                           std::int64_t max_keys, std::int64_t window) {
  return part_offset(rows, 0, 0, N, max_attention_parts(max_keys, window), H);
}

/// Elements of AppendGradArgs::workspace on a GPU, where so many blocks add up the weights' gradients.
inline constexpr std::int64_t kHeadNormParts = 128;
constexpr std::int64_t head_norm_workspace(std::int64_t H) {
  return kHeadNormParts * H;
}

/// On a GPU a row of logits is cut into parts of so many tokens, whatever the number of rows.
inline constexpr std::int64_t kLogitsPart = 4096;
inline constexpr std::int64_t kPartDoubles = 3;  ///< that a part leaves
constexpr std::int64_t logits_parts(std::int64_t V) {
  return ceil_div(V, kLogitsPart);
}
/// Elements of LogitsArgs::workspace and DrawArgs::workspace on a GPU.
constexpr std::int64_t logits_workspace(std::int64_t rows, std::int64_t V) {
  return rows * logits_parts(V) * kPartDoubles;
}

/// Whether few_rows_linear computes this on a GPU, where rows are read 16 bytes at a time.
template <class T>
bool takes_few_rows(const FewRowsArgs<T>& args) {
  const auto wide = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; };
  const std::int64_t bytes = sizeof(T);
  return args.M <= kFewRows && args.product.K * bytes % 16 == 0 && args.product.ldx * bytes % 16 == 0 &&
         wide(args.product.x) && wide(args.product.w) && wide(args.norm.weight) && wide(args.norm.bias);
}

/// Up to where few_rows_linear is faster than a library's product: what counts then is how soon a kernel
/// starts, not how fast it reads (measured on an H200, docs/results/gpu.md).
template <class T>
bool gains_from_few_rows(const FewRowsArgs<T>& args, std::int64_t N) {
  const std::int64_t weights = (args.gated ? 2 * N : N) * args.product.K;
  return takes_few_rows(args) && weights <= 12 << 20 && args.M * args.product.K <= 32 << 10;
}

/// The CPU's table; T is float or double.
template <class T>
const DeviceKernels<T>& cpu_device_kernels();

}  // namespace rlhf::kernels
