/// MoRE's gate: every task chooses how many leading ranks of one LoRA it uses.
///
/// Computes:    p_τ = softmax(ℓ_τ) over r_max ranks (router/task.hpp), c = argmax ℓ_τ (ties to the smaller), r_τ = c + 1;
///              g(t, j) = [j ≤ r_τ] · law · m for tokens of task τ, j from 1, with
///                law   paper_linear r_τ/r_max, code_squared (j/r_max)², lr_linear and none 1
///                m     1 + p_c − stop(p_c): the value is 1, its gradient dp_c (raw_logit: dℓ_c) trains the selector
///              Ablations: `random` draws c uniformly per task and step while there is a key; `subset` opens the ranks with
///              p_j ≥ 1/r_max and the argmax instead of a prefix, r_τ is their number, and all their p_j get m's gradient.
/// Source:      MoRE (arXiv 2505.22694); MATH.md sections 3 and 4. What `random` and `subset` do exactly is ours.
/// Reads:       the scorer's e [tasks, d_in or r_max], W_g [r_max, d_in], b_g [1, r_max]; the batch's tasks, −1 = none.
/// Writes:      State: logits, p [tasks, r_max], count, multiplier [tasks], assigned.
/// Adds to:     the gradient gate's e, W_g, b_g, or assigns with Into::set.
/// Errors:      a batch that says no tasks, or another number of them.
/// Cost:        2·tasks·r_max·dim flop, whatever the number of tokens.
/// Determinism: chosen anew from the parameters in every forward, float logits compared: the same on every device where
///              logits agree. A NaN logit makes the task's output NaN.
/// Example:     tests/adapter/more.cpp
#pragma once
#include <loramix/core/matrix.hpp>
#include <loramix/router/task.hpp>
#include <loramix/router/top_k.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// What a rank is weighted with: the paper's equation, the authors' code, their words for learning rates, nothing.
enum class RankLaw { paper_linear, code_squared, lr_linear, none };
/// The largest number that a file may give for one.
constexpr RankLaw last_of(RankLaw) { return RankLaw::none; }
/// Which ranks a task uses.
enum class RankChoice { argmax, random, subset };
/// The largest number that a file may give for one.
constexpr RankChoice last_of(RankChoice) { return RankChoice::subset; }
/// What the straight-through multiplier's gradient reaches.
enum class StraightThrough { probability, raw_logit, none };
/// The largest number that a file may give for one.
constexpr StraightThrough last_of(StraightThrough) { return StraightThrough::none; }

/// The method and its ablations.
struct RankRule {
  RankLaw law = RankLaw::paper_linear;
  RankChoice choice = RankChoice::argmax;
  StraightThrough straight_through = StraightThrough::probability;

  template <class Self, class F>
  static void fields(Self& self, F&& f) {
    f("law", self.law);
    f("choice", self.choice);
    f("straight_through", self.straight_through);
  }
};

/// What lr_linear multiplies the gradients of rank j's row of A and column of B by (adapter/forward.hpp asks for it).
struct RankRatio {
  Index ranks = 1;
  bool on = false;
  LORAMIX_HD double operator()(Index j) const { return static_cast<double>(j + 1) / static_cast<double>(ranks); }
};

/// A prefix (or subset) of ranks per task.
template <class W, class Score, Space S = Space::host>
struct RankSelectorGate {
  static constexpr GateFacts facts{Sparsity::segments, Slots::prefix | Slots::subset | Slots::multiplier, false};
  static constexpr Space space = S;
  static constexpr bool by_task = true;  // one gate per task: merges task by task
  struct State {
    MatrixView<Score, S> logits, p;      // [tasks, r_max]
    MatrixView<std::int32_t, S> chosen;  // [tasks, 1] c
    VectorView<std::int32_t, S> count;   // [tasks] r_τ
    MatrixView<std::uint8_t, S> open;    // [tasks, r_max], of subsets
    VectorView<Score, S> multiplier;     // [tasks] law · m
    VectorView<Score, S> rank_scale;     // [r_max], of code_squared
    MatrixView<Score, S> dp, dlogits;    // [tasks, r_max] losses add to them
  };

  TaskScorer<W, Score, S> scorer;
  RankRule rule{};

  LORAMIX_HD Index tasks() const { return scorer.tasks(); }
  LORAMIX_HD Index ranks() const { return scorer.columns(); }
  MatrixView<W, S> side() const { return {}; }
  void check(const char* op, const GateCall<S>& call) const { detail::check_tasks(op, call, tasks()); }
  State carve(Arena<S>& arena, Index, bool training) const {
    const auto scores = [&] { return arena.template matrix<Score>(tasks(), ranks()); };
    State state;
    state.logits = scores();
    state.p = scores();
    state.chosen = arena.template matrix<std::int32_t>(tasks(), 1);
    state.count = arena.template vector<std::int32_t>(tasks());
    if (rule.choice == RankChoice::subset) state.open = arena.template matrix<std::uint8_t>(tasks(), ranks());
    state.multiplier = arena.template vector<Score>(tasks());
    if (rule.law == RankLaw::code_squared) state.rank_scale = arena.template vector<Score>(ranks());
    if (training) {
      state.dp = scores();
      state.dlogits = scores();
    }
    return state;
  }
  GateForm<Score, S> form(const State& state, const GateCall<S>& call, Index ranks) const {
    auto form = Multiplier<Score, S>{state.multiplier, call.batch.tasks}.form(call.tokens, ranks);
    form.rank_scale = state.rank_scale;
    if (rule.choice == RankChoice::subset) {
      form.subset = state.open;
      form.subset_groups = call.batch.tasks;
    } else {
      form.prefix = state.count;
      form.prefix_groups = call.batch.tasks;
    }
    return form;
  }
  GateGradient<Score, S> gradient(const State& state) const { return {.multiplier = state.multiplier}; }
  /// Rows are tasks, experts the ranks.
  Scores<Score, S> scores(const State& state, MatrixView<Score, S>, MatrixView<Score, S>) const {
    return {.logits = state.logits,
            .p = state.p,
            .dlogits = state.dlogits,
            .dp = state.dp,
            .ids = state.chosen,
            .weights = {state.multiplier.data, state.multiplier.size, 1},
            .chosen = state.chosen,
            .by_token = false};
  }

  /// r_τ of one task, as the next forward without draws will choose it. Allocates.
  Index chosen_rank(Index task) const requires(S == Space::host) {
    if (task < 0 || task >= tasks()) {
      fail(check::detail::about(ErrorCode::value, "chosen_rank", "task")
           << " is " << task << ", but there are " << tasks() << " tasks");
    }
    Buffer<std::byte> memory(Arena<>::with_alignment(carved_bytes<S>([&](Arena<>& a) { carve(a, 1, false); })));
    Arena<> arena{memory.data(), memory.size()};
    const State state = carve(arena, 1, false);
    Forward{*this, state, no_draws}(SerialTeam{}, task);
    return state.count[task];
  }

  template <class Backend>
  void forward(const Backend& be, MatrixView<Score, S>, const State& state, const GateCall<S>& call, Arena<S>) const {
    for_rows<S>(be, tasks(), Forward{*this, state, call.key});
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
    RankSelectorGate gate;
    State state;
    Key key;

    template <Team Tm>
    LORAMIX_HD void operator()(const Tm& team, Index task) const {
      const Index R = gate.ranks();
      gate.scorer.logits(team, task, state.logits.row(task));
      detail::softmax_row(team, R, state.logits.row(task), Score(1), state.p.row(task));
      team.once([&] { choose(task, R); });
      if (state.dp.data != nullptr) {
        team.each(R, [&](Index j) { state.dp(task, j) = state.dlogits(task, j) = Score(0); });
      }
      if (task != 0 || state.rank_scale.data == nullptr) return;
      team.each(R, [&](Index j) {
        const Score ratio = Score(j + 1) / Score(R);
        state.rank_scale[j] = ratio * ratio;
      });
    }

   private:
    LORAMIX_HD void choose(Index task, Index R) const {
      const Score* const logits = state.logits.row(task);
      const Score* const p = state.p.row(task);
      std::int32_t c = static_cast<std::int32_t>(detail::index_of(detail::next_choice(
          SerialTeam{}, R, detail::before_all, [&](Index j) { return static_cast<float>(logits[j]); })));
      if (gate.rule.choice == RankChoice::random && key.on) {
        const double u = draw_uniform(philox_key(key), Purpose::sampling, static_cast<std::uint64_t>(task), 0);
        c = static_cast<std::int32_t>(u * static_cast<double>(R));
      }
      Index count = Index{c} + 1;
      if (gate.rule.choice == RankChoice::subset) {
        count = 0;
        for (Index j = 0; j < R; ++j) {
          const bool open = j == c || p[j] >= Score(1) / Score(R);
          state.open(task, j) = open ? 1 : 0;
          count += open ? 1 : 0;
        }
      }
      state.chosen(task, 0) = c;
      state.count[task] = static_cast<std::int32_t>(count);
      state.multiplier[task] = gate.law_of(count) * (Score(1) + (p[c] - p[c]));  // NaN where p is
    }
  };

  struct Backward {
    RankSelectorGate gate;
    State state, dstate;

    template <Team Tm>
    LORAMIX_HD void operator()(const Tm& team, Index task) const {
      const StraightThrough through = gate.rule.straight_through;
      const Score dm = dstate.multiplier[task] * gate.law_of(state.count[task]);
      team.each(gate.ranks(), [&](Index j) {
        const Score mine = gate.is_chosen(state, task, j) ? dm : Score(0);
        dstate.p(task, j) = (through == StraightThrough::probability ? mine : Score(0)) +
                            (state.dp.data == nullptr ? Score(0) : state.dp(task, j));
        dstate.logits(task, j) = (through == StraightThrough::raw_logit ? mine : Score(0)) +
                                 (state.dlogits.data == nullptr ? Score(0) : state.dlogits(task, j));
      });
      detail::softmax_backward_row(team, gate.ranks(), state.p.row(task), dstate.p.row(task), Score(1),
                                   dstate.logits.row(task));
    }
  };

 private:
  LORAMIX_HD Score law_of(Index count) const {
    return rule.law == RankLaw::paper_linear ? Score(count) / Score(ranks()) : Score(1);
  }
  /// Whether rank j's score is one of those that the multiplier m of a task is made of.
  LORAMIX_HD bool is_chosen(const State& state, Index task, Index j) const {
    return rule.choice == RankChoice::subset ? state.open(task, j) != 0 : state.chosen(task, 0) == j;
  }
};

}  // namespace LORAMIX_ABI
}  // namespace loramix
