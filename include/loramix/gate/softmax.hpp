/// The plain softmax gate over experts, and the softmax of a row.
///
/// Computes:    SoftmaxGate: g = softmax(h / τ) over the experts; dh = p ∘ (dp − ⟨p, dp⟩) / τ (MATH.md section 2).
/// Reads:       side [E, d_in]: one row per expert, no bias.
/// Writes:      State::weights [T, E] (assigned).
/// Adds to:     dh [T, E].
/// Errors:      value: τ is not above 0 and finite; shapes are checked by the ops.
/// Cost:        O(T·E) beside the side rows' 2·T·E·d_in flop; State of T·E scores.
/// Determinism: a row depends on itself only; the order of its sums on the team's width.
/// Example:     examples/train
#pragma once
#include <cmath>

#include <loramix/core/check.hpp>
#include <loramix/core/team.hpp>
#include <loramix/gate/computed.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

namespace detail {

/// exp((z − top) / τ) / Σ where every thread of a team has its own z, of n ≤ width; those beyond repeat the first one's.
template <Team Tm, class Score>
LORAMIX_HD Score softmax_of(const Tm& team, Index n, Score z, Score temperature) {
  using std::exp;
  const Score top = team.maximum(n, [=](Index) { return z; });
  if (top - top != Score(0) && top < Score(0)) return Score(0);
  const Score power = Score(exp((z - top) / temperature));
  return power / team.sum(n, [=](Index) { return power; });
}

/// p = softmax(logits / τ), shifted by the maximum. A row with a NaN logit becomes NaN, one of −∞ alone 0.
template <Team Tm, class Score>
LORAMIX_HD void softmax_row(const Tm& team, Index n, const Score* logits, Score temperature, Score* p) {
  using std::exp;
  if (n > 0 && n <= Tm::width) {
    const Score mine = softmax_of(team, n, logits[team.place() < n ? team.place() : 0], temperature);
    team.each(n, [=](Index i) { p[i] = mine; });
    return;
  }
  const Score top = team.maximum(n, [=](Index i) { return logits[i]; });
  if (n != 0 && top - top != Score(0) && top < Score(0)) {
    team.each(n, [=](Index i) { p[i] = Score(0); });
    return;
  }
  team.each(n, [=](Index i) { p[i] = Score(exp((logits[i] - top) / temperature)); });
  const Score sum = team.sum(n, [=](Index i) { return p[i]; });
  team.each(n, [=](Index i) { p[i] = p[i] / sum; });
}

/// p ∘ (dp − ⟨p, dp⟩) / τ where every thread of a team has its own p and dp, of n ≤ width.
template <Team Tm, class Score>
LORAMIX_HD Score softmax_slope(const Tm& team, Index n, Score p, Score dp, Score temperature) {
  return p * (dp - team.sum(n, [=](Index) { return p * dp; })) / temperature;
}

/// dlogits += p ∘ (dp − ⟨p, dp⟩) / τ; dp(i) is asked once or twice.
template <Team Tm, class Score, class F>
LORAMIX_HD void softmax_backward(const Tm& team, Index n, const Score* p, const F& dp, Score temperature,
                                 Score* dlogits) {
  if (n > 0 && n <= Tm::width) {
    const Index own = team.place() < n ? team.place() : 0;
    const Score slope = softmax_slope(team, n, p[own], dp(own), temperature);
    team.each(n, [=](Index i) { dlogits[i] += slope; });
    return;
  }
  const Score inner = team.sum(n, [&](Index i) { return p[i] * dp(i); });
  team.each(n, [&](Index i) { dlogits[i] += p[i] * (dp(i) - inner) / temperature; });
}
template <Team Tm, class Score>
LORAMIX_HD void softmax_backward_row(const Tm& team, Index n, const Score* p, const Score* dp, Score temperature,
                                     Score* dlogits) {
  softmax_backward(
      team, n, p, [=](Index i) { return dp[i]; }, temperature, dlogits);
}

}  // namespace detail

/// g = softmax(x routerᵀ / τ).
template <class W = float, class Score = accumulation_t<W>, Space S = Space::host>
struct SoftmaxGate {
  static constexpr GateFacts facts{Sparsity::dense, Slots::weights, false};
  static constexpr Space space = S;
  struct State {
    MatrixView<Score, S> weights;  // [T, E]
    MatrixView<Score, S> dp{};     // [T, E] losses add to it
  };

  MatrixView<const W, S> router;  // [E, d_in]
  Score temperature = Score(1);

  MatrixView<const W, S> side() const { return router; }
  void check(const char* op, const GateCall<S>&) const { check::above_zero(op, "temperature", temperature); }
  State carve(Arena<S>& arena, Index tokens, bool training) const {
    State state{arena.template matrix<Score>(tokens, router.rows), {}};
    if (training) state.dp = arena.template matrix<Score>(tokens, router.rows);
    return state;
  }
  GateForm<Score, S> form(const State& state, const GateCall<S>& call, Index ranks) const {
    return TokenExperts<Score, S>{state.weights}.form(call.tokens, ranks);
  }
  GateGradient<Score, S> gradient(const State& state) const { return {.weights = state.weights}; }
  Scores<Score, S> scores(const State& state, MatrixView<Score, S> h, MatrixView<Score, S> dh) const {
    return {.logits = h, .p = state.weights, .dlogits = dh, .dp = state.dp, .weights = state.weights};
  }

  template <Team Tm>
  LORAMIX_HD void forward_row(const Tm& team, Index t, const Score* h, const State& state) const {
    detail::softmax_row(team, state.weights.cols, h, temperature, state.weights.row(t));
    if (state.dp.data != nullptr) team.each(state.dp.cols, [&](Index e) { state.dp(t, e) = Score(0); });
  }
  template <Team Tm>
  LORAMIX_HD void backward_row(const Tm& team, Index t, const Score*, const State& state, const State& dstate,
                               Score* dh) const {
    const Score* const dp = dstate.weights.row(t);
    const Score* const more = state.dp.data == nullptr ? nullptr : state.dp.row(t);  // from losses
    detail::softmax_backward(
        team, state.weights.cols, state.weights.row(t),
        [=](Index e) { return more == nullptr ? dp[e] : dp[e] + more[e]; }, temperature, dh);
  }
};

}  // namespace LORAMIX_ABI
}  // namespace loramix
