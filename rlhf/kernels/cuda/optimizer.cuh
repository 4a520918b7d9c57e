#pragma once
// AdamW over a flat buffer, in one pass that also writes the rounded weights, and the gradient norm, which
// stays on the device. Bound: memory; 4 reads and 3 to 4 writes per weight.

#include "rlhf/kernels/adamw.h"
#include "rlhf/kernels/cuda/elementwise.cuh"
#include "rlhf/kernels/float_hash.h"

namespace rlhf::kernels::RLHF_GPU {

template <class T>
__global__ void adamw_kernel(AdamwFactors factors, OptimizerArgs<T> args) {
  const float rate = static_cast<float>(factors.rate), decay = static_cast<float>(factors.decay);
  const float root_correction = static_cast<float>(factors.root_correction);
  const float one_minus_beta1 = static_cast<float>(factors.one_minus_beta1);
  const float beta2 = static_cast<float>(factors.beta2);
  const float one_minus_beta2 = static_cast<float>(factors.one_minus_beta2);
  const float epsilon = static_cast<float>(factors.epsilon);
  const float scale = args.gradient_scale ? static_cast<float>(*args.gradient_scale) : 1;
  for_elements(args.count, [&](std::int64_t i) {
    const float gradient = args.gradient[i] * scale;
    const float m = args.first_moment[i] + one_minus_beta1 * (gradient - args.first_moment[i]);
    float v = beta2 * args.second_moment[i] + one_minus_beta2 * gradient * gradient;
    args.first_moment[i] = m;
    args.second_moment[i] = v;
    if (args.max_second_moment) v = args.max_second_moment[i] = fmaxf(args.max_second_moment[i], v);
    const float p = args.master[i] * decay - rate * m / (sqrtf(v) / root_correction + epsilon);
    args.master[i] = p;
    if (args.shadow) args.shadow[i] = from_float<T>(p);
  });
}

// The grid is fixed, so the order of the sum is.
static __global__ void square_partials_kernel(double* partials, const float* x, std::int64_t n) {
  double* scratch = block_shared<double>();
  double sum = 0;
  for_elements(n, [&](std::int64_t i) { sum += static_cast<double>(x[i]) * static_cast<double>(x[i]); });
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

template <class V>
__global__ void sum_partials_kernel(V* result, const V* partials) {
  const V sum = block_sum(partials[threadIdx.x], block_shared<V>());
  if (threadIdx.x == 0) *result = sum;
}

static __global__ void hash_partials_kernel(std::uint64_t* partials, const float* x, std::int64_t n,
                                            std::uint64_t first) {
  std::uint64_t sum = 0;
  for_elements(n, [&](std::int64_t i) {
    sum += float_hash_term(first + static_cast<std::uint64_t>(i), __builtin_bit_cast(std::uint32_t, x[i]));
  });
  sum = block_sum(sum, block_shared<std::uint64_t>());
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

static __global__ void clip_kernel(double* scale, const double* square, double max_norm) {
  const double clip = max_norm / (sqrt(*square) + 1e-6);
  *scale = max_norm > 0 && clip < 1 ? clip : 1;
}

template <class T>
void adamw(const AdamwFactors& factors, const OptimizerArgs<T>& args, void* queue) {
  launch("adamw", adamw_kernel<T>, blocks_for(args.count), kThreads, 0, queue, factors, args);
}

inline void sum_squares(double* result, double* workspace, const float* x, std::int64_t n, void* queue) {
  static_assert(kSumPartials == kThreads, "one thread per partial sum");
  launch("square_partials", square_partials_kernel, dim3(static_cast<unsigned>(kSumPartials)), kThreads,
         kWarp * sizeof(double), queue, workspace, x, n);
  launch("sum_partials", sum_partials_kernel<double>, dim3(1), kThreads, kWarp * sizeof(double), queue,
         result, workspace);
}

inline void hash_floats(std::uint64_t* result, std::uint64_t* workspace, const float* x, std::int64_t n,
                        std::uint64_t first, void* queue) {
  launch("hash_partials", hash_partials_kernel, dim3(static_cast<unsigned>(kSumPartials)), kThreads,
         kWarp * sizeof(std::uint64_t), queue, workspace, x, n, first);
  launch("sum_hashes", sum_partials_kernel<std::uint64_t>, dim3(1), kThreads, kWarp * sizeof(std::uint64_t),
         queue, result, workspace);
}

inline void clip(double* scale, const double* square, double max_norm, void* queue) {
  launch("clip", clip_kernel, dim3(1), 1, 0, queue, scale, square, max_norm);
}

}  // namespace rlhf::kernels::RLHF_GPU
