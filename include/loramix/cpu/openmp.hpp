/// An executor over OpenMP's threads. Needs -fopenmp (CMake: loramix::openmp).
///
/// Example: lm::cpu::Backend be{lm::OpenMPExecutor{}};
#pragma once
#include <omp.h>

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
#pragma omp parallel for num_threads(threads_) schedule(dynamic, 1)
    for (Index i = 0; i < jobs; ++i) job(i, Index{omp_get_thread_num()});
  }

 private:
  int threads_;
};

}  // namespace LORAMIX_ABI
}  // namespace loramix
