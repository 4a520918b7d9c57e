#include "rlhf/kernels/ops.h"

#include <memory>

#include "rlhf/kernels/layout.h"

namespace rlhf {
namespace {

using kernels::ceil_div;

constexpr std::int64_t kRowsPerTask = 384;    // with a block of K: 590 KB of a row block stay in a 1 MiB L2
constexpr std::int64_t kFewRowsPerTask = 48;  // fewer rows do not pay for packing a panel
constexpr std::int64_t kChunk = 1 << 16;

// Rows a task takes: as few tasks as the cache wants, but some for each thread. Results do not depend on it.
std::int64_t rows_per_task(std::int64_t rows, std::int64_t panels, std::int64_t tile_rows, int threads) {
  const std::int64_t wanted = ceil_div(4 * threads, panels),
                     most = std::max<std::int64_t>(1, rows / kFewRowsPerTask);
  const std::int64_t blocks = std::max(ceil_div(rows, kRowsPerTask), std::min(wanted, most));
  return ceil_div(ceil_div(rows, blocks), tile_rows) * tile_rows;
}

// Scratch of this thread, aligned to whole vectors.
template <class T>
T* packed_panel(const kernels::Kernels<T>& table) {
  constexpr std::size_t kAlignment = 64;
  static thread_local std::vector<T> scratch;
  const auto needed =
      static_cast<std::size_t>(table.packed_rows * table.panel_columns) + kAlignment / sizeof(T);
  if (scratch.size() < needed) scratch.resize(needed);
  void* at = scratch.data();
  std::size_t space = scratch.size() * sizeof(T);
  return static_cast<T*>(std::align(kAlignment, space - kAlignment, at, space));
}

}  // namespace

template <class T>
void Compute<T>::linear(const kernels::LinearArgs<T>& args, std::int64_t M, std::int64_t N) const {
  if (M <= 0 || N <= 0) return;
  const kernels::Kernels<T>& table = *kernels_;
  // Few rows pass through W once and are done: smaller pieces keep the threads together.
  const std::int64_t width = M <= 8 && N <= 4096 ? table.panel_columns / 2 : table.panel_columns;
  const std::int64_t panels = ceil_div(N, width),
                     rows = rows_per_task(M, panels, table.tile_rows, pool_->num_threads());
  const std::int64_t tasks = panels * ceil_div(M, rows);
  const bool small = M * N * args.K < 60000;
  pool_->parallel_for(tasks, small ? tasks : 1, [&](std::int64_t begin, std::int64_t end) {
    T* packed = packed_panel(table);
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t m = task / panels * rows, n = task % panels * width;
      table.linear(args, m, std::min(M, m + rows), n, std::min(N, n + width), packed);
    }
  });
}

template <class T>
void Compute<T>::gemm(const kernels::GemmArgs<T>& args) const {
  if (args.M <= 0 || args.N <= 0) return;
  const kernels::Kernels<T>& table = *kernels_;
  const std::int64_t panels = ceil_div(args.N, table.panel_columns);
  const std::int64_t rows = rows_per_task(args.M, panels, table.tile_rows, pool_->num_threads());
  const std::int64_t tasks = panels * ceil_div(args.M, rows);
  const bool small = args.M * args.N * args.K < 60000;
  pool_->parallel_for(tasks, small ? tasks : 1, [&](std::int64_t begin, std::int64_t end) {
    T* packed = packed_panel(table);
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t i = task / panels * rows;
      table.gemm_panel(args, i, std::min(args.M, i + rows), task % panels * table.panel_columns, packed);
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
