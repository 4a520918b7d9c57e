// C (+)= A B over a packed panel of B: the two matrix products of the backward pass (dX = dY W and dW = dY^T
// X). Each element of C is summed over k in order, so results do not depend on threads.
#include "rlhf/kernels/cpu/kernels.h"
#include "rlhf/kernels/cpu/tile.h"

namespace rlhf::kernels::RLHF_ISA {
namespace {

template <class T>
void pack(const T* b, std::int64_t ldb, std::int64_t count, std::int64_t columns, T* packed) {
  for (std::int64_t k = 0; k < count; ++k, b += ldb, packed += kPanelColumns<T>) {
    if (columns == kPanelColumns<T>) {
      for (int v = 0; v < kPanelVecs; ++v) store(packed + v * kLanes<T>, load(b + v * kLanes<T>));
      continue;
    }
    std::copy_n(b, columns, packed);
    std::fill(packed + columns, packed + kPanelColumns<T>, T(0));
  }
}

}  // namespace

template <class T>
std::int64_t panel_columns() {
  return kPanelColumns<T>;
}

template <class T>
void gemm_panel(const GemmArgs<T>& args, std::int64_t i0, std::int64_t i1, std::int64_t j0, T* packed) {
  const std::int64_t columns = std::min<std::int64_t>(kPanelColumns<T>, args.N - j0);
  for (std::int64_t k = 0; k == 0 || k < args.K; k += kBlockK) {
    const std::int64_t count = std::min(kBlockK, args.K - k);
    pack(args.b + k * args.ldb + j0, args.ldb, count, columns, packed);
    tiles<T>({args.a + k * args.a_col_stride, args.a_row_stride, args.a_col_stride, packed, count,
              args.c + j0, args.ldc, columns, nullptr, args.accumulate || k > 0},
             i0, i1);
  }
}

template std::int64_t panel_columns<float>();
template std::int64_t panel_columns<double>();
template void gemm_panel<float>(const GemmArgs<float>&, std::int64_t, std::int64_t, std::int64_t, float*);
template void gemm_panel<double>(const GemmArgs<double>&, std::int64_t, std::int64_t, std::int64_t, double*);

}  // namespace rlhf::kernels::RLHF_ISA
