#include "rlhf/distributed/collective.h"

#include <algorithm>

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
  void all_gather(std::span<float>) override {}
  void all_gather(std::span<double>) override {}
  std::vector<std::string> all_gather_bytes(const std::string& own) override { return {own}; }
  void broadcast(std::span<std::byte>, int) override {}
  void barrier() override {}
};

}  // namespace

Slice slice_of(std::size_t count, int rank, int world_size) {
  RLHF_CHECK(world_size > 0 && rank >= 0 && rank < world_size, "slice_of: rank ", rank, " of ", world_size);
  const auto r = static_cast<std::size_t>(rank), ranks = static_cast<std::size_t>(world_size);
  const std::size_t each = count / ranks, more = count % ranks;
  const std::size_t begin = r * each + std::min(r, more);
  return {begin, begin + each + (r < more)};
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

}  // namespace rlhf
