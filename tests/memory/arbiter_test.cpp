#include "rlhf/memory/arbiter.h"

#include <atomic>
#include <map>
#include <thread>

#include "rlhf/core/error.h"
#include "rlhf/core/random.h"
#include "tests/catch.h"

namespace rlhf {
namespace {

TEST_CASE("a lease counts while it lives") {
  MemoryArbiter arbiter(100);
  const TenantId weights = arbiter.add_tenant("weights");
  const TenantId cache = arbiter.add_tenant("cache");
  {
    MemoryLease a = arbiter.acquire(weights, 60);
    CHECK(a.bytes() == 60);
    CHECK(arbiter.available_bytes() == 40);
    CHECK_FALSE(arbiter.try_acquire(cache, 41));
    const auto b = arbiter.try_acquire(cache, 40);
    REQUIRE(b);
    CHECK(arbiter.available_bytes() == 0);
    CHECK(arbiter.try_acquire(cache, 0));
    a.shrink_to(10);
    CHECK(arbiter.available_bytes() == 50);
    CHECK_THROWS_WITH(a.shrink_to(11), ContainsSubstring("cannot shrink 10 bytes to 11"));
    MemoryLease moved = std::move(a);
    CHECK(moved.bytes() == 10);
    CHECK(a.bytes() == 0);  // NOLINT: the moved-from state is documented
    moved = MemoryLease();
    CHECK(arbiter.available_bytes() == 60);
  }
  const MemoryUsage usage = arbiter.usage();
  CHECK(usage.used_bytes == 0);
  CHECK(usage.peak_bytes == 100);
  CHECK(usage.tenants[weights].peak_bytes == 60);
  CHECK(usage.tenants[cache].num_denied == 1);
  arbiter.reset_peaks();
  CHECK(arbiter.usage().peak_bytes == 0);
}

TEST_CASE("what does not fit is an error that says who holds what") {
  MemoryArbiter arbiter(100);
  const TenantId weights = arbiter.add_tenant("weights");
  const TenantId cache = arbiter.add_tenant("cache");
  const MemoryLease lease = arbiter.acquire(weights, 90);
  CHECK_THROWS_WITH(arbiter.acquire(cache, 11),
                    ContainsSubstring("cache needs 11 bytes, 10 of 100 are free") &&
                        ContainsSubstring("weights") && ContainsSubstring("90 bytes"));
  CHECK_THROWS_AS(arbiter.acquire(cache, UINT64_MAX), MemoryError);
  CHECK_THROWS_AS(arbiter.acquire(9, 1), InvalidArgument);
  CHECK_THROWS_WITH(arbiter.add_tenant("cache"), ContainsSubstring("two tenants are called cache"));
  CHECK_THROWS_AS(arbiter.add_tenant(""), InvalidArgument);
  CHECK_THROWS_AS(MemoryArbiter(0), InvalidArgument);
}

TEST_CASE("tenants are asked in order, only as much as needed, never for themselves") {
  MemoryArbiter arbiter(100);
  std::vector<MemoryLease> blocks, scraps;
  std::vector<std::uint64_t> asked;
  const TenantId scrap = arbiter.add_tenant("scrap", [&](std::uint64_t wanted) {
    asked.push_back(wanted);
    scraps.clear();
  });
  const TenantId cache = arbiter.add_tenant("cache", [&](std::uint64_t wanted) {
    asked.push_back(wanted);
    while (wanted > 0 && !blocks.empty()) {
      wanted -= std::min<std::uint64_t>(wanted, blocks.back().bytes());
      blocks.pop_back();
    }
  });
  const TenantId training = arbiter.add_tenant("training");
  scraps.push_back(arbiter.acquire(scrap, 20));
  for (int i = 0; i < 8; ++i) blocks.push_back(arbiter.acquire(cache, 10));
  const MemoryLease lease = arbiter.acquire(training, 45);
  CHECK(asked == std::vector<std::uint64_t>{45, 25});
  CHECK(blocks.size() == 5);
  CHECK(arbiter.usage().tenants[cache].reclaimed_bytes == 30);
  CHECK(arbiter.usage().tenants[scrap].reclaimed_bytes == 20);
  CHECK(arbiter.usage().tenants[scrap].num_reclaims == 1);

  asked.clear();
  CHECK_FALSE(arbiter.try_acquire(cache, 6));  // nobody else can give
  CHECK(asked.empty());
  CHECK_FALSE(arbiter.try_acquire(training, 101));  // could never fit: nobody is disturbed
  CHECK(asked.empty());
}

TEST_CASE("a lease may outlive its arbiter") {
  MemoryLease lease;
  {
    MemoryArbiter arbiter(10);
    lease = arbiter.acquire(arbiter.add_tenant("a"), 5);
  }
  CHECK(lease.bytes() == 5);
}

TEST_CASE("leases of a tenant are merged, others are not") {
  MemoryArbiter arbiter(100), other(100);
  const TenantId a = arbiter.add_tenant("a"), b = arbiter.add_tenant("b");
  MemoryLease lease;
  lease.merge(arbiter.acquire(a, 10));
  lease.merge(arbiter.acquire(a, 20));
  lease.merge(MemoryLease());
  CHECK(lease.bytes() == 30);
  CHECK(arbiter.usage().tenants[a].used_bytes == 30);
  CHECK_THROWS_WITH(lease.merge(arbiter.acquire(b, 5)), ContainsSubstring("of one tenant"));
  CHECK_THROWS_AS(lease.merge(other.acquire(other.add_tenant("a"), 5)), InvalidArgument);
  CHECK(arbiter.usage().used_bytes == 30);
  lease.release();
  CHECK(arbiter.usage().used_bytes == 0);
}

TEST_CASE("random operations agree with plain sums") {
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    INFO("seed " << seed);
    RandomStream random(seed);
    constexpr std::uint64_t kBudget = 1000;
    MemoryArbiter arbiter(kBudget);
    std::vector<std::vector<MemoryLease>> held(3);
    std::vector<std::uint64_t> peaks(3, 0);
    std::uint64_t peak = 0;
    for (const char* name : {"a", "b", "c"}) arbiter.add_tenant(name);
    const auto sum = [&](std::size_t tenant) {
      std::uint64_t total = 0;
      for (const MemoryLease& lease : held[tenant]) total += lease.bytes();
      return total;
    };
    for (int step = 0; step < 400; ++step) {
      const std::size_t tenant = random.below(3);
      const std::uint64_t action = random.below(3);
      if (action == 0 || held[tenant].empty()) {
        const std::uint64_t bytes = random.below(300);
        const std::uint64_t used = sum(0) + sum(1) + sum(2);
        auto lease = arbiter.try_acquire(tenant, bytes);
        CHECK(lease.has_value() == (used + bytes <= kBudget));
        if (lease) held[tenant].push_back(std::move(*lease));
      } else if (action == 1) {
        std::swap(held[tenant][random.below(held[tenant].size())], held[tenant].back());
        held[tenant].pop_back();
      } else {
        MemoryLease& lease = held[tenant][random.below(held[tenant].size())];
        lease.shrink_to(random.below(lease.bytes() + 1));
      }
      const MemoryUsage usage = arbiter.usage();
      peak = std::max(peak, usage.used_bytes);
      CHECK(usage.used_bytes == sum(0) + sum(1) + sum(2));
      CHECK(usage.used_bytes <= kBudget);
      CHECK(usage.peak_bytes == peak);
      for (std::size_t i = 0; i < 3; ++i) {
        peaks[i] = std::max(peaks[i], sum(i));
        CHECK(usage.tenants[i].used_bytes == sum(i));
        CHECK(usage.tenants[i].peak_bytes == peaks[i]);
      }
    }
  }
}

TEST_CASE("threads never exceed the budget") {
  constexpr std::uint64_t kBudget = 500;
  MemoryArbiter arbiter(kBudget);
  std::atomic<std::uint64_t> in_use{0};
  std::atomic<bool> exceeded{false};
  std::vector<std::thread> threads;
  for (std::uint64_t t = 0; t < 4; ++t) {
    const TenantId tenant = arbiter.add_tenant("thread " + std::to_string(t));
    threads.emplace_back([&, t, tenant] {
      RandomStream random(t);
      for (int i = 0; i < 3000; ++i) {
        const std::uint64_t bytes = 1 + random.below(300);
        auto lease = arbiter.try_acquire(tenant, bytes);
        if (!lease) continue;
        if (in_use.fetch_add(bytes) + bytes > kBudget) exceeded = true;
        in_use.fetch_sub(bytes);
        lease->release();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK_FALSE(exceeded);
  CHECK(arbiter.usage().used_bytes == 0);
  CHECK(arbiter.usage().peak_bytes <= kBudget);
  CHECK(arbiter.usage().peak_bytes > 0);
}

}  // namespace
}  // namespace rlhf
