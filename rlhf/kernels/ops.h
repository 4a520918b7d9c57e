#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "rlhf/core/thread_pool.h"
#include "rlhf/kernels/kernel_table.h"
#include "rlhf/kernels/packed_kernels.h"

namespace rlhf {

struct Accelerator;

/// Runs kernels over a thread pool. Cheap to copy; the pool must outlive it. One lane of the scheduler owns
/// one. Where it carries an accelerator, models run there, and the pool does what stays on the host. Results
/// do not depend on the number of threads: every output element is computed by one thread in a fixed order.
template <class T>
class Compute {
 public:
  /// @param accelerator null = models run on the CPU; else it must outlive this
  Compute(ThreadPool& pool, kernels::CpuIsa isa, const Accelerator* accelerator = nullptr)
      : pool_(&pool),
        kernels_(&kernels::kernels_for<T>(isa)),
        packed_(&kernels::packed_kernels_for(isa)),
        accelerator_(accelerator) {}

  ThreadPool& pool() const { return *pool_; }
  const Accelerator* accelerator() const { return accelerator_; }
  const kernels::Kernels<T>& table() const { return *kernels_; }
  const kernels::PackedKernels& packed_table() const { return *packed_; }

  /// y[M, N] (+)= x[M, K] w[N, K]^T + bias.
  void linear(const kernels::LinearArgs<T>& args, std::int64_t M, std::int64_t N) const;
  /// C (+)= A B.
  void gemm(const kernels::GemmArgs<T>& args) const;
  void norm(const kernels::NormArgs<T>& args, std::int64_t rows) const;
  void norm_grad(const kernels::NormGradArgs<T>& args) const;
  void activation(const kernels::ActivationArgs<T>& args, std::int64_t rows) const;
  void activation_grad(const kernels::ActivationGradArgs<T>& args, std::int64_t rows) const;
  /// y[n] += x[n].
  void add(T* y, const T* x, std::int64_t n) const;
  void scale(T* y, T factor, std::int64_t n) const;
  /// Sum of squares in double, over fixed chunks so that the result does not depend on the number of threads.
  double sum_squares(const T* x, std::int64_t n) const;
  /// Adds the column sums of x[rows, n] to out[n].
  void add_column_sums(T* out, const T* x, std::int64_t rows, std::int64_t n) const;

  /// Calls fn(row) for each row, in parallel when `work_per_row` (in rough flops) is worth it.
  template <class Fn>
  void for_rows(std::int64_t rows, std::int64_t work_per_row, Fn&& fn) const {
    constexpr std::int64_t kMinWork = 20000;  // about 5 microseconds, the price of waking a spinning thread
    const std::int64_t grain = std::max<std::int64_t>(1, kMinWork / std::max<std::int64_t>(1, work_per_row));
    pool_->parallel_for(rows, grain, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t row = begin; row < end; ++row) fn(row);
    });
  }

 private:
  ThreadPool* pool_;
  const kernels::Kernels<T>* kernels_;
  const kernels::PackedKernels* packed_;
  const Accelerator* accelerator_;
};

}  // namespace rlhf
