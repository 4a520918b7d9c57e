#include "rlhf/core/error.h"
#include "rlhf/kernels/packed_kernels.h"

namespace rlhf::kernels {

#define RLHF_DECLARE_ISA(isa)          \
  namespace isa {                      \
  const PackedKernels& packed_table(); \
  }
RLHF_DECLARE_ISA(baseline)
RLHF_DECLARE_ISA(avx2)
RLHF_DECLARE_ISA(avx512)
RLHF_DECLARE_ISA(avx512_vnni)
#undef RLHF_DECLARE_ISA

const PackedKernels& packed_kernels_for(CpuIsa isa) {
  RLHF_CHECK(cpu_supports(isa), "packed_kernels_for: this CPU does not support instruction set number ",
             static_cast<int>(isa));
  switch (isa) {
    case CpuIsa::kAvx512:
      return __builtin_cpu_supports("avx512vnni") ? avx512_vnni::packed_table() : avx512::packed_table();
    case CpuIsa::kAvx2:
      return avx2::packed_table();
    default:
      return baseline::packed_table();
  }
}

std::vector<const PackedKernels*> all_packed_kernels() {
  std::vector<const PackedKernels*> all = {&baseline::packed_table()};
  if (cpu_supports(CpuIsa::kAvx2)) all.push_back(&avx2::packed_table());
  if (!cpu_supports(CpuIsa::kAvx512)) return all;
  all.push_back(&avx512::packed_table());
  if (__builtin_cpu_supports("avx512vnni")) all.push_back(&avx512_vnni::packed_table());
  return all;
}

}  // namespace rlhf::kernels
