/// TeamLoRA's competition: a learned stand-in for the experts' Shapley values, and a matrix in which they interact.
///
/// Computes:    φ = softmax(S(v)),  ω = M φ, the gate; S = linear, or linear (hidden rows) + SiLU + linear. ω is not
///              renormalised and may be negative. v is the token, its sequence's mean or last valid row (pooled after S₁:
///              the same by linearity), or the embedding of its task.
///              dM += Σ_v dω φᵀ,  dφ = Mᵀ dω,  and through the softmax and S (MATH.md section 3).
/// Source:      TeamLoRA, arXiv 2408.09856. The form of S, and reading anything but tokens, are ours: no source fixes them.
/// Reads:       S₁ [hidden or E, d_in] (side rows; [hidden or E, dim] of a task's embedding), b₁ [1, hidden], S₂ [E, hidden],
///              b₂ [1, E], M [E, E], embedding [tasks, dim].
/// Writes:      State: S₁v, activations, logits, φ, ω [rows, …], assigned; rows are tokens, sequences or tasks.
/// Adds to:     dh [T, hidden or E]; the gradient gate's b₁, S₂, b₂, M, of tasks also S₁ and embedding, or assigns with
///              Into::set.
/// Errors:      shapes are checked by the adapter that owns the parameters; a batch without tasks, or as
///              router/sequence.hpp.
/// Cost:        rows·E·(hidden + E) multiplications beside the side rows' 2·T·hidden·d_in flop, or 2·tasks·hidden·dim.
/// Determinism: a row depends on itself only; parameter gradients sum rows in a fixed order.
/// Example:     tests/router/competition.cpp
#pragma once
#include <cmath>

#include <loramix/ops/token_product.hpp>
#include <loramix/router/sequence.hpp>
#include <loramix/router/task.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// The paper's gate and its ablations.
enum class Competition {
  learned,   // ω = M φ
  identity,  // ω = φ: collaboration only
  equal      // ω = M·1/E: no S
};
/// The largest number that a file may give for one.
constexpr Competition last_of(Competition) { return Competition::equal; }

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

/// What S is given.
enum class Reads { token, sequence, task };
/// The largest number that a file may give for one.
constexpr Reads last_of(Reads) { return Reads::task; }

/// What the gate leaves for backward. Rows are tokens, sequences (in room for T) or tasks.
template <class Score, Space S>
struct CompetitionState {
  MatrixView<Score, S> z;            // [rows, hidden or E] S₁v; of tokens: their side rows, not here
  MatrixView<Score, S> activation;   // [rows, hidden] SiLU(z + b₁); in a gradient: of z + b₁
  MatrixView<Score, S> logits;       // [rows, E]
  MatrixView<Score, S> p;            // [rows, E] φ
  MatrixView<Score, S> weights;      // [rows, E] ω
  MatrixView<Score, S> dp, dlogits;  // [rows, E] losses add to them
};

/// W is const in an adapter and mutable in its gradient.
template <class W, class Score, Space S = Space::host>
struct CompetitionGate {
  static constexpr GateFacts facts{Sparsity::dense, Slots::weights, false};
  static constexpr Space space = S;
  static constexpr bool can_be_by_task = true;  // where S reads the task: merges task by task
  using State = CompetitionState<Score, S>;

  MatrixView<W, S> S1;  // [hidden or E, d_in or dim]
  MatrixView<W, S> b1;  // [1, hidden]
  MatrixView<W, S> S2;  // [E, hidden], empty: S is linear
  MatrixView<W, S> b2;  // [1, E]
  MatrixView<W, S> M;   // [E, E]
  Competition form_of = Competition::learned;
  Reads reads = Reads::token;
  Pooling pooling = Pooling::mean;  // of sequences
  MatrixView<W, S> embedding{};     // [tasks, dim]

  LORAMIX_HD Index experts() const { return M.rows; }
  LORAMIX_HD Index hidden() const { return b1.cols; }
  /// 0 where S does not read the task.
  Index tasks() const { return reads == Reads::task ? embedding.rows : 0; }
  LORAMIX_HD TaskScorer<W, Score, S> scorer() const { return {embedding, S1, {}}; }

  MatrixView<W, S> side() const { return reads == Reads::task ? MatrixView<W, S>{} : S1; }
  void check(const char* op, const GateCall<S>& call) const {
    if (reads == Reads::task) detail::check_tasks(op, call, tasks());
    if (reads == Reads::sequence) SequenceRows<S>{call}.check(op);
  }
  State carve(Arena<S>& arena, Index tokens, bool training) const {
    const auto scores = [&](Index columns) { return arena.template matrix<Score>(room(tokens), columns); };
    State state;
    if (reads != Reads::token) state.z = scores(S1.rows);
    state.activation = scores(hidden());
    for (MatrixView<Score, S>* m : {&state.logits, &state.p, &state.weights}) *m = scores(experts());
    if (training) {
      state.dp = scores(experts());
      state.dlogits = scores(experts());
    }
    return state;
  }
  GateForm<Score, S> form(const State& state, const GateCall<S>& call, Index ranks) const {
    const Index n = rows(call);
    Groups<S> groups{};
    if (reads == Reads::task) groups = call.batch.tasks;
    if (reads == Reads::sequence && n != 0) groups = call.batch.sequences;
    return GroupExperts<Score, S>{state.weights.row_range(0, n), groups}.form(call.tokens, ranks);
  }
  GateGradient<Score, S> gradient(const State& state, const GateCall<S>& call) const {
    return {.weights = state.weights.row_range(0, rows(call))};
  }
  Scores<Score, S> scores(const State& state, MatrixView<Score, S>, MatrixView<Score, S>,
                          const GateCall<S>& call) const {
    const Index n = rows(call), trained = state.dp.data == nullptr ? 0 : n;
    return {.logits = state.logits.row_range(0, n),
            .p = state.p.row_range(0, n),
            .dlogits = state.dlogits.row_range(0, trained),
            .dp = state.dp.row_range(0, trained),
            .weights = state.weights.row_range(0, n),
            .by_token = reads == Reads::token || (reads == Reads::sequence && call.batch.sequences.per_token())};
  }

  template <class Backend>
  Index scratch(const Backend& be, Index tokens) const {
    const MatrixView<const Score, S> left{nullptr, room(tokens), experts()}, right{nullptr, room(tokens), hidden()};
    const Index a = scratch_bytes(be, TokenProduct<Score, Score, S>{left, left, {nullptr, experts(), experts()}});
    const Index b = scratch_bytes(be, TokenProduct<Score, Score, S>{left, right, {nullptr, experts(), hidden()}});
    return a > b ? a : b;
  }

  template <class Backend>
  void forward(const Backend& be, MatrixView<Score, S> h, const State& state, const GateCall<S>& call, Arena<S>) const {
    for_rows<S>(be, rows(call), forward_rows(h, state, call));
  }
  template <class Backend, class GradientGate>
  void backward(const Backend& be, MatrixView<Score, S> h, const State& state, const State& dstate,
                MatrixView<Score, S> dh, const GateCall<S>& call, const GradientGate& gradient, Into into,
                Arena<S> work) const {
    for_rows<S>(be, rows(call), backward_rows(h, state, dstate, dh, call));
    backward_rest(be, state, dstate, call, gradient, into, work);
  }

  bool by_token(const GateCall<S>&) const { return reads == Reads::token; }
  template <class Backend, class GradientGate>
  void backward_rest(const Backend& be, const State& state, const State& dstate, const GateCall<S>& call,
                     const GradientGate& gradient, Into into, Arena<S> work) const {
    if constexpr (!is_frozen<GradientGate>) {
      const Index n = rows(call);
      const auto used = [n](MatrixView<Score, S> m) { return m.row_range(0, n); };
      const Index read = form_of == Competition::identity ? 0 : n;  // M is not read: its gradient is 0
      add_product(be, dstate.weights.row_range(0, read), state.p.row_range(0, read), gradient.M, into, work);
      add_sum(be, used(dstate.logits), gradient.b2, into);
      if (S2.data != nullptr) {
        add_product(be, used(dstate.logits), used(state.activation), gradient.S2, into, work);
        add_sum(be, used(dstate.activation), gradient.b1, into);
      }
      if (reads == Reads::task) scorer().backward(be, dstate.z, gradient.scorer(), into);
    }
  }

  // Row bodies are public: nvcc takes no private type as a kernel's argument.
  struct Forward {
    CompetitionGate gate;
    SequenceRows<S> sequences;
    MatrixView<const Score, S> h;
    MatrixView<Score, S> z;
    State state;

    template <Team Tm>
    LORAMIX_HD void operator()(const Tm& team, Index t) const {
      const Index E = gate.experts(), hidden = gate.hidden();
      if (gate.reads == Reads::task) gate.scorer().logits(team, t, z.row(t));
      if (gate.reads == Reads::sequence) sequences.pool(team, t, h, MatrixView<W, S>{}, z);
      team.each(hidden, [&](Index i) { state.activation(t, i) = detail::silu(z(t, i) + widen<Score>(gate.b1(0, i))); });
      team.each(E, [&](Index e) {
        Score logit = widen<Score>(gate.b2(0, e));
        if (gate.S2.data == nullptr) logit += z(t, e);
        logit += SerialTeam{}.sum(hidden,
                                  [&](Index i) { return Score(widen<Score>(gate.S2(e, i)) * state.activation(t, i)); });
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
    SequenceRows<S> sequences;
    MatrixView<const Score, S> z;
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
        team.each(E, [&](Index e) { give(t, e, dstate.logits(t, e)); });
      } else {
        team.each(hidden, [&](Index i) {
          Score slope = Score(0);
          for (Index e = 0; e < E; ++e) slope += widen<Score>(gate.S2(e, i)) * dstate.logits(t, e);
          slope *= detail::silu_slope(z(t, i) + widen<Score>(gate.b1(0, i)));
          dstate.activation(t, i) = slope;
          give(t, i, slope);
        });
      }
      if (gate.reads == Reads::sequence) sequences.pool_backward(team, t, MatrixView<const Score, S>(dstate.z), dh);
    }

   private:
    /// dz(t, i).
    LORAMIX_HD void give(Index t, Index i, Score value) const {
      if (gate.reads == Reads::token)
        dh(t, i) += value;
      else
        dstate.z(t, i) = value;
    }
  };

  Forward forward_rows(MatrixView<Score, S> h, const State& state, const GateCall<S>& call) const {
    return {*this, {call, pooling}, h, reads == Reads::token ? h : state.z, state};
  }
  Backward backward_rows(MatrixView<Score, S> h, const State& state, const State& dstate, MatrixView<Score, S> dh,
                         const GateCall<S>& call) const {
    return {*this, {call, pooling}, reads == Reads::token ? h : state.z, state, dstate, dh};
  }

 private:
  Index rows(const GateCall<S>& call) const {
    if (reads == Reads::task) return embedding.rows;
    return reads == Reads::sequence ? SequenceRows<S>{call}.count() : call.tokens;
  }
  Index room(Index tokens) const { return reads == Reads::task ? embedding.rows : tokens; }
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
