#pragma once

#include "rlhf/kernels/kernel_table.h"

namespace rlhf::kernels::RLHF_ISA {

template <class T>
void linear(const LinearArgs<T>& args, std::int64_t m0, std::int64_t m1, std::int64_t n0, std::int64_t n1,
            T* packed);
template <class T>
void gemm_panel(const GemmArgs<T>& args, std::int64_t i0, std::int64_t i1, std::int64_t j0, T* packed);
template <class T>
std::int64_t panel_columns();
template <class T>
void norm(const NormArgs<T>& args, std::int64_t t0, std::int64_t t1);
template <class T>
void norm_grad_input(const NormGradArgs<T>& args, std::int64_t t0, std::int64_t t1);
template <class T>
void norm_grad_weight(const NormGradArgs<T>& args, std::int64_t d0, std::int64_t d1);
template <class T>
void rope(const RopeArgs<T>& args, std::int64_t t0, std::int64_t t1);
template <class T>
void attention(const AttentionArgs<T>& args, const AttentionRow<T>* rows, std::int64_t count, std::int64_t g);
template <class T>
void attention_grad(const AttentionArgs<T>& args, const AttentionGradRow<T>* rows, std::int64_t count, T* dk,
                    T* dv, std::int64_t g);
template <class T>
void activation(const ActivationArgs<T>& args, std::int64_t t0, std::int64_t t1);
template <class T>
void activation_grad(const ActivationGradArgs<T>& args, std::int64_t t0, std::int64_t t1);
template <class T>
LogitsRow logits_row(T* logits, std::int64_t V, double inv_temperature, double softcap, TokenId target);
template <class T>
void logits_row_grad(T* logits, std::int64_t V, double inv_temperature, double softcap, TokenId target,
                     const LogitsRow& row, double dlogprob, double dentropy);
template <class T>
RowWeights weigh(const T* logits, std::int64_t n, T scale, T* weights);
template <class T>
T largest(const T* x, std::int64_t n);
template <class T>
void add(T* y, const T* x, std::int64_t n);
template <class T>
void scale(T* y, T factor, std::int64_t n);
template <class T>
double sum_squares(const T* x, std::int64_t n);
template <class T>
void adamw(const AdamwFactors& factors, double gradient_scale, const AdamwBuffers<T>& buffers);

template <class T>
const Kernels<T>& table();

}  // namespace rlhf::kernels::RLHF_ISA
