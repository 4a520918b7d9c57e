#include "rlhf/kernels/packed_matrix.h"

#include <algorithm>
#include <vector>

#include "rlhf/core/error.h"
#include "rlhf/kernels/layout.h"

namespace rlhf {
namespace {

using kernels::ceil_div;
using kernels::kPackedColumns;

std::int64_t words_of(WeightFormat format, std::int64_t K) {
  return ceil_div(K, format == WeightFormat::kBf16 ? kernels::kBf16Inputs : kernels::kInt8Inputs);
}

}  // namespace

PackedMatrix::PackedMatrix(WeightFormat format, std::int64_t N, std::int64_t K)
    : format_(format),
      N_(N),
      K_(K),
      panels_(to_size(ceil_div(N, kPackedColumns) * kPackedColumns * words_of(format, K))),
      scales_(format == WeightFormat::kInt8 ? to_size(N) : 0) {
  RLHF_CHECK(format != WeightFormat::kFp32, "packed matrix: fp32 is not packed");
}

std::int64_t PackedMatrix::words() const {
  return words_of(format_, K_);
}

std::size_t PackedMatrix::bytes(WeightFormat format, std::int64_t N, std::int64_t K) {
  if (format == WeightFormat::kFp32) return 0;
  const std::int64_t panels = ceil_div(N, kPackedColumns) * kPackedColumns * words_of(format, K);
  return to_size(panels) * sizeof(std::uint32_t) +
         (format == WeightFormat::kInt8 ? to_size(N) * sizeof(float) : 0);
}

void PackedMatrix::pack(const Compute<float>& compute, const float* w) {
  const kernels::PackedKernels& table = compute.packed_table();
  const std::int64_t panel_words = words() * kPackedColumns;
  compute.pool().parallel_for(ceil_div(N_, kPackedColumns), 4, [&](std::int64_t begin, std::int64_t end) {
    std::vector<std::uint32_t> rows(to_size(panel_words));
    for (std::int64_t p = begin; p < end; ++p) {
      std::uint32_t* panel = panels_.data() + p * panel_words;
      if (format_ == WeightFormat::kBf16)
        table.pack_bf16(w, N_, K_, p, panel, rows.data());
      else
        table.pack_int8(w, N_, K_, p, panel, scales_.data(), rows.data());
    }
  });
}

void QuantisedRows::fill(const Compute<float>& compute, const float* x, std::int64_t ldx, std::int64_t rows,
                         std::int64_t K) {
  using kernels::kQuantisedInputs;
  const std::int64_t words = words_of(WeightFormat::kInt8, K), groups = ceil_div(K, kQuantisedInputs);
  words_.reserve_discard(to_size(rows * words));
  scales_.reserve_discard(to_size(rows * groups));
  sums_.reserve_discard(to_size(rows * groups));
  compute.for_rows(rows, 2 * K, [&](std::int64_t m) {
    for (std::int64_t g = 0; g < groups; ++g) {
      const std::int64_t k = g * kQuantisedInputs;
      const kernels::QuantisedRow group =
          compute.packed_table().quantise_row(x + m * ldx + k, std::min(kQuantisedInputs, K - k),
                                              words_.data() + m * words + k / kernels::kInt8Inputs);
      scales_[to_size(m * groups + g)] = group.scale;
      sums_[to_size(m * groups + g)] = group.sum;
    }
  });
}

std::size_t QuantisedRows::bytes(std::int64_t rows, std::int64_t K) {
  const std::int64_t words = words_of(WeightFormat::kInt8, K),
                     groups = ceil_div(K, kernels::kQuantisedInputs);
  return to_size(rows * words) * sizeof(std::uint32_t) +
         to_size(rows * groups) * (sizeof(float) + sizeof(std::int32_t));
}

void packed_linear(const Compute<float>& compute, const PackedMatrix& w, const PackedLinearArgs& args,
                   std::int64_t M, QuantisedRows& scratch) {
  if (M <= 0 || w.N() <= 0) return;
  const kernels::PackedKernels& table = compute.packed_table();
  const std::int64_t N = w.N(), K = w.K(), panels = ceil_div(N, kPackedColumns);
  const bool is_int8 = w.format() == WeightFormat::kInt8;
  if (is_int8) scratch.fill(compute, args.x, args.ldx, M, K);
  const kernels::Bf16LinearArgs bf16{args.x,   args.ldx, w.panels(), args.bias,      args.y,
                                     args.ldy, N,        K,          args.accumulate};
  const kernels::Int8LinearArgs int8{
      scratch.words(), scratch.scales(), scratch.sums(), w.panels(), w.scales(),
      args.bias,       args.y,           args.ldy,       N,          K,
      args.accumulate};
  // Pieces so small that no thread waits long for another at the end, or one where waking costs more.
  const std::int64_t piece = M * N * K < 60000 ? panels : panels > 256 ? 8 : panels > 64 ? 2 : 1;
  compute.pool().parallel_for(panels, piece, [&](std::int64_t begin, std::int64_t end) {
    if (is_int8)
      table.linear_int8(int8, M, begin, end);
    else
      table.linear_bf16(bf16, M, begin, end);
  });
}

}  // namespace rlhf
