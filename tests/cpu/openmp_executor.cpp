// OpenMP's threads as an executor; only where the compiler has OpenMP.
#ifdef _OPENMP
#include <doctest/doctest.h>

#include <loramix/core/executor.hpp>
#include <loramix/cpu/backend.hpp>
#include <loramix/cpu/openmp.hpp>

#include "core/executor_laws.hpp"

namespace lm = loramix;

static_assert(lm::Executor<lm::OpenMPExecutor>);

TEST_CASE("OpenMP holds the laws of an executor, with 1 to 4 threads and by default") {
  CHECK(lm::OpenMPExecutor{}.lanes() == omp_get_max_threads());
  CHECK(lm::OpenMPExecutor{0}.lanes() == omp_get_max_threads());
  loramix_test::check_executor(lm::OpenMPExecutor{});
  for (int threads = 1; threads <= 4; ++threads) {
    CHECK(lm::OpenMPExecutor{threads}.lanes() == threads);
    loramix_test::check_executor(lm::OpenMPExecutor{threads});
  }
  const lm::cpu::Backend backend{lm::OpenMPExecutor{3}};
  CHECK(backend.lanes() == 3);
}

TEST_CASE("inside a parallel region of the caller's, lanes are still not shared") {
  int wrong = 0;
#pragma omp parallel for num_threads(2) reduction(+ : wrong)
  for (int i = 0; i < 4; ++i) {
    int done[9] = {};
    lm::OpenMPExecutor{2}.run(9, [&](lm::Index job, lm::Index) { done[job] += 1; });
    for (const int d : done) wrong += d != 1;
  }
  CHECK(wrong == 0);
}
#endif
