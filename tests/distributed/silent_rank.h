#pragma once

#include <string>
#include <vector>

#include "rlhf/distributed/collective.h"

namespace rlhf {

/// One of several ranks whose others never say anything: nothing is exchanged.
class SilentRank : public Collective {
 public:
  SilentRank(int rank, int world_size) : rank_(rank), world_size_(world_size) {}

  int rank() const override { return rank_; }
  int world_size() const override { return world_size_; }
  void all_reduce(std::span<float>) override {}
  void all_reduce(std::span<double>) override {}
  void reduce_scatter(std::span<float>) override {}
  void reduce_scatter(std::span<double>) override {}
  void reduce_parts(std::span<float>, const std::vector<Slice>&) override {}
  void all_gather(std::span<float>) override {}
  void all_gather(std::span<double>) override {}
  std::vector<std::string> all_gather_bytes(const std::string& own) override {
    return std::vector<std::string>(static_cast<std::size_t>(world_size_), own);
  }
  void broadcast(std::span<std::byte>, int) override {}
  void barrier() override {}
  void check_alive() override {}

 private:
  int rank_, world_size_;
};

}  // namespace rlhf
