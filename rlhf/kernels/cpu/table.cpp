#include "rlhf/kernels/cpu/kernels.h"
#include "rlhf/kernels/cpu/tile.h"

#define RLHF_STRINGIFY_(name) #name
#define RLHF_STRINGIFY(name) RLHF_STRINGIFY_(name)

namespace rlhf::kernels::RLHF_ISA {

template <class T>
const Kernels<T>& table() {
  static const Kernels<T> kernels = {RLHF_STRINGIFY(RLHF_ISA),
                                     linear<T>,
                                     gemm_panel<T>,
                                     panel_columns<T>(),
                                     kBlockK,
                                     kTileRows,
                                     norm<T>,
                                     norm_grad_input<T>,
                                     norm_grad_weight<T>,
                                     rope<T>,
                                     attention<T>,
                                     attention_grad<T>,
                                     activation<T>,
                                     activation_grad<T>,
                                     logits_row<T>,
                                     logits_row_grad<T>,
                                     weigh<T>,
                                     largest<T>,
                                     add<T>,
                                     scale<T>,
                                     sum_squares<T>,
                                     adamw<T>};
  return kernels;
}
template const Kernels<float>& table<float>();
template const Kernels<double>& table<double>();

}  // namespace rlhf::kernels::RLHF_ISA
