#pragma once
// Runs the kernels of rlhf/kernels/cuda on the CPU, from their own sources. Include before any of them; takes
// the place of rlhf/kernels/cuda/launch.cuh. One thread of the machine runs the blocks one after another; the
// threads of a block are coroutines that switch at barriers and shuffles only.
//
// It is stricter than a GPU where it can be: shared memory has exactly the bytes asked for, on the heap (the
// address sanitizer sees an access beyond it), and is full of NaN at the start of a block; a thread that
// ends, or waits elsewhere, while others wait is an error; an access of 16 bytes elsewhere than at a multiple
// of 16 is one too; and `order` starts threads in ascending, descending or mixed order, so that a missing
// barrier changes results. Tensor cores and asynchronous copies (rlhf/kernels/cuda/mma.cuh) are here too,
// fragments as the PTX ISA defines them. It cannot show: races between blocks, limits of the hardware.

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "rlhf/core/error.h"
#include "rlhf/kernels/bfloat16.h"
#include "tests/cuda/emulator_queue.h"

#define __global__
#define __device__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  explicit dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulator {

inline dim3 thread_index, block_index, block_size, grid_size;

enum class Order { kAscending, kDescending, kMixed };
inline Order order = Order::kAscending;

/// Called around every kernel, where a test has set them.
struct Hooks {
  void (*before)(void*) = nullptr;
  void (*after)(void*) = nullptr;
  void* context = nullptr;
};
inline Hooks hooks;

/// Where kernels go in place of running, while a test records.
inline thread_local std::vector<std::function<void()>>* recorder = nullptr;

/// One block of threads as coroutines.
class Block {
 public:
  static constexpr std::size_t kStackBytes = 64 << 10;
  static constexpr std::size_t kWarp = 32;

  Block(int threads, std::size_t shared_bytes) : threads_(static_cast<std::size_t>(threads)) {
    if (threads <= 0 || threads > 1024 || (threads > 1 && threads % static_cast<int>(kWarp) != 0))
      throw std::logic_error("emulator: a block has " + std::to_string(threads) + " threads");
    if (shared_bytes > 48 << 10)
      throw std::logic_error("emulator: " + std::to_string(shared_bytes) + " bytes of shared memory");
    shared_bytes_ = shared_bytes;
    shared_.reset(new unsigned char[std::max<std::size_t>(shared_bytes, 1)]);  // aligned as a GPU's, to 16
    for (std::size_t i = 0; i < threads_.size(); ++i) {
      threads_[i].stack = take_stack();
      start_order_.push_back(i);
    }
    if (order == Order::kDescending) std::reverse(start_order_.begin(), start_order_.end());
    const auto mix = [](std::size_t i) { return i * 2654435761U % 65521; };
    if (order == Order::kMixed)
      std::sort(start_order_.begin(), start_order_.end(), [&](std::size_t a, std::size_t b) {
        return std::pair(mix(a / kWarp), mix(a)) < std::pair(mix(b / kWarp), mix(b));
      });
  }

  ~Block() {
    for (Thread& thread : threads_) spare_stacks_.push_back(std::move(thread.stack));
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  /// Runs `body` in every thread of the block.
  template <class Body>
  void run(const Body& body) {
    std::memset(shared_.get(), 0xFF, shared_bytes_);
    body_ = [](const void* b) { (*static_cast<const Body*>(b))(); };
    context_ = &body;
    current_block = this;
    barrier_arrived_ = barriers_passed_ = 0;
    misaligned_ = false;
    for (Thread& t : threads_) {
      t.done = false;
      t.barriers = t.shuffles = 0;
      t.copies.clear();
    }
    for (std::size_t left = threads_.size(); left > 0;) {
      bool progress = false;
      for (std::size_t warp = 0; warp < threads_.size(); warp += kWarp)
        while (run_warp(warp, left)) progress = true;
      if (!progress)
        throw std::logic_error("emulator: threads wait at a barrier or shuffle that others never reach");
    }
    for (const Thread& t : threads_)
      if (!t.copies.empty()) throw std::logic_error("emulator: a thread ended before its copies");
    if (barrier_arrived_ != 0) throw std::logic_error("emulator: a barrier that not all threads reach");
    if (misaligned_) throw std::logic_error("emulator: an access of 16 bytes at another address");
  }

  /// Notes an access of 16 bytes; `run` reports it, as a thread's stack cannot throw.
  void check_wide(const void* address) { misaligned_ |= reinterpret_cast<std::uintptr_t>(address) % 16 != 0; }

  void barrier() {
    Thread& me = threads_[current_];
    const std::size_t mine = ++me.barriers;
    progressed_ = true;
    if (++barrier_arrived_ == threads_.size()) {
      barrier_arrived_ = 0;
      ++barriers_passed_;
    }
    while (barriers_passed_ < mine) yield();
    progressed_ = true;
  }

  /// Every lane of the warp gives a value; returns that of lane `from`.
  template <class V>
  V shuffle(V value, int from) {
    share(value);
    return shared_by<V>(from);
  }

  /// Every lane of the warp gives a value, which shared_by then reads until the next share or shuffle.
  template <class V>
  void share(const V& value) {
    static_assert(sizeof(V) <= kSlotBytes);
    Thread& me = threads_[current_];
    const std::size_t generation = ++me.shuffles, first = current_ / kWarp * kWarp;
    // Two slots in turn: a lane can be one shuffle ahead of another, not two.
    std::memcpy(me.slot[generation % 2], &value, sizeof(V));
    progressed_ = true;
    const auto all_here = [&] {
      for (std::size_t i = first; i < first + kWarp; ++i)
        if (threads_[i].shuffles < generation) return false;
      return true;
    };
    while (!all_here()) yield();
    progressed_ = true;
  }
  template <class V>
  V shared_by(int lane) const {
    const std::size_t first = current_ / kWarp * kWarp, generation = threads_[current_].shuffles;
    V result;
    std::memcpy(&result, threads_[first + static_cast<std::size_t>(lane)].slot[generation % 2], sizeof(V));
    return result;
  }

  /// A copy that is made at the thread's next finish_copies(): what reads it before reads something else.
  void copy_later(void* to, const void* from, std::size_t bytes) {
    threads_[current_].copies.push_back({to, from, bytes});
  }
  void finish_copies() {
    for (const Copy& copy : threads_[current_].copies)
      copy.from ? std::memcpy(copy.to, copy.from, copy.bytes) : std::memset(copy.to, 0, copy.bytes);
    threads_[current_].copies.clear();
  }

  int lane() const { return static_cast<int>(current_ % kWarp); }
  unsigned char* shared() { return shared_.get(); }

  static inline Block* current_block = nullptr;

 private:
  static constexpr std::size_t kSlotBytes = 32;

  struct Copy {
    void* to;
    const void* from;  ///< null: zeros
    std::size_t bytes;
  };
  struct Thread {
    std::unique_ptr<unsigned char[]> stack;
    jmp_buf state;
    bool started = false, done = false;
    std::size_t barriers = 0, shuffles = 0;
    unsigned char slot[2][kSlotBytes] = {};
    std::vector<Copy> copies;
  };

  using Stack = std::unique_ptr<unsigned char[]>;
  static Stack take_stack() {
    if (spare_stacks_.empty()) return Stack(new unsigned char[kStackBytes]);
    Stack stack = std::move(spare_stacks_.back());
    spare_stacks_.pop_back();
    return stack;
  }

  // A thread stays for the next block of its launch: to begin one costs calls of the system.
  static void enter() {
    for (;;) {
      Block& block = *current_block;
      block.body_(block.context_);
      Thread& me = block.threads_[block.current_];
      me.done = true;
      if (_setjmp(me.state) == 0) _longjmp(block.scheduler_, 1);
    }
  }

  // Runs the lanes of one warp up to what they wait for. @return whether one of them came any further
  bool run_warp(std::size_t first, std::size_t& left) {
    progressed_ = false;
    for (std::size_t k = first; k < std::min(first + kWarp, threads_.size()); ++k) {
      Thread& thread = threads_[start_order_[k]];
      if (thread.done) continue;
      resume(start_order_[k]);
      left -= thread.done;
      progressed_ |= thread.done;
    }
    return progressed_;
  }

  void resume(std::size_t i) {
    current_ = i;
    thread_index.x = static_cast<unsigned>(i);
    if (_setjmp(scheduler_) != 0) return;
    if (threads_[i].started) _longjmp(threads_[i].state, 1);
    threads_[i].started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = threads_[i].stack.get();
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, enter, 0);
    setcontext(&context);
  }

  void yield() {
    if (_setjmp(threads_[current_].state) == 0) _longjmp(scheduler_, 1);
  }

  static inline thread_local std::vector<Stack> spare_stacks_;
  std::vector<Thread> threads_;
  std::vector<std::size_t> start_order_;
  std::unique_ptr<unsigned char[]> shared_;
  std::size_t shared_bytes_ = 0, current_ = 0, barrier_arrived_ = 0, barriers_passed_ = 0;
  bool progressed_ = false, misaligned_ = false;
  jmp_buf scheduler_;
  void (*body_)(const void*) = nullptr;
  const void* context_ = nullptr;
};

}  // namespace emulator

#define threadIdx ::emulator::thread_index
#define blockIdx ::emulator::block_index
#define blockDim ::emulator::block_size
#define gridDim ::emulator::grid_size

inline void __syncthreads() {
  ::emulator::Block::current_block->barrier();
}
inline void __syncwarp() {
  ::emulator::Block::current_block->shuffle(0, 0);
}
template <class V>
V __shfl_xor_sync(unsigned, V value, int mask) {
  auto& block = *::emulator::Block::current_block;
  return block.shuffle(value, block.lane() ^ mask);
}
template <class V>
V __shfl_sync(unsigned, V value, int from) {
  return ::emulator::Block::current_block->shuffle(value, from);
}

namespace rlhf::kernels::RLHF_GPU {

template <class V>
V* block_shared() {
  return reinterpret_cast<V*>(::emulator::Block::current_block->shared());
}

inline void load_16_bytes(std::uint32_t (&to)[4], const void* from) {
  ::emulator::Block::current_block->check_wide(from);
  std::memcpy(to, from, sizeof(to));
}
inline void store_16_bytes(void* to, const std::uint32_t (&from)[4]) {
  ::emulator::Block::current_block->check_wide(to);
  std::memcpy(to, from, sizeof(from));
}
inline void prefetch_line(const void*) {}
inline std::uint32_t round_pair(float low, float high) {
  return from_float<Bfloat16>(low).bits | static_cast<std::uint32_t>(from_float<Bfloat16>(high).bits) << 16;
}
inline float quick_quotient(float a, float b) {
  return a / b;
}

template <class... Parameters, class... Arguments>
void run_kernel(void (*kernel)(Parameters...), dim3 grid, int threads, std::size_t shared_bytes,
                const Arguments&... arguments) {
  if (::emulator::hooks.before) ::emulator::hooks.before(::emulator::hooks.context);
  ::emulator::Block block(threads, shared_bytes);
  ::emulator::block_size = dim3(static_cast<unsigned>(threads));
  ::emulator::grid_size = grid;
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      ::emulator::block_index = dim3(x, y);
      block.run([&] { kernel(arguments...); });
    }
  if (::emulator::hooks.after) ::emulator::hooks.after(::emulator::hooks.context);
}

template <class... Parameters, class... Arguments>
void launch(const char*, void (*kernel)(Parameters...), dim3 grid, int threads, std::size_t shared_bytes,
            void* queue, const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0) return;
  if (::emulator::recorder) {
    ::emulator::recorder->push_back([=] { run_kernel(kernel, grid, threads, shared_bytes, arguments...); });
    return;
  }
  if (queue) {
    static_cast<EmulatorQueue*>(queue)->push(
        [=] { run_kernel(kernel, grid, threads, shared_bytes, arguments...); });
    return;
  }
  run_kernel(kernel, grid, threads, shared_bytes, arguments...);
}

// Kernels of a queue run one after another here.
inline void follow_last_kernel() {}
template <class... Parameters, class... Arguments>
void launch_early(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads,
                  std::size_t shared_bytes, void* queue, const Arguments&... arguments) {
  launch(name, kernel, grid, threads, shared_bytes, queue, arguments...);
}

/// The lane's registers of A and of B.
struct Operands {
  unsigned a[4], b[2];
};

inline float half_of(unsigned pair, int which) {
  return to_float(Bfloat16{static_cast<std::uint16_t>(which == 0 ? pair & 0xFFFFU : pair >> 16)});
}

/// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type": element (row, k) of A is with lane
/// 4 (row % 8) + k % 8 / 2, in register row / 8 + 2 (k / 8); (k, column) of B with lane 4 column + k % 8 / 2,
/// in register k / 8.
inline void multiply_add(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  auto& block = *::emulator::Block::current_block;
  block.share(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const int lane = block.lane();
  Operands rows[4], columns[2][4];
  for (int i = 0; i < 4; ++i) {
    rows[i] = block.shared_by<Operands>(lane / 4 * 4 + i);
    for (int c = 0; c < 2; ++c) columns[c][i] = block.shared_by<Operands>((lane % 4 * 2 + c) * 4 + i);
  }
  for (int e = 0; e < 4; ++e) {
    float sum = 0;
    for (int k = 0; k < 16; ++k)
      sum += half_of(rows[k % 8 / 2].a[e / 2 + 2 * (k / 8)], k % 2) *
             half_of(columns[e % 2][k % 8 / 2].b[k / 8], k % 2);
    d[e] += sum;
  }
}

inline void check_alignment(const void* address, std::size_t bytes) {
  if (reinterpret_cast<std::uintptr_t>(address) % bytes != 0)
    throw std::logic_error("emulator: an address is not a multiple of " + std::to_string(bytes));
}

template <bool kTransposed>
void load_matrices(unsigned (&m)[4], const Bfloat16* row) {
  check_alignment(row, 16);
  auto& block = *::emulator::Block::current_block;
  block.share(row);
  for (int i = 0; i < 4; ++i) {
    m[i] = 0;
    for (int half = 0; half < 2; ++half) {
      const int line = kTransposed ? block.lane() % 4 * 2 + half : block.lane() / 4;
      const int column = kTransposed ? block.lane() / 4 : block.lane() % 4 * 2 + half;
      m[i] |= static_cast<unsigned>(block.shared_by<const Bfloat16*>(8 * i + line)[column].bits)
              << (16 * half);
    }
  }
}

template <int kBytes>
void copy_later(void* to, const void* from, bool valid) {
  static_assert(kBytes == 4 || kBytes == 16);
  check_alignment(to, kBytes);
  check_alignment(from, kBytes);
  ::emulator::Block::current_block->copy_later(to, valid ? from : nullptr, kBytes);
}
inline void wait_for_copies() {
  ::emulator::Block::current_block->finish_copies();
}

inline float power_of_two(float x) {
  return std::exp2(x);
}
inline unsigned load_pair(const Bfloat16* from) {
  check_alignment(from, 4);
  return from[0].bits | static_cast<unsigned>(from[1].bits) << 16;
}
inline void store_pair(Bfloat16* to, unsigned pair) {
  check_alignment(to, 4);
  to[0].bits = static_cast<std::uint16_t>(pair & 0xFFFFU);
  to[1].bits = static_cast<std::uint16_t>(pair >> 16);
}

}  // namespace rlhf::kernels::RLHF_GPU
