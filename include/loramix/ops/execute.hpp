/// How an op reaches a backend.
///
/// An op is a small struct of views: what it reads, what it writes. `execute` refuses bad input, then calls
/// `execute_impl(backend, op, work)`, found by argument-dependent lookup in the backend's namespace;
/// `scratch_bytes(backend, op)` runs the backend's carving code on a counting arena.
///
/// Computes:    what the op's own header says.
/// Reads:       the op's views, all sizes of which are inside [0, 2^63 bytes).
/// Writes:      the op's views, and scratch in the arena.
/// Errors:      whatever op.check() finds; a workspace that is too small. All before the first write.
/// Cost:        no allocation, ever; on the GPU no synchronisation.
/// Determinism: ADR 0005: the same bits for any number of threads; the composed path also for any order of tokens.
/// Example:     docs/how-to/add-a-kernel.md
#pragma once
#include <loramix/core/arena.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

namespace detail {
template <class Backend, class Op>
concept Implements = requires(const Backend& be, const Op& op, Arena<Op::space> work) {
  execute_impl(be, op, work);
  scratch_impl(be, op);
};
}  // namespace detail

/// What a backend says of itself. Backends give `path_of(backend)` and, where it depends on more, `path_of(backend, expand)`,
/// which reads sizes only; both are found by argument-dependent lookup.
struct PathFacts {
  const char* path;
  const char* why;
  Index tile_tokens;
  const char* kernels = "library products";
};

/// Bytes of workspace that executing `op` takes. Reads sizes only: its views may be null.
template <class Backend, class Op>
Index scratch_bytes(const Backend& be, const Op& op) {
  static_assert(detail::Implements<Backend, Op>,
                "loramix: this backend has no implementation of this op for these types: include "
                "<loramix/cpu/cpu.hpp> (host views) or <loramix/gpu/gpu.cuh> (device views) before using it");
  return scratch_impl(be, op);
}

namespace detail {
/// Runs an op that has been checked, in a workspace that has been found large enough.
template <class Backend, class Op>
void run_checked(const Backend& be, const Op& op, Arena<Op::space> work) {
  static_assert(Implements<Backend, Op>, "loramix: this backend does not implement this op for these types");
  execute_impl(be, op, work);
}
}  // namespace detail

/// Checks, then runs.
template <class Backend, class Op>
void execute(const Backend& be, const Op& op, Arena<Op::space> work) {
  op.check();
  work.require(Op::name, "work", scratch_bytes(be, op));
  execute_impl(be, op, work);
}

}  // namespace LORAMIX_ABI
}  // namespace loramix
