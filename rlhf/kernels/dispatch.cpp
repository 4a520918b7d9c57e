#include <cstdlib>
#include <string_view>
#include <utility>

#include "rlhf/core/error.h"
#include "rlhf/kernels/kernel_table.h"

namespace rlhf::kernels {

#define RLHF_DECLARE_ISA(isa)                             \
  namespace isa {                                         \
  template <class T>                                      \
  const Kernels<T>& table();                              \
  extern template const Kernels<float>& table<float>();   \
  extern template const Kernels<double>& table<double>(); \
  }
RLHF_DECLARE_ISA(baseline)
RLHF_DECLARE_ISA(avx2)
RLHF_DECLARE_ISA(avx512)
#undef RLHF_DECLARE_ISA

bool cpu_supports(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::kBaseline:
      return true;
    case CpuIsa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case CpuIsa::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  return false;
}

namespace {

CpuIsa choose_cpu_isa() {
  const char* const wanted = std::getenv("RLHF_CPU_ISA");
  if (wanted && *wanted) {
    for (const auto& [name, isa] : {std::pair<std::string_view, CpuIsa>{"baseline", CpuIsa::kBaseline},
                                    {"avx2", CpuIsa::kAvx2},
                                    {"avx512", CpuIsa::kAvx512}})
      if (name == wanted) {
        RLHF_CHECK(cpu_supports(isa), "RLHF_CPU_ISA is ", wanted, ", which this CPU does not support");
        return isa;
      }
    fail<InvalidArgument>("RLHF_CPU_ISA is \"", wanted, "\", expected baseline, avx2 or avx512");
  }
  for (CpuIsa isa : {CpuIsa::kAvx512, CpuIsa::kAvx2})
    if (cpu_supports(isa)) return isa;
  return CpuIsa::kBaseline;
}

}  // namespace

CpuIsa detect_cpu_isa() {
  static const CpuIsa isa = choose_cpu_isa();
  return isa;
}

template <class T>
const Kernels<T>& kernels_for(CpuIsa isa) {
  RLHF_CHECK(cpu_supports(isa), "kernels_for: this CPU does not support instruction set number ",
             static_cast<int>(isa));
  switch (isa) {
    case CpuIsa::kAvx512:
      return avx512::table<T>();
    case CpuIsa::kAvx2:
      return avx2::table<T>();
    default:
      return baseline::table<T>();
  }
}
template const Kernels<float>& kernels_for<float>(CpuIsa);
template const Kernels<double>& kernels_for<double>(CpuIsa);

}  // namespace rlhf::kernels
