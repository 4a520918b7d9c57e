#include "rlhf/distributed/collective.h"

#include <algorithm>
#include <fstream>

namespace rlhf {
namespace {

class OneProcess : public Collective {
 public:
  int rank() const override { return 0; }
  int world_size() const override { return 1; }
  void all_reduce(std::span<float>) override {}
  void all_reduce(std::span<double>) override {}
  void reduce_scatter(std::span<float>) override {}
  void reduce_scatter(std::span<double>) override {}
  void reduce_parts(std::span<float>, const std::vector<Slice>&) override {}
  void all_gather(std::span<float>) override {}
  void all_gather(std::span<double>) override {}
  std::vector<std::string> all_gather_bytes(const std::string& own) override { return {own}; }
  void broadcast(std::span<std::byte>, int) override {}
  void barrier() override {}
  void check_alive() override {}
};

}  // namespace

Division divide(std::size_t count, int world_size) {
  RLHF_CHECK(world_size > 0, "divide: by ", world_size, " ranks");
  constexpr std::size_t kUnit = 64;
  const auto ranks = static_cast<std::size_t>(world_size);
  Division division{count / ranks, 0};
  if (division.each >= kUnit) division.each -= division.each % kUnit;
  division.rest = count - ranks * division.each;
  return division;
}

Slice slice_of(std::size_t count, int rank, int world_size) {
  RLHF_CHECK(world_size > 0 && rank >= 0 && rank < world_size, "slice_of: rank ", rank, " of ", world_size);
  const Division division = divide(count, world_size);
  const std::size_t begin = static_cast<std::size_t>(rank) * division.each;
  return {begin, begin + division.each + (rank == world_size - 1 ? division.rest : 0)};
}

Collective& one_process() {
  static OneProcess alone;
  return alone;
}

std::unique_ptr<Collective> make_one_process() {
  return std::make_unique<OneProcess>();
}

bool any_rank(Collective& collective, bool own) {
  double count = own;
  collective.all_reduce({&count, 1});
  return count > 0;
}

bool first_rank_says(Collective& collective, bool own) {
  std::byte said{own};
  collective.broadcast(std::span(&said, 1), 0);
  return said != std::byte{0};
}

// Slice by slice, so that the other ranks hold no more than one.
std::span<const float> gather_slices(Collective& collective, std::span<float> own, std::size_t count,
                                     std::vector<float>& storage) {
  if (collective.world_size() == 1) return own;
  const bool first = collective.is_first();
  if (first) storage.resize(count);
  std::vector<float> passing;
  for (int r = 0; r < collective.world_size(); ++r) {
    const Slice slice = slice_of(count, r, collective.world_size());
    std::span<float> place = first ? slice.of(std::span(storage)) : std::span<float>();
    if (r == collective.rank()) {
      if (first) std::ranges::copy(own, place.begin());
      place = own;
    } else if (!first) {
      passing.resize(slice.size());
      place = passing;
    }
    if (r > 0) collective.broadcast(place, r);
  }
  return storage;
}

void scatter_slices(Collective& collective, std::span<const float> all, std::span<float> own,
                    std::size_t count) {
  std::vector<float> passing;
  for (int r = 0; r < collective.world_size(); ++r) {
    const Slice slice = slice_of(count, r, collective.world_size());
    passing.resize(slice.size());
    if (collective.is_first()) std::ranges::copy(slice.of(all), passing.begin());
    if (r > 0) collective.broadcast(std::span(passing), 0);
    if (r == collective.rank()) std::ranges::copy(passing, own.begin());
  }
}

std::string machine_id() {
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string id;
  std::getline(file, id);
  return id;
}

int ranks_on_this_machine(Collective& collective) {
  const std::string id = machine_id();
  const auto ids = collective.all_gather_bytes(id);
  return static_cast<int>(std::ranges::count(ids, id));
}

}  // namespace rlhf
