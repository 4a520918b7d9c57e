#pragma once

#include "rlhf/kernels/ops.h"

namespace rlhf {

/// Rate of this library's matrix product on all threads of `compute`, in floating-point operations per
/// second: the best of some products of [512, 1024] and [1024, 1024], whose operands stay in the caches.
/// Takes some hundredths of a second.
double product_flops_per_s(const Compute<float>& compute);

/// Rate at which all threads together read memory that no cache holds, in bytes per second: the best of some
/// passes over 256 MiB.
double read_bytes_per_s(const Compute<float>& compute);

}  // namespace rlhf
