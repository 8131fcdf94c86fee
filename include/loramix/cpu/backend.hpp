/// The CPU backend: an executor, and what it may be told about how to work (cpu/tuning.hpp). Views are in host memory;
/// scratch comes from the caller's arena.
///
/// Example: lm::cpu::Backend be;                               // the calling thread
///          lm::cpu::Backend be{pool.executor()};              // lm::ThreadPool
///          lm::cpu::Backend be{EngineExecutor{engine_pool}};  // the engine's own threads (core/executor.hpp)
#pragma once
#include <loramix/core/executor.hpp>
#include <loramix/cpu/tuning.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace cpu {

template <Executor E = SerialExecutor>
struct Backend {
  static constexpr Space space = Space::host;
  E executor{};
  Tuning tuning{};

  Index lanes() const { return executor.lanes(); }
  /// f(job, lane) for every job in [0, n).
  template <class F>
  void run(Index n, const F& f) const {
    if (n > 0) executor.run(n, f);
  }
};
template <class E>
Backend(E) -> Backend<E>;
template <class E>
Backend(E, Tuning) -> Backend<E>;
Backend()->Backend<SerialExecutor>;

namespace detail {

/// Who does an op's jobs: all lanes, or, where few tokens meet few bytes of weights, the caller alone.
template <class E>
struct Crew {
  const Backend<E>& be;
  bool alone;
  Crew(const Backend<E>& backend, Index tokens, Index bytes)
      : be(backend), alone(tokens <= few_tokens && bytes <= be.tuning.serial_bytes) {}

  Index lanes() const { return alone ? 1 : be.lanes(); }
  /// f(job, lane) for every job in [0, n).
  template <class F>
  void run(Index n, const F& f) const {
    if (!alone) return be.run(n, f);
    for (Index i = 0; i < n; ++i) f(i, Index{0});
  }
};

}  // namespace detail

}  // namespace cpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
