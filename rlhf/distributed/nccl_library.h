#pragma once

#include <cstddef>
#include <string>

struct ncclComm;  // NCCL's own

// NCCL's C interface as far as it is used, so that neither its header nor the library is needed to build:
// names, numbers and layouts of nccl.h 2.14 and newer, which NCCL keeps.
namespace rlhf::nccl {

using Communicator = ::ncclComm*;
using Result = int;  // ncclResult_t
inline constexpr Result kSuccess = 0, kInProgress = 7;
inline constexpr int kUint8 = 1, kFloat32 = 7, kSum = 0;  // ncclDataType_t, ncclRedOp_t

struct UniqueId {
  char bytes[128] = {};
};
/// ncclConfig_t of 2.14; a newer library takes its own defaults for what came later.
struct Config {
  std::size_t size = sizeof(Config);
  unsigned magic = 0xcafebeef;
  unsigned version = 21400;
  int blocking = 0;  ///< calls return at once, and are asked for their end: so that there is a time limit
  int unused = 0;
};

/// The library's functions, opened at run time: linked, the program would not start without it.
struct Library {
  std::string problem;  ///< why it cannot be used; empty when it can
  std::string path;     ///< that was opened
  int version = 0;      ///< such as 22809 for 2.28.9

  Result (*get_unique_id)(UniqueId*) = nullptr;
  Result (*init_rank)(Communicator*, int ranks, UniqueId, int rank, Config*) = nullptr;
  Result (*get_async_error)(Communicator, Result*) = nullptr;
  Result (*abort)(Communicator) = nullptr;
  const char* (*error_string)(Result) = nullptr;
  const char* (*last_error)(Communicator) = nullptr;
  Result (*group_start)() = nullptr;
  Result (*group_end)() = nullptr;
  Result (*reduce_scatter)(const void*, void*, std::size_t, int type, int op, Communicator,
                           void* stream) = nullptr;
  Result (*reduce)(const void*, void*, std::size_t, int type, int op, int root, Communicator,
                   void* stream) = nullptr;
  Result (*all_gather)(const void*, void*, std::size_t, int type, Communicator, void* stream) = nullptr;
  Result (*broadcast)(const void*, void*, std::size_t, int type, int root, Communicator,
                      void* stream) = nullptr;

  /// "2.28.9".
  std::string version_text() const;
};

/// Opens `file`; empty: libnccl.so.2, where the loader looks or where the wheel nvidia-nccl puts it beside
/// the toolkit of the build. It stays open.
Library open_library(const std::string& file);

}  // namespace rlhf::nccl
