// One rank of a test: `distributed_rank SCENARIO TIMEOUT_MS`. Writes what the collective returned to standard
// output.
#include <unistd.h>

#include <cstdio>
#include <iostream>

#include "rlhf/distributed/device_collective.h"
#include "rlhf/distributed/gloo_collective.h"
#include "rlhf/distributed/launch.h"
#include "tests/distributed/exchanged.h"

using namespace rlhf;

namespace {

template <class T>
void write(std::span<const T> values) {
  if (!values.empty()) std::fwrite(values.data(), sizeof(T), values.size(), stdout);
}

template <class T>
void reduce_and_gather(Collective& collective) {
  for (const std::size_t count : kCounts) {
    std::vector<T> sums = values_of<T>(collective.rank(), count);
    collective.all_reduce(sums);
    write<T>(sums);
    std::vector<T> slices = values_of<T>(collective.rank(), count);
    collective.reduce_scatter(slices);
    write<T>(slices);
    std::vector<T> gathered = values_of<T>(collective.rank(), count);
    collective.all_gather(gathered);
    write<T>(gathered);
  }
}

std::vector<Slice> uneven_parts(std::size_t count, int ranks) {
  std::vector<Slice> parts;
  for (int r = 0; r < ranks; ++r)
    parts.push_back({uneven_begin_of(count, r, ranks), uneven_begin_of(count, r + 1, ranks)});
  return parts;
}

void reduce_parts(Collective& collective) {
  for (const std::size_t count : kCounts) {
    std::vector<float> values = values_of<float>(collective.rank(), count);
    collective.reduce_parts(values, uneven_parts(count, collective.world_size()));
    write<float>(values);
  }
}

void exchange(Collective& collective) {
  reduce_and_gather<float>(collective);
  reduce_and_gather<double>(collective);
  reduce_parts(collective);
  for (const std::string& text : collective.all_gather_bytes(text_of(collective.rank()))) write<char>(text);
  for (int root = 0; root < collective.world_size(); ++root) {
    auto values = values_of<float>(collective.rank(), 70001);
    collective.broadcast(std::span(values), root);
    write<float>(values);
  }
  // Each gives its slice of its own values; rank 0 hands out its values.
  constexpr std::size_t kCount = 10007;
  const Slice slice = slice_of(kCount, collective.rank(), collective.world_size());
  std::vector<float> values = values_of<float>(collective.rank(), kCount), storage;
  write<float>(gather_slices(collective, slice.of(std::span(values)), kCount, storage));
  std::vector<float> own(slice.size());
  scatter_slices(collective,
                 collective.is_first() ? std::span<const float>(values) : std::span<const float>(), own,
                 kCount);
  write<float>(own);
  collective.barrier();
  const bool one = any_rank(collective, collective.rank() == collective.world_size() - 1);
  const bool first = first_rank_says(collective, collective.rank() != 0);
  std::fputs(one && !any_rank(collective, false) ? "any" : "none", stdout);
  std::fputs(first ? "yes" : "no", stdout);
}

void reduce_and_gather(Collective& collective, DeviceMemory& memory, DeviceCollective& devices) {
  std::cerr << devices.text() << "\n";
  for (const std::size_t count : kCounts) {
    const std::vector<float> own = values_of<float>(collective.rank(), count);
    DeviceBuffer<float> sums(memory, own), part_sums(memory, own), gathered(memory, own);
    DeviceBuffer<std::uint16_t> halves(memory, halves_of(collective.rank(), count));
    const std::vector<Slice> parts = uneven_parts(std::min(count, kUnevenCount), collective.world_size());
    devices.reduce_scatter(sums.data(), count);
    devices.reduce_parts(part_sums.data(), parts);
    devices.all_gather(gathered.data(), count, sizeof(float));
    devices.all_gather(halves.data(), count, sizeof(std::uint16_t));
    devices.wait();
    const Slice slice = slice_of(count, collective.rank(), collective.world_size());
    const std::vector<float> summed = sums.values(), parts_summed = part_sums.values();
    write<float>(slice.of(std::span(summed)));
    write<float>(parts[static_cast<std::size_t>(collective.rank())].of(std::span(parts_summed)));
    write<float>(gathered.values());
    write<std::uint16_t>(halves.values());
  }
}

// Arrays in a memory of their own, which is this process's.
void exchange_on_devices(Collective& collective, const std::string& scenario,
                         std::chrono::milliseconds timeout) {
  HostMemory memory(nullptr);
  if (scenario == "staged") {
    const auto staged = make_staged_collective(collective, memory, "a test", 3000);
    return reduce_and_gather(collective, memory, *staged);
  }
  const bool is_stuck = scenario == "devices_stuck";
  const auto devices =
      make_device_collective(collective, memory,
                             {.is_done = [=](void*) { return !is_stuck; },
                              .timeout = timeout,
                              .nccl_library = process_environment("RLHF_NCCL_LIBRARY").value_or("")});
  if (scenario == "devices_repeat") {
    DeviceBuffer<float> values(memory, std::vector<float>(5000, 1));
    std::cerr << "begun" << std::endl;
    while (true) {
      devices->all_gather(values.data(), values.size(), sizeof(float));
      devices->wait();
    }
  }
  if (scenario == "devices_absent" && collective.rank() == collective.world_size() - 1) sleep(60);
  reduce_and_gather(collective, memory, *devices);
}

// Adds up until somebody ends.
void repeat(Collective& collective) {
  std::vector<float> values(100000, 1);
  std::cerr << "begun" << std::endl;
  while (true) collective.all_reduce(std::span(values));
}

// The last rank does not take part.
void wait_for_last(Collective& collective) {
  if (collective.rank() == collective.world_size() - 1) sleep(60);
  collective.barrier();
}

}  // namespace

int main(int, char** argv) {
  const std::string scenario = argv[1];
  try {
    const Launch launch = read_launch();
    const std::chrono::milliseconds timeout(std::stoi(argv[2]));
    const auto collective = connect(launch, timeout);
    if (scenario == "exchange") exchange(*collective);
    if (scenario == "repeat") repeat(*collective);
    if (scenario == "wait") wait_for_last(*collective);
    if (scenario == "staged" || scenario.starts_with("devices"))
      exchange_on_devices(*collective, scenario, timeout);
    return 0;
  } catch (const Error& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
}
