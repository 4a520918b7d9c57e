#include "rlhf/memory/arbiter.h"

#include <algorithm>
#include <iomanip>
#include <mutex>
#include <sstream>
#include <utility>

#include "rlhf/core/error.h"

namespace rlhf {

struct MemoryLease::State {
  mutable std::mutex mutex;
  MemoryUsage usage;                        // guarded by mutex
  std::vector<ReclaimCallback> reclaimers;  // guarded by mutex

  void give_back(TenantId tenant, std::uint64_t bytes) noexcept {
    const std::lock_guard lock(mutex);
    usage.used_bytes -= bytes;
    usage.tenants[tenant].used_bytes -= bytes;
  }
};

MemoryLease::MemoryLease(std::shared_ptr<State> state, TenantId tenant, std::uint64_t bytes)
    : state_(std::move(state)), tenant_(tenant), bytes_(bytes) {}

MemoryLease::MemoryLease(MemoryLease&& other) noexcept
    : state_(std::move(other.state_)), tenant_(other.tenant_), bytes_(std::exchange(other.bytes_, 0)) {}

MemoryLease& MemoryLease::operator=(MemoryLease&& other) noexcept {
  if (this == &other) return *this;
  release();
  state_ = std::move(other.state_);
  tenant_ = other.tenant_;
  bytes_ = std::exchange(other.bytes_, 0);
  return *this;
}

void MemoryLease::shrink_to(std::uint64_t bytes) {
  RLHF_CHECK(bytes <= bytes_, "memory lease: cannot shrink ", bytes_, " bytes to ", bytes);
  if (state_) state_->give_back(tenant_, bytes_ - bytes);
  bytes_ = bytes;
}

void MemoryLease::release() noexcept {
  if (state_) state_->give_back(tenant_, bytes_);
  state_.reset();
  bytes_ = 0;
}

void MemoryLease::merge(MemoryLease&& other) {
  if (!state_) {
    *this = std::move(other);
    return;
  }
  if (!other.state_) return;
  RLHF_CHECK(state_ == other.state_ && tenant_ == other.tenant_,
             "memory lease: only leases of one tenant can be merged");
  bytes_ += std::exchange(other.bytes_, 0);
  other.state_.reset();
}

MemoryArbiter::MemoryArbiter(std::uint64_t budget_bytes) : state_(std::make_shared<MemoryLease::State>()) {
  RLHF_CHECK(budget_bytes > 0, "memory budget: got 0 bytes");
  state_->usage.budget_bytes = budget_bytes;
}

TenantId MemoryArbiter::add_tenant(std::string name, ReclaimCallback reclaim) {
  const std::lock_guard lock(state_->mutex);
  RLHF_CHECK(!name.empty(), "memory budget: a tenant needs a name");
  for (const TenantUsage& tenant : state_->usage.tenants) {
    RLHF_CHECK(tenant.name != name, "memory budget: two tenants are called ", name);
  }
  TenantUsage& tenant = state_->usage.tenants.emplace_back();
  tenant.name = std::move(name);
  state_->reclaimers.push_back(std::move(reclaim));
  return state_->usage.tenants.size() - 1;
}

bool MemoryArbiter::reserve(TenantId tenant, std::uint64_t bytes) {
  const std::lock_guard lock(state_->mutex);
  MemoryUsage& usage = state_->usage;
  RLHF_CHECK(tenant < usage.tenants.size(), "memory budget: no tenant ", tenant);
  if (bytes > usage.budget_bytes - usage.used_bytes) return false;
  TenantUsage& account = usage.tenants[tenant];
  usage.used_bytes += bytes;
  account.used_bytes += bytes;
  usage.peak_bytes = std::max(usage.peak_bytes, usage.used_bytes);
  account.peak_bytes = std::max(account.peak_bytes, account.used_bytes);
  return true;
}

bool MemoryArbiter::reserve_with_reclaim(TenantId tenant, std::uint64_t bytes) {
  if (reserve(tenant, bytes)) return true;
  std::size_t num_tenants = 0;
  {
    const std::lock_guard lock(state_->mutex);
    num_tenants = bytes > state_->usage.budget_bytes ? 0 : state_->usage.tenants.size();
  }
  for (TenantId other = 0; other < num_tenants; ++other) {
    if (other == tenant) continue;
    ReclaimCallback reclaim;
    std::uint64_t wanted = 0, before = 0;
    {
      const std::lock_guard lock(state_->mutex);
      const std::uint64_t available = state_->usage.budget_bytes - state_->usage.used_bytes;
      wanted = bytes > available ? bytes - available : 0;
      before = state_->usage.tenants[other].used_bytes;
      if (wanted > 0 && before > 0) reclaim = state_->reclaimers[other];
    }
    if (reclaim) {
      // Without the lock: the tenant releases leases of its own.
      reclaim(wanted);
      const std::lock_guard lock(state_->mutex);
      TenantUsage& account = state_->usage.tenants[other];
      if (account.used_bytes < before) {
        account.reclaimed_bytes += before - account.used_bytes;
        ++account.num_reclaims;
      }
    }
    if (reserve(tenant, bytes)) return true;
  }
  const std::lock_guard lock(state_->mutex);
  ++state_->usage.tenants[tenant].num_denied;
  return false;
}

std::optional<MemoryLease> MemoryArbiter::try_acquire(TenantId tenant, std::uint64_t bytes) {
  if (!reserve_with_reclaim(tenant, bytes)) return {};
  return MemoryLease(state_, tenant, bytes);
}

MemoryLease MemoryArbiter::acquire(TenantId tenant, std::uint64_t bytes) {
  auto lease = try_acquire(tenant, bytes);
  if (lease) return std::move(*lease);
  const MemoryUsage now = usage();
  fail<MemoryError>("memory budget: ", now.tenants[tenant].name, " needs ", bytes, " bytes, ",
                    now.budget_bytes - now.used_bytes, " of ", now.budget_bytes, " are free\n",
                    describe(now));
}

std::uint64_t MemoryArbiter::budget_bytes() const {
  const std::lock_guard lock(state_->mutex);
  return state_->usage.budget_bytes;
}

std::uint64_t MemoryArbiter::available_bytes() const {
  const std::lock_guard lock(state_->mutex);
  return state_->usage.budget_bytes - state_->usage.used_bytes;
}

MemoryUsage MemoryArbiter::usage() const {
  const std::lock_guard lock(state_->mutex);
  return state_->usage;
}

void MemoryArbiter::reset_peaks() {
  const std::lock_guard lock(state_->mutex);
  state_->usage.peak_bytes = state_->usage.used_bytes;
  for (TenantUsage& tenant : state_->usage.tenants) tenant.peak_bytes = tenant.used_bytes;
}

std::string describe(const MemoryUsage& usage) {
  std::vector<TenantUsage> tenants = usage.tenants;
  std::stable_sort(tenants.begin(), tenants.end(),
                   [](const TenantUsage& a, const TenantUsage& b) { return a.used_bytes > b.used_bytes; });
  std::ostringstream out;
  for (const TenantUsage& tenant : tenants) {
    out << "  " << std::left << std::setw(16) << tenant.name << ' ' << std::right << std::setw(14)
        << tenant.used_bytes << " bytes, peak " << tenant.peak_bytes << '\n';
  }
  return out.str();
}

}  // namespace rlhf
