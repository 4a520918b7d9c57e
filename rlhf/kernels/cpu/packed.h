#pragma once

#include "rlhf/kernels/packed_kernels.h"

namespace rlhf::kernels::RLHF_ISA {

/// Asks for the words of a panel that are multiplied 32 words later (4 KiB; panels lie one behind another),
/// so that multiplying hides reading. With one row the processor's own prefetching is as good.
inline void fetch_ahead(const std::uint32_t* group) {
  constexpr std::int64_t kAhead = 32 * kPackedColumns;
  __builtin_prefetch(group + kAhead, 0, 2);
  __builtin_prefetch(group + kAhead + kPackedColumns / 2, 0, 2);
}

void linear_bf16(const Bf16LinearArgs& args, std::int64_t M, std::int64_t p0, std::int64_t p1);
void linear_int8(const Int8LinearArgs& args, std::int64_t M, std::int64_t p0, std::int64_t p1);
QuantisedRow quantise_row(const float* x, std::int64_t K, std::uint32_t* q);
void pack_bf16(const float* w, std::int64_t N, std::int64_t K, std::int64_t p, std::uint32_t* panel,
               std::uint32_t* rows);
void pack_int8(const float* w, std::int64_t N, std::int64_t K, std::int64_t p, std::uint32_t* panel,
               float* scales, std::uint32_t* rows);

const PackedKernels& packed_table();

}  // namespace rlhf::kernels::RLHF_ISA
