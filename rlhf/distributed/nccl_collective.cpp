// Sums over ranks on GPUs by NCCL. Its calls are used in the way that does not block: each returns at once
// and is then asked, within a time limit, whether it has come about, and so is the queue. What fails or takes
// too long is aborted, which ends NCCL's kernels that wait for other ranks.
//
// Slices are `each` elements to every rank and a small rest to the last one. NCCL's reduce-scatter and
// all-gather take the equal parts in place, a reduce and a broadcast in the same group the rest: nothing is
// padded or copied.
#include <thread>

#include "rlhf/distributed/device_collective.h"
#include "rlhf/distributed/nccl_library.h"

namespace rlhf {
namespace {

using SteadyClock = std::chrono::steady_clock;

class NcclCollective : public DeviceCollective {
 public:
  NcclCollective(const nccl::Library& library, Collective& collective, DeviceMemory& memory,
                 const DeviceCollectiveOptions& options)
      : nccl_(library),
        collective_(collective),
        memory_(memory),
        options_(options),
        rank_(collective.rank()),
        ranks_(collective.world_size()),
        text_(concat("NCCL ", library.version_text())) {
    memory.synchronize();  // makes this thread's current device the one that NCCL is to take
    nccl::UniqueId id;
    if (collective.is_first()) check(nccl_.get_unique_id(&id), "asking for an id");
    collective.broadcast(std::as_writable_bytes(std::span(id.bytes)), 0);
    nccl::Config config;
    check(nccl_.init_rank(&communicator_, ranks_, id, rank_, &config), "connecting the GPUs");
    settle("connecting the GPUs");
  }

  // Not ncclCommDestroy: that waits for the other ranks of this machine, which may have failed. Whoever used
  // this has waited for what was queued.
  ~NcclCollective() override { abort(); }

  const std::string& text() const override { return text_; }
  Collective& host() const override { return collective_; }

  void reduce_scatter(float* values, std::size_t count) override {
    const Division division = divide(count, ranks_);
    float* const rest = values + static_cast<std::size_t>(ranks_) * division.each;
    group("summing gradients", [&] {
      nccl::Result result = nccl::kSuccess;
      if (division.each > 0)
        result =
            nccl_.reduce_scatter(values, values + static_cast<std::size_t>(rank_) * division.each,
                                 division.each, nccl::kFloat32, nccl::kSum, communicator_, memory_.queue());
      if (is_good(result) && division.rest > 0)
        result = nccl_.reduce(rest, rest, division.rest, nccl::kFloat32, nccl::kSum, ranks_ - 1,
                              communicator_, memory_.queue());
      return result;
    });
  }

  void reduce_parts(float* values, const std::vector<Slice>& parts) override {
    group("summing gradients", [&] {
      nccl::Result result = nccl::kSuccess;
      for (int root = 0; root < ranks_ && is_good(result); ++root) {
        const Slice& part = parts[static_cast<std::size_t>(root)];
        if (part.size() > 0)
          result = nccl_.reduce(values + part.begin, values + part.begin, part.size(), nccl::kFloat32,
                                nccl::kSum, root, communicator_, memory_.queue());
      }
      return result;
    });
  }

  void all_gather(void* values, std::size_t count, std::size_t element_bytes) override {
    const Division division = divide(count, ranks_);
    const std::size_t each = division.each * element_bytes, rest = division.rest * element_bytes;
    char* const bytes = static_cast<char*>(values);
    char* const behind = bytes + static_cast<std::size_t>(ranks_) * each;
    group("gathering weights", [&] {
      nccl::Result result = nccl::kSuccess;
      if (each > 0)
        result = nccl_.all_gather(bytes + static_cast<std::size_t>(rank_) * each, bytes, each, nccl::kUint8,
                                  communicator_, memory_.queue());
      if (is_good(result) && rest > 0)
        result =
            nccl_.broadcast(behind, behind, rest, nccl::kUint8, ranks_ - 1, communicator_, memory_.queue());
      return result;
    });
  }

  void wait() override {
    settle("waiting for the GPUs");
    const SteadyClock::time_point start = SteadyClock::now();
    while (!options_.is_done(memory_.queue())) {
      look("waiting for the GPUs");
      pause("waiting for the GPUs", start);
    }
  }

 private:
  // Calls that are queued as one. A group that was begun is ended, also when a call in it fails.
  template <class Fn>
  void group(const char* what, const Fn& queue_calls) {
    require_usable();
    check(nccl_.group_start(), what);
    const nccl::Result queued = queue_calls(), ended = nccl_.group_end();
    check(queued, what);
    check(ended, what);
    settle(what);
  }

  void require_usable() const {
    if (!communicator_) fail<CollectiveError>(who(), ": the GPUs' connection was ended by an earlier error");
  }
  static bool is_good(nccl::Result result) { return result == nccl::kSuccess || result == nccl::kInProgress; }
  void check(nccl::Result result, const char* what) {
    if (!is_good(result)) lost(what, result);
  }
  // Whether the last call has come about.
  bool look(const char* what) {
    nccl::Result state = nccl::kSuccess;
    check(nccl_.get_async_error(communicator_, &state), what);
    check(state, what);
    return state == nccl::kSuccess;
  }
  void settle(const char* what) {
    require_usable();
    const SteadyClock::time_point start = SteadyClock::now();
    while (!look(what)) pause(what, start);
  }
  // A step's sums take milliseconds; at first the next look comes at once.
  void pause(const char* what, SteadyClock::time_point start) {
    const auto passed = SteadyClock::now() - start;
    if (passed > options_.timeout) {
      abort();
      fail<CollectiveError>(who(), ": NCCL, ", what, ": other ranks have ended or did not answer within ",
                            std::chrono::duration<double>(options_.timeout).count(), " s");
    }
    if (passed < std::chrono::microseconds(200)) return std::this_thread::yield();
    std::this_thread::sleep_for(std::chrono::microseconds(20));
    if (SteadyClock::now() - last_check_ > std::chrono::seconds(1)) check_alive();
  }
  // NCCL does not notice a rank of this machine that is killed; the host's connection to it does.
  void check_alive() {
    last_check_ = SteadyClock::now();
    try {
      collective_.check_alive();
    } catch (const CollectiveError&) {
      abort();
      throw;
    }
  }

  [[noreturn]] void lost(const char* what, nccl::Result result) {
    const char* const last = nccl_.last_error(communicator_);
    const std::string text = concat(nccl_.error_string(result), " (result ", result, ")",
                                    last && *last ? concat(": ", last) : std::string());
    abort();
    fail<CollectiveError>(who(), ": NCCL, ", what, ": ", text);
  }
  void abort() {
    if (communicator_) nccl_.abort(communicator_);
    communicator_ = nullptr;
  }
  std::string who() const { return concat("rank ", rank_, " of ", ranks_); }

  nccl::Library nccl_;
  Collective& collective_;
  DeviceMemory& memory_;
  DeviceCollectiveOptions options_;
  int rank_, ranks_;
  std::string text_;
  nccl::Communicator communicator_ = nullptr;
  SteadyClock::time_point last_check_ = SteadyClock::now();
};

// Why NCCL does not connect these ranks; empty when it does. The same on every rank.
std::string nccl_problem(Collective& collective, const nccl::Library& library) {
  const auto all = collective.all_gather_bytes(concat(library.version, " ", library.problem));
  for (std::size_t r = 0; r < all.size(); ++r) {
    const std::size_t space = all[r].find(' ');
    if (space + 1 < all[r].size()) return concat("rank ", r, ": ", all[r].substr(space + 1));
    if (all[r] != all[0])
      return concat("rank ", r, " has NCCL ", all[r], "and rank 0 has ", all[0], "(as 22809 for 2.28.9)");
  }
  return "";
}

}  // namespace

std::unique_ptr<DeviceCollective> make_device_collective(Collective& collective, DeviceMemory& memory,
                                                         const DeviceCollectiveOptions& options) {
  if (!options.is_done) return make_staged_collective(collective, memory, "no NCCL for this device");
  const nccl::Library library = nccl::open_library(options.nccl_library);
  if (const std::string problem = nccl_problem(collective, library); !problem.empty())
    return make_staged_collective(collective, memory, "NCCL is not used: " + problem);
  return std::make_unique<NcclCollective>(library, collective, memory, options);
}

}  // namespace rlhf
