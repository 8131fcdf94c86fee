// A made-up method, added as docs/how-to/add-an-adapter.md says: this header and a line in list.hpp, nothing else.
//
//   ΔY = s Σ_e g_e (X̂ A_eᵀ) B_eᵀ,   g = tanh(x W_gᵀ)   [T, E]
//
// The experts of a token are weighed between −1 and 1, each by itself: a gate of its own, and the rest is what mixtures
// have in common.
#pragma once
#include <cmath>

#include <loramix/adapter/forward.hpp>
#include <loramix/adapter/mixture.hpp>

namespace tanh_mixture {

namespace lm = loramix;
using lm::Index;

// [gate]
// g = tanh(h), h = x routerᵀ;  dh = (1 − g²) ∘ dg.
template <class W, class Score, lm::Space S>
struct Gate {
  static constexpr lm::GateFacts facts{lm::Sparsity::dense, lm::Slots::weights, false};
  static constexpr lm::Space space = S;
  struct State {
    lm::MatrixView<Score, S> weights;  // [T, E]
    lm::MatrixView<Score, S> dp{};     // [T, E] losses add to it
  };

  lm::MatrixView<const W, S> router;  // [E, d_in] read with the token, in the shrink stage's pass over x

  lm::MatrixView<const W, S> side() const { return router; }
  State carve(lm::Arena<S>& arena, Index tokens, bool training) const {
    State state{arena.template matrix<Score>(tokens, router.rows)};
    if (training) state.dp = arena.template matrix<Score>(tokens, router.rows);
    return state;
  }
  lm::GateForm<Score, S> form(const State& state, const lm::GateCall<S>& call, Index ranks) const {
    return lm::TokenExperts<Score, S>{state.weights}.form(call.tokens, ranks);
  }
  lm::GateGradient<Score, S> gradient(const State& dstate) const { return {.weights = dstate.weights}; }
  lm::Scores<Score, S> scores(const State& state, lm::MatrixView<Score, S> h, lm::MatrixView<Score, S> dh) const {
    return {.logits = h, .p = state.weights, .dlogits = dh, .dp = state.dp, .weights = state.weights};
  }

  // One row of the batch, by one thread on the CPU and by a warp on the GPU.
  template <lm::Team Tm>
  LORAMIX_HD void forward_row(const Tm& team, Index t, const Score* h, const State& state) const {
    using std::tanh;
    team.each(router.rows, [&](Index e) {
      state.weights(t, e) = tanh(h[e]);
      if (state.dp.data != nullptr) state.dp(t, e) = Score(0);
    });
  }
  template <lm::Team Tm>
  LORAMIX_HD void backward_row(const Tm& team, Index t, const Score*, const State& state, const State& dstate,
                               Score* dh) const {
    team.each(router.rows, [&](Index e) {
      const Score g = state.weights(t, e), lost = state.dp.data == nullptr ? Score(0) : state.dp(t, e);
      dh[e] += (Score(1) - g * g) * (dstate.weights(t, e) + lost);
    });
  }
};
// [/gate]

// [method]
struct Method : lm::SoftmaxMethod<false> {  // a Config, a router of E rows and its start; every expert has its own A
  static constexpr const char* kind = "tanh_mixture";

  template <class W, class Score, lm::Space S, class Views>
  static Gate<std::remove_const_t<W>, Score, S> gate(const Config&, const Views& router) {
    return {router[0]};
  }
};

template <class P = float, lm::Space S = lm::Space::host, class T = typename lm::precision_t<P>::weight>
using TanhMixture = lm::Mixture<Method, P, S, T>;
// [/method]

}  // namespace tanh_mixture
