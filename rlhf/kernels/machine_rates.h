#pragma once

#include "rlhf/kernels/ops.h"

namespace rlhf {

/// Rate of this library's matrix product on all threads of `compute`, in floating-point operations per
/// second: the best of some products of [512, 1024] and [1024, 1024], whose operands stay in the caches; on
/// an accelerator in bfloat16, of 4096 x 4096 x 4096. Takes some hundredths of a second.
double product_flops_per_s(const Compute<float>& compute);

/// Rate at which all threads together read memory that no cache holds, in bytes per second: the best of some
/// passes over 256 MiB; on an accelerator the rate of reads and writes together, by copies of 1 GiB.
double read_bytes_per_s(const Compute<float>& compute);

}  // namespace rlhf
