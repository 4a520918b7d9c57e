#pragma once
// The CPU's products of few rows: norm, product and activation one after another.

#include <vector>

#include "rlhf/kernels/device_kernels.h"
#include "rlhf/kernels/ops.h"

namespace rlhf::kernels {

template <class T>
void few_rows_linear(const Compute<T>& compute, const FewRowsArgs<T>& args, std::int64_t N) {
  LinearArgs<T> product = args.product;
  std::vector<T> normed, gated;
  if (args.norm.weight) {
    NormArgs<T> norm = args.norm;
    norm.D = product.K;
    norm.mean = norm.rstd = nullptr;
    normed.resize(static_cast<std::size_t>(args.M * product.K));
    for (std::int64_t m = 0; m < args.M; ++m) {
      norm.x = product.x + m * product.ldx;
      norm.y = normed.data() + m * product.K;
      compute.norm(norm, 1);
    }
    product.x = normed.data();
    product.ldx = product.K;
  }
  if (!args.gated) return compute.linear(product, args.M, N);
  gated.resize(static_cast<std::size_t>(args.M * 2 * N));
  product.y = gated.data();
  product.ldy = 2 * N;
  compute.linear(product, args.M, 2 * N);
  for (std::int64_t m = 0; m < args.M; ++m)
    compute.activation({gated.data() + m * 2 * N, args.product.y + m * args.product.ldy, N, args.activation},
                       1);
}

}  // namespace rlhf::kernels
