#pragma once

#include <barrier>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "rlhf/distributed/collective.h"

namespace rlhf {

/// Ranks as threads of this process, which sum parts of arrays in the order of the ranks; they do nothing
/// else together.
class ThreadRanks {
 public:
  explicit ThreadRanks(int world_size)
      : arrived_(world_size), values_(static_cast<std::size_t>(world_size)) {}

  /// Calls body(collective) on every rank, in a thread of its own.
  template <class Body>
  void run(const Body& body) {
    std::vector<std::thread> threads;
    for (int rank = 0; rank < world_size(); ++rank)
      threads.emplace_back([&, rank] {
        Rank collective(*this, rank);
        body(collective);
      });
    for (std::thread& thread : threads) thread.join();
  }

 private:
  class Rank : public Collective {
   public:
    Rank(ThreadRanks& all, int rank) : all_(all), rank_(rank) {}

    int rank() const override { return rank_; }
    int world_size() const override { return all_.world_size(); }
    void reduce_parts(std::span<float> values, const std::vector<Slice>& parts) override {
      all_.values_[static_cast<std::size_t>(rank_)] = values;
      all_.arrived_.arrive_and_wait();
      const Slice own = parts[static_cast<std::size_t>(rank_)];
      std::vector<float> sums(all_.values_[0].begin() + static_cast<std::ptrdiff_t>(own.begin),
                              all_.values_[0].begin() + static_cast<std::ptrdiff_t>(own.end));
      for (std::size_t r = 1; r < all_.values_.size(); ++r)
        for (std::size_t i = 0; i < sums.size(); ++i) sums[i] += all_.values_[r][own.begin + i];
      all_.arrived_.arrive_and_wait();
      std::copy(sums.begin(), sums.end(), values.begin() + static_cast<std::ptrdiff_t>(own.begin));
      all_.arrived_.arrive_and_wait();
    }
    void all_reduce(std::span<float>) override { unknown(); }
    void all_reduce(std::span<double>) override { unknown(); }
    void reduce_scatter(std::span<float>) override { unknown(); }
    void reduce_scatter(std::span<double>) override { unknown(); }
    void all_gather(std::span<float>) override { unknown(); }
    void all_gather(std::span<double>) override { unknown(); }
    std::vector<std::string> all_gather_bytes(const std::string&) override { unknown(); }
    void broadcast(std::span<std::byte>, int) override { unknown(); }
    void barrier() override { all_.arrived_.arrive_and_wait(); }
    void check_alive() override {}

   private:
    [[noreturn]] static void unknown() { fail<InternalError>("ThreadRanks sums parts alone"); }

    ThreadRanks& all_;
    int rank_;
  };

  int world_size() const { return static_cast<int>(values_.size()); }

  std::barrier<> arrived_;
  std::vector<std::span<float>> values_;
};

}  // namespace rlhf
