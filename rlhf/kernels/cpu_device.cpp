// The CPU's table of DeviceKernels: the kernels of one instruction set over the rows of a pass, split over
// threads. Threads only split work that they do not share, so results do not depend on how many there are.
#include <algorithm>
#include <cmath>
#include <vector>

#include "rlhf/core/random.h"
#include "rlhf/kernels/adamw.h"
#include "rlhf/kernels/cpu_device_edit.h"
#include "rlhf/kernels/cpu_device_few_rows.h"
#include "rlhf/kernels/cpu_device_filter.h"
#include "rlhf/kernels/cpu_device_fp8.h"
#include "rlhf/kernels/device_kernels.h"
#include "rlhf/kernels/float_hash.h"
#include "rlhf/kernels/ops.h"

namespace rlhf::kernels {
namespace {

template <class T>
const Compute<T>& compute_of(void* queue) {
  return *static_cast<const Compute<T>*>(queue);
}

// ---- embedding and rows ----

template <class T>
void embed(const EmbedArgs<T>& args, const PassRows& rows, void* queue) {
  const std::int64_t D = args.D;
  const T scale = static_cast<T>(args.scale);
  compute_of<T>(queue).for_rows(rows.count, D, [&](std::int64_t t) {
    const T* row = args.table + rows.tokens[t] * D;
    T* out = args.x + t * D;
    for (std::int64_t d = 0; d < D; ++d) out[d] = row[d] * scale;
    if (args.positions)
      for (std::int64_t d = 0; d < D; ++d) out[d] += args.positions[rows.positions[t] * D + d];
  });
}

template <class T>
void embed_grad(const EmbedGradArgs<T>& args, void* queue) {
  const T scale = static_cast<T>(args.scale);
  compute_of<T>(queue).for_rows(args.num_keys, 4 * args.D, [&](std::int64_t s) {
    T* row = args.dtable + args.keys[s] * args.D;
    for (std::int64_t i = args.offsets[s]; i < args.offsets[s + 1]; ++i) {
      const T* d = args.dx + args.order[i] * args.D;
      for (std::int64_t k = 0; k < args.D; ++k) row[k] += d[k] * scale;
    }
  });
}

template <class T>
void gather_rows(T* to, const T* from, const std::int64_t* index, std::int64_t rows, std::int64_t D,
                 void* queue) {
  compute_of<T>(queue).for_rows(rows, D,
                                [&](std::int64_t i) { std::copy_n(from + index[i] * D, D, to + i * D); });
}

template <class T>
void add_to_rows(T* to, const T* from, const std::int64_t* index, std::int64_t rows, std::int64_t D,
                 void* queue) {
  const Compute<T>& compute = compute_of<T>(queue);
  compute.for_rows(rows, D, [&](std::int64_t i) { compute.table().add(to + index[i] * D, from + i * D, D); });
}

template <class T>
void copy_blocks(T* base, std::int64_t layers, std::int64_t layer_stride, std::int64_t block_stride,
                 const std::int32_t* pairs, std::int64_t num_pairs, void* queue) {
  compute_of<T>(queue).for_rows(layers * num_pairs, block_stride, [&](std::int64_t task) {
    T* layer = base + task / num_pairs * layer_stride;
    const std::int32_t* pair = pairs + task % num_pairs * 2;
    std::copy_n(layer + pair[0] * block_stride, block_stride, layer + pair[1] * block_stride);
  });
}

// ---- q, k, v and the cache ----

// Calls fn(block) for every block that takes row t's K and V.
template <class Fn>
void for_blocks_of_row(const PassRows& rows, std::int64_t t, const Fn& fn) {
  fn(rows.tables[t][rows.positions[t] / kBlockTokens]);
  if (!rows.copy_offsets) return;
  for (std::size_t i = rows.copy_offsets[t]; i < rows.copy_offsets[t + 1]; ++i) fn(rows.copies[i]);
}

template <class T, class E>
void append(const AppendArgs<T, E>& args, const PassRows& rows, void* queue) {
  const Compute<T>& compute = compute_of<T>(queue);
  const std::int64_t N = args.N, G = args.G, H = args.H, width = (N + 2 * G) * H;
  const RopeArgs<T> rope{args.qkv, width, N + G, H, args.cos, args.sin, rows.positions, false};
  const auto head_norm = [&](const T* weight, T* x, std::int64_t heads) {
    if (weight)
      compute.table().norm({x, weight, nullptr, x, nullptr, nullptr, H, args.eps, false, args.plus_one}, 0,
                           heads);
  };
  compute.for_rows(rows.count, 4 * width, [&](std::int64_t t) {
    T* row = args.qkv + t * width;
    head_norm(args.q_norm, row, N);
    head_norm(args.k_norm, row + N * H, G);
    if (args.cos) compute.table().rope(rope, t, t + 1);
    const std::int64_t slot = rows.positions[t] % kBlockTokens;
    const T* key = row + N * H;
    const T* value = key + G * H;
    for_blocks_of_row(rows, t, [&](std::int32_t block) {
      for (std::int64_t g = 0; g < G; ++g) {
        const std::int64_t at = head_offset<E>(block, args.block_stride, g, H);
        store_in_slot(args.k + at, slot, H, key + g * H, [&](std::int64_t h) { return key_offset(slot, h); });
        store_in_slot(args.v + at, slot, H, value + g * H,
                      [&](std::int64_t h) { return value_offset(slot, h, H); });
      }
    });
    if (args.q) std::copy_n(row, N * H, args.q + t * N * H);
  });
}

// Gradient of the per-head norms of q and k, in place on dqkv.
template <class T>
void head_norm_grad(const AppendGradArgs<T>& args, std::int64_t rows, const Kernels<T>& table) {
  const std::int64_t N = args.N, G = args.G, H = args.H, width = (N + 2 * G) * H;
  std::vector<T> gradient(static_cast<std::size_t>(N * H)), rstd(static_cast<std::size_t>(N)),
      normed(static_cast<std::size_t>(N * H));
  const auto one = [&](std::int64_t t, const T* weight, T* dweight, std::int64_t offset, std::int64_t heads) {
    if (!weight) return;
    const T* x = args.raw + t * width + offset;
    T* d = args.dqkv + t * width + offset;
    table.norm({x, weight, nullptr, normed.data(), nullptr, rstd.data(), H, args.eps, false, args.plus_one},
               0, heads);
    std::fill(gradient.begin(), gradient.end(), T(0));
    const NormGradArgs<T> grad{d,       x,       weight, nullptr, rstd.data(), gradient.data(),
                               dweight, nullptr, heads,  H,       false,       args.plus_one};
    table.norm_grad_input(grad, 0, heads);
    if (dweight) table.norm_grad_weight(grad, 0, H);
    std::copy_n(gradient.data(), heads * H, d);
  };
  for (std::int64_t t = 0; t < rows; ++t) {
    one(t, args.q_norm, args.dq_norm, 0, N);
    one(t, args.k_norm, args.dk_norm, N * H, G);
  }
}

template <class T>
void append_grad(const AppendGradArgs<T>& args, const PassRows& rows, void* queue) {
  const Compute<T>& compute = compute_of<T>(queue);
  const std::int64_t N = args.N, G = args.G, H = args.H, width = (N + 2 * G) * H;
  const RopeArgs<T> rope{args.dqkv, width, N + G, H, args.cos, args.sin, rows.positions, true};
  compute.for_rows(rows.count, 4 * width, [&](std::int64_t t) {
    const std::int64_t slot = rows.positions[t] % kBlockTokens;
    T* key = args.dqkv + t * width + N * H;
    T* value = key + G * H;
    std::fill_n(key, 2 * G * H, T(0));
    for_blocks_of_row(rows, t, [&](std::int32_t block) {
      for (std::int64_t g = 0; g < G; ++g) {
        const T* k_head = args.dk + head_offset(block, args.block_stride, g, H);
        const T* v_head = args.dv + head_offset(block, args.block_stride, g, H);
        for (std::int64_t h = 0; h < H; ++h) key[g * H + h] += k_head[key_offset(slot, h)];
        for (std::int64_t h = 0; h < H; ++h) value[g * H + h] += v_head[value_offset(slot, h, H)];
      }
    });
    if (args.cos) compute.table().rope(rope, t, t + 1);
  });
  head_norm_grad(args, rows.count, compute.table());
}

template <class T>
void attention(const PassAttentionArgs<T>& args, const PassRows& rows, void* queue) {
  constexpr std::int64_t kMostRows = 8;  // neighbours are often rows of one sequence
  const Compute<T>& compute = compute_of<T>(queue);
  const std::int64_t N = args.cache.N, G = args.cache.G, H = args.cache.H;
  const std::int64_t share = rows.count * G / (4 * compute.pool().num_threads());
  const std::int64_t rows_per_task = std::clamp<std::int64_t>(share, 1, kMostRows);
  const std::int64_t chunks = (rows.count + rows_per_task - 1) / rows_per_task;
  const std::int64_t keys = rows.count == 0 ? 1 : rows.positions[rows.count - 1] + kBlockTokens;
  compute.for_rows(chunks * G, rows_per_task * 4 * N * H * keys / G, [&](std::int64_t task) {
    const std::int64_t first = task / G * rows_per_task, last = std::min(rows.count, first + rows_per_task);
    AttentionRow<T> chunk[kMostRows];
    for (std::int64_t t = first; t < last; ++t) {
      const std::int64_t position = rows.positions[t];
      chunk[t - first] = {args.q + t * args.q_stride,
                          args.out + t * N * H,
                          args.lse ? args.lse + t * N : nullptr,
                          rows.tables[t],
                          first_visible_key(position, args.window),
                          position + 1};
    }
    compute.table().attention(args.cache, chunk, last - first, task % G);
  });
}

template <class T>
void attention_grad(const PassAttentionGradArgs<T>& args, const PassRows& rows, void* queue) {
  const Compute<T>& compute = compute_of<T>(queue);
  const std::int64_t N = args.cache.N, G = args.cache.G, H = args.cache.H;
  std::fill_n(args.dk, args.uses.num_blocks * args.cache.block_stride, T(0));
  std::fill_n(args.dv, args.uses.num_blocks * args.cache.block_stride, T(0));
  // One task per tree and kv head: the rows of a tree add to the same dK and dV, in order.
  compute.pool().parallel_for(args.trees.count * G, 1, [&](std::int64_t begin, std::int64_t end) {
    static thread_local std::vector<AttentionGradRow<T>> tree;
    for (std::int64_t task = begin; task < end; ++task) {
      tree.clear();
      for (std::int64_t i = args.trees.offsets[task / G]; i < args.trees.offsets[task / G + 1]; ++i) {
        const std::int64_t t = args.trees.rows[i], position = rows.positions[t];
        tree.push_back({args.q + t * N * H, args.out + t * N * H, args.dout + t * N * H, args.lse + t * N,
                        args.dq + t * args.dq_stride, rows.tables[t],
                        first_visible_key(position, args.window), position + 1});
      }
      compute.table().attention_grad(args.cache, tree.data(), static_cast<std::int64_t>(tree.size()), args.dk,
                                     args.dv, task % G);
    }
  });
}

// ---- logits ----

template <class T>
void logits(const LogitsArgs<T>& args, std::int64_t rows, void* queue) {
  const Compute<T>& compute = compute_of<T>(queue);
  compute.for_rows(rows, 20 * args.V, [&](std::int64_t i) {
    args.statistics[i] = compute.table().logits_row(args.logits + i * args.V, args.V, args.inv_temperature,
                                                    args.softcap, args.targets[i]);
  });
}

template <class T>
void logits_grad(const LogitsArgs<T>& args, std::int64_t rows, void* queue) {
  const Compute<T>& compute = compute_of<T>(queue);
  compute.for_rows(rows, 20 * args.V, [&](std::int64_t i) {
    T* const row = (args.rounded ? args.rounded : args.logits) + i * args.V;
    if (args.rounded) std::copy_n(args.logits + i * args.V, args.V, row);
    compute.table().logits_row_grad(row, args.V, args.inv_temperature, args.softcap, args.targets[i],
                                    args.statistics[i], static_cast<double>(args.dlogprobs[i]),
                                    args.dentropies ? static_cast<double>(args.dentropies[i]) : 0);
  });
}

// The temperature is of no effect on a greedy row's token; its statistics are at temperature 1.
double draw_scale(const DrawKey& key) {
  return key.greedy ? 1 : key.inv_temperature;
}

// One row's token, and its statistics where they are wanted.
template <class T>
TokenId draw_one(const T* logits, std::int64_t V, const DrawKey& key, LogitsRow* statistics) {
  const T* largest = std::max_element(logits, logits + V);
  const bool has_nan = std::any_of(logits, logits + V, [](T x) { return std::isnan(x); });
  if (statistics) *statistics = {NAN, NAN, NAN, NAN};
  if (has_nan || !std::isfinite(*largest)) return -1;
  if (key.greedy && !statistics) return static_cast<TokenId>(largest - logits);
  const double scale = draw_scale(key);
  const auto exponent = [&](std::int64_t i) {
    return (static_cast<double>(logits[i]) - static_cast<double>(*largest)) * scale;
  };
  double mass = 0, below = 0, moment = 0;
  for (std::int64_t i = 0; i < V; ++i) {
    const double weight = std::exp(exponent(i));
    mass += weight;
    if (weight > 0) moment += weight * exponent(i);
  }
  std::int64_t last = largest - logits;
  const double target = uniform_at(key.seed, key.a, key.b, key.c) * mass;
  for (std::int64_t i = 0; i < V && !key.greedy && below <= target; ++i) {
    const double weight = std::exp(exponent(i));
    if (weight <= 0) continue;
    below += weight;
    last = i;
  }
  if (statistics) {
    const double log_mass = std::log(mass), max = static_cast<double>(*largest) * scale;
    *statistics = {max, max + log_mass, exponent(last) - log_mass, log_mass - moment / mass};
  }
  return static_cast<TokenId>(last);
}

template <class T>
void edit(const EditArgs<T>& args, std::int64_t rows, void* queue) {
  compute_of<T>(queue).for_rows(rows, 20 * args.V, [&](std::int64_t i) {
    if (args.edits[i].changes())
      args.unedited[i] = edit_one(args.logits + i * args.V, args.V, draw_scale(args.keys[i]), args.edits[i]);
  });
}

template <class T>
void unedited_logprobs(const EditArgs<T>& args, const TokenId* tokens, std::int64_t rows, void* /*queue*/) {
  for (std::int64_t i = 0; i < rows; ++i)
    if (args.edits[i].changes())
      args.unedited[i] =
          unedited_logit(args.logits + i * args.V, args.edits[i], tokens[i]) * draw_scale(args.keys[i]) -
          args.unedited[i];
}

template <class T>
void filter(const FilterArgs<T>& args, std::int64_t rows, void* queue) {
  compute_of<T>(queue).for_rows(rows, 20 * args.V, [&](std::int64_t i) {
    if (args.filters[i].removes())
      args.lse[i] =
          filter_one(args.logits + i * args.V, args.V, args.keys[i].inv_temperature, args.filters[i]);
  });
}

template <class T>
void draw(const DrawArgs<T>& args, std::int64_t rows, void* queue) {
  compute_of<T>(queue).for_rows(rows, 60 * args.V, [&](std::int64_t i) {
    args.tokens[i] = draw_one(args.logits + i * args.V, args.V, args.keys[i],
                              args.statistics ? args.statistics + i : nullptr);
  });
}

// ---- optimizer ----

template <class T>
void adamw(const AdamwFactors& factors, const OptimizerArgs<T>& args, void* queue) {
  const auto n = [](std::int64_t i) { return static_cast<std::size_t>(i); };
  const double scale = args.gradient_scale ? *args.gradient_scale : 1;
  const Compute<T>& compute = compute_of<T>(queue);
  compute.pool().parallel_for(args.count, 1 << 16, [&](std::int64_t begin, std::int64_t end) {
    const std::size_t count = n(end - begin);
    compute.table().adamw(factors, scale,
                          {{args.master + begin, count},
                           {args.gradient + begin, count},
                           {args.first_moment + begin, count},
                           {args.second_moment + begin, count},
                           {args.max_second_moment ? args.max_second_moment + begin : nullptr,
                            args.max_second_moment ? count : 0}});
    if (args.shadow) std::copy_n(args.master + begin, count, args.shadow + begin);
  });
}

}  // namespace

template <class T>
const DeviceKernels<T>& cpu_device_kernels() {
  static const DeviceKernels<T> kernels = [] {
    DeviceKernels<T> k{};
    k.name = "cpu";
    k.linear = k.linear_wide = [](const LinearArgs<T>& args, std::int64_t M, std::int64_t N, void* queue) {
      compute_of<T>(queue).linear(args, M, N);
    };
    k.gemm = k.gemm_wide = [](const GemmArgs<T>& args, void* queue) { compute_of<T>(queue).gemm(args); };
    k.few_rows_linear = [](const FewRowsArgs<T>& args, std::int64_t N, void* queue) {
      few_rows_linear(compute_of<T>(queue), args, N);
    };
    k.norm = [](const NormArgs<T>& args, std::int64_t rows, void* queue) {
      compute_of<T>(queue).norm(args, rows);
    };
    k.norm_grad = [](const NormGradArgs<T>& args, void* queue) { compute_of<T>(queue).norm_grad(args); };
    k.activation = [](const ActivationArgs<T>& args, std::int64_t rows, void* queue) {
      compute_of<T>(queue).activation(args, rows);
    };
    k.activation_grad = [](const ActivationGradArgs<T>& args, std::int64_t rows, void* queue) {
      compute_of<T>(queue).activation_grad(args, rows);
    };
    k.add = [](T* y, const T* x, std::int64_t n, void* queue) { compute_of<T>(queue).add(y, x, n); };
    k.add_wide = k.add;
    k.scale = [](T* y, double factor, std::int64_t n, void* queue) {
      compute_of<T>(queue).scale(y, static_cast<T>(factor), n);
    };
    k.add_column_sums = [](T* out, const T* x, std::int64_t rows, std::int64_t n, void* queue) {
      compute_of<T>(queue).add_column_sums(out, x, rows, n);
    };
    k.embed = embed<T>;
    k.embed_grad = embed_grad<T>;
    k.append = append<T, T>;
    k.append_fp8 = append<T, Float8>;
    k.append_grad = append_grad<T>;
    k.attention = attention<T>;
    k.attention_fp8 = [](const PassAttentionArgs<T, Float8>& args, const PassRows& rows, void* queue) {
      attention_fp8(compute_of<T>(queue), args, rows);
    };
    k.attention_grad = attention_grad<T>;
    k.gather_rows = gather_rows<T>;
    k.add_to_rows = add_to_rows<T>;
    k.copy_blocks = copy_blocks<T>;
    k.logits = logits<T>;
    k.logits_grad = logits_grad<T>;
    k.edit = edit<T>;
    k.unedited_logprobs = unedited_logprobs<T>;
    k.filter = filter<T>;
    k.draw = draw<T>;
    k.narrow = [](T* to, const T* from, std::int64_t n, void*) { std::copy_n(from, n, to); };
    k.adamw = adamw<T>;
    k.hash_floats = [](std::uint64_t* result, std::uint64_t*, const float* x, std::int64_t n,
                       std::uint64_t first, void*) {
      *result = hash_floats({x, static_cast<std::size_t>(n)}, first);
    };
    k.sum_squares = [](double* result, double*, const T* x, std::int64_t n, void* queue) {
      *result = compute_of<T>(queue).sum_squares(x, n);
    };
    k.clip = [](double* scale, const double* square, double max_norm, void*) {
      *scale = clip_scale(std::sqrt(*square), max_norm);
    };
    return k;
  }();
  return kernels;
}
template const DeviceKernels<float>& cpu_device_kernels<float>();
template const DeviceKernels<double>& cpu_device_kernels<double>();

}  // namespace rlhf::kernels
