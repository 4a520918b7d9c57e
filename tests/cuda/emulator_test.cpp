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

// One product d[16][8] = a[16][16] b[16][8] of integers, fragments filled as mma.cuh says.
__global__ void product_kernel(const float* a, const float* b, float* d) {
  const int lane = static_cast<int>(threadIdx.x), row = lane / 4, pair = 2 * (lane % 4);
  const auto of_a = [&](int i, int k) { return device::round_pair(a[i * 16 + k], a[i * 16 + k + 1]); };
  const auto of_b = [&](int k) { return device::round_pair(b[k * 8 + row], b[(k + 1) * 8 + row]); };
  float sum[4] = {};
  device::multiply_add(sum,
                       {of_a(row, pair), of_a(row + 8, pair), of_a(row, pair + 8), of_a(row + 8, pair + 8)},
                       of_b(pair), of_b(pair + 8));
  for (int e = 0; e < 4; ++e) d[(row + e / 2 * 8) * 8 + pair + e % 2] = sum[e];
}

// Each lane's pair of four matrices of 8 x 8 in which element (i, j) of matrix m is 64 m + 8 i + j.
template <bool kTransposed>
__global__ void matrices_kernel(unsigned* out) {
  auto* shared = device::block_shared<rlhf::Bfloat16>();
  for (unsigned i = threadIdx.x; i < 256; i += 32) shared[i].bits = static_cast<std::uint16_t>(i);
  __syncwarp();
  unsigned m[4];
  device::load_matrices<kTransposed>(m, shared + 8 * threadIdx.x);
  for (unsigned i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = m[i];
}

__global__ void copy_kernel(const float* from, float* out, bool wait) {
  float* shared = device::block_shared<float>();
  device::copy_later<4>(shared + threadIdx.x, from + threadIdx.x, threadIdx.x != 5);
  if (wait) device::wait_for_copies();
  __syncthreads();
  out[threadIdx.x] = shared[31 - threadIdx.x];
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

TEST_CASE("a warp's product and the loads of its operands follow the PTX ISA's fragments") {
  std::vector<float> a(256), b(128), d(128);
  for (std::size_t i = 0; i < a.size(); ++i) a[i] = static_cast<float>(i * 7 % 13) - 6;
  for (std::size_t i = 0; i < b.size(); ++i) b[i] = static_cast<float>(i * 5 % 11) - 5;
  device::launch("product", product_kernel, dim3(1), 32, 0, nullptr, a.data(), b.data(), d.data());
  for (std::size_t i = 0; i < 16; ++i)
    for (std::size_t j = 0; j < 8; ++j) {
      float sum = 0;
      for (std::size_t k = 0; k < 16; ++k) sum += a[i * 16 + k] * b[k * 8 + j];
      CHECK(d[i * 8 + j] == sum);
    }
  std::vector<unsigned> plain(128), transposed(128);
  device::launch("matrices", matrices_kernel<false>, dim3(1), 32, 512, nullptr, plain.data());
  device::launch("matrices", matrices_kernel<true>, dim3(1), 32, 512, nullptr, transposed.data());
  for (unsigned lane = 0; lane < 32; ++lane)
    for (unsigned m = 0; m < 4; ++m) {
      const unsigned row = lane / 4, pair = 2 * (lane % 4), base = 64 * m;
      CHECK(plain[4 * lane + m] == ((base + 8 * row + pair) | (base + 8 * row + pair + 1) << 16));
      CHECK(transposed[4 * lane + m] == ((base + 8 * pair + row) | (base + 8 * (pair + 1) + row) << 16));
    }
}

TEST_CASE("a copy is there when it was waited for, and not to wait is an error") {
  std::vector<float> from(32), out(32);
  for (std::size_t i = 0; i < from.size(); ++i) from[i] = static_cast<float>(i + 1);
  device::launch("copy", copy_kernel, dim3(1), 32, 128, nullptr, from.data(), out.data(), true);
  for (std::size_t i = 0; i < 32; ++i) CHECK(out[i] == (31 - i == 5 ? 0 : from[31 - i]));
  CHECK_THROWS_WITH(
      device::launch("copy", copy_kernel, dim3(1), 32, 128, nullptr, from.data(), out.data(), false),
      ContainsSubstring("before its copies"));
  CHECK(std::isnan(out[0]));
}
