#pragma once
// The devices that one test body runs on, and values on them.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "rlhf/core/random.h"
#include "rlhf/core/thread_pool.h"
#include "rlhf/kernels/cuda_device.h"
#include "rlhf/kernels/device_kernels.h"
#include "rlhf/kernels/ops.h"
#include "rlhf/tensor/device_memory.h"
#include "tests/catch.h"

namespace rlhf {

/// The CUDA kernels' sources, run on the CPU (tests/cuda/emulated.cpp).
template <class T>
const kernels::DeviceKernels<T>& emulated_kernels();
/// In which order the emulator starts the threads of a block: 0 ascending, 1 descending, 2 mixed.
void set_emulator_order(int order);

/// A device under test.
template <class T>
struct TestDevice {
  const char* name = "";
  const kernels::DeviceKernels<T>* ops = nullptr;
  DeviceMemory* memory = nullptr;

  void* queue() const { return memory->queue(); }
  template <class V>
  DeviceBuffer<V> put(const std::vector<V>& values) const {
    return {*memory, values};
  }
};

/// Values with their exact doubles: what an oracle computes with is what the device sees, whatever T rounds.
template <class T>
struct Values {
  std::vector<T> stored;
  std::vector<double> exact;
};

template <class T>
T round_to(double value) {
  if constexpr (sizeof(T) == 2)
    return from_float<T>(static_cast<float>(value));
  else
    return static_cast<T>(value);
}
template <class T>
double exact(T value) {
  return static_cast<double>(to_float(value));
}
template <class T>
std::vector<double> exact(const std::vector<T>& values) {
  std::vector<double> out;
  for (const T value : values) out.push_back(exact(value));
  return out;
}

template <class T>
Values<T> random_rounded(std::int64_t count, std::uint64_t stream, double scale = 1, double offset = 0) {
  RandomStream random(20261126, stream);
  Values<T> values;
  for (std::int64_t i = 0; i < count; ++i) {
    values.stored.push_back(round_to<T>(offset + scale * random.normal()));
    values.exact.push_back(exact(values.stored.back()));
  }
  return values;
}

/// Half the distance between 1 and the next number of T: what one rounding may change, relatively.
template <class T>
constexpr double kRounding = sizeof(T) == 2 ? 0x1.0p-8 : 0x1.0p-24;

/// Every element within `absolute` + (`relative` + a rounding to T) * |expected|; NaN never is.
template <class T>
void check_values(const std::vector<T>& got, const std::vector<double>& expected, double absolute,
                  double relative) {
  REQUIRE(got.size() == expected.size());
  std::size_t off = 0, first = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    const double allowed = absolute + (relative + kRounding<T>)*std::abs(expected[i]);
    if (std::abs(exact(got[i]) - expected[i]) <= allowed) continue;
    if (off++ == 0) first = i;
  }
  if (off > 0) {
    INFO(off << " of " << got.size() << " elements off; element " << first << " is " << exact(got[first])
             << ", expected " << expected[first]);
    CHECK(off == 0);
  }
}

/// True unless RLHF_TEST_DEVICES names devices and not this one.
inline bool wants_device(const std::string& name) {
  const char* wanted = std::getenv("RLHF_TEST_DEVICES");
  return !wanted || std::string(wanted).find(name) != std::string::npos;
}

/// Runs body(device) on the CPU (where it computes in T), on the emulator with three orders of threads, and
/// on a GPU where there is one.
template <class T, class Body>
void on_every_device(const Body& body) {
  if constexpr (sizeof(T) == sizeof(float)) {
    ThreadPool pool(2);
    Compute<T> compute(pool, kernels::detect_cpu_isa());
    HostMemory host(&compute);
    if (wants_device("cpu")) body(TestDevice<T>{"cpu", &kernels::cpu_device_kernels<T>(), &host});
  }
  HostMemory host(nullptr);
  const char* orders[] = {"emulated, threads ascending", "emulated, threads descending",
                          "emulated, threads mixed"};
  for (int order = 0; order < 3 && wants_device("emulated"); ++order) {
    set_emulator_order(order);
    body(TestDevice<T>{orders[order], &emulated_kernels<T>(), &host});
  }
  set_emulator_order(0);
  if (!wants_device("cuda") || !cuda_status().usable) return;  // status_test.cpp says so
  const auto cuda = CudaDevice::open();
  body(TestDevice<T>{"cuda, own products", &cuda_device_kernels<T>(CudaProducts::kOwn), cuda.get()});
  if (cuda_library_problem().empty()) body(TestDevice<T>{"cuda", &cuda_device_kernels<T>(), cuda.get()});
}

}  // namespace rlhf
