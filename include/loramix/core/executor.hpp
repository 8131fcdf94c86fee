/// Threads are the caller's: a CPU backend carries an executor, and this is all it asks of one.
///
///   lanes()              how many jobs may run at the same time; the workspace is sized by it
///   run(n, f(job, lane)) calls f once for every job in [0, n), returns when all are done; no two jobs that run at the
///                        same time have the same lane in [0, lanes()). f does not throw.
///
/// Determinism: which lane runs a job, and in what order, never changes a bit of any result.
/// Example:     examples/engine wraps an engine's own pool in six lines.
#pragma once
#include <concepts>

#include <loramix/core/views.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

namespace detail {
struct AnyJob {
  void operator()(Index, Index) const {}
};
}  // namespace detail

/// Anything with lanes() and run().
template <class E>
concept Executor = std::copy_constructible<E> && requires(const E& executor, detail::AnyJob job) {
  { executor.lanes() } -> std::convertible_to<Index>;
  executor.run(Index{1}, job);
};

/// Runs every job in the calling thread.
struct SerialExecutor {
  Index lanes() const { return 1; }
  template <class Job>
  void run(Index jobs, const Job& job) const {
    for (Index i = 0; i < jobs; ++i) job(i, Index{0});
  }
};

}  // namespace LORAMIX_ABI
}  // namespace loramix
