/// Folding in a mixture whose gate depends on the token: by its average gate, with the error that this makes.
///
/// Computes:    ḡ = the mean of g(t, ·) over the valid tokens of x (a closed rank counts as 0) and W ← round(W + s B diag(ḡ) A),
///              as adapter/merge.hpp. Reports over the same tokens, without dropout, ‖ΔY − X ΔW̄ᵀ‖_F = (Σ_t ‖s B (u_t ∘ (g_t
///              − ḡ))‖²)^½ and ‖ΔY‖_F.
/// Source:      MATH.md section 4, LoRAMoE ("average gate over given valid tokens, with its error").
/// Reads:       the adapter, x [T, d_in] and what a forward is told of it: sequences, tasks, labels, valid, selection bias.
/// Writes:      W [d_out, d_in] of any storage type, in place; the token keeps the bytes there were.
/// Errors:      shape, null, alias; parameters, gates or activations of valid tokens that are not finite; no valid token; a
///              key or a reserve: before any write. A gate that is the same for all tokens does not compile: merge is exact.
/// Cost:        2·R·d_in·d_out flop in double, and a forward of x: 2·T·R·(d_in + 2·d_out) flop; T·(R_a + router) values.
/// Determinism: tokens are summed in their order, every element of W in rank order, whatever the threads.
/// Example:     tests/adapter/average_merge.cpp
#pragma once
#include <loramix/adapter/forward.hpp>
#include <loramix/adapter/merge.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// What merge_average returns.
template <class T>
struct AverageMerged {
  Merged<T> merged;          // undo(), and how the merged weights were rounded
  double error = 0;          // ‖ΔY − X ΔW̄ᵀ‖_F
  double norm = 0;           // ‖ΔY‖_F
  Index tokens = 0;          // valid ones
  Buffer<double> gate = {};  // [R] ḡ
};

namespace detail {

/// g [T, R] of the valid tokens of a call, and what they are gated with: U [T, R_a], in double.
template <class A>
struct TokenGates {
  using T = ProductOf<A>;
  using Score = typename T::Score;
  static constexpr Space space = Space::host;

  template <class Backend>
  TokenGates(const Backend& be, const A& adapter, MatrixView<const typename T::X> x,
             const ForwardOptions<space>& options)
      : call{x.rows,
             {options.sequences, options.tasks, options.labels, options.valid},
             no_draws,
             options.selection_bias},
        kept(bytes_for<space>([&](Arena<>& arena) { carve_saved(arena, adapter, x.rows, true, false); })),
        scratch(workspace_bytes(be, adapter, x.rows)) {
    const auto gate = adapter.gate();
    if constexpr (requires { gate.check("merge_average", call); }) gate.check("merge_average", call);
    Arena<> arena{kept.data(), kept.size()};
    const Arena<> work{scratch.data(), scratch.size()};
    saved = carve_saved(arena, adapter, x.rows, true, false);
    execute(be, typename T::ShrinkOp{adapter.A(), T::side(gate), x, {}, saved.u, saved.h}, work);
    if constexpr (T::computed) run_gate(be, gate, saved.h, saved.state, call, work);
    form = T::form(gate, saved.state, call, adapter.B().cols);
    check_form("merge_average", form, x.rows, adapter.B().cols);
  }
  bool valid(Index t) const { return call.batch.is_valid(t); }
  /// f(rank, g) for every rank.
  template <class F>
  void each(Index t, const F& f) const {
    const GateRow<typename T::Acc, Score, space> row(form, t);
    for (Index j = 0; j < form.ranks; ++j) {
      const Index e = form.expert_of(j);
      f(j, row.open(j, e) ? widen<double>(row.factor(j, e)) : 0.0);
    }
  }
  double u(Index t, Index j) const { return widen<double>(saved.u(t, j % saved.u.cols)); }

  GateCall<space> call;
  Buffer<std::byte> kept, scratch;
  Saved<A> saved;
  GateForm<Score, space> form;
};

/// ḡ, and how many tokens it is of.
template <class Gates>
Buffer<double> average_gate(const Gates& gates, Index& tokens) {
  const char* const op = "merge_average";
  Buffer<double> mean(gates.form.ranks);
  for (Index t = 0; t < gates.form.tokens; ++t) {
    if (!gates.valid(t)) continue;
    ++tokens;
    gates.each(t, [&](Index j, double g) {
      if (!is_finite(g) || !is_finite(gates.u(t, j))) {
        fail(check::detail::about(ErrorCode::value, op, is_finite(g) ? "x" : "the gate")
             << " of token " << t << " is not finite");
      }
      mean[j] += g;
    });
  }
  if (tokens == 0) fail(check::detail::about(ErrorCode::value, op, "x") << " has no valid token to average over");
  for (double& g : mean) g /= static_cast<double>(tokens);
  return mean;
}

}  // namespace detail

/// Folds the adapter into `weights` [d_out, d_in] with the gate that the tokens of x have on average.
template <class Backend, ProductAdapter A, class T>
  requires(A::space == Space::host)
AverageMerged<T> merge_average(const Backend& be, const A& adapter, MatrixView<T> weights,
                               MatrixView<const typename A::precision::activation> x,
                               const ForwardOptions<Space::host>& options = {}) {
  static_assert(!decltype(adapter.gate())::facts.token_invariant,
                "loramix: this adapter's gate is the same for all tokens: merge(be, adapter, weights) is exact");
  const char* const op = "merge_average";
  check::view(op, "x", x);
  check::same(op, "x", "columns", x.cols, "d_in of the adapter", adapter.A().cols);
  detail::check_optional(op, "valid", options.valid, "the number of tokens", x.rows);
  if (options.save != nullptr || options.key.on) {
    fail(check::detail::about(ErrorCode::value, op, options.key.on ? "key" : "save")
         << " is given, but an average is of inference: nothing is drawn or saved");
  }
  detail::check_merge(op, adapter, weights);
  check::disjoint(op, "weights", weights, "x", x);
  const detail::TokenGates<A> gates(be, adapter, x, options);
  AverageMerged<T> average{Merged<T>(weights, {})};
  average.gate = detail::average_gate(gates, average.tokens);

  const auto B = adapter.B();
  Matrix<double> lanes(be.lanes(), 2 * B.rows), squares(x.rows, 2);
  be.run(x.rows, [&](Index t, Index lane) {
    if (!gates.valid(t)) return;
    double* const delta = lanes.view().row(lane);
    double* const gap = delta + B.rows;
    for (Index o = 0; o < 2 * B.rows; ++o) delta[o] = 0;
    gates.each(t, [&](Index j, double g) {
      const double with = g * gates.u(t, j), beyond = (g - average.gate[j]) * gates.u(t, j);
      for (Index o = 0; o < B.rows; ++o) {
        delta[o] += widen<double>(B(o, j)) * with;
        gap[o] += widen<double>(B(o, j)) * beyond;
      }
    });
    for (Index o = 0; o < B.rows; ++o) {
      squares(t, 0) += delta[o] * delta[o];
      squares(t, 1) += gap[o] * gap[o];
    }
  });
  double norm = 0, error = 0;
  for (Index t = 0; t < x.rows; ++t) {
    norm += squares(t, 0);
    error += squares(t, 1);
  }
  average.norm = std::fabs(adapter.scale()) * std::sqrt(norm);
  average.error = std::fabs(adapter.scale()) * std::sqrt(error);
  detail::merge_product(be, adapter.A(), B, VectorView<const double>(average.gate.view()), adapter.scale(), weights,
                        average.merged.report);
  detail::finish(average.merged.report, weights.rows * weights.cols);
  return average;
}
/// The same for an owning matrix.
template <class Backend, ProductAdapter A, class T>
AverageMerged<T> merge_average(const Backend& be, const A& adapter, Matrix<T>& weights,
                               MatrixView<const typename A::precision::activation> x,
                               const ForwardOptions<Space::host>& options = {}) {
  return merge_average(be, adapter, weights.view(), x, options);
}

}  // namespace LORAMIX_ABI
}  // namespace loramix
