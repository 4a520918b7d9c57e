#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "rlhf/core/error.h"

namespace rlhf {

/// Ranks that cannot work together any more: one ended, did not answer in time or never came.
class CollectiveError : public Error {
 public:
  using Error::Error;
};

/// The part [begin, end) of a flat buffer.
struct Slice {
  std::size_t begin = 0, end = 0;

  std::size_t size() const { return end - begin; }
  bool operator==(const Slice&) const = default;
  template <class T>
  std::span<T> of(std::span<T> all) const {
    return all.subspan(begin, size());
  }
};
/// How elements of a flat buffer are divided over ranks: `each` to every rank, in order, and what is left
/// over to the last one as well. Equal parts are what libraries for devices want; the rest is small.
struct Division {
  std::size_t each =
      0;  ///< a multiple of 64 where it is at least that, so that slices begin on wide accesses
  std::size_t rest = 0;  ///< fewer than 64 times the ranks
};
Division divide(std::size_t count, int world_size);
/// The slice of a rank when `count` elements are divided.
Slice slice_of(std::size_t count, int rank, int world_size);

/// What the processes of a run ("ranks", 0 .. world_size - 1) do together. Every rank calls the same
/// functions with buffers of the same size in the same order, from one thread; a call returns when this
/// rank's part is done. Sums are taken element by element in the order of the ranks, so that they are the
/// same bits on every rank and in every run, whatever arrived first.
/// @throws CollectiveError from every function; the collective cannot be used after that.
class Collective {
 public:
  virtual ~Collective() = default;

  virtual int rank() const = 0;
  virtual int world_size() const = 0;
  /// The rank that writes and reports.
  bool is_first() const { return rank() == 0; }

  /// Replaces the values by their sum over all ranks.
  virtual void all_reduce(std::span<float> values) = 0;
  virtual void all_reduce(std::span<double> values) = 0;
  /// Replaces this rank's slice (slice_of) by its sum over all ranks; the rest stays.
  virtual void reduce_scatter(std::span<float> values) = 0;
  virtual void reduce_scatter(std::span<double> values) = 0;
  /// Replaces parts[rank] by its sum over all ranks; the rest stays. Every rank gives the same parts, one for
  /// each rank, which do not overlap and may be empty.
  virtual void reduce_parts(std::span<float> values, const std::vector<Slice>& parts) = 0;
  /// Replaces every other rank's slice by what that rank has there.
  virtual void all_gather(std::span<float> values) = 0;
  virtual void all_gather(std::span<double> values) = 0;
  /// Returns what each rank gave; lengths may differ.
  virtual std::vector<std::string> all_gather_bytes(const std::string& own) = 0;
  /// Replaces the bytes by those of `root`.
  virtual void broadcast(std::span<std::byte> bytes, int root) = 0;
  template <class T>
  void broadcast(std::span<T> values, int root) {
    broadcast(std::as_writable_bytes(values), root);
  }
  /// Returns when all ranks have called it.
  virtual void barrier() = 0;
  /// Throws when it is known that a rank has ended; waits for nothing and may be called by one rank alone.
  virtual void check_alive() = 0;
};

/// A run of one process: nothing is exchanged. Has no state, may be shared by everything.
Collective& one_process();
std::unique_ptr<Collective> make_one_process();

/// Whether any rank says so.
bool any_rank(Collective& collective, bool own);
/// What rank 0 says.
bool first_rank_says(Collective& collective, bool own);

/// The slices of a buffer of `count` elements, in order. Rank 0 gets all of them, in `storage` unless it is
/// the only one; what the others get is empty.
std::span<const float> gather_slices(Collective& collective, std::span<float> own, std::size_t count,
                                     std::vector<float>& storage);
/// Gives each rank its slice of what rank 0 has in `all`, which is empty on the others.
void scatter_slices(Collective& collective, std::span<const float> all, std::span<float> own,
                    std::size_t count);
/// The same on all processes of one machine, also in containers of it, and different elsewhere.
std::string machine_id();
/// Ranks that run on the machine of this one, itself included.
int ranks_on_this_machine(Collective& collective);

}  // namespace rlhf
