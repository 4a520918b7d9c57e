#include "rlhf/distributed/nccl_library.h"

#include <dlfcn.h>

#include <type_traits>
#include <vector>

#include "rlhf/core/error.h"

namespace rlhf::nccl {
namespace {

constexpr int kOldest = 21400;  // the first with calls that do not block

std::vector<std::string> candidates(const std::string& file) {
  if (!file.empty()) return {file};
  const std::string name = "libnccl.so.2", toolkit = RLHF_CUDA_LIBRARIES;
  if (toolkit.empty()) return {name};
  // A toolkit of wheels is site-packages/nvidia/cu13/lib.
  return {name, toolkit + "/" + name, toolkit + "/../../nccl/lib/" + name};
}

}  // namespace

std::string Library::version_text() const {
  return concat(version / 10000, ".", version / 100 % 100, ".", version % 100);
}

Library open_library(const std::string& file) {
  Library library;
  void* handle = nullptr;
  for (const std::string& candidate : candidates(file)) {
    library.path = candidate;
    handle = dlopen(candidate.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle) break;
    const char* const reason = dlerror();
    library.problem += concat(library.problem.empty() ? "" : "; ", reason ? reason : candidate);
  }
  if (!handle) return library;
  library.problem.clear();
  const auto load = [&](auto& function, const char* symbol) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(handle, symbol));
    if (!function) library.problem = concat(library.path, " has no ", symbol);
  };
  Result (*get_version)(int*) = nullptr;
  load(get_version, "ncclGetVersion");
  load(library.get_unique_id, "ncclGetUniqueId");
  load(library.init_rank, "ncclCommInitRankConfig");
  load(library.get_async_error, "ncclCommGetAsyncError");
  load(library.abort, "ncclCommAbort");
  load(library.error_string, "ncclGetErrorString");
  load(library.last_error, "ncclGetLastError");
  load(library.group_start, "ncclGroupStart");
  load(library.group_end, "ncclGroupEnd");
  load(library.reduce_scatter, "ncclReduceScatter");
  load(library.reduce, "ncclReduce");
  load(library.all_gather, "ncclAllGather");
  load(library.broadcast, "ncclBroadcast");
  if (!library.problem.empty()) return library;
  if (const Result result = get_version(&library.version); result != kSuccess)
    library.problem = concat(library.path, ": ncclGetVersion: ", library.error_string(result));
  else if (library.version < kOldest)
    library.problem = concat(library.path, " is NCCL ", library.version_text(), ", expected 2.14 or newer");
  return library;
}

}  // namespace rlhf::nccl
