/// Gates that a router computes from the token, and the plain softmax gate.
///
/// A computed gate has *side rows*: a matrix [n, d_in] that the shrink stage multiplies with the undropped token in the
/// same pass over x, giving h = x sideᵀ. The row stage makes the gate's State from h, the form is views of that State,
/// and backward turns the form's gradient into dh:
///
///     side()                                   [n, d_in]
///     carve(arena, tokens) → State             where the gate's values live, trivially copyable
///     form(state, tokens, ranks) → GateForm    views of the State
///     gradient(state) → GateGradient           the same views of a State that holds gradients
///     forward_row(team, t, h, state)           h: row t of [T, n]
///     backward_row(team, t, h, state, dstate, dh)   dh: row t, added to
///
/// Computes:    SoftmaxGate: g = softmax(h / τ) over the experts; dh = p ∘ (dp − ⟨p, dp⟩) / τ (MATH.md section 2).
/// Reads:       side [E, d_in]: one row per expert, no bias.
/// Writes:      State::weights [T, E] (assigned). Adds to: dh [T, E].
/// Errors:      shapes are checked by the ops.
/// Cost:        O(T·E) beside the side rows' 2·T·E·d_in flop; State of T·E scores.
/// Determinism: a row depends on itself only; the order of its sums on the team's width.
/// Example:     examples/train
#pragma once
#include <cmath>
#include <concepts>

#include <loramix/core/arena.hpp>
#include <loramix/core/precision.hpp>
#include <loramix/core/team.hpp>
#include <loramix/gate/gates.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// A gate whose values come from side rows.
template <class G>
concept ComputedGate = Gate<G> && requires(const G& gate, const typename G::State& state, Index n) {
  { gate.side().rows } -> std::convertible_to<Index>;
  { gate.form(state, n, n).ranks } -> std::convertible_to<Index>;
  gate.gradient(state);
};

namespace detail {

/// p = softmax(logits / τ), shifted by the maximum. A row with a NaN logit becomes NaN.
template <Team Tm, class Score>
LORAMIX_HD void softmax_row(const Tm& team, Index n, const Score* logits, Score temperature, Score* p) {
  using std::exp;
  const Score top = team.maximum(n, [=](Index i) { return logits[i]; });
  const Score sum = team.sum(n, [=](Index i) { return Score(exp((logits[i] - top) / temperature)); });
  team.each(n, [=](Index i) { p[i] = Score(exp((logits[i] - top) / temperature)) / sum; });
}

/// dlogits += p ∘ (dp − ⟨p, dp⟩) / τ.
template <Team Tm, class Score>
LORAMIX_HD void softmax_backward_row(const Tm& team, Index n, const Score* p, const Score* dp, Score temperature,
                                     Score* dlogits) {
  const Score inner = team.sum(n, [=](Index i) { return p[i] * dp[i]; });
  team.each(n, [=](Index i) { dlogits[i] += p[i] * (dp[i] - inner) / temperature; });
}

}  // namespace detail

template <class W = float, class Score = accumulation_t<W>, Space S = Space::host>
struct SoftmaxGate {
  static constexpr GateFacts facts{Sparsity::dense, Slots::weights, false};
  struct State {
    MatrixView<Score, S> weights;  // [T, E]
  };

  MatrixView<const W, S> router;  // [E, d_in]
  Score temperature = Score(1);

  MatrixView<const W, S> side() const { return router; }
  State carve(Arena<S>& arena, Index tokens) const { return {arena.template matrix<Score>(tokens, router.rows)}; }
  GateForm<Score, S> form(const State& state, Index tokens, Index ranks) const {
    return TokenExperts<Score, S>{state.weights}.form(tokens, ranks);
  }
  GateGradient<Score, S> gradient(const State& state) const { return {.weights = state.weights}; }

  template <Team Tm>
  LORAMIX_HD void forward_row(const Tm& team, Index t, const Score* h, const State& state) const {
    detail::softmax_row(team, state.weights.cols, h, temperature, state.weights.row(t));
  }
  template <Team Tm>
  LORAMIX_HD void backward_row(const Tm& team, Index t, const Score*, const State& state, const State& dstate,
                               Score* dh) const {
    detail::softmax_backward_row(team, state.weights.cols, state.weights.row(t), dstate.weights.row(t), temperature,
                                 dh);
  }
};

}  // namespace LORAMIX_ABI
}  // namespace loramix
