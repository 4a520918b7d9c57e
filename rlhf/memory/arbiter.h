#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace rlhf {

/// Who holds memory: an index into the arbiter's tenants, in order of registration.
using TenantId = std::size_t;

/// Asks a tenant to give back at least `wanted_bytes` by releasing or shrinking its leases; less is fine.
/// Called without locks, from the thread whose acquisition does not fit. It must not acquire memory itself.
using ReclaimCallback = std::function<void(std::uint64_t wanted_bytes)>;

/// Counters of one tenant.
struct TenantUsage {
  std::string name;
  std::uint64_t used_bytes = 0;
  std::uint64_t peak_bytes = 0;
  std::uint64_t reclaimed_bytes = 0;  ///< given back in answer to reclaim requests
  std::uint64_t num_reclaims = 0;     ///< requests that were answered so
  std::uint64_t num_denied = 0;       ///< acquisitions that did not fit
};

/// Counters of the whole budget.
struct MemoryUsage {
  std::uint64_t budget_bytes = 0;
  std::uint64_t used_bytes = 0;
  std::uint64_t peak_bytes = 0;
  std::vector<TenantUsage> tenants;
};

/// A reservation of bytes; given back when the object dies. Movable, not copyable. An empty lease holds 0
/// bytes. May outlive the arbiter.
class MemoryLease {
 public:
  MemoryLease() = default;
  MemoryLease(MemoryLease&& other) noexcept;
  MemoryLease& operator=(MemoryLease&& other) noexcept;
  ~MemoryLease() { release(); }

  std::uint64_t bytes() const { return bytes_; }
  /// Gives part of the bytes back. @throws InvalidArgument when `bytes` is above what the lease holds.
  void shrink_to(std::uint64_t bytes);
  void release() noexcept;
  /// Takes over the bytes of another lease of the same tenant, or of any when this one is empty.
  /// @throws InvalidArgument for one of another tenant or arbiter.
  void merge(MemoryLease&& other);

 private:
  friend class MemoryArbiter;
  struct State;
  MemoryLease(std::shared_ptr<State> state, TenantId tenant, std::uint64_t bytes);

  std::shared_ptr<State> state_;
  TenantId tenant_ = 0;
  std::uint64_t bytes_ = 0;
};

/// One memory budget, shared by tenants (weights, optimizer, KV blocks, activations ...). It counts bytes and
/// allocates none. Every function is thread-safe.
class MemoryArbiter {
 public:
  static constexpr std::uint64_t kUnlimited = std::numeric_limits<std::uint64_t>::max();

  /// @throws InvalidArgument for a budget of 0.
  explicit MemoryArbiter(std::uint64_t budget_bytes);

  /// Adds a tenant. Tenants with a callback are asked in order of registration when another tenant's
  /// acquisition does not fit. @throws InvalidArgument for an empty name or one that is taken.
  TenantId add_tenant(std::string name, ReclaimCallback reclaim = {});

  /// Reserves bytes, asking other tenants to give some back when needed.
  /// @throws MemoryError saying what was asked for and who holds what.
  MemoryLease acquire(TenantId tenant, std::uint64_t bytes);
  /// As acquire, but returns nothing when the bytes do not fit.
  std::optional<MemoryLease> try_acquire(TenantId tenant, std::uint64_t bytes);

  std::uint64_t budget_bytes() const;
  std::uint64_t available_bytes() const;
  MemoryUsage usage() const;
  /// Sets all peaks to what is used now, e.g. between stages.
  void reset_peaks();

 private:
  bool reserve(TenantId tenant, std::uint64_t bytes);
  bool reserve_with_reclaim(TenantId tenant, std::uint64_t bytes);

  std::shared_ptr<MemoryLease::State> state_;
};

/// Returns a table of the usage, one line a tenant, largest first.
std::string describe(const MemoryUsage& usage);

}  // namespace rlhf
