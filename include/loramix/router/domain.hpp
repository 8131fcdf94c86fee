/// One expert per sequence: the domain that a label names, or the router's best.
///
/// Computes:    c_b = label_b where it is ≥ 0, else argmax ℓ_b, compared as floats, ties to the lower, NaN last; gate 1 for
///              expert c_b on every token of sequence b. ℓ_b as router/sequence.hpp. straight_through: where the router
///              chose, the multiplier 1 + p_c − stop(p_c), p = softmax(ℓ_b): value 1, dp_c = Σ dŨ ∘ U over b.
///              Without a router (no rows) the label decides alone, and −1 selects nothing.
/// Source:      MATH.md sections 2 to 4 (MoA). Labels are domains in training and decisions (adapter/domains.hpp) in inference.
/// Reads:       router [places, d_in] (side rows) and bias [1, places], of which the first `experts` are read; labels.
/// Writes:      State: logits, p [sequences, E] and ids [sequences] in room for T rows, multiplier [T]; assigned. A NaN logit
///              makes the multiplier NaN where the router chose.
/// Adds to:     dh [T, places]; the gradient gate's bias, or assigns with Into::set.
/// Errors:      as router/sequence.hpp; on the host a label that is no expert. On the device it contributes nothing, and
///              one beyond the places is flagged.
/// Cost:        O(T·E) beside the side rows.
/// Determinism: a sequence depends on its own rows only; decisions at exact ties agree on all devices.
/// Example:     tests/adapter/moa.cpp
#pragma once
#include <loramix/router/sequence.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// W is const in an adapter and mutable in its gradient.
template <class W, class Score = accumulation_t<std::remove_const_t<W>>, Space S = Space::host>
struct DomainGate {
  static constexpr GateFacts facts{Sparsity::segments, Slots::ids | Slots::multiplier, false};
  static constexpr Space space = S;
  struct State {
    MatrixView<Score, S> logits, p;    // [T, E], rows are sequences
    VectorView<std::int32_t, S> ids;   // [T], of sequences
    VectorView<Score, S> multiplier;   // [T], of tokens
    MatrixView<Score, S> dp, dlogits;  // [T, E], rows are sequences; losses add to them
  };

  MatrixView<W, S> router;  // [places, d_in], or empty
  MatrixView<W, S> bias;    // [1, places]
  Index experts = 1;
  Index places = 1;  // experts that ranks are laid out for
  Pooling pooling = Pooling::mean;
  bool straight_through = false;

  LORAMIX_HD bool routed() const { return router.rows != 0; }
  MatrixView<W, S> side() const { return router; }
  State carve(Arena<S>& arena, Index tokens, bool training) const {
    const auto scores = [&] { return arena.template matrix<Score>(tokens, routed() ? experts : Index{0}); };
    State state;
    state.logits = scores();
    state.p = scores();
    state.ids = arena.template vector<std::int32_t>(tokens);
    state.multiplier = arena.template vector<Score>(tokens);
    if (training) {
      state.dp = scores();
      state.dlogits = scores();
    }
    return state;
  }
  void check(const char* op, const GateCall<S>& call) const {
    const SequenceRows<S> rows{call, pooling};
    rows.check(op);
    if constexpr (S == Space::host) {
      for (Index b = 0; b < call.batch.labels.size; ++b) {
        const Index label = call.batch.labels[b];
        if (label >= -1 && label < experts) continue;
        fail(check::detail::about(ErrorCode::value, op, "labels")
             << " has domain " << label << " for sequence " << b << ", but there are " << experts << " domains");
      }
    }
  }
  GateForm<Score, S> form(const State& state, const GateCall<S>& call, Index ranks) const {
    const Index n = SequenceRows<S>{call}.count();
    const Groups<S> none{};
    GateForm<Score, S> f = OneExpert<Score, S>{state.ids.part(0, n), n == 0 ? none : call.batch.sequences, places}.form(
        call.tokens, ranks);
    f.multiplier = state.multiplier;
    return f;
  }
  GateGradient<Score, S> gradient(const State& state) const {
    GateGradient<Score, S> wanted;
    if (straight_through) wanted.multiplier = state.multiplier;
    return wanted;
  }
  /// Rows are the call's sequences.
  Scores<Score, S> scores(const State& state, MatrixView<Score, S>, MatrixView<Score, S>,
                          const GateCall<S>& call) const {
    const Index n = SequenceRows<S>{call}.count(), trained = state.dp.data == nullptr ? 0 : n;
    return {.logits = state.logits.row_range(0, n),
            .p = state.p.row_range(0, n),
            .dlogits = state.dlogits.row_range(0, trained),
            .dp = state.dp.row_range(0, trained),
            .ids = {state.ids.data, n, 1},
            .by_token = call.batch.sequences.per_token()};
  }

  template <class Backend>
  void forward(const Backend& be, MatrixView<Score, S> h, const State& state, const GateCall<S>& call, Arena<S>) const {
    const SequenceRows<S> rows{call, pooling};
    for_rows<S>(be, rows.count(), Forward{*this, rows, h, state});
  }
  template <class Backend, class GradientGate>
  void backward(const Backend& be, MatrixView<Score, S>, const State& state, const State& dstate,
                MatrixView<Score, S> dh, const GateCall<S>& call, const GradientGate& gradient, Into into,
                Arena<S>) const {
    if (!routed()) return;
    const SequenceRows<S> rows{call, pooling};
    for_rows<S>(be, rows.count(), Backward{*this, rows, state, dstate, dh});
    if constexpr (!is_frozen<GradientGate>) {
      using G = std::remove_reference_t<decltype(gradient.bias(0, 0))>;
      execute(be,
              ColumnSum<Score, G, S>{
                  dstate.logits.row_range(0, rows.count()), {}, gradient.bias.col_range(0, experts), into},
              Arena<S>{});
    }
  }

  // Row bodies: public, for nvcc instantiates kernels with them.
  LORAMIX_HD static Index label_of(const GateCall<S>& call, Index b) {
    return call.batch.labels.data == nullptr ? Index{-1} : Index{call.batch.labels[b]};
  }

  struct Forward {
    DomainGate gate;
    SequenceRows<S> rows;
    MatrixView<const Score, S> h;
    State state;
    template <Team Tm>
    LORAMIX_HD void operator()(const Tm& team, Index b) const {
      const Index label = label_of(rows.call, b), E = state.p.cols;
      bool broken = false;
      if (gate.routed()) {
        rows.pool(team, b, h, gate.bias, state.logits);
        detail::softmax_row(team, E, state.logits.row(b), Score(1), state.p.row(b));
        team.each(state.dp.data != nullptr ? E : Index{0},
                  [&](Index e) { state.dp(b, e) = state.dlogits(b, e) = Score(0); });
        broken =
            label < 0 && team.sum(E, [&](Index e) { return Index{state.logits(b, e) != state.logits(b, e)}; }) != 0;
      }
      team.once([&] {
        state.ids[b] = static_cast<std::int32_t>(label >= 0 || !gate.routed() ? label : best(state.logits.row(b), E));
      });
      const Index first = rows.begin(b);
      team.each(rows.end(b) - first, [&](Index i) { state.multiplier[first + i] = broken ? Score(NAN) : Score(1); });
    }

   private:
    LORAMIX_HD static Index best(const Score* logits, Index E) {
      Index best = 0;
      for (Index e = 1; e < E; ++e) {
        const float x = static_cast<float>(logits[e]), top = static_cast<float>(logits[best]);
        if (x > top || (x == x && top != top)) best = e;
      }
      return best;
    }
  };

  struct Backward {
    DomainGate gate;
    SequenceRows<S> rows;
    State state, dstate;
    MatrixView<Score, S> dh;
    template <Team Tm>
    LORAMIX_HD void operator()(const Tm& team, Index b) const {
      const Index E = state.p.cols, first = rows.begin(b), n = rows.end(b) - first;
      const bool chose = gate.straight_through && label_of(rows.call, b) < 0 && n > 0;
      const Score slope = chose ? team.sum(n, [&](Index i) { return dstate.multiplier[first + i]; }) : Score(0);
      team.each(E, [&](Index e) {
        dstate.p(b, e) =
            (state.dp.data != nullptr ? state.dp(b, e) : Score(0)) + (e == state.ids[b] ? slope : Score(0));
        dstate.logits(b, e) = state.dlogits.data != nullptr ? state.dlogits(b, e) : Score(0);
      });
      detail::softmax_backward_row(team, E, state.p.row(b), dstate.p.row(b), Score(1), dstate.logits.row(b));
      rows.pool_backward(team, b, MatrixView<const Score, S>(dstate.logits), dh);
    }
  };
};

}  // namespace LORAMIX_ABI
}  // namespace loramix
