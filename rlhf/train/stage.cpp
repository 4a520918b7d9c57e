#include "rlhf/train/stage.h"

#include <sys/resource.h>
#include <unistd.h>

#include <chrono>
#include <fstream>
#include <string>

#include "rlhf/kernels/accelerator.h"

namespace rlhf {
namespace {
double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
}  // namespace

double metric(const Metrics& metrics, const std::string& name, double otherwise) {
  for (const auto& [key, value] : metrics)
    if (key == name) return value;
  return otherwise;
}

Stopwatch::Stopwatch() : start_(now()), lap_(start_) {}
double Stopwatch::seconds() const {
  return now() - start_;
}
double Stopwatch::lap() {
  const double before = lap_;
  lap_ = now();
  return lap_ - before;
}

std::uint64_t machine_memory_bytes() {
  return static_cast<std::uint64_t>(sysconf(_SC_PHYS_PAGES)) *
         static_cast<std::uint64_t>(sysconf(_SC_PAGE_SIZE));
}

std::uint64_t device_memory_bytes(const Compute<float>& compute) {
  return compute.accelerator() ? compute.accelerator()->bytes : machine_memory_bytes();
}

// getrusage would count what the launcher held that has become this process.
std::size_t peak_resident_bytes() {
  std::ifstream file("/proc/self/status");
  for (std::string line; std::getline(file, line);)
    if (line.starts_with("VmHWM:")) return std::stoull(line.substr(6)) * 1024;
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<std::size_t>(usage.ru_maxrss) * 1024;
}

std::size_t resident_bytes() {
  std::ifstream file("/proc/self/statm");  // pages: total, resident, ...
  std::size_t total = 0, resident = 0;
  file >> total >> resident;
  return resident * static_cast<std::size_t>(sysconf(_SC_PAGE_SIZE));
}

}  // namespace rlhf
