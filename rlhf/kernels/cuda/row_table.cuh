#pragma once
// Everything but attention, into the table of a device.

#include "rlhf/kernels/cuda/append.cuh"
#include "rlhf/kernels/cuda/edit.cuh"
#include "rlhf/kernels/cuda/elementwise.cuh"
#include "rlhf/kernels/cuda/few_rows.cuh"
#include "rlhf/kernels/cuda/filter.cuh"
#include "rlhf/kernels/cuda/logits.cuh"
#include "rlhf/kernels/cuda/norm.cuh"
#include "rlhf/kernels/cuda/optimizer.cuh"
#include "rlhf/kernels/cuda/product.cuh"

namespace rlhf::kernels::RLHF_GPU {

template <class T>
void fill_rows(DeviceKernels<T>& table) {
  table.linear = linear<T, T>;
  table.linear_wide = linear<T, Wide<T>>;
  table.gemm = gemm<T, T>;
  table.gemm_wide = gemm<T, Wide<T>>;
  if constexpr (sizeof(T) == sizeof(Bfloat16)) table.few_rows_linear = few_rows_linear;
  table.norm = norm<T>;
  table.norm_grad = norm_grad<T>;
  table.activation = activation<T>;
  table.activation_grad = activation_grad<T>;
  table.add = add<T>;
  table.add_wide = add<Wide<T>>;
  table.scale = scale<T>;
  table.add_column_sums = add_column_sums<T>;
  table.embed = embed<T>;
  table.embed_grad = embed_grad<T>;
  table.append = append<T, T>;
  table.append_fp8 = append<T, Float8>;
  table.append_grad = append_grad<T>;
  table.gather_rows = gather_rows<T>;
  table.add_to_rows = add_to_rows<T>;
  table.copy_blocks = copy_blocks<T>;
  table.logits = logits<T>;
  table.logits_grad = logits_grad<T>;
  table.edit = edit<T>;
  table.unedited_logprobs = unedited_logprobs<T>;
  table.filter = filter<T>;
  table.draw = draw<T>;
  table.narrow = narrow<T>;
  table.adamw = adamw<T>;
  table.sum_squares = sum_squares;
  table.clip = clip;
  table.hash_floats = hash_floats;
}

}  // namespace rlhf::kernels::RLHF_GPU
