// Executors: every job exactly once, lanes never shared, any number of callers. TSan runs this program.
#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include <loramix/core/executor.hpp>
#include <loramix/core/thread_pool.hpp>

#include "core/caught.hpp"
#include "core/executor_laws.hpp"

namespace lm = loramix;
using lm::Index;
using loramix_test::check_executor;

namespace {

/// An engine's own way of running jobs, as a user would wrap it: threads started for the call, jobs dealt in turn.
struct DealingExecutor {
  Index threads;
  Index lanes() const { return threads; }
  template <class Job>
  void run(Index jobs, const Job& job) const {
    std::vector<std::thread> running;
    for (Index lane = 0; lane < threads; ++lane) {
      running.emplace_back([&, lane] {
        for (Index i = lane; i < jobs; i += threads) job(i, lane);
      });
    }
    for (std::thread& thread : running) thread.join();
  }
};

/// One behind type erasure.
struct ErasedExecutor {
  std::shared_ptr<std::function<void(Index, const std::function<void(Index, Index)>&)>> engine;
  int lanes() const { return 1; }  // convertible to Index
  void run(Index jobs, const std::function<void(Index, Index)>& job) const { (*engine)(jobs, job); }
};

struct NoLanes {
  template <class Job>
  void run(Index, const Job&) const {}
};
struct NotCopyable {
  NotCopyable(const NotCopyable&) = delete;
  Index lanes() const { return 1; }
  template <class Job>
  void run(Index, const Job&) const {}
};
struct OnlyMutable {
  Index lanes() const { return 1; }
  template <class Job>
  void run(Index, const Job&) {}
};

static_assert(lm::Executor<lm::SerialExecutor> && lm::Executor<lm::ThreadPool::PoolExecutor>);
static_assert(lm::Executor<DealingExecutor> && lm::Executor<ErasedExecutor>);
static_assert(!lm::Executor<NoLanes> && !lm::Executor<NotCopyable> && !lm::Executor<OnlyMutable> && !lm::Executor<int>);
static_assert(!lm::Executor<lm::ThreadPool>);  // its executor is what backends copy

}  // namespace

TEST_CASE("the serial executor runs in order in the calling thread") {
  const lm::SerialExecutor serial;
  CHECK(serial.lanes() == 1);
  std::vector<Index> order;
  bool own_thread = true;
  const auto caller = std::this_thread::get_id();
  serial.run(4, [&](Index i, Index lane) {
    order.push_back(10 * lane + i);
    own_thread = own_thread && std::this_thread::get_id() == caller;
  });
  CHECK(order == std::vector<Index>{0, 1, 2, 3});
  CHECK(own_thread);
  check_executor(serial);
}

TEST_CASE("a pool of 1 to 5 lanes holds the laws") {
  for (Index lanes = 1; lanes <= 5; ++lanes) {
    lm::ThreadPool pool(lanes);
    CHECK(pool.executor().lanes() == lanes);
    check_executor(pool.executor());
  }
}

TEST_CASE("a user's own executor holds the laws") {
  check_executor(DealingExecutor{3});
  const ErasedExecutor erased{std::make_shared<std::function<void(Index, const std::function<void(Index, Index)>&)>>(
      [](Index jobs, const std::function<void(Index, Index)>& job) {
        for (Index i = jobs; i-- > 0;) job(i, 0);  // in no order that we promise
      })};
  check_executor(erased);
}

TEST_CASE("jobs of a pool really overlap: each waits for all") {
  constexpr Index lanes = 3;
  lm::ThreadPool pool(lanes);
  std::atomic<Index> arrived{0};
  std::atomic<int> late{0};
  pool.executor().run(lanes, [&](Index, Index) {
    arrived.fetch_add(1);
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (arrived.load() < lanes) {
      if (std::chrono::steady_clock::now() > deadline) {
        late.fetch_add(1);
        return;
      }
      std::this_thread::yield();
    }
  });
  CHECK(late.load() == 0);
}

TEST_CASE("many small runs on one pool: plain memory written by jobs is visible after each") {
  lm::ThreadPool pool(4);
  const auto executor = pool.executor();
  std::vector<Index> sums(7);  // not atomic: the pool must order it
  for (int round = 0; round < 3000; ++round) {
    const Index jobs = round % 8;
    executor.run(jobs, [&](Index i, Index) { sums[static_cast<std::size_t>(i)] += i + 1; });
  }
  long wrong = 0;
  for (Index i = 0; i < 7; ++i) wrong += sums[static_cast<std::size_t>(i)] != 375 * (7 - i) * (i + 1);
  CHECK(wrong == 0);
}

TEST_CASE("several callers share a pool; each sees its own jobs done, in lanes of its own") {
  lm::ThreadPool pool(3);
  std::atomic<long> wrong{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&, caller] {
      for (int round = 0; round < 200; ++round) {
        const Index jobs = (round + caller) % 9;
        std::vector<int> done(static_cast<std::size_t>(jobs));
        std::vector<std::atomic<int>> busy(3);
        pool.executor().run(jobs, [&](Index i, Index lane) {
          if (lane < 0 || lane >= 3 || busy[static_cast<std::size_t>(lane)].fetch_add(1) != 0) wrong.fetch_add(1);
          done[static_cast<std::size_t>(i)] += 1;
          busy[static_cast<std::size_t>(lane)].fetch_sub(1);
        });
        for (const int d : done) wrong += d != 1;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(wrong.load() == 0);
}

TEST_CASE("pools are made and destroyed: unused, just used, many") {
  std::atomic<Index> done{0};
  for (int i = 0; i < 200; ++i) {
    lm::ThreadPool pool(1 + i % 4);
    if (i % 3 != 0) pool.executor().run(5, [&](Index, Index) { done.fetch_add(1); });
  }
  CHECK(done.load() == 5 * 133);
}

TEST_CASE("a pool needs a lane") {
  loramix_test::check_error(lm::ErrorCode::value, {"ThreadPool", "lanes is 0", "at least 1"},
                            [] { lm::ThreadPool(0); });
  loramix_test::check_error(lm::ErrorCode::value, {"lanes is -2"}, [] { lm::ThreadPool(-2); });
}
