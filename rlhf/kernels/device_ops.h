#pragma once

#include <algorithm>
#include <cstring>
#include <optional>
#include <type_traits>

#include "rlhf/kernels/device_kernels.h"
#include "rlhf/kernels/ops.h"
#include "rlhf/tensor/device_memory.h"

namespace rlhf {

/// The operations of one device: its table, memory and queue. The CPU's queue is a Compute and its memory the
/// process's own; another device's memory must outlive this object. Calls may return before their work is
/// done.
template <class T>
class DeviceOps {
 public:
  /// @param buffers where CPU buffers come from; null = the process's own memory
  explicit DeviceOps(Compute<T> compute,
                     DeviceMemory* buffers = nullptr) requires(!std::is_same_v<T, Bfloat16>)
      : kernels_(&kernels::cpu_device_kernels<T>()), buffers_(buffers), compute_(compute) {}
  /// @param buffers where large buffers come from, on the same device; null = `memory`
  DeviceOps(const kernels::DeviceKernels<T>& kernels, DeviceMemory& memory, DeviceMemory* buffers = nullptr)
      : kernels_(&kernels), memory_(&memory), buffers_(buffers ? buffers : &memory) {}

  /// Null on the CPU.
  DeviceMemory* memory() const { return memory_; }
  /// What Buffer takes as its memory.
  DeviceMemory* buffers() const { return buffers_; }
  /// On the CPU only.
  const Compute<T>& compute() const { return *compute_; }

  void linear(const kernels::LinearArgs<T>& args, std::int64_t M, std::int64_t N) {
    kernels_->linear(args, M, N, queue());
  }
  void linear_wide(const kernels::LinearArgs<T, Wide<T>>& args, std::int64_t M, std::int64_t N) {
    kernels_->linear_wide(args, M, N, queue());
  }
  void gemm(const kernels::GemmArgs<T>& args) { kernels_->gemm(args, queue()); }
  void gemm_wide(const kernels::GemmArgs<T, Wide<T>>& args) { kernels_->gemm_wide(args, queue()); }
  bool prefers_few_rows(const kernels::FewRowsArgs<T>& args, std::int64_t N) const {
    return kernels_->prefers_few_rows && kernels::gains_from_few_rows(args, N);
  }
  void few_rows_linear(const kernels::FewRowsArgs<T>& args, std::int64_t N) {
    kernels_->few_rows_linear(args, N, queue());
  }
  void norm(const kernels::NormArgs<T>& args, std::int64_t rows) { kernels_->norm(args, rows, queue()); }
  void norm_grad(const kernels::NormGradArgs<T>& args) { kernels_->norm_grad(args, queue()); }
  void activation(const kernels::ActivationArgs<T>& args, std::int64_t rows) {
    kernels_->activation(args, rows, queue());
  }
  void activation_grad(const kernels::ActivationGradArgs<T>& args, std::int64_t rows) {
    kernels_->activation_grad(args, rows, queue());
  }
  void add(T* y, const T* x, std::int64_t n) { kernels_->add(y, x, n, queue()); }
  void scale(T* y, double factor, std::int64_t n) { kernels_->scale(y, factor, n, queue()); }
  void add_column_sums(Wide<T>* out, const T* x, std::int64_t rows, std::int64_t n) {
    kernels_->add_column_sums(out, x, rows, n, queue());
  }
  void embed(const kernels::EmbedArgs<T>& args, const kernels::PassRows& rows) {
    kernels_->embed(args, rows, queue());
  }
  void embed_grad(const kernels::EmbedGradArgs<T>& args) { kernels_->embed_grad(args, queue()); }
  void append(const kernels::AppendArgs<T>& args, const kernels::PassRows& rows) {
    kernels_->append(args, rows, queue());
  }
  void append(const kernels::AppendArgs<T, Float8>& args, const kernels::PassRows& rows) {
    kernels_->append_fp8(args, rows, queue());
  }
  void append_grad(const kernels::AppendGradArgs<T>& args, const kernels::PassRows& rows) {
    kernels_->append_grad(args, rows, queue());
  }
  void attention(const kernels::PassAttentionArgs<T>& args, const kernels::PassRows& rows) {
    kernels_->attention(args, rows, queue());
  }
  void attention(const kernels::PassAttentionArgs<T, Float8>& args, const kernels::PassRows& rows) {
    kernels_->attention_fp8(args, rows, queue());
  }
  void attention_grad(const kernels::PassAttentionGradArgs<T>& args, const kernels::PassRows& rows) {
    kernels_->attention_grad(args, rows, queue());
  }
  void gather_rows(T* to, const T* from, const std::int64_t* index, std::int64_t rows, std::int64_t D) {
    kernels_->gather_rows(to, from, index, rows, D, queue());
  }
  void logits(const kernels::LogitsArgs<T>& args, std::int64_t rows) {
    kernels_->logits(args, rows, queue());
  }
  void logits_grad(const kernels::LogitsArgs<T>& args, std::int64_t rows) {
    kernels_->logits_grad(args, rows, queue());
  }
  void edit(const kernels::EditArgs<T>& args, std::int64_t rows) { kernels_->edit(args, rows, queue()); }
  void unedited_logprobs(const kernels::EditArgs<T>& args, const TokenId* tokens, std::int64_t rows) {
    kernels_->unedited_logprobs(args, tokens, rows, queue());
  }
  void filter(const kernels::FilterArgs<T>& args, std::int64_t rows) {
    kernels_->filter(args, rows, queue());
  }
  void draw(const kernels::DrawArgs<T>& args, std::int64_t rows) { kernels_->draw(args, rows, queue()); }
  void narrow(T* to, const Wide<T>* from, std::int64_t n) { kernels_->narrow(to, from, n, queue()); }

  /// Copies n elements inside the device.
  void copy(T* to, const T* from, std::int64_t n) {
    if (memory_)
      memory_->copy(to, from, static_cast<std::size_t>(n) * sizeof(T));
    else
      std::copy_n(from, n, to);
  }
  /// Copies from the device to the process's memory; waits for all that is queued.
  void download(void* to, const void* from, std::size_t bytes) {
    if (memory_)
      memory_->download(to, from, bytes);
    else
      std::memcpy(to, from, bytes);
  }
  /// Copies from the process's memory to the device.
  void upload(void* to, const void* from, std::size_t bytes) {
    if (memory_)
      memory_->upload(to, from, bytes);
    else
      std::memcpy(to, from, bytes);
  }
  void zero(void* memory, std::size_t bytes) {
    if (memory_)
      memory_->zero(memory, bytes);
    else
      std::memset(memory, 0, bytes);
  }

 private:
  void* queue() { return memory_ ? memory_->queue() : &*compute_; }

  const kernels::DeviceKernels<T>* kernels_;
  DeviceMemory* memory_ = nullptr;
  DeviceMemory* buffers_ = nullptr;
  std::optional<Compute<T>> compute_;
};

}  // namespace rlhf
