// Stands in for libnccl.so.2 in tests: the same functions for arrays in the memory of processes, which give
// each other their numbers as files. Calls do not block, as NCCL's with `blocking = 0`: whoever asks for the
// state drives them. It is strict about what NCCL demands: types, the configuration, one call at a time.
//
// Environment:
// - NCCL_DOUBLE_FOLDER: where the files go; a rank that aborts leaves "aborted.RANK" there
// - NCCL_DOUBLE_FAULT: "FUNCTION RESULT RANK": that rank's call of it returns RESULT, or never comes about
// (0)
// - NCCL_DOUBLE_VERSION: what ncclGetVersion says
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#include "rlhf/distributed/nccl_library.h"

using namespace rlhf::nccl;

namespace {

constexpr Result kSystemError = 2, kInvalidArgument = 4, kInvalidUsage = 5;

std::string variable(const char* name) {
  const char* const value = std::getenv(name);
  return value ? value : "";
}

// One call of a rank: what it gives, and what it does with all ranks' gifts.
struct Call {
  std::string gift;
  std::function<void(const std::vector<std::string>&)> finish;
};

int group_depth = 0;
std::string last_error;

}  // namespace

struct ncclComm {
  int rank = 0, ranks = 0, sequence = 0;
  std::string id;
  std::vector<Call> queued, pending;

  std::filesystem::path file(int call, int of_rank) const {
    return std::filesystem::path(variable("NCCL_DOUBLE_FOLDER")) /
           (id + "." + std::to_string(call) + "." + std::to_string(of_rank));
  }
  void publish() {
    for (std::size_t i = 0; i < queued.size(); ++i) {
      const auto name = file(sequence + static_cast<int>(i), rank);
      std::ofstream(name.string() + ".part", std::ios::binary) << queued[i].gift;
      std::filesystem::rename(name.string() + ".part", name);
    }
    pending = std::move(queued);
    queued.clear();
  }
  // Whether everything has come about.
  bool advance() {
    while (!pending.empty()) {
      std::vector<std::string> gifts;
      for (int r = 0; r < ranks; ++r) {
        std::ifstream in(file(sequence, r), std::ios::binary);
        if (!in) return false;
        gifts.emplace_back(std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>());
      }
      pending.front().finish(gifts);
      pending.erase(pending.begin());
      ++sequence;
    }
    return true;
  }
};

namespace {

ncclComm* grouped = nullptr;  // communicator of the calls of an open group

// What a fault makes of a call: -1 = nothing.
Result fault_of(const char* function, int rank) {
  std::istringstream words(variable("NCCL_DOUBLE_FAULT"));
  std::string name;
  Result result = 0;
  int whose = -1;
  if (!(words >> name >> result >> whose) || name != function || whose != rank) return -1;
  last_error = std::string("the double was told to fail in ") + function;
  return result;
}

Result queue(ncclComm* comm, const char* function, Call call) {
  if (!comm->pending.empty()) return kInvalidUsage;
  const Result fault = fault_of(function, comm->rank);
  if (fault > 0) return fault;
  if (fault == 0) comm->id += "-lost";  // its gift comes where nobody looks
  comm->queued.push_back(std::move(call));
  if (group_depth > 0)
    grouped = comm;
  else
    comm->publish();
  return group_depth > 0 ? kSuccess : kInProgress;
}

std::string bytes_of(const void* values, std::size_t bytes) {
  return {static_cast<const char*>(values), bytes};
}
void add(float* sums, const std::string& gift, std::size_t from, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    float value = 0;
    std::memcpy(&value, gift.data() + (from + i) * sizeof(float), sizeof value);
    sums[i] += value;
  }
}
// In the order of the ranks.
void sum(float* to, const std::vector<std::string>& gifts, std::size_t from, std::size_t count) {
  std::memcpy(to, gifts[0].data() + from * sizeof(float), count * sizeof(float));
  for (std::size_t r = 1; r < gifts.size(); ++r) add(to, gifts[r], from, count);
}

}  // namespace

extern "C" {

Result ncclGetVersion(int* version) {
  const std::string text = variable("NCCL_DOUBLE_VERSION");
  *version = text.empty() ? 22809 : std::stoi(text);
  return kSuccess;
}

Result ncclGetUniqueId(UniqueId* id) {
  std::snprintf(id->bytes, sizeof id->bytes, "double-%d", getpid());
  return kSuccess;
}

Result ncclCommInitRankConfig(Communicator* out, int ranks, UniqueId id, int rank, Config* config) {
  if (config->magic != 0xcafebeef || config->version < 21400 || config->blocking != 0 ||
      config->size < offsetof(Config, unused) || rank < 0 || rank >= ranks)
    return kInvalidArgument;
  auto* const comm = new ncclComm{rank, ranks, 0, id.bytes, {}, {}};
  *out = comm;
  return queue(comm, "ncclCommInitRankConfig", {"", [](const auto&) {}});
}

Result ncclCommGetAsyncError(Communicator comm, Result* state) {
  *state = comm->advance() ? kSuccess : kInProgress;
  return kSuccess;
}

Result ncclCommAbort(Communicator comm) {
  const auto folder = std::filesystem::path(variable("NCCL_DOUBLE_FOLDER"));
  std::ofstream(folder / ("aborted." + std::to_string(comm->rank))) << "aborted";
  delete comm;
  return kSuccess;
}

const char* ncclGetErrorString(Result result) {
  return result == kSystemError ? "unhandled system error" : "another error";
}
const char* ncclGetLastError(Communicator) {
  return last_error.c_str();
}

Result ncclGroupStart() {
  ++group_depth;
  return kSuccess;
}
Result ncclGroupEnd() {
  if (group_depth == 0) return kInvalidUsage;
  if (--group_depth > 0 || !grouped) return kSuccess;
  grouped->publish();
  grouped = nullptr;
  return kInProgress;
}

Result ncclReduceScatter(const void* send, void* receive, std::size_t count, int type, int op,
                         Communicator comm, void*) {
  if (type != kFloat32 || op != kSum) return kInvalidArgument;
  const std::size_t own = static_cast<std::size_t>(comm->rank) * count;
  return queue(comm, "ncclReduceScatter",
               {bytes_of(send, count * static_cast<std::size_t>(comm->ranks) * sizeof(float)),
                [=](const auto& gifts) { sum(static_cast<float*>(receive), gifts, own, count); }});
}

Result ncclReduce(const void* send, void* receive, std::size_t count, int type, int op, int root,
                  Communicator comm, void*) {
  if (type != kFloat32 || op != kSum) return kInvalidArgument;
  const bool is_root = comm->rank == root;
  return queue(comm, "ncclReduce", {bytes_of(send, count * sizeof(float)), [=](const auto& gifts) {
                                      if (is_root) sum(static_cast<float*>(receive), gifts, 0, count);
                                    }});
}

Result ncclAllGather(const void* send, void* receive, std::size_t count, int type, Communicator comm, void*) {
  if (type != kUint8) return kInvalidArgument;
  return queue(comm, "ncclAllGather", {bytes_of(send, count), [=](const auto& gifts) {
                                         auto* to = static_cast<char*>(receive);
                                         for (const std::string& gift : gifts) {
                                           std::memcpy(to, gift.data(), gift.size());
                                           to += gift.size();
                                         }
                                       }});
}

Result ncclBroadcast(const void* send, void* receive, std::size_t count, int type, int root,
                     Communicator comm, void*) {
  if (type != kUint8) return kInvalidArgument;
  const bool is_root = comm->rank == root;
  return queue(comm, "ncclBroadcast",
               {is_root ? bytes_of(send, count) : std::string(), [=](const auto& gifts) {
                  const std::string& gift = gifts[static_cast<std::size_t>(root)];
                  std::memcpy(receive, gift.data(), gift.size());
                }});
}

}  // extern "C"
