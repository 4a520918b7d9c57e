// Arrays in devices' memories over several processes: through the host, and over NCCL's functions, for which
// a double stands in (nccl_double.cpp).
#include "rlhf/distributed/device_collective.h"

#include "rlhf/distributed/gloo_collective.h"
#include "rlhf/distributed/nccl_library.h"
#include "tests/distributed/exchanged.h"
#include "tests/distributed/processes.h"

// Where NCCL's header is at hand, our declarations are held against it.
#if __has_include(<nccl.h>) && __has_include(<cuda_runtime.h>)
#include <nccl.h>
static_assert(sizeof(rlhf::nccl::UniqueId) == sizeof(ncclUniqueId));
static_assert(rlhf::nccl::kSuccess == ncclSuccess && rlhf::nccl::kInProgress == ncclInProgress);
static_assert(rlhf::nccl::kUint8 == static_cast<int>(ncclUint8) &&
              rlhf::nccl::kFloat32 == static_cast<int>(ncclFloat32) &&
              rlhf::nccl::kSum == static_cast<int>(ncclSum));
static_assert(offsetof(rlhf::nccl::Config, magic) == offsetof(ncclConfig_t, magic) &&
              offsetof(rlhf::nccl::Config, version) == offsetof(ncclConfig_t, version) &&
              offsetof(rlhf::nccl::Config, blocking) == offsetof(ncclConfig_t, blocking));
#endif

using namespace rlhf;

namespace {

using Words = std::vector<std::string>;

bool is_without_gloo() {
  if (!has_gloo()) WARN("skipped: built without Gloo");
  return !has_gloo();
}

// A rank with the double in the place of NCCL; `more` = further variables.
Words command(const TemporaryFolder& folder, const std::string& scenario, int timeout_ms,
              const Words& more = {}) {
  Words words = {"/usr/bin/env", std::string("RLHF_NCCL_LIBRARY=") + RLHF_NCCL_DOUBLE,
                 "NCCL_DOUBLE_FOLDER=" + folder.path().string()};
  words.insert(words.end(), more.begin(), more.end());
  for (const auto& word : {std::string(RLHF_RANK_PROGRAM), scenario, std::to_string(timeout_ms)})
    words.push_back(word);
  return words;
}

// Of every count: this rank's slice of the sums in the order of the ranks, its part of the same where parts
// are uneven, then all slices, of two types.
std::string expected_of(int rank, int ranks) {
  std::string out;
  const auto append = [&](auto value) { out.append(reinterpret_cast<const char*>(&value), sizeof value); };
  for (const std::size_t count : kCounts) {
    std::vector<std::vector<float>> all;
    for (int r = 0; r < ranks; ++r) all.push_back(values_of<float>(r, count));
    const auto append_sums = [&](std::size_t begin, std::size_t end) {
      for (std::size_t i = begin; i < end; ++i) {
        float sum = all[0][i];
        for (std::size_t r = 1; r < all.size(); ++r) sum += all[r][i];
        append(sum);
      }
    };
    append_sums(begin_of(count, rank, ranks), begin_of(count, rank + 1, ranks));
    const std::size_t few = std::min(count, kUnevenCount);
    append_sums(uneven_begin_of(few, rank, ranks), uneven_begin_of(few, rank + 1, ranks));
    for (int r = 0; r < ranks; ++r)
      for (std::size_t i = begin_of(count, r, ranks); i < begin_of(count, r + 1, ranks); ++i)
        append(all[static_cast<std::size_t>(r)][i]);
    for (int r = 0; r < ranks; ++r) {
      const auto halves = halves_of(r, count);
      for (std::size_t i = begin_of(count, r, ranks); i < begin_of(count, r + 1, ranks); ++i)
        append(halves[i]);
    }
  }
  return out;
}

void check_exchange(const std::string& scenario, const Words& more, const std::string& text) {
  for (const int ranks : {2, 3, 4}) {
    const TemporaryFolder folder;
    auto processes = start_ranks(folder, command(folder, scenario, 20000, more), ranks);
    for (int r = 0; r < ranks; ++r) {
      Process& process = processes[static_cast<std::size_t>(r)];
      CHECK(process.wait() == 0);
      INFO("rank " << r << " of " << ranks << ": " << process.err());
      CHECK_THAT(process.err(), ContainsSubstring(text));
      const bool equal = process.out() == expected_of(r, ranks);
      CHECK(equal);
    }
  }
}

// All but the last of three ranks end with this error, and have told the library to give up.
void check_failure(const std::string& scenario, const Words& more, const std::string& text) {
  INFO(scenario);
  const TemporaryFolder folder;
  auto processes = start_ranks(folder, command(folder, scenario, 700, more), 3);
  for (int r = 0; r < 2; ++r) {
    Process& process = processes[static_cast<std::size_t>(r)];
    CHECK(process.wait(20) == 1);
    CHECK_THAT(process.err(), ContainsSubstring("rank " + std::to_string(r) + " of 3: NCCL, " + text));
    CHECK(std::filesystem::exists(folder.path() / ("aborted." + std::to_string(r))));
  }
}

}  // namespace

TEST_CASE("ranks sum and gather arrays of devices through the host's memory, bit for bit") {
  if (is_without_gloo()) return;
  check_exchange("staged", {}, "through the host's memory (a test)");
}

TEST_CASE("ranks sum and gather arrays of devices over NCCL, bit for bit") {
  if (is_without_gloo()) return;
  check_exchange("devices", {}, "NCCL 2.28.9");
}

TEST_CASE("without NCCL on every rank arrays go through the host, and the reason is told") {
  if (is_without_gloo()) return;
  check_exchange("devices", {"RLHF_NCCL_LIBRARY=/nowhere/libnccl.so.2"},
                 "NCCL is not used: rank 0: /nowhere");
  const TemporaryFolder folder;
  const int port = free_port();
  std::vector<Process> processes;
  for (int r = 0; r < 2; ++r)
    processes.emplace_back(
        folder, "rank" + std::to_string(r),
        command(folder, "devices", 20000, {"NCCL_DOUBLE_VERSION=" + std::to_string(22809 + r)}),
        rank_variables(r, 2, port));
  for (Process& process : processes) {
    CHECK(process.wait() == 0);
    CHECK_THAT(process.err(), ContainsSubstring("rank 1 has NCCL 22810 and rank 0 has 22809"));
  }
}

TEST_CASE("an error of NCCL ends a rank with its text") {
  if (is_without_gloo()) return;
  for (const auto& [function, what] :
       {std::pair{"ncclReduceScatter", "summing gradients"}, std::pair{"ncclReduce", "summing gradients"},
        std::pair{"ncclAllGather", "gathering weights"}, std::pair{"ncclBroadcast", "gathering weights"},
        std::pair{"ncclCommInitRankConfig", "connecting the GPUs"}}) {
    const TemporaryFolder folder;
    auto processes = start_ranks(
        folder, command(folder, "devices", 700, {std::string("NCCL_DOUBLE_FAULT=") + function + " 2 0"}), 2);
    CHECK(processes[0].wait(20) == 1);
    CHECK_THAT(
        processes[0].err(),
        ContainsSubstring(std::string("rank 0 of 2: NCCL, ") + what +
                          ": unhandled system error (result 2): the double was told to fail in " + function));
    CHECK(std::filesystem::exists(folder.path() / "aborted.0"));
    CHECK(processes[1].wait(20) == 1);
  }
}

TEST_CASE("a rank that does not come, or a queue that does not end, is an error after the time-out") {
  if (is_without_gloo()) return;
  const std::string late = ": other ranks have ended or did not answer within 0.7 s";
  check_failure("devices_absent", {}, "summing gradients" + late);
  check_failure("devices_stuck", {}, "waiting for the GPUs" + late);
  check_failure("devices", {"NCCL_DOUBLE_FAULT=ncclCommInitRankConfig 0 2"}, "connecting the GPUs" + late);
  check_failure("devices", {"NCCL_DOUBLE_FAULT=ncclAllGather 0 2"}, "gathering weights" + late);
}

TEST_CASE("a rank that is killed ends the others") {
  if (is_without_gloo()) return;
  const TemporaryFolder folder;
  // Long: the host's connections tell it before any time limit.
  auto processes = start_ranks(folder, command(folder, "devices_repeat", 120000), 3);
  for (Process& process : processes)
    for (int i = 0; i < 4000 && process.err().find("begun") == std::string::npos; ++i)
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
  processes[1].signal(SIGKILL);
  for (const std::size_t r : {0u, 2u}) {
    CHECK(processes[r].wait(20) == 1);
    CHECK_THAT(processes[r].err(), ContainsSubstring("rank " + std::to_string(r) + " of 3 lost rank "));
    CHECK(std::filesystem::exists(folder.path() / ("aborted." + std::to_string(r))));
  }
}

TEST_CASE("a library that is not NCCL, or too old, is not used") {
  CHECK(nccl::open_library(RLHF_NCCL_DOUBLE).problem.empty());
  CHECK(nccl::open_library(RLHF_NCCL_DOUBLE).version_text() == "2.28.9");
  CHECK_THAT(nccl::open_library("libm.so.6").problem, ContainsSubstring("libm.so.6 has no nccl"));
  CHECK_THAT(nccl::open_library("/nowhere.so").problem, ContainsSubstring("/nowhere.so"));
  setenv("NCCL_DOUBLE_VERSION", "21304", 1);
  CHECK_THAT(nccl::open_library(RLHF_NCCL_DOUBLE).problem,
             ContainsSubstring("is NCCL 2.13.4, expected 2.14 or newer"));
  unsetenv("NCCL_DOUBLE_VERSION");
}
