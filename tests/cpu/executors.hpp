// Executors that try to make a difference: jobs that really run at the same time, jobs in a random order on random lanes.
#pragma once

#include <algorithm>
#include <atomic>
#include <barrier>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include <loramix/core/executor.hpp>

namespace loramix_test {

/// Where the jobs of one wave wait for each other. A job arrives from inside its body (user_scalars.hpp: Meeting) or, if
/// the body never called, when it has ended.
class Rendezvous {
 public:
  static void call() {
    if (pending_ == nullptr) return;
    std::barrier<>* const barrier = pending_;
    pending_ = nullptr;
    barrier->arrive_and_wait();
    met_inside_.fetch_add(1);
  }
  /// Jobs that waited inside their bodies until as many others were inside theirs.
  static long met_inside() { return met_inside_.load(); }

  static void begin(std::barrier<>& barrier) { pending_ = &barrier; }
  static void end() {
    if (pending_ != nullptr) pending_->arrive_and_drop();
    pending_ = nullptr;
  }

 private:
  static inline thread_local std::barrier<>* pending_ = nullptr;
  static inline std::atomic<long> met_inside_{0};
};

/// Jobs run in waves of `lanes` threads. All jobs of a wave have begun before any goes on: intervals [begun, ended] of a
/// wave share the moment at which the barrier opens.
class WaveExecutor {
 public:
  explicit WaveExecutor(loramix::Index lanes) : lanes_(lanes), facts_(std::make_shared<Facts>()) {}

  loramix::Index lanes() const { return lanes_; }
  template <class Job>
  void run(loramix::Index jobs, const Job& job) const {
    for (loramix::Index first = 0; first < jobs; first += lanes_) {
      const loramix::Index width = jobs - first < lanes_ ? jobs - first : lanes_;
      std::barrier<> begun(width), met(width);
      std::atomic<long> inside{0};
      const auto work = [&](loramix::Index lane) {
        inside.fetch_add(1);
        begun.arrive_and_wait();
        if (inside.load() == width && width == lanes_ && lanes_ > 1) facts_->overlapped.fetch_add(1);
        Rendezvous::begin(met);
        job(first + lane, lane);
        Rendezvous::end();
      };
      std::vector<std::thread> threads;
      for (loramix::Index lane = 1; lane < width; ++lane) threads.emplace_back(work, lane);
      work(0);
      for (std::thread& t : threads) t.join();
    }
  }
  /// Jobs that ran while `lanes` jobs were running.
  long overlapped() const { return facts_->overlapped.load(); }

 private:
  struct Facts {
    std::atomic<long> overlapped{0};
  };
  loramix::Index lanes_;
  std::shared_ptr<Facts> facts_;
};

/// One thread; jobs in a random order, each on a random lane.
class ShuffledExecutor {
 public:
  ShuffledExecutor(loramix::Index lanes, std::uint64_t seed)
      : lanes_(lanes), random_(std::make_shared<std::mt19937_64>(seed)) {}

  loramix::Index lanes() const { return lanes_; }
  template <class Job>
  void run(loramix::Index jobs, const Job& job) const {
    std::vector<loramix::Index> order;
    for (loramix::Index i = 0; i < jobs; ++i) order.push_back(i);
    std::shuffle(order.begin(), order.end(), *random_);
    for (const loramix::Index i : order) {
      job(i, static_cast<loramix::Index>((*random_)() % static_cast<std::uint64_t>(lanes_)));
    }
  }

 private:
  loramix::Index lanes_;
  std::shared_ptr<std::mt19937_64> random_;
};

}  // namespace loramix_test
