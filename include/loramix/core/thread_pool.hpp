/// A small std::thread pool for programs that have none of their own. Threads that wait look for work for a tenth of a
/// millisecond before they sleep: the stages of a step follow each other faster than a thread wakes. A call does not wait for
/// threads that come too late to take a job.
///
/// Example: lm::ThreadPool pool(4);  lm::cpu::Backend be{pool.executor()};
#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include <loramix/core/check.hpp>
#include <loramix/core/executor.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// The calling thread works too: `lanes` lanes are `lanes` − 1 threads. One call of run at a time; another
/// waits. A job must not call run on the pool it runs in: it would wait for itself. A thread that cannot start is a
/// std::system_error; those started before it have ended by then.
class ThreadPool {
 public:
  explicit ThreadPool(Index lanes) : ThreadPool() {  // delegates: where the body throws, the destructor runs
    check::at_least("ThreadPool", "lanes", lanes, 1);
    for (Index lane = 1; lane < lanes; ++lane) threads_.emplace_back([this, lane] { work(lane); });
  }
  ~ThreadPool() {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  class PoolExecutor {
   public:
    explicit PoolExecutor(ThreadPool& pool) : pool_(&pool) {}
    Index lanes() const { return static_cast<Index>(pool_->threads_.size()) + 1; }
    template <class Job>
    void run(Index jobs, const Job& job) const {
      pool_->run(
          jobs, [](const void* f, Index i, Index lane) { (*static_cast<const Job*>(f))(i, lane); }, &job);
    }

   private:
    ThreadPool* pool_;
  };
  PoolExecutor executor() { return PoolExecutor(*this); }

 private:
  using Call = void (*)(const void*, Index, Index);

  ThreadPool() = default;

  void run(Index jobs, Call call, const void* job) {
    if (jobs <= 1 || threads_.empty()) {
      for (Index i = 0; i < jobs; ++i) call(job, i, 0);
      return;
    }
    std::lock_guard one_at_a_time(callers_);
    {
      std::lock_guard lock(mutex_);
      call_ = call;
      job_ = job;
      jobs_ = jobs;
      next_.store(0, std::memory_order_relaxed);
      open_ = true;
      generation_.store(generation_.load(std::memory_order_relaxed) + 1, std::memory_order_release);
    }
    wake_.notify_all();
    take_jobs(0, call, job, jobs);
    {
      std::lock_guard lock(mutex_);
      open_ = false;  // from here on nobody joins
    }
    if (look_for([this] { return running_.load(std::memory_order_acquire) == 0; })) return;
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return running_.load(std::memory_order_acquire) == 0; });
  }

  void take_jobs(Index lane, Call call, const void* job, Index jobs) {
    for (Index i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < jobs;) call(job, i, lane);
  }

  /// Whether `found` holds within a tenth of a millisecond or so.
  template <class F>
  static bool look_for(const F& found) {
    const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(100);
    do {
      for (int i = 0; i < 16; ++i) {
        if (found()) return true;
        detail::relax();
      }
    } while (std::chrono::steady_clock::now() < until);
    return false;
  }

  void work(Index lane) {
    std::uint64_t seen = 0;
    for (;;) {
      look_for([&] { return generation_.load(std::memory_order_acquire) != seen; });
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [&] { return stopping_ || generation_.load(std::memory_order_relaxed) != seen; });
      if (stopping_) return;
      seen = generation_.load(std::memory_order_relaxed);
      if (!open_) continue;
      running_.fetch_add(1, std::memory_order_relaxed);
      const Call call = call_;
      const void* const job = job_;
      const Index jobs = jobs_;
      lock.unlock();
      take_jobs(lane, call, job, jobs);
      lock.lock();
      if (running_.fetch_sub(1, std::memory_order_release) == 1) done_.notify_one();
    }
  }

  std::vector<std::thread> threads_;
  std::mutex callers_, mutex_;
  std::condition_variable wake_, done_;
  std::atomic<Index> next_{0};
  Call call_ = nullptr;
  const void* job_ = nullptr;
  Index jobs_ = 0;
  std::atomic<std::size_t> running_{0};  // threads inside a call; changed under the mutex
  std::atomic<std::uint64_t> generation_{0};
  bool open_ = false;  // whether the call still takes threads
  bool stopping_ = false;
};

}  // namespace LORAMIX_ABI
}  // namespace loramix
