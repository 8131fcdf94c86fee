/// Shapley values of an adapter's experts, token by token, from what forward saved.
///
/// Computes:    φ_{t,e} of v(C) = ‖q‖² − ‖q − Σ_{e∈C} h_e‖² over the outputs of token t, h_e = s g_e (X̂ A_eᵀ) B_eᵀ, in
///              rank space (ops/shapley.hpp); the target is factor·q. After the task's backward dy is known: q = dy with
///              factor −1 asks what every expert does to lower the loss, and lm::shapley_loss trains a router's logits
///              towards it, before backward.
/// Source:      MATH.md section 3; TeamLoRA's claim that S stands in for Shapley values is what this can check.
/// Reads:       saved with Keep::z, B [d_out, R] rank-major, q [T, d_out].
/// Writes:      φ [T, E], assigned.
/// Errors:      a Saved without u (Keep::recompute), spent or of another adapter; shapes; small workspace.
/// Cost:        one shrink of q beside 2·T·R² + 2·R²·d_out flop; shapley_workspace_bytes.
/// Determinism: a row depends on its own row only.
/// Example:     tests/ops/shapley.cpp
#pragma once
#include <loramix/adapter/forward.hpp>
#include <loramix/ops/shapley.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// Bytes of workspace that shapley_values takes.
template <class Backend, ProductAdapter A>
Index shapley_workspace_bytes(const Backend& be, const A& adapter, Index tokens) {
  using T = detail::ProductOf<A>;
  const MatrixView<const typename T::X, A::space> q{nullptr, tokens, adapter.B().rows};
  return shapley_scratch_bytes<typename T::Acc>(be, adapter.B(), q);
}

/// φ [T, E] of the target factor·q.
template <class Backend, ProductAdapter A>
void shapley_values(const Backend& be, const A& adapter, const Saved<A>& saved,
                    MatrixView<const typename A::precision::activation, A::space> q, double factor,
                    MatrixView<typename A::precision::score, A::space> phi, Arena<A::space> work) {
  using T = detail::ProductOf<A>;
  const char* const op = "shapley_values";
  detail::check_origin(op, adapter, saved.origin);
  if (saved.u.data == nullptr && saved.origin.tokens != 0 && adapter.A().rows != 0) {
    fail(check::detail::about(ErrorCode::state, op, "saved") << " holds no u: save with Keep::z");
  }
  const auto gate = adapter.gate();
  shapley_rows(be, saved.u, T::form(gate, saved.state, saved.call, adapter.B().cols), adapter.B(), adapter.scale(), q,
               factor, phi, work);
}

}  // namespace LORAMIX_ABI
}  // namespace loramix
