/// The gated product on the GPU: fused kernels (gpu/fused.cuh) for what they take, else the composed path (gpu/composed.cuh).
///
/// Computes:    Shrink, ShrinkBackward (ops/shrink.hpp), Expand, ExpandBackward (ops/expand.hpp), TokenProduct.
/// Reads / Writes / Adds to: as the ops say; strided views are used as they are.
/// Errors:      as the ops say, before the first launch; CUDA and cuBLAS failures (ErrorCode::device). Bad ids, groups and
///              segments contribute nothing and set the backend's StatusFlags.
/// Cost:        the ops' flop; the chosen path's passes and scratch.
/// Determinism: the path follows from types and the backend's Tuning alone.
/// Example:     tests/gpu/product.cu
#pragma once
#include <loramix/gpu/composed.cuh>
#include <loramix/gpu/fused.cuh>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace gpu {

namespace detail {

/// Whether an op's types are what the fused kernels take.
template <class Op>
inline constexpr bool fusible = false;
template <class X, class W, class Acc, class Score, Space S>
inline constexpr bool fusible<Shrink<X, W, Acc, Score, S>> = fused::takes<X, W, Acc, Score>;
template <class X, class W, class Acc, class Score, class G, Space S>
inline constexpr bool fusible<ShrinkBackward<X, W, Acc, Score, G, S>> = fused::takes<X, W, Acc, Score, G>;
template <class Acc, class W, class Y, class Score, Space S, Major M>
inline constexpr bool fusible<Expand<Acc, W, Y, Score, S, M>> = fused::takes<Y, W, Acc, Score>;
template <class Acc, class W, class Y, class Score, class G, Space S, Major M>
inline constexpr bool fusible<ExpandBackward<Acc, W, Y, Score, G, S, M>> = fused::takes<Y, W, Acc, Score, G>;
template <class Acc, class Out, Space S>
inline constexpr bool fusible<TokenProduct<Acc, Out, S>> = std::is_same_v<Acc, float>&& std::is_same_v<Out, float>;

template <class Op>
Index product_scratch(const Backend& be, const Op& op) {
  if constexpr (fusible<Op>) {
    if (be.tuning.fused) return fused::scratch(be, op);
  }
  return composed::scratch(be, op);
}
template <class Op>
void run_product(const Backend& be, const Op& op, DeviceArena work) {
  if constexpr (fusible<Op>) {
    if (be.tuning.fused) return fused::execute(be, op, work);
  }
  composed::execute(be, op, work);
}

}  // namespace detail

/// What explain() prints.
inline PathFacts path_of(const Backend& be) {
  if (be.tuning.fused) {
    return {"gpu fused (shrink, expand, token sums)",
            "float, bfloat16 and half in float accumulation; the rest is composed", detail::tile_rows};
  }
  return {"gpu composed (cuBLAS product, gate, cuBLAS product)", "the path of every scalar, gate and size",
          detail::chunk_tokens};
}

template <class Acc, class W, class Y, class Score, Major M>
PathFacts path_of(const Backend& be, const Expand<Acc, W, Y, Score, Space::device, M>& op) {
  PathFacts facts = path_of(be);
  if constexpr (detail::fusible<Expand<Acc, W, Y, Score, Space::device, M>>) {
    if (be.tuning.fused && detail::is_sparse(be.tuning, op.gate)) {
      facts.path = "gpu fused, grouped by expert inside tiles (shrink, expand, token sums)";
      facts.why = "most ranks are closed: one expert per segment, or more ranks than Tuning::dense_ranks";
    }
  } else {
    Backend composed = be;
    composed.tuning.fused = false;
    facts = path_of(composed);
  }
  return facts;
}

/// Whether it pays to know the gate before U is computed; shapes only.
template <class Score>
bool wants_selection_impl(const Backend& be, const GateForm<Score, Space::device>& form, Index columns) {
  return be.tuning.fused && columns == form.ranks && detail::is_sparse(be.tuning, form);
}

template <class X, class W, class Acc, class Score>
Index scratch_impl(const Backend& be, const Shrink<X, W, Acc, Score, Space::device>& op) {
  return detail::product_scratch(be, op);
}
template <class X, class W, class Acc, class Score>
void execute_impl(const Backend& be, const Shrink<X, W, Acc, Score, Space::device>& op, DeviceArena work) {
  detail::run_product(be, op, work);
}

template <class X, class W, class Acc, class Score, class G>
Index scratch_impl(const Backend& be, const ShrinkBackward<X, W, Acc, Score, G, Space::device>& op) {
  return detail::product_scratch(be, op);
}
template <class X, class W, class Acc, class Score, class G>
void execute_impl(const Backend& be, const ShrinkBackward<X, W, Acc, Score, G, Space::device>& op, DeviceArena work) {
  detail::run_product(be, op, work);
}

template <class Acc, class W, class Y, class Score, Major M>
Index scratch_impl(const Backend& be, const Expand<Acc, W, Y, Score, Space::device, M>& op) {
  return detail::product_scratch(be, op);
}
template <class Acc, class W, class Y, class Score, Major M>
void execute_impl(const Backend& be, const Expand<Acc, W, Y, Score, Space::device, M>& op, DeviceArena work) {
  detail::run_product(be, op, work);
}

template <class Acc, class W, class Y, class Score, class G, Major M>
Index scratch_impl(const Backend& be, const ExpandBackward<Acc, W, Y, Score, G, Space::device, M>& op) {
  return detail::product_scratch(be, op);
}
template <class Acc, class W, class Y, class Score, class G, Major M>
void execute_impl(const Backend& be, const ExpandBackward<Acc, W, Y, Score, G, Space::device, M>& op,
                  DeviceArena work) {
  detail::run_product(be, op, work);
}

// ---- rows in the launch before -----------------------------------------------------------------------------------------

/// Whether row bodies follow their op in its launch (ops/rows.hpp).
inline bool rows_follow_impl(const Backend& be) { return be.tuning.fused; }

/// The row body that makes ũ = U ∘ g.
template <class Acc, class Score>
auto gate_rows_impl(const Backend& be, View<const Acc> u, const GateForm<Score, Space::device>& gate, View<Acc> gated) {
  return loramix::detail::ApplyGate<Acc, Score, Space::device>{u, detail::reporting(be, gate), gated};
}

namespace detail {
template <class Op, class Body>
void run_then_rows(const Backend& be, const Op& op, DeviceArena work, Index rows, const Body& body) {
  if constexpr (fusible<Op>) {
    fused::execute(be, op, work, body);
  } else {
    composed::execute(be, op, work);
    gpu::execute_impl(be, Rows<Body, Space::device>{rows, body}, DeviceArena{});
  }
}
}  // namespace detail

template <class X, class W, class Acc, class Score, class Body>
void execute_then_impl(const Backend& be, const Shrink<X, W, Acc, Score, Space::device>& op, DeviceArena work,
                       const Body& body) {
  detail::run_then_rows(be, op, work, op.x.rows, body);
}
template <class Acc, class W, class Y, class Score, class G, Major M, class Body>
void execute_then_impl(const Backend& be, const ExpandBackward<Acc, W, Y, Score, G, Space::device, M>& op,
                       DeviceArena work, const Body& body) {
  detail::run_then_rows(be, op, work, op.u.rows, body);
}

template <class Acc, class Out>
Index scratch_impl(const Backend& be, const TokenProduct<Acc, Out, Space::device>& op) {
  return detail::product_scratch(be, op);
}
template <class Acc, class Out>
void execute_impl(const Backend& be, const TokenProduct<Acc, Out, Space::device>& op, DeviceArena work) {
  detail::run_product(be, op, work);
}

}  // namespace gpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
