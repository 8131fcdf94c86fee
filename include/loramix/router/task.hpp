/// Gates of the task: scores from a learned embedding of every task, and the softmax gate over experts made of them.
///
/// Computes:    TaskScorer: ℓ_τ = e_τ W_gᵀ (+ b_g), or ℓ_τ = e_τ where there is no W_g (a free table of logits).
///              TaskSoftmaxGate: g_τ = softmax(ℓ_τ / τ) over the experts, for all tokens of task τ.
///              dℓ = p ∘ (dp − ⟨p, dp⟩) / τ,  dW_g += Σ_τ dℓ_τᵀ e_τ,  db_g += Σ_τ dℓ_τ,  de_τ += dℓ_τ W_g.
/// Source:      MATH.md section 2 (V = a task embedding); MOELoRA, Liu et al. 2023 (arXiv 2310.18339), equations 7 and 8.
/// Reads:       e [tasks, dim], W_g [E, dim], b_g [1, E]; the batch's tasks: groups of tokens, −1 = none.
/// Writes:      State: logits, weights [tasks, E], assigned. A token of no task gets no expert.
/// Adds to:     the gradient gate's e, W_g, b_g, or assigns with Into::set.
/// Errors:      a batch that says no tasks, or another number of them; a temperature that is not above 0 and finite.
/// Cost:        2·tasks·E·dim flop, whatever the number of tokens; State of tasks·E scores.
/// Determinism: a task depends on itself only; gradients sum tokens, then tasks, in a fixed order.
/// Example:     tests/adapter/moe_lora.cpp
#pragma once
#include <loramix/gate/softmax.hpp>
#include <loramix/ops/gate_rows.hpp>
#include <loramix/ops/small_product.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

namespace detail {

/// Refuses a batch whose tokens do not say which of `tasks` tasks they belong to; ids are checked with the form.
template <Space S>
void check_tasks(const char* op, const GateCall<S>& call, Index tasks) {
  if (call.batch.tasks.per_token()) {
    fail(check::detail::about(ErrorCode::value, op, "tasks")
         << " are missing: this gate is one of " << tasks
         << " tasks; give .tasks, Groups::by_id or Groups::by_segment, for the " << call.tokens << " tokens");
  }
  check::same(op, "tasks", "count", call.batch.tasks.count, "the number of tasks of the adapter", tasks);
}

}  // namespace detail

/// The scores of every task. W is const in an adapter and mutable in its gradient.
template <class W, class Score, Space S = Space::host>
struct TaskScorer {
  MatrixView<W, S> embedding;     // [tasks, dim]
  MatrixView<W, S> projection{};  // [n, dim], empty: the embedding is the logits
  MatrixView<W, S> bias{};        // [1, n] or empty

  LORAMIX_HD Index tasks() const { return embedding.rows; }
  /// n.
  LORAMIX_HD Index columns() const { return projection.data == nullptr ? embedding.cols : projection.rows; }

  /// logits [n] of one task.
  template <Team Tm>
  LORAMIX_HD void logits(const Tm& team, Index task, Score* out) const {
    if (projection.data == nullptr) {
      team.each(embedding.cols, [&](Index e) { out[e] = widen<Score>(embedding(task, e)); });
      return;
    }
    for (Index e = 0; e < projection.rows; ++e) {
      const Score sum = team.sum(
          embedding.cols, [&](Index c) { return widen<Score>(embedding(task, c)) * widen<Score>(projection(e, c)); });
      team.once([&] { out[e] = bias.data == nullptr ? sum : sum + widen<Score>(bias(0, e)); });
    }
  }

  /// Gradients from those of the logits [tasks, n].
  template <class Backend, class G>
  void backward(const Backend& be, MatrixView<Score, S> dlogits, const TaskScorer<G, Score, S>& gradient,
                Into into) const {
    if (projection.data == nullptr) {
      for_rows<S>(be, tasks(), detail::StoreRow<Score, G, S>{dlogits, gradient.embedding, into});
      return;
    }
    using ByTask = detail::SmallProduct<Score, W, G, S, Major::row>;
    using ByExpert = detail::SmallProduct<Score, W, G, S, Major::column>;
    for_rows<S>(be, tasks(), ByTask{dlogits, projection, gradient.embedding, into});
    for_rows<S>(be, columns(), ByExpert{dlogits.transposed(), embedding, gradient.projection, into});
    if (bias.data == nullptr) return;
    execute(be, ColumnSum<Score, G, S>{dlogits, {}, gradient.bias, into}, Arena<S>{});
  }
};

/// g = softmax of the task's scores.
template <class W, class Score, Space S = Space::host>
struct TaskSoftmaxGate {
  static constexpr GateFacts facts{Sparsity::dense, Slots::weights, false};
  static constexpr Space space = S;
  static constexpr bool by_task = true;  // one gate per task: merges task by task
  struct State {
    MatrixView<Score, S> logits, weights;  // [tasks, E]
    MatrixView<Score, S> dp, dlogits;      // [tasks, E] losses add to them
  };

  TaskScorer<W, Score, S> scorer;
  Score temperature = Score(1);

  Index tasks() const { return scorer.tasks(); }
  MatrixView<W, S> side() const { return {}; }
  void check(const char* op, const GateCall<S>& call) const {
    check::above_zero(op, "temperature", temperature);
    detail::check_tasks(op, call, tasks());
  }
  State carve(Arena<S>& arena, Index, bool training) const {
    const auto scores = [&] { return arena.template matrix<Score>(tasks(), scorer.columns()); };
    State state;
    state.logits = scores();
    state.weights = scores();
    if (training) {
      state.dp = scores();
      state.dlogits = scores();
    }
    return state;
  }
  GateForm<Score, S> form(const State& state, const GateCall<S>& call, Index ranks) const {
    return GroupExperts<Score, S>{state.weights, call.batch.tasks}.form(call.tokens, ranks);
  }
  GateGradient<Score, S> gradient(const State& state) const { return {.weights = state.weights}; }
  /// Rows are tasks.
  Scores<Score, S> scores(const State& state, MatrixView<Score, S>, MatrixView<Score, S>) const {
    return {.logits = state.logits,
            .p = state.weights,
            .dlogits = state.dlogits,
            .dp = state.dp,
            .weights = state.weights,
            .by_token = false};
  }

  template <class Backend>
  void forward(const Backend& be, MatrixView<Score, S>, const State& state, const GateCall<S>&, Arena<S>) const {
    for_rows<S>(be, tasks(), Forward{*this, state});
  }
  template <class Backend, class GradientGate>
  void backward(const Backend& be, MatrixView<Score, S>, const State& state, const State& dstate, MatrixView<Score, S>,
                const GateCall<S>&, const GradientGate& gradient, Into into, Arena<S>) const {
    if constexpr (!is_frozen<GradientGate>) {
      for_rows<S>(be, tasks(), Backward{*this, state, dstate});
      scorer.backward(be, dstate.logits, gradient.scorer, into);
    }
  }

  // Row bodies; public, for nvcc takes no private type as a kernel's argument.
  struct Forward {
    TaskSoftmaxGate gate;
    State state;

    template <Team Tm>
    LORAMIX_HD void operator()(const Tm& team, Index task) const {
      gate.scorer.logits(team, task, state.logits.row(task));
      detail::softmax_row(team, state.logits.cols, state.logits.row(task), gate.temperature, state.weights.row(task));
      if (state.dp.data == nullptr) return;
      team.each(state.dp.cols, [&](Index e) { state.dp(task, e) = state.dlogits(task, e) = Score(0); });
    }
  };

  struct Backward {
    TaskSoftmaxGate gate;
    State state, dstate;

    template <Team Tm>
    LORAMIX_HD void operator()(const Tm& team, Index task) const {
      team.each(state.logits.cols, [&](Index e) {
        if (state.dp.data != nullptr) dstate.weights(task, e) += state.dp(task, e);
        dstate.logits(task, e) = state.dlogits.data == nullptr ? Score(0) : state.dlogits(task, e);
      });
      detail::softmax_backward_row(team, state.logits.cols, state.weights.row(task), dstate.weights.row(task),
                                   gate.temperature, dstate.logits.row(task));
    }
  };
};

}  // namespace LORAMIX_ABI
}  // namespace loramix
