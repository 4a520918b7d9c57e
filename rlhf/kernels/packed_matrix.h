#pragma once

#include <cstdint>

#include "rlhf/kernels/ops.h"
#include "rlhf/kernels/weight_format.h"
#include "rlhf/tensor/buffer.h"

namespace rlhf {

/// A matrix of weights W [N, K] in bf16 or int8, for products y = x W^T. See kernels/packed_kernels.h for the
/// layout.
class PackedMatrix {
 public:
  PackedMatrix() = default;
  /// Makes room; `pack` fills it. @throws InvalidArgument for fp32
  PackedMatrix(WeightFormat format, std::int64_t N, std::int64_t K);

  WeightFormat format() const { return format_; }
  std::int64_t N() const { return N_; }
  std::int64_t K() const { return K_; }
  std::size_t bytes() const { return panels_.bytes() + scales_.bytes(); }
  /// What `bytes` is for such a matrix; 0 for fp32.
  static std::size_t bytes(WeightFormat format, std::int64_t N, std::int64_t K);

  /// Rounds w [N, K], row-major. Reads it once.
  void pack(const Compute<float>& compute, const float* w);

  const std::uint32_t* panels() const { return panels_.data(); }
  /// [N], int8 only.
  const float* scales() const { return scales_.data(); }

 private:
  std::int64_t words() const;  ///< of a column of a panel

  WeightFormat format_ = WeightFormat::kFp32;
  std::int64_t N_ = 0, K_ = 0;
  Buffer<std::uint32_t> panels_;
  Buffer<float> scales_;
};

/// Rows of activations in int8, a scale for every kQuantisedInputs of them, made anew for each product.
/// Scratch memory of a caller.
class QuantisedRows {
 public:
  /// Quantises rows of x [rows, K], which are `ldx` apart.
  void fill(const Compute<float>& compute, const float* x, std::int64_t ldx, std::int64_t rows,
            std::int64_t K);
  const std::uint32_t* words() const { return words_.data(); }
  const float* scales() const { return scales_.data(); }
  const std::int32_t* sums() const { return sums_.data(); }
  std::size_t bytes() const { return words_.bytes() + scales_.bytes() + sums_.bytes(); }
  /// Bytes that so many rows take.
  static std::size_t bytes(std::int64_t rows, std::int64_t K);

 private:
  Buffer<std::uint32_t> words_;
  Buffer<float> scales_;
  Buffer<std::int32_t> sums_;
};

struct PackedLinearArgs {
  const float* x;  ///< [M, K]
  std::int64_t ldx;
  const float* bias;  ///< [N] or null
  float* y;           ///< [M, N]
  std::int64_t ldy;
  bool accumulate;  ///< y += instead of y =
};
/// y (+)= x W^T + bias over the thread pool. A row's result depends on nothing but the row and W.
void packed_linear(const Compute<float>& compute, const PackedMatrix& w, const PackedLinearArgs& args,
                   std::int64_t M, QuantisedRows& scratch);

}  // namespace rlhf
