#pragma once
// Tensor cores: the product of one warp, its operands from shared memory, and copies to there that do not
// wait (compute capability 8.0). tests/cuda/emulator.h takes this file's place where there is no GPU.
//
// Fragments of m16n8k16, with row = lane / 4 and pair = 2 (lane % 4); a register holds two neighbours in
// bf16:
//   a[0]: (row, pair)  a[1]: (row + 8, pair)  a[2]: (row, pair + 8)  a[3]: (row + 8, pair + 8)   A is 16 x 16
//   b0: (pair, row)  b1: (pair + 8, row)                                       B is 16 x 8, neighbours along
//   k d[0], d[1]: (row, pair), (row, pair + 1)  d[2], d[3]: those of row + 8     D is 16 x 8
// So two D side by side, packed, are an A.

#if defined(__CUDACC__)

#include <cstdint>

#include "rlhf/kernels/bfloat16.h"

namespace rlhf::kernels::RLHF_GPU {

/// d += a b
__device__ inline void multiply_add(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// Four matrices of 8 x 8: lane l gives the l % 8th row of matrix l / 8, 16 bytes of shared memory. m[i] is
/// the lane's element (lane / 4, 2 (lane % 4)) of matrix i and its right neighbour; transposed, its lower one
/// in the transposed place.
template <bool kTransposed>
__device__ inline void load_matrices(unsigned (&m)[4], const Bfloat16* row) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(address));
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(address));
}

/// Copies 4 or 16 bytes, aligned, to shared memory, or zeros where not `valid`; there after
/// wait_for_copies().
template <int kBytes>
__device__ inline void copy_later(void* to, const void* from, bool valid) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(from), "r"(valid ? 4 : 0)
                 : "memory");
}
/// Waits for the copies of this thread; a barrier then shows them to the others.
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

/// 2^x to two units in the last place; 0 of -inf.
__device__ inline float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Two neighbours at an even place.
__device__ inline unsigned load_pair(const Bfloat16* from) {
  return *reinterpret_cast<const unsigned*>(from);
}
__device__ inline void store_pair(Bfloat16* to, unsigned pair) {
  *reinterpret_cast<unsigned*>(to) = pair;
}

}  // namespace rlhf::kernels::RLHF_GPU

#endif
