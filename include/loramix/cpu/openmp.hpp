/// An executor over OpenMP's threads. Needs -fopenmp (CMake: loramix::openmp).
///
/// Example: lm::cpu::Backend be{lm::OpenMPExecutor{}};
#pragma once
#include <omp.h>

#include <atomic>

#include <loramix/core/executor.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// `threads` = 0: omp_get_max_threads() when it is made.
class OpenMPExecutor {
 public:
  explicit OpenMPExecutor(int threads = 0) : threads_(threads > 0 ? threads : omp_get_max_threads()) {}
  Index lanes() const { return threads_; }
  template <class Job>
  void run(Index jobs, const Job& job) const {
    if (threads_ == 1 || jobs == 1) return SerialExecutor{}.run(jobs, job);  // OpenMP takes half a microsecond for it
    // Jobs by a counter of our own: LLVM's runtime takes memory for every loop that it hands out dynamically.
    std::atomic<Index> next{0};
#pragma omp parallel num_threads(threads_)
    for (Index i; (i = next.fetch_add(1, std::memory_order_relaxed)) < jobs;) job(i, Index{omp_get_thread_num()});
  }

 private:
  int threads_;
};

}  // namespace LORAMIX_ABI
}  // namespace loramix
