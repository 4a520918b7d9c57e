// C (+)= A B in outer-product form over a packed panel of B: the two matrix products of the backward pass
// (dX = dY W and dW = dY^T X). Each element of C is summed over k in order, so results do not depend on
// threads. Bound: FMA throughput; per k step a 6 x 4-vector tile needs 4 vector loads and 6 broadcasts for 24
// FMAs.
#include <algorithm>

#include "rlhf/kernels/cpu/kernels.h"
#include "rlhf/kernels/cpu/vec.h"

namespace rlhf::kernels::RLHF_ISA {
namespace {

constexpr int kTileM = 6;
constexpr std::int64_t kBlockK =
    384;  // a packed block of 384 x 64 floats takes 96 KiB: a tenth of a 1 MiB L2

template <class T>
constexpr int kColumns = kPanelVecs* kLanes<T>;

template <class T>
void pack(const GemmArgs<T>& args, std::int64_t k0, std::int64_t k1, std::int64_t j0, std::int64_t columns,
          T* packed) {
  for (std::int64_t k = k0; k < k1; ++k, packed += kColumns<T>) {
    const T* row = args.b + k * args.ldb + j0;
    std::int64_t j = 0;
    for (; j < columns; ++j) packed[j] = row[j];
    for (; j < kColumns<T>; ++j) packed[j] = 0;
  }
}

template <class T, int MR, bool kRowsContiguous>
void tile(const GemmArgs<T>& args, std::int64_t i0, std::int64_t k0, std::int64_t k1, const T* packed,
          T* out) {
  Vec<T> acc[MR][kPanelVecs] = {};
  const T* a = args.a + i0 * args.a_row_stride + k0 * args.a_col_stride;
  const std::int64_t stride = kRowsContiguous ? args.a_row_stride : args.a_col_stride;
  for (std::int64_t k = 0; k < k1 - k0; ++k, packed += kColumns<T>) {
    Vec<T> b[kPanelVecs];
    for (int v = 0; v < kPanelVecs; ++v) b[v] = load(packed + v * kLanes<T>);
    for (int i = 0; i < MR; ++i) {
      const T value = kRowsContiguous ? a[i * stride + k] : a[k * stride + i];
      for (int v = 0; v < kPanelVecs; ++v) acc[i][v] += value * b[v];
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int v = 0; v < kPanelVecs; ++v) store(out + i * kColumns<T> + v * kLanes<T>, acc[i][v]);
}

template <class T, int MR>
void tile_rows(const GemmArgs<T>& args, std::int64_t i0, std::int64_t rows, std::int64_t k0, std::int64_t k1,
               const T* packed, T* out) {
  if constexpr (MR > 0) {
    if (rows < MR)
      tile_rows<T, MR - 1>(args, i0, rows, k0, k1, packed, out);
    else if (args.a_col_stride == 1)
      tile<T, MR, true>(args, i0, k0, k1, packed, out);
    else
      tile<T, MR, false>(args, i0, k0, k1, packed, out);
  }
}

}  // namespace

template <class T>
std::int64_t gemm_panel_columns() {
  return kColumns<T>;
}

template <class T>
void gemm_panel(const GemmArgs<T>& args, std::int64_t i0, std::int64_t i1, std::int64_t j0, T* packed) {
  const std::int64_t columns = std::min<std::int64_t>(kColumns<T>, args.N - j0);
  alignas(kVecBytes) T out[kTileM * kColumns<T>];
  for (std::int64_t k0 = 0; k0 < args.K; k0 += kBlockK) {
    const std::int64_t k1 = std::min(args.K, k0 + kBlockK);
    pack(args, k0, k1, j0, columns, packed);
    const bool add = args.accumulate || k0 > 0;
    for (std::int64_t i = i0; i < i1; i += kTileM) {
      const std::int64_t rows = std::min<std::int64_t>(kTileM, i1 - i);
      tile_rows<T, kTileM>(args, i, rows, k0, k1, packed, out);
      for (std::int64_t r = 0; r < rows; ++r) {
        T* c = args.c + (i + r) * args.ldc + j0;
        const T* from = out + r * kColumns<T>;
        if (add)
          for (std::int64_t j = 0; j < columns; ++j) c[j] += from[j];
        else
          for (std::int64_t j = 0; j < columns; ++j) c[j] = from[j];
      }
    }
  }
}

template std::int64_t gemm_panel_columns<float>();
template std::int64_t gemm_panel_columns<double>();
template void gemm_panel<float>(const GemmArgs<float>&, std::int64_t, std::int64_t, std::int64_t, float*);
template void gemm_panel<double>(const GemmArgs<double>&, std::int64_t, std::int64_t, std::int64_t, double*);

}  // namespace rlhf::kernels::RLHF_ISA
