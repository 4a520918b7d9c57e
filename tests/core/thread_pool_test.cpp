#include "rlhf/core/thread_pool.h"

#include <algorithm>
#include <chrono>
#include <set>
#include <stdexcept>
#include <string>

#include "rlhf/core/error.h"
#include "tests/catch.h"

using namespace rlhf;

TEST_CASE("parallel_for covers every index once, in ranges of at most the grain") {
  for (int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    CHECK(pool.num_threads() == threads);
    for (std::int64_t count : {0, 1, 2, 7, 64, 1001})
      for (std::int64_t grain : {-3, 0, 1, 3, 64, 5000}) {
        std::vector<std::atomic<int>> hits(static_cast<std::size_t>(count));
        std::atomic<bool> wide{false};
        pool.parallel_for(count, grain, [&](std::int64_t begin, std::int64_t end) {
          if (begin >= end || end - begin > std::max<std::int64_t>(1, grain)) wide = true;
          for (std::int64_t i = begin; i < end; ++i) ++hits[static_cast<std::size_t>(i)];
        });
        INFO(threads << " threads, count " << count << ", grain " << grain);
        CHECK_FALSE(wide);
        CHECK(std::ranges::all_of(hits, [](const auto& hit) { return hit == 1; }));
      }
  }
}

TEST_CASE("many short regions in a row neither lose nor repeat work") {
  ThreadPool pool(3);
  std::atomic<std::int64_t> sum{0};
  for (int round = 0; round < 3000; ++round)
    pool.parallel_for(10, 1, [&](std::int64_t begin, std::int64_t) { sum += begin; });
  CHECK(sum == 3000 * 45);
}

TEST_CASE("work is shared: a region with blocking ranges uses several threads") {
  ThreadPool pool(3);
  std::mutex mutex;
  std::set<std::thread::id> ids;
  pool.parallel_for(12, 1, [&](std::int64_t, std::int64_t) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    std::lock_guard lock(mutex);
    ids.insert(std::this_thread::get_id());
  });
  CHECK(ids.size() > 1);
  CHECK(ids.size() <= 3);
}

TEST_CASE("an exception reaches the caller and the pool goes on working") {
  for (int threads : {1, 2, 4}) {
    ThreadPool pool(threads);
    for (int round = 0; round < 50; ++round) {
      std::atomic<int> calls{0};
      try {
        pool.parallel_for(1000, 1, [&](std::int64_t begin, std::int64_t) {
          ++calls;
          if (begin == 17) throw std::runtime_error("range 17");
        });
        FAIL("nothing was thrown");
      } catch (const std::runtime_error& error) {
        CHECK(std::string(error.what()) == "range 17");
      }
      CHECK(calls >= 1);
      std::atomic<int> after{0};
      pool.parallel_for(
          100, 7, [&](std::int64_t begin, std::int64_t end) { after += static_cast<int>(end - begin); });
      CHECK(after == 100);
    }
  }
}

TEST_CASE("when every range throws, one exception arrives") {
  ThreadPool pool(4);
  for (int round = 0; round < 50; ++round)
    CHECK_THROWS_AS(pool.parallel_for(64, 1, [](std::int64_t begin, std::int64_t) { throw begin; }),
                    std::int64_t);
}

TEST_CASE("a nested region runs in the thread that opens it, and passes exceptions on") {
  ThreadPool pool(3);
  std::atomic<int> inner{0}, strangers{0};
  pool.parallel_for(8, 1, [&](std::int64_t, std::int64_t) {
    const auto opener = std::this_thread::get_id();
    pool.parallel_for(20, 1, [&](std::int64_t, std::int64_t) {
      ++inner;
      if (std::this_thread::get_id() != opener) ++strangers;
    });
  });
  CHECK(inner == 160);
  CHECK(strangers == 0);
  CHECK_THROWS_WITH(pool.parallel_for(8, 1,
                                      [&](std::int64_t, std::int64_t) {
                                        pool.parallel_for(4, 1, [](std::int64_t, std::int64_t) {
                                          throw std::runtime_error("inner");
                                        });
                                      }),
                    "inner");
  // The regions after it are parallel again: the flag of nesting was taken back.
  std::atomic<int> count{0};
  pool.parallel_for(30, 1, [&](std::int64_t, std::int64_t) { ++count; });
  CHECK(count == 30);
}

TEST_CASE("pools of different callers do not disturb each other") {
  std::vector<std::thread> callers;
  std::atomic<std::int64_t> sum{0};
  for (int c = 0; c < 3; ++c)
    callers.emplace_back([&] {
      ThreadPool pool(2);
      for (int round = 0; round < 200; ++round)
        pool.parallel_for(50, 3, [&](std::int64_t begin, std::int64_t end) { sum += end - begin; });
    });
  for (auto& caller : callers) caller.join();
  CHECK(sum == 3 * 200 * 50);
}

TEST_CASE("a pool says which numbers of threads it takes") {
  CHECK_THROWS_WITH(ThreadPool(-1), "ThreadPool: num_threads is -1, expected 0 (all cores) to 1024");
  CHECK_THROWS_WITH(ThreadPool(1025), ContainsSubstring("num_threads is 1025"));
  CHECK(ThreadPool(0).num_threads() >= 1);
}
