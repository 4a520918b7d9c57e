#pragma once

#include <cstdint>
#include <string>

#include "rlhf/kernels/bfloat16.h"

namespace rlhf::kernels::cuda {

/// A product as rlhf/kernels/cuda/product.cuh takes it: c[M, N] (+)= a b + bias with a(i, k) = a[i * a_row +
/// k * a_column] and b(k, j) = b[k * b_row + j * b_column].
template <class T, class C>
struct LibraryProduct {
  const T* a;
  std::int64_t a_row, a_column;
  const T* b;
  std::int64_t b_row, b_column;
  const T* bias;
  C* c;
  std::int64_t ldc, M, N, K;
  bool accumulate;
};

/// Why cuBLASLt cannot be used; empty when it can. The first call opens the library.
const std::string& library_problem();

/// Queues the product in cuBLASLt, with sums in float (never tf32). @return false when the library is missing
/// or has no algorithm for this case; nothing is queued then. @throws Error when a call fails.
template <class T, class C>
bool try_library_product(const LibraryProduct<T, C>& args, void* queue);

}  // namespace rlhf::kernels::cuda
