// What every executor promises (core/executor.hpp), checked on one.
#pragma once
#include <doctest/doctest.h>

#include <atomic>
#include <thread>
#include <vector>

#include <loramix/core/executor.hpp>

namespace loramix_test {

/// Every job exactly once, all done on return, lanes in range and never shared by jobs that run at the same time.
template <loramix::Executor E>
void check_executor(const E& executor) {
  using loramix::Index;
  const Index lanes = executor.lanes();
  REQUIRE(lanes >= 1);
  for (const Index jobs : {0, 1, 2, 3, 7, 64, 500}) {
    CAPTURE(jobs);
    std::vector<int> done(static_cast<std::size_t>(jobs));  // plain: run must order it before it returns
    std::vector<std::atomic<int>> busy(static_cast<std::size_t>(lanes));
    std::atomic<int> out_of_range{0}, lane_shared{0};
    executor.run(jobs, [&](Index i, Index lane) {
      if (i < 0 || i >= jobs || lane < 0 || lane >= lanes) {
        out_of_range.fetch_add(1);
        return;
      }
      if (busy[static_cast<std::size_t>(lane)].fetch_add(1) != 0) lane_shared.fetch_add(1);
      if (i % 5 == 0) std::this_thread::yield();
      done[static_cast<std::size_t>(i)] += 1;
      busy[static_cast<std::size_t>(lane)].fetch_sub(1);
    });
    int wrong = 0;
    for (const int d : done) wrong += d != 1;
    CHECK(wrong == 0);
    CHECK(out_of_range.load() == 0);
    CHECK(lane_shared.load() == 0);
  }
}

}  // namespace loramix_test
