/// Routing by sequence: all tokens of a sequence share one row of logits, pooled from their side rows.
///
/// Computes:    ℓ_b = W_g v_b + b_g, v_b the mean of sequence b's valid rows of x, or its last valid one (0 where none is);
///              pooled after the side rows, which is the same by linearity. SequenceGate: g = softmax(ℓ_b / τ) for every
///              token of b, padding too. dh_t = dℓ_b / valid rows, or dℓ_b for the last; db_g = Σ_b dℓ_b.
/// Source:      MATH.md section 2 ("V"). Sequences are segments of the call; without any, every token is its own.
/// Reads:       router [E or more, d_in] (side rows), bias [1, E or more].
/// Writes:      State: logits, p [sequences, E] in room for T rows; weights [T, E]; assigned.
/// Adds to:     dh [T, side rows]; the gradient gate's bias, or assigns with Into::set.
/// Errors:      sequences that are not segments, or more of them than tokens; labels that are not [sequences];
///              a temperature that is not above 0 and finite.
/// Cost:        O(T·E) beside the side rows.
/// Determinism: a sequence depends on its own rows only, summed in their order.
/// Example:     tests/router
#pragma once
#include <cmath>

#include <loramix/gate/softmax.hpp>
#include <loramix/ops/column_sum.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// What stands for a sequence.
enum class Pooling { mean, last };
/// The largest number that a file may give for one.
constexpr Pooling last_of(Pooling) { return Pooling::last; }

/// The sequences of a call, whose gates are made one by one.
template <Space S = Space::host>
struct SequenceRows {
  GateCall<S> call;
  Pooling pooling = Pooling::mean;

  LORAMIX_HD Index count() const { return call.tokens == 0 ? 0 : call.batch.sequences.size(call.tokens); }
  /// Tokens [begin(b), end(b)); device offsets were not checked.
  LORAMIX_HD Index begin(Index b) const { return bound(b); }
  LORAMIX_HD Index end(Index b) const { return bound(b + 1); }

  void check(const char* op) const {
    const Groups<S>& sequences = call.batch.sequences;
    if (sequences.ids != nullptr || sequences.of_segment != nullptr) {
      fail(check::detail::about(ErrorCode::value, op, "sequences")
           << " must be segments of the batch, Groups::by_segment(offsets, count)");
    }
    if (count() > call.tokens) {
      fail(check::detail::about(ErrorCode::shape, op, "sequences")
           << " has " << count() << " segments, but the router has room for one per token, which are " << call.tokens);
    }
    detail::check_groups<float>(op, "sequences", sequences, call.tokens, sequences.size(call.tokens));
    detail::check_optional(op, "labels", call.batch.labels, "the number of sequences", count());
  }

  /// logits(b, :) = the pooled rows of h, plus the bias where there is one.
  template <Team Tm, class W, class Score>
  LORAMIX_HD void pool(const Tm& team, Index b, MatrixView<const Score, S> h, MatrixView<W, S> bias,
                       MatrixView<Score, S> logits) const {
    const Share share = share_of(team, b);
    team.each(logits.cols, [&](Index e) {
      Score sum = Score(0);
      for (Index t = share.first; t <= share.last; ++t) sum += call.batch.is_valid(t) ? h(t, e) : Score(0);
      const Score pooled = share.rows == 0 ? Score(0) : sum / Score(share.rows);
      logits(b, e) = bias.data == nullptr ? pooled : pooled + widen<Score>(bias(0, e));
    });
  }
  /// dh(t, :) += what dlogits(b, :) gives each of its rows.
  template <Team Tm, class Score>
  LORAMIX_HD void pool_backward(const Tm& team, Index b, MatrixView<const Score, S> dlogits,
                                MatrixView<Score, S> dh) const {
    const Share share = share_of(team, b);
    team.each(dlogits.cols, [&](Index e) {
      for (Index t = share.first; t <= share.last; ++t) {
        if (call.batch.is_valid(t)) dh(t, e) += dlogits(b, e) / Score(share.rows);
      }
    });
  }

 private:
  struct Share {
    Index first, last, rows;  // the rows that are pooled: valid ones in [first, last]
  };
  template <Team Tm>
  LORAMIX_HD Share share_of(const Tm& team, Index b) const {
    const Index first = begin(b), n = end(b) - first;
    const auto valid = [&](Index i) { return call.batch.is_valid(first + i) ? Index{1} : Index{0}; };
    const Index rows = n > 0 ? team.sum(n, valid) : Index{0};
    if (rows == 0) return {0, -1, 0};
    if (pooling == Pooling::mean) return {first, first + n - 1, rows};
    const Index last = first + team.maximum(n, [&](Index i) { return valid(i) != 0 ? i : Index{-1}; });
    return {last, last, 1};
  }
  LORAMIX_HD Index bound(Index b) const {
    const Index* const offsets = call.batch.sequences.offsets;
    const Index t = offsets == nullptr ? b : offsets[b];
    return t < 0 ? 0 : t < call.tokens ? t : call.tokens;
  }
};

/// A softmax over experts for every sequence. W is const in an adapter and mutable in its gradient.
template <class W, class Score = accumulation_t<std::remove_const_t<W>>, Space S = Space::host>
struct SequenceGate {
  static constexpr GateFacts facts{Sparsity::dense, Slots::weights, false};
  static constexpr Space space = S;
  struct State {
    MatrixView<Score, S> logits, p;    // [T, E], rows are sequences
    MatrixView<Score, S> weights;      // [T, E], rows are tokens
    MatrixView<Score, S> dp, dlogits;  // [T, E], rows are sequences; losses add to them
  };

  MatrixView<W, S> router;  // [E, d_in]
  MatrixView<W, S> bias;    // [1, E]
  Pooling pooling = Pooling::mean;
  Score temperature = Score(1);

  MatrixView<W, S> side() const { return router; }
  State carve(Arena<S>& arena, Index tokens, bool training) const {
    const auto scores = [&] { return arena.template matrix<Score>(tokens, router.rows); };
    State state;
    state.logits = scores();
    state.p = scores();
    state.weights = scores();
    if (training) {
      state.dp = scores();
      state.dlogits = scores();
    }
    return state;
  }
  void check(const char* op, const GateCall<S>& call) const {
    check::above_zero(op, "temperature", temperature);
    SequenceRows<S>{call, pooling}.check(op);
  }
  GateForm<Score, S> form(const State& state, const GateCall<S>& call, Index ranks) const {
    return TokenExperts<Score, S>{state.weights}.form(call.tokens, ranks);
  }
  GateGradient<Score, S> gradient(const State& state) const { return {.weights = state.weights}; }
  /// Rows are the call's sequences.
  Scores<Score, S> scores(const State& state, MatrixView<Score, S>, MatrixView<Score, S>,
                          const GateCall<S>& call) const {
    const Index n = SequenceRows<S>{call}.count();
    return {.logits = state.logits.row_range(0, n),
            .p = state.p.row_range(0, n),
            .dlogits = state.dlogits.row_range(0, state.dlogits.data == nullptr ? 0 : n),
            .dp = state.dp.row_range(0, state.dp.data == nullptr ? 0 : n),
            .weights = state.p.row_range(0, n),
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
    const SequenceRows<S> rows{call, pooling};
    for_rows<S>(be, rows.count(), Backward{*this, rows, state, dstate, dh});
    if constexpr (!is_frozen<GradientGate>) {
      using G = std::remove_reference_t<decltype(gradient.bias(0, 0))>;
      execute(be, ColumnSum<Score, G, S>{dstate.logits.row_range(0, rows.count()), {}, gradient.bias, into},
              Arena<S>{});
    }
  }

  // Row bodies: public, for nvcc instantiates kernels with them.
  struct Forward {
    SequenceGate gate;
    SequenceRows<S> rows;
    MatrixView<const Score, S> h;
    State state;
    template <Team Tm>
    LORAMIX_HD void operator()(const Tm& team, Index b) const {
      rows.pool(team, b, h, gate.bias, state.logits);
      detail::softmax_row(team, state.p.cols, state.logits.row(b), gate.temperature, state.p.row(b));
      team.each(state.p.cols, [&](Index e) {
        for (Index t = rows.begin(b); t < rows.end(b); ++t) state.weights(t, e) = state.p(b, e);
        if (state.dp.data != nullptr) state.dp(b, e) = state.dlogits(b, e) = Score(0);
      });
    }
  };
  struct Backward {
    SequenceGate gate;
    SequenceRows<S> rows;
    State state, dstate;
    MatrixView<Score, S> dh;
    template <Team Tm>
    LORAMIX_HD void operator()(const Tm& team, Index b) const {
      team.each(state.p.cols, [&](Index e) {
        Score sum = state.dp.data != nullptr ? state.dp(b, e) : Score(0);
        for (Index t = rows.begin(b); t < rows.end(b); ++t) sum += dstate.weights(t, e);
        dstate.p(b, e) = sum;
        dstate.logits(b, e) = state.dlogits.data != nullptr ? state.dlogits(b, e) : Score(0);
      });
      detail::softmax_backward_row(team, state.p.cols, state.p.row(b), dstate.p.row(b), gate.temperature,
                                   dstate.logits.row(b));
      rows.pool_backward(team, b, MatrixView<const Score, S>(dstate.logits), dh);
    }
  };
};

}  // namespace LORAMIX_ABI
}  // namespace loramix
