#include "rlhf/kernels/ops.h"

namespace rlhf {
namespace {

constexpr std::int64_t kBlockM = 192;  // rows of x per task: 192 x 576 floats stay in a 1 MiB L2
constexpr std::int64_t kBlockN = 64;   // rows of w per task
constexpr std::int64_t kGemmRows = 384;
constexpr std::int64_t kChunk = 1 << 16;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace

template <class T>
void Compute<T>::linear(const kernels::LinearArgs<T>& args, std::int64_t M, std::int64_t N) const {
  if (M <= 0) return;
  const std::int64_t block_n = M <= 8 && N <= 4096 ? 32 : kBlockN;
  const std::int64_t columns = ceil_div(N, block_n), tasks = columns * ceil_div(M, kBlockM);
  const bool small = M * N * args.K < 60000;
  pool_->parallel_for(tasks, small ? tasks : 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t m = task / columns * kBlockM, n = task % columns * block_n;
      kernels_->linear(args, m, std::min(M, m + kBlockM), n, std::min(N, n + block_n));
    }
  });
}

template <class T>
void Compute<T>::gemm(const kernels::GemmArgs<T>& args) const {
  const std::int64_t width = kernels_->gemm_panel_columns;
  const std::int64_t panels = ceil_div(args.N, width), tasks = panels * ceil_div(args.M, kGemmRows);
  const bool small = args.M * args.N * args.K < 60000;
  pool_->parallel_for(tasks, small ? tasks : 1, [&](std::int64_t begin, std::int64_t end) {
    static thread_local std::vector<T> packed;
    packed.resize(static_cast<std::size_t>(std::min<std::int64_t>(args.K, 384) * width));
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t i = task / panels * kGemmRows;
      kernels_->gemm_panel(args, i, std::min(args.M, i + kGemmRows), task % panels * width, packed.data());
    }
  });
}

template <class T>
void Compute<T>::norm(const kernels::NormArgs<T>& args, std::int64_t rows) const {
  const std::int64_t grain = std::max<std::int64_t>(1, 16384 / args.D);
  pool_->parallel_for(rows, grain, [&](std::int64_t b, std::int64_t e) { kernels_->norm(args, b, e); });
}

template <class T>
void Compute<T>::norm_grad(const kernels::NormGradArgs<T>& args) const {
  const std::int64_t grain = std::max<std::int64_t>(1, 16384 / args.D);
  pool_->parallel_for(args.T_rows, grain,
                      [&](std::int64_t b, std::int64_t e) { kernels_->norm_grad_input(args, b, e); });
  if (!args.dweight && !args.dbias) return;
  pool_->parallel_for(args.D, 128,
                      [&](std::int64_t b, std::int64_t e) { kernels_->norm_grad_weight(args, b, e); });
}

template <class T>
void Compute<T>::activation(const kernels::ActivationArgs<T>& args, std::int64_t rows) const {
  const std::int64_t grain = std::max<std::int64_t>(1, 8192 / args.F);
  pool_->parallel_for(rows, grain, [&](std::int64_t b, std::int64_t e) { kernels_->activation(args, b, e); });
}

template <class T>
void Compute<T>::activation_grad(const kernels::ActivationGradArgs<T>& args, std::int64_t rows) const {
  const std::int64_t grain = std::max<std::int64_t>(1, 4096 / args.F);
  pool_->parallel_for(rows, grain,
                      [&](std::int64_t b, std::int64_t e) { kernels_->activation_grad(args, b, e); });
}

template <class T>
void Compute<T>::add(T* y, const T* x, std::int64_t n) const {
  pool_->parallel_for(n, kChunk, [&](std::int64_t b, std::int64_t e) { kernels_->add(y + b, x + b, e - b); });
}

template <class T>
void Compute<T>::scale(T* y, T factor, std::int64_t n) const {
  pool_->parallel_for(n, kChunk,
                      [&](std::int64_t b, std::int64_t e) { kernels_->scale(y + b, factor, e - b); });
}

template <class T>
double Compute<T>::sum_squares(const T* x, std::int64_t n) const {
  std::vector<double> partial(static_cast<std::size_t>(ceil_div(n, kChunk)));
  pool_->parallel_for(n, kChunk, [&](std::int64_t b, std::int64_t e) {
    partial[static_cast<std::size_t>(b / kChunk)] = kernels_->sum_squares(x + b, e - b);
  });
  double total = 0;
  for (double value : partial) total += value;
  return total;
}

template <class T>
void Compute<T>::add_column_sums(T* out, const T* x, std::int64_t rows, std::int64_t n) const {
  pool_->parallel_for(n, 128, [&](std::int64_t b, std::int64_t e) {
    for (std::int64_t row = 0; row < rows; ++row) kernels_->add(out + b, x + row * n + b, e - b);
  });
}

template class Compute<float>;
template class Compute<double>;

}  // namespace rlhf
