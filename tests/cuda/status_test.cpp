#include "rlhf/kernels/open_device.h"

#include <algorithm>

#include "tests/cuda/devices.h"

using namespace rlhf;

TEST_CASE("without a GPU the status says what is missing, and opening it fails with that") {
  const CudaStatus status = cuda_status();
  if (status.usable) {
    WARN("GPU tests run on " << status.text);
    if (!cuda_library_problem().empty())
      WARN("products of cuBLASLt are not tested: " << cuda_library_problem());
    CHECK(CudaDevice::open()->total_bytes() > 0);
  } else {
    if (std::getenv("RLHF_TEST_DEVICES") && wants_device("cuda"))
      FAIL("RLHF_TEST_DEVICES asks for cuda, but " << status.text);
    WARN("GPU tests are skipped: " << status.text);
    CHECK_THROWS_WITH(CudaDevice::open(), "device: cuda: " + status.text);
  }
}

TEST_CASE("a GPU that does not exist is named") {
  const CudaStatus status = cuda_status(1000);
  CHECK_FALSE(status.usable);
  if (cuda_status().usable) CHECK(status.text.find("no GPU number 1000") != std::string::npos);
}

TEST_CASE("GPUs have names, by number") {
  const std::vector<std::string> names = cuda_gpu_names();
  for (std::size_t i = 0; i < names.size(); ++i) {
    CHECK(names[i].size() == (cuda_status(static_cast<int>(i)).usable ? 32u : 0u));
    CHECK(std::ranges::count(names, names[i]) == (names[i].empty() ? std::ranges::count(names, "") : 1));
  }
  if (!cuda_status().usable) return;
  CHECK_FALSE(names.empty());
  const auto device = CudaDevice::open();
  device->synchronize();
  CHECK(cuda_queue_is_done(device->queue()));
}

TEST_CASE("device buffers hold what they were given") {
  on_every_device<float>([](const TestDevice<float>& device) {
    const std::vector<float> values = {1, -2, 3.5F};
    DeviceBuffer<float> buffer = device.put(values);
    CHECK(buffer.values() == values);
    const DeviceBuffer<float> moved = std::move(buffer);
    CHECK(moved.values() == values);
    const DeviceBuffer<float> empty(*device.memory, std::vector<float>{});
    CHECK(empty.values().empty());
    DeviceBuffer<float> cleared = device.put(values);
    device.memory->zero(cleared.data(), 2 * sizeof(float));
    CHECK(cleared.values() == std::vector<float>{0, 0, 3.5F});
  });
}

TEST_CASE("a device that is asked for is opened, and auto says what it took and why") {
  CHECK_FALSE(OpenDevice(Device::kCpu).accelerator());
  CHECK(OpenDevice(Device::kCpu).text() == "cpu");
  const CudaStatus status = cuda_status();
  const OpenDevice automatic(Device::kAuto);
  CHECK_THAT(automatic.text(), ContainsSubstring(status.text));
  CHECK((automatic.accelerator() != nullptr) == status.usable);
  if (!status.usable) {
    CHECK_THROWS_WITH(OpenDevice(Device::kCuda), ContainsSubstring(status.text));
    return;
  }
  const Accelerator& accelerator = *automatic.accelerator();
  CHECK(accelerator.name == status.text);
  CHECK(accelerator.bytes > 0);
  CHECK(accelerator.memory->record([] {}) != nullptr);
}
