#include "rlhf/train/ppo_memory.h"

#include <algorithm>

#include "rlhf/core/error.h"
#include "rlhf/train/memory_plan.h"

namespace rlhf {

std::uint64_t PpoMemory::Setting::arena_bytes(std::uint64_t address_space) const {
  std::uint64_t left = budget_bytes;
  for (const auto& [name, bytes] : fixed) left -= std::min(left, bytes);
  return std::min(left, address_space);
}

PpoMemory::PpoMemory(const Setting& setting, const ModelConfig& model, RolloutEngine& engine,
                     SequencePass<float>& pass, Arena& arena)
    : model_(model),
      engine_(engine),
      pass_(pass),
      arena_(arena),
      least_blocks_(std::min<std::int64_t>(setting.least_blocks, engine.cache().num_blocks())),
      arbiter_(setting.budget_bytes) {
  for (const auto& [name, bytes] : setting.fixed)
    if (bytes > 0) fixed_.push_back(arbiter_.acquire(arbiter_.add_tenant(name), bytes));
  cache_tenant_ = arbiter_.add_tenant(kKvCacheTenant, [this](std::uint64_t wanted) { shrink_cache(wanted); });
  pass_tenant_ = arbiter_.add_tenant(kActivationsTenant, [this](std::uint64_t) { release_idle_pass(); });
  cache_lease_ = arbiter_.acquire(cache_tenant_, engine_.kv_bytes());
  reported_ = arbiter_.usage();
  arena_.set_make_room([this](std::size_t bytes) { return shrink_cache(bytes); });
}

// ---- generate lane ----

void PpoMemory::grow_cache() {
  const std::int64_t limit = engine_.cache().limit(), missing = engine_.cache().num_blocks() - limit;
  if (missing == 0 || training_) return;
  const MemoryUsage now = arbiter_.usage();
  const std::uint64_t block = engine_.block_bytes(),
                      possible = now.budget_bytes - now.used_bytes + now.tenants[pass_tenant_].used_bytes;
  const std::int64_t blocks = std::min(missing, static_cast<std::int64_t>(possible / block));
  if (blocks == 0) return;
  // Refused when a pass has begun meanwhile: then it needs the bytes more.
  auto lease = arbiter_.try_acquire(cache_tenant_, static_cast<std::uint64_t>(blocks) * block);
  if (!lease || !arena_.try_set_slabs(limit + blocks)) return;
  cache_lease_.merge(std::move(*lease));
  engine_.set_block_limit(limit + blocks);
}

// The arbiter asks on the generate lane, in the middle of a step's turn: a pass that runs is not waited for.
void PpoMemory::release_idle_pass() {
  const std::unique_lock lock(pass_mutex_, std::try_to_lock);
  if (!lock) return;
  drop_buffers();
}

void PpoMemory::drop_buffers() {
  pass_.release();
  leased_ = made_ = {};
  pass_lease_.release();
}

// ---- train lane ----

// The arbiter asks on the train lane, and so does the arena where gaps between buffers take what the lease
// does not hold.
bool PpoMemory::shrink_cache(std::uint64_t wanted_bytes) {
  bool shrank = false;
  gate_.between_steps([&] {
    const std::int64_t limit = engine_.cache().limit();
    const std::uint64_t block = engine_.block_bytes();
    const auto wanted = static_cast<std::int64_t>((wanted_bytes + block - 1) / block);
    const std::int64_t given = std::min(wanted, limit - least_blocks_);
    if (given <= 0) return;
    engine_.set_block_limit(limit - given);
    cache_lease_.shrink_to(static_cast<std::uint64_t>(limit - given) * block);
    shrank = true;
  });
  return shrank;
}

PpoMemory::Pass::Pass(PpoMemory& memory, const PassShape& shape, std::int64_t kept_layers)
    : memory_(memory), lock_(memory.pass_mutex_) {
  memory_.acquire_pass(shape, kept_layers);
}

PpoMemory::Pass::~Pass() {
  memory_.measure_pass();
}

PpoMemory::Pass PpoMemory::begin_pass(const PassShape& shape, std::int64_t kept_layers) {
  return Pass(*this, shape, kept_layers);
}

void PpoMemory::Extent::include(const PassShape& other, std::int64_t layers) {
  shape = {std::max(shape.rows, other.rows), std::max(shape.blocks, other.blocks),
           std::max(shape.targets, other.targets)};
  kept_layers = std::max(kept_layers, layers);
}

std::uint64_t PpoMemory::formula(const Extent& extent) const {
  return pass_.predicted_bytes(extent.shape, extent.kept_layers);
}

// Buffers stay from pass to pass, so what counts is the largest of each kind. When they must grow they are
// all made anew, one behind the other, since each on its own would leave a gap.
void PpoMemory::acquire_pass(const PassShape& shape, std::int64_t kept_layers) {
  const Extent before = leased_;
  const auto needed = [&] {
    leased_.include(shape, kept_layers);
    return predictor(leased_).predict(formula(leased_));
  };
  const std::uint64_t bytes = needed();
  if (leased_ != before) {
    pass_.release();
    made_ = {};
  }
  made_.include(shape, kept_layers);
  if (bytes <= pass_lease_.bytes()) return;
  if (auto more = arbiter_.try_acquire(pass_tenant_, bytes - pass_lease_.bytes())) {
    pass_lease_.merge(std::move(*more));
    return;
  }
  // Buffers of passes of other shapes are in the way.
  drop_buffers();
  made_.include(shape, kept_layers);
  try {
    pass_lease_ = arbiter_.acquire(pass_tenant_, needed());
  } catch (const MemoryError& error) {
    fail<MemoryError>("a pass of ", shape.rows,
                      " tokens does not fit: lower max_tokens_per_micro_batch or raise memory.budget; ",
                      error.what());
  }
}

void PpoMemory::measure_pass() {
  const std::uint64_t measured = pass_.held_bytes();
  predictor(made_).observe(formula(made_), measured);
  error_sum_ += predictor(made_).last_error();
  ++num_passes_;
  if (measured <= pass_lease_.bytes()) return;
  // More than was set aside: what is there is counted, as far as the budget goes.
  ++num_overruns_;
  if (auto more = arbiter_.try_acquire(pass_tenant_, measured - pass_lease_.bytes()))
    pass_lease_.merge(std::move(*more));
}

Metrics PpoMemory::take_metrics() {
  const MemoryUsage now = arbiter_.usage();
  arbiter_.reset_peaks();
  Metrics metrics = {{"memory/peak_bytes", static_cast<double>(now.peak_bytes)}};
  for (std::size_t i = 0; i < now.tenants.size(); ++i) {
    const TenantUsage& tenant = now.tenants[i];
    metrics.emplace_back("memory/peak_bytes/" + tenant.name, static_cast<double>(tenant.peak_bytes));
  }
  const auto since = [&](TenantId tenant, std::uint64_t TenantUsage::*counter) {
    return static_cast<double>(now.tenants[tenant].*counter - reported_.tenants[tenant].*counter);
  };
  metrics.emplace_back("memory/cache_reclaims", since(cache_tenant_, &TenantUsage::num_reclaims));
  metrics.emplace_back("memory/cache_reclaimed_bytes", since(cache_tenant_, &TenantUsage::reclaimed_bytes));
  metrics.emplace_back("memory/cache_denied", since(cache_tenant_, &TenantUsage::num_denied));
  metrics.emplace_back("memory/passes_denied", since(pass_tenant_, &TenantUsage::num_denied));
  metrics.emplace_back("memory/arena_peak_bytes", static_cast<double>(arena_.layout().peak_bytes()));
  reported_ = now;
  const std::lock_guard lock(pass_mutex_);
  metrics.emplace_back("memory/prediction_error",
                       error_sum_ / static_cast<double>(std::max<std::int64_t>(1, num_passes_)));
  metrics.emplace_back("memory/prediction_margin", std::max(scoring_.margin(), training_passes_.margin()));
  metrics.emplace_back("memory/prediction_overruns", static_cast<double>(num_overruns_));
  error_sum_ = 0;
  num_passes_ = num_overruns_ = 0;
  return metrics;
}

}  // namespace rlhf
