// What the emulator must catch, and that a kernel without faults runs.
#define RLHF_GPU emulator_check
#include "tests/cuda/emulator.h"
// The emulator comes first.
#include "tests/catch.h"

namespace {

namespace device = rlhf::kernels::emulator_check;

__global__ void reverse_kernel(int* out, bool with_barrier) {
  int* shared = device::block_shared<int>();
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (with_barrier) __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

__global__ void lane_sum_kernel(int* out) {
  int sum = static_cast<int>(threadIdx.x) % 32;
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0U, sum, distance);
  out[threadIdx.x] = sum + 1000 * __shfl_sync(~0U, static_cast<int>(threadIdx.x), 3);
}

__global__ void divergent_kernel(bool leave) {
  if (threadIdx.x == 7 && leave) return;
  if (threadIdx.x < 40) __syncthreads();
}

__global__ void wide_kernel(const std::uint32_t* from, std::uint32_t* to) {
  std::uint32_t words[4];
  device::load_16_bytes(words, from);
  if (threadIdx.x == 0) device::store_16_bytes(to, words);
}

std::vector<int> run_reverse(emulator::Order order, bool with_barrier) {
  emulator::order = order;
  std::vector<int> out(128);
  device::launch("reverse", reverse_kernel, dim3(2), 64, 64 * sizeof(int), nullptr, out.data(), with_barrier);
  emulator::order = emulator::Order::kAscending;
  return out;
}

}  // namespace

TEST_CASE("the emulator runs barriers in any order of threads") {
  std::vector<int> expected;
  for (int i = 0; i < 128; ++i) expected.push_back(63 - i % 64);
  for (const auto order :
       {emulator::Order::kAscending, emulator::Order::kDescending, emulator::Order::kMixed})
    CHECK(run_reverse(order, true) == expected);
}

TEST_CASE("a missing barrier shows: what is not written yet is full of ones, and orders differ") {
  const std::vector<int> ascending = run_reverse(emulator::Order::kAscending, false);
  CHECK(ascending[0] == -1);
  CHECK(run_reverse(emulator::Order::kDescending, false) != ascending);
}

TEST_CASE("shuffles exchange within warps") {
  std::vector<int> out(64);
  device::launch("lane_sum", lane_sum_kernel, dim3(1), 64, 0, nullptr, out.data());
  for (int i = 0; i < 64; ++i) CHECK(out[static_cast<std::size_t>(i)] == 496 + 1000 * (i / 32 * 32 + 3));
}

TEST_CASE("a barrier that not every thread reaches is an error") {
  for (const bool leave : {false, true})
    CHECK_THROWS_WITH(device::launch("divergent", divergent_kernel, dim3(1), 64, 0, nullptr, leave),
                      ContainsSubstring("emulator:"));
}

TEST_CASE("launches that a GPU would refuse are errors") {
  CHECK_THROWS_WITH(device::launch("divergent", divergent_kernel, dim3(1), 48, 0, nullptr, false),
                    ContainsSubstring("48 threads"));
  CHECK_THROWS_WITH(device::launch("divergent", divergent_kernel, dim3(1), 64, 50000, nullptr, false),
                    ContainsSubstring("50000 bytes"));
}

TEST_CASE("the emulator refuses an access of 16 bytes that is not aligned") {
  alignas(16) std::uint32_t numbers[12] = {1, 2, 3, 4, 5, 6, 7, 8};
  const std::uint32_t* from = numbers;
  std::uint32_t* to = numbers + 8;
  device::launch("wide", wide_kernel, dim3(1), 32, 0, nullptr, from + 4, to);
  CHECK(to[3] == 8);
  CHECK_THROWS_WITH(device::launch("wide", wide_kernel, dim3(1), 32, 0, nullptr, from + 1, to),
                    ContainsSubstring("an access of 16 bytes at another address"));
}
