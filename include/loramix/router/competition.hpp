/// TeamLoRA's competition: a learned stand-in for the experts' Shapley values, and a matrix in which they interact.
///
/// Computes:    φ = softmax(S(x)),  ω = M φ, the gate; S = linear, or linear (hidden rows) + SiLU + linear. ω is not
///              renormalised and may be negative.
///              dM += Σ_t dω φᵀ,  dφ = Mᵀ dω,  and through the softmax and S (MATH.md section 3).
/// Source:      TeamLoRA, arXiv 2408.09856. The form of S is ours: no source fixes it.
/// Reads:       S₁ [hidden or E, d_in] (side rows), b₁ [1, hidden], S₂ [E, hidden], b₂ [1, E], M [E, E].
/// Writes:      State: activations, logits, φ, ω [T, …], assigned.
/// Adds to:     dh [T, hidden or E]; the gradient gate's b₁, S₂, b₂, M, or assigns with Into::set.
/// Errors:      shapes are checked by the adapter that owns the parameters.
/// Cost:        T·E·(hidden + E) multiplications beside the side rows' 2·T·hidden·d_in flop.
/// Determinism: a row depends on itself only; parameter gradients sum tokens in a fixed order.
/// Example:     tests/adapter
#pragma once
#include <cmath>

#include <loramix/gate/softmax.hpp>
#include <loramix/ops/column_sum.hpp>
#include <loramix/ops/token_product.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// The paper's gate and its ablations.
enum class Competition {
  learned,   // ω = M φ
  identity,  // ω = φ: collaboration only
  equal      // ω = M·1/E: no S
};

namespace detail {
template <class T>
LORAMIX_HD T silu(T z) {
  using std::exp;
  return z / (T(1) + exp(-z));
}
template <class T>
LORAMIX_HD T silu_slope(T z) {
  using std::exp;
  const T sigmoid = T(1) / (T(1) + exp(-z));
  return sigmoid * (T(1) + z * (T(1) - sigmoid));
}
}  // namespace detail

/// What the gate leaves for backward.
template <class Score, Space S>
struct CompetitionState {
  MatrixView<Score, S> activation;   // [T, hidden] SiLU(h + b₁); in a gradient: of h + b₁
  MatrixView<Score, S> logits;       // [T, E]
  MatrixView<Score, S> p;            // [T, E] φ
  MatrixView<Score, S> weights;      // [T, E] ω
  MatrixView<Score, S> dp, dlogits;  // [T, E] losses add to them
};

/// W is const in an adapter and mutable in its gradient.
template <class W, class Score, Space S = Space::host>
struct CompetitionGate {
  static constexpr GateFacts facts{Sparsity::dense, Slots::weights, false};
  static constexpr Space space = S;
  using State = CompetitionState<Score, S>;

  MatrixView<W, S> S1;  // [hidden or E, d_in]
  MatrixView<W, S> b1;  // [1, hidden]
  MatrixView<W, S> S2;  // [E, hidden], empty: S is linear
  MatrixView<W, S> b2;  // [1, E]
  MatrixView<W, S> M;   // [E, E]
  Competition form_of = Competition::learned;

  LORAMIX_HD Index experts() const { return M.rows; }
  LORAMIX_HD Index hidden() const { return b1.cols; }

  MatrixView<W, S> side() const { return S1; }
  State carve(Arena<S>& arena, Index tokens, bool training) const {
    State state;
    state.activation = arena.template matrix<Score>(tokens, hidden());
    for (MatrixView<Score, S>* m : {&state.logits, &state.p, &state.weights}) {
      *m = arena.template matrix<Score>(tokens, experts());
    }
    if (training) {
      state.dp = arena.template matrix<Score>(tokens, experts());
      state.dlogits = arena.template matrix<Score>(tokens, experts());
    }
    return state;
  }
  GateForm<Score, S> form(const State& state, const GateCall<S>& call, Index ranks) const {
    return TokenExperts<Score, S>{state.weights}.form(call.tokens, ranks);
  }
  GateGradient<Score, S> gradient(const State& state) const { return {.weights = state.weights}; }
  Scores<Score, S> scores(const State& state, MatrixView<Score, S>, MatrixView<Score, S>) const {
    return {.logits = state.logits, .p = state.p, .dlogits = state.dlogits, .dp = state.dp, .weights = state.weights};
  }

  template <class Backend>
  Index scratch(const Backend& be, Index tokens) const {
    const MatrixView<const Score, S> left{nullptr, tokens, experts()}, right{nullptr, tokens, hidden()};
    const Index a = scratch_bytes(be, TokenProduct<Score, Score, S>{left, left, {nullptr, experts(), experts()}});
    const Index b = scratch_bytes(be, TokenProduct<Score, Score, S>{left, right, {nullptr, experts(), hidden()}});
    return a > b ? a : b;
  }

  template <class Backend>
  void forward(const Backend& be, MatrixView<Score, S> h, const State& state, const GateCall<S>& call, Arena<S>) const {
    for_rows<S>(be, call.tokens, Forward{*this, h, state});
  }

  template <class Backend, class GradientGate>
  void backward(const Backend& be, MatrixView<Score, S> h, const State& state, const State& dstate,
                MatrixView<Score, S> dh, const GateCall<S>& call, const GradientGate& gradient, Into into,
                Arena<S> work) const {
    for_rows<S>(be, call.tokens, Backward{*this, h, state, dstate, dh});
    if constexpr (!is_frozen<GradientGate>) {
      const Index used = form_of == Competition::identity ? 0 : call.tokens;  // M is not read: its gradient is 0
      add_product(be, dstate.weights.row_range(0, used), state.p.row_range(0, used), gradient.M, into, work);
      add_sum(be, dstate.logits, gradient.b2, into);
      if (S2.data == nullptr) return;
      add_product(be, dstate.logits, state.activation, gradient.S2, into, work);
      add_sum(be, dstate.activation, gradient.b1, into);
    }
  }

  // Row bodies are public: nvcc takes no private type as a kernel's argument.
  struct Forward {
    CompetitionGate gate;
    MatrixView<const Score, S> h;
    State state;

    template <Team Tm>
    LORAMIX_HD void operator()(const Tm& team, Index t) const {
      const Index E = gate.experts(), hidden = gate.hidden();
      team.each(hidden, [&](Index i) { state.activation(t, i) = detail::silu(h(t, i) + widen<Score>(gate.b1(0, i))); });
      team.each(E, [&](Index e) {
        Score logit = widen<Score>(gate.b2(0, e));
        if (gate.S2.data == nullptr) logit += h(t, e);
        for (Index i = 0; i < hidden; ++i) logit += widen<Score>(gate.S2(e, i)) * state.activation(t, i);
        state.logits(t, e) = logit;
        if (state.dp.data != nullptr) state.dp(t, e) = state.dlogits(t, e) = Score(0);
      });
      if (gate.form_of == Competition::equal) {
        team.each(E, [&](Index e) { state.p(t, e) = Score(1) / Score(E); });
      } else {
        detail::softmax_row(team, E, state.logits.row(t), Score(1), state.p.row(t));
      }
      team.each(E, [&](Index e) {
        Score weight = gate.form_of == Competition::identity ? state.p(t, e) : Score(0);
        for (Index f = 0; gate.form_of != Competition::identity && f < E; ++f) {
          weight += widen<Score>(gate.M(e, f)) * state.p(t, f);
        }
        state.weights(t, e) = weight;
      });
    }
  };

  struct Backward {
    CompetitionGate gate;
    MatrixView<const Score, S> h;
    State state, dstate;
    MatrixView<Score, S> dh;

    template <Team Tm>
    LORAMIX_HD void operator()(const Tm& team, Index t) const {
      const Index E = gate.experts(), hidden = gate.hidden();
      team.each(E, [&](Index f) {  // dφ = Mᵀ dω, and what losses say
        Score dphi = gate.form_of == Competition::identity ? dstate.weights(t, f) : Score(0);
        for (Index e = 0; gate.form_of != Competition::identity && e < E; ++e) {
          dphi += widen<Score>(gate.M(e, f)) * dstate.weights(t, e);
        }
        dstate.p(t, f) = dphi + (state.dp.data != nullptr ? state.dp(t, f) : Score(0));
        dstate.logits(t, f) = state.dlogits.data != nullptr ? state.dlogits(t, f) : Score(0);
      });
      if (gate.form_of != Competition::equal) {
        detail::softmax_backward_row(team, E, state.p.row(t), dstate.p.row(t), Score(1), dstate.logits.row(t));
      }
      if (gate.S2.data == nullptr) {
        team.each(E, [&](Index e) { dh(t, e) += dstate.logits(t, e); });
        return;
      }
      team.each(hidden, [&](Index i) {
        Score slope = Score(0);
        for (Index e = 0; e < E; ++e) slope += widen<Score>(gate.S2(e, i)) * dstate.logits(t, e);
        slope *= detail::silu_slope(h(t, i) + widen<Score>(gate.b1(0, i)));
        dstate.activation(t, i) = slope;
        dh(t, i) += slope;
      });
    }
  };

 private:
  template <class Backend, class G>
  static void add_product(const Backend& be, MatrixView<Score, S> left, MatrixView<Score, S> right,
                          MatrixView<G, S> out, Into into, Arena<S> work) {
    execute(be, TokenProduct<Score, G, S>{left, right, out, into}, work);
  }
  template <class Backend, class G>
  static void add_sum(const Backend& be, MatrixView<Score, S> values, MatrixView<G, S> out, Into into) {
    execute(be, ColumnSum<Score, G, S>{values, {}, out, into}, Arena<S>{});
  }
};

}  // namespace LORAMIX_ABI
}  // namespace loramix
