/// Shapley values of experts: what each contributes to a game v(C) over coalitions of them.
///
/// Computes:    exact: φ_e = Σ_C |C|!(n−|C|−1)!/n! (v(C ∪ e) − v(C)) over all 2^n coalitions; sampled: the mean marginal
///              contribution over random orders, with its standard error. Σφ = v(all) − v(∅).
///              closed form for v(C) = ‖q‖² − ‖q − Σ_{e∈C} h_e‖², h_e an expert's weighted part of ΔY:
///              φ_e = 2⟨q,h_e⟩ − ⟨h_e, Σ_j h_j⟩; in rank space, token by token, without [T, d_out] tensors:
///              φ_{t,e} = Σ_{j in e} ũ_j (2 z_j − s² (K ũ)_j), z = s q B, K = BᵀB, ũ = U ∘ g (⟨⟩ over outputs).
///              shapley_loss: mean over valid tokens of KL(softmax(φ̂/τ) ‖ softmax(ℓ)), φ̂ = φ / its unbiased standard
///              deviation over experts, detached; dℓ = (softmax(ℓ) − softmax(φ̂/τ))/T. Experts that all contribute the
///              same give φ̂ = 0.
/// Source:      MATH.md section 3. Shapley 1953; sampling: Castro et al. 2009. The loss is ours.
/// Reads:       v: any callable from a coalition (bit e of std::uint64_t) to double; u [T, R_a], a gate's form, B [d_out, R]
///              rank-major, q [T, d_out]; φ [T, E], a Scores.
/// Writes:      φ [E] or [T, E], standard errors [E], assigned; the value (ops/loss.hpp).
/// Adds to:     Scores::dlogits [T, E].
/// Errors:      more than 16 experts (exact) or 63 (sampled), fewer than 2 orders; τ or 1/τ that is not above 0 and finite as
///              a score; shapes; small workspace.
/// Cost:        exact 2^n calls of v, sampled orders·n; rank space 2·T·R·d_out + 2·T·R² + 2·R²·d_out flop,
///              shapley_scratch_bytes.
/// Determinism: sampled: a pure function of the key. Rank space: a row depends on its own row only.
/// Example:     tests/ops/shapley.cpp
#pragma once
#include <cmath>

#include <loramix/core/draws.hpp>
#include <loramix/ops/gate_rows.hpp>
#include <loramix/ops/loss.hpp>
#include <loramix/ops/shrink.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// φ [n] of v over all coalitions; v is called once for each.
template <class Game>
void shapley_exact(Index experts, Game&& v, VectorView<double> phi) {
  const char* const op = "shapley_exact";
  check::at_least(op, "experts", experts, 1);
  if (experts > 16) {
    fail(check::detail::about(ErrorCode::value, op, "experts") << " is " << experts << ", must be at most 16: sample");
  }
  check::view(op, "phi", phi);
  check::same(op, "phi", "size", phi.size, "the number of experts", experts);
  double share[17] = {};  // of a coalition of c without e: c!(n−c−1)!/n!
  share[0] = 1 / static_cast<double>(experts);
  for (Index c = 1; c < experts; ++c) {
    share[c] = share[c - 1] * static_cast<double>(c) / static_cast<double>(experts - c);
  }
  for (Index e = 0; e < experts; ++e) phi[e] = 0;
  for (std::uint64_t coalition = 0; coalition < std::uint64_t{1} << experts; ++coalition) {
    Index members = 0;
    for (Index e = 0; e < experts; ++e) members += coalition >> e & 1 ? 1 : 0;
    const double value = v(coalition);
    for (Index e = 0; e < experts; ++e) {
      phi[e] += coalition >> e & 1 ? share[members - 1] * value : -share[members] * value;
    }
  }
}

/// φ [n] and its standard error [n] from `orders` random orders of the experts.
template <class Game>
void shapley_sampled(Index experts, Game&& v, Index orders, const Key& key, VectorView<double> phi,
                     VectorView<double> standard_error) {
  const char* const op = "shapley_sampled";
  check::at_least(op, "experts", experts, 1);
  check::at_least(op, "orders", orders, 2);
  if (experts > 63) {
    fail(check::detail::about(ErrorCode::value, op, "experts") << " is " << experts << ", must be at most 63");
  }
  check::view(op, "phi", phi);
  check::view(op, "standard_error", standard_error);
  check::same(op, "phi", "size", phi.size, "the number of experts", experts);
  check::same(op, "standard_error", "size", standard_error.size, "the number of experts", experts);
  const std::uint64_t philox = philox_key(key);
  const double nobody = v(std::uint64_t{0});
  for (Index e = 0; e < experts; ++e) phi[e] = standard_error[e] = 0;
  for (Index m = 0; m < orders; ++m) {
    Index order[63];
    for (Index e = 0; e < experts; ++e) order[e] = e;
    for (Index i = experts - 1; i > 0; --i) {  // Fisher and Yates
      const double u = draw_uniform(philox, Purpose::sampling, static_cast<std::uint64_t>(m), i);
      const Index j = static_cast<Index>(u * static_cast<double>(i + 1));
      const Index swap = order[i];
      order[i] = order[j];
      order[j] = swap;
    }
    std::uint64_t coalition = 0;
    double before = nobody;
    for (Index i = 0; i < experts; ++i) {
      const Index e = order[i];
      coalition |= std::uint64_t{1} << e;
      const double now = v(coalition), gain = now - before, off = gain - phi[e];
      before = now;
      phi[e] += off / static_cast<double>(m + 1);  // Welford: standard_error holds Σ (gain − mean)²
      standard_error[e] += off * (gain - phi[e]);
    }
  }
  const double n = static_cast<double>(orders);
  for (Index e = 0; e < experts; ++e) standard_error[e] = std::sqrt(standard_error[e] / ((n - 1) * n));
}

/// φ_e = 2⟨q,h_e⟩ − Σ_j ⟨h_e,h_j⟩ from inner products: with_q [E], gram [E, E].
template <class T>
void shapley_closed_form(VectorView<T> with_q, MatrixView<T> gram, VectorView<std::remove_const_t<T>> phi) {
  const char* const op = "shapley_closed_form";
  check::view(op, "with_q", with_q);
  check::shape(op, "gram", gram, "the number of experts", with_q.size, "the number of experts", with_q.size);
  check::view(op, "phi", phi);
  check::same(op, "phi", "size", phi.size, "the number of experts", with_q.size);
  for (Index e = 0; e < phi.size; ++e) {
    std::remove_const_t<T> sum = 2 * with_q[e];
    for (Index j = 0; j < phi.size; ++j) sum -= gram(e, j);
    phi[e] = sum;
  }
}

namespace detail {

/// Memory of the rank-space form.
template <class Acc, Space S>
struct ShapleyScratch {
  MatrixView<Acc, S> gated;   // [T, R] ũ
  MatrixView<Acc, S> with_q;  // [T, R] q B
  MatrixView<Acc, S> inner;   // [R, R] BᵀB
  MatrixView<Acc, S> pull;    // [T, R] ũ BᵀB
};
template <class Acc, Space S>
ShapleyScratch<Acc, S> carve_shapley(Arena<S>& arena, Index tokens, Index ranks) {
  ShapleyScratch<Acc, S> s;
  s.gated = arena.template matrix<Acc>(tokens, ranks);
  s.with_q = arena.template matrix<Acc>(tokens, ranks);
  s.inner = arena.template matrix<Acc>(ranks, ranks);
  s.pull = arena.template matrix<Acc>(tokens, ranks);
  return s;
}

/// Row body: φ of a token from its rank-space rows.
template <class Acc, class Score, Space S>
struct ShapleyRow {
  GateForm<Score, S> gate;
  ShapleyScratch<Acc, S> s;
  Acc linear, square;  // 2·s·(factor of q), s²
  MatrixView<Score, S> phi;

  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index t) const {
    team.each(phi.cols, [&](Index e) {
      Acc sum = Acc(0);
      for (Index j = gate.expert_begin(e); j < gate.expert_begin(e + 1); ++j) {
        sum += s.gated(t, j) * (linear * s.with_q(t, j) - square * s.pull(t, j));
      }
      phi(t, e) = Score(sum);
    });
  }
};

/// Row body: terms(t) = KL, 1; and the gradient where it is wanted.
template <class Score, Space S>
struct ShapleyTerms {
  Scores<Score, S> scores;
  MatrixView<const Score, S> phi;  // [T, E]
  Score temperature;
  MatrixView<Score, S> terms;  // [T, 2]
  static constexpr double rounding = 16 * detail::rounding_of<Score>();

  /// ln softmax(φ̂/τ)_e is scale·φ_e − target, ln softmax(ℓ)_e is ℓ_e − own.
  struct Logs {
    Score scale, target, own;
  };
  template <Team Tm>
  LORAMIX_HD Logs logs(const Tm& team, Index t) const {
    using std::exp;
    using std::log;
    using std::sqrt;
    const Index E = phi.cols;
    const auto value = [&](Index e) { return phi(t, e); };
    const auto spread = squared_variation<Score>(team, E, value, [](Index) { return true; });
    const Score deviation = Score(sqrt(spread.variance));
    const Score largest = team.maximum(E, [&](Index e) { return phi(t, e) < Score(0) ? -phi(t, e) : phi(t, e); });
    // Below this all are equal but for rounding.
    const bool differ = deviation > Score(rounding) * largest;
    Logs out;
    out.scale = differ ? Score(1) / (deviation * temperature) : Score(0);
    const auto log_sum = [&](const auto& of) {
      const Score top = team.maximum(E, of);
      return top + Score(log(team.sum(E, [&](Index e) { return Score(exp(of(e) - top)); })));
    };
    out.target = log_sum([&](Index e) { return out.scale * phi(t, e); });
    out.own = log_sum([&](Index e) { return scores.logits(t, e); });
    return out;
  }

  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index t) const {
    using std::exp;
    if (!counts(scores.valid, t)) {
      team.each(2, [&](Index c) { terms(t, c) = Score(0); });
      return;
    }
    const Logs of = logs(team, t);
    const Score sum = team.sum(phi.cols, [&](Index e) {
      const Score log_target = of.scale * phi(t, e) - of.target;
      return Score(exp(log_target)) * (log_target - (scores.logits(t, e) - of.own));
    });
    team.once([&] {
      terms(t, 0) = sum;
      terms(t, 1) = Score(1);
    });
  }
};
template <class Score, Space S>
struct ShapleySlopes {
  ShapleyTerms<Score, S> forward;
  MatrixView<const Score, S> sums;  // [1, 2]
  Score weight;

  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index t) const {
    using std::exp;
    if (!counts(forward.scores.valid, t)) return;
    const auto of = forward.logs(team, t);
    const Score each = weight / sums(0, 1);
    team.each(forward.phi.cols, [&](Index e) {
      const Score target = exp(of.scale * forward.phi(t, e) - of.target),
                  own = exp(forward.scores.logits(t, e) - of.own);
      forward.scores.dlogits(t, e) += each * (own - target);
    });
  }
};

template <class Backend, class Acc, class W, class Y, Space S>
Index shapley_stage_bytes(const Backend& be, MatrixView<const W, S> Bt, MatrixView<const Y, S> q,
                          const ShapleyScratch<Acc, S>& s) {
  const Index a = scratch_bytes(be, make_shrink(Bt, q, s.with_q)), b = scratch_bytes(be, make_shrink(Bt, Bt, s.inner)),
              c = scratch_bytes(be, make_shrink(s.inner, s.gated, s.pull));
  return a > b ? (a > c ? a : c) : (b > c ? b : c);
}

}  // namespace detail

/// Bytes of workspace that shapley_rows takes.
template <class Acc, class Backend, class W, class Y, Space S>
Index shapley_scratch_bytes(const Backend& be, MatrixView<W, S, Major::column> B, MatrixView<Y, S> q) {
  Arena<S> counter = Arena<S>::counting();
  const auto scratch = detail::carve_shapley<Acc>(counter, q.rows, B.cols);
  const MatrixView<const std::remove_const_t<W>, S> Bt = B.transposed();
  const MatrixView<const std::remove_const_t<Y>, S> target = q;
  return Arena<S>::with_alignment(counter.used() + detail::shapley_stage_bytes(be, Bt, target, scratch));
}

/// φ [T, E] of every token, in rank space; the target is factor·q: −1 with q = dY asks what lowers the loss.
template <class Backend, class Acc, class Score, class W, class Y, Space S>
void shapley_rows(const Backend& be, MatrixView<Acc, S> u, const GateForm<Score, S>& gate,
                  MatrixView<W, S, Major::column> B, double scale, MatrixView<Y, S> q, double factor,
                  MatrixView<Score, S> phi, Arena<S> work) {
  using Sum = std::remove_const_t<Acc>;
  const char* const op = "shapley_rows";
  const MatrixView<const std::remove_const_t<W>, S> Bt = B.transposed();
  const MatrixView<const std::remove_const_t<Y>, S> target = q;
  check::view(op, "u", u);
  check::view(op, "B", B);
  check::shape(op, "q", q, "the number of tokens", u.rows, "d_out of B", B.rows);
  check::shape(op, "phi", phi, "the number of tokens", u.rows, "the number of experts", gate.experts);
  check_form(op, gate, u.rows, B.cols);
  detail::check_shared(op, u.cols, B.cols, gate.experts, gate.rank_offsets != nullptr);
  work.require(op, "work", shapley_scratch_bytes<Sum>(be, B, q) - Arena<S>::alignment);
  const auto scratch = detail::carve_shapley<Sum>(work, u.rows, B.cols);
  for_rows<S>(be, u.rows, detail::ApplyGate<Sum, Score, S>{u, gate, scratch.gated});
  detail::run_checked(be, make_shrink(Bt, target, scratch.with_q), work);
  detail::run_checked(be, make_shrink(Bt, Bt, scratch.inner), work);
  detail::run_checked(be, make_shrink(scratch.inner, scratch.gated, scratch.pull), work);
  const Sum s = static_cast<Sum>(scale);
  for_rows<S>(be, u.rows,
              detail::ShapleyRow<Sum, Score, S>{gate, scratch, Sum(2) * s * static_cast<Sum>(factor), s * s, phi});
}

/// Options of shapley_loss.
template <class Score, Space S = Space::host>
struct ShapleyLossOptions {
  double weight = 1;
  double temperature = 1;        // τ_S
  VectorView<Score, S> value{};  // [1]
};

/// Trains a router's logits towards φ [T, E], which is constant; adds to Scores::dlogits.
template <class Backend, ScoreSource F>
loss_value_t<score_t<F>, space_of<F>> shapley_loss(const Backend& be, const F& from,
                                                   MatrixView<const score_t<F>, space_of<F>> phi,
                                                   const ShapleyLossOptions<score_t<F>, space_of<F>>& options,
                                                   Arena<space_of<F>> work) {
  using Score = score_t<F>;
  constexpr Space S = space_of<F>;
  const char* const op = "shapley_loss";
  const Scores<Score, S>& scores = detail::source_of<F>::scores(from);
  detail::check_scores(op, "logits", scores.logits, "dlogits", scores.dlogits, options.weight, scores.valid);
  const Score temperature = static_cast<Score>(options.temperature);
  check::above_zero(op, "temperature", temperature);
  check::above_zero(op, "1 / temperature", Score(1) / temperature);
  check::shape(op, "phi", phi, "the rows of the logits", scores.logits.rows, "the number of experts",
               scores.logits.cols);
  if (options.weight != 0) check::disjoint(op, "dlogits", scores.dlogits, "phi", phi);
  detail::check_value_place(op, options.value);
  const auto scratch = detail::loss_scratch<Score>(op, work, phi.rows, 1, 2, 0);
  const detail::ShapleyTerms<Score, S> terms{scores, phi, temperature, scratch.terms};
  for_rows<S>(be, phi.rows, terms);
  detail::sum_terms(be, scratch);
  const auto place = detail::value_place(scratch, options.value);
  for_rows<S>(be, 1, detail::MeanValue<Score, S>{scratch.sums, Score(1), place});
  if (options.weight != 0) {
    for_rows<S>(be, phi.rows, detail::ShapleySlopes<Score, S>{terms, scratch.sums, static_cast<Score>(options.weight)});
  }
  return detail::returned(place, options.value);
}

}  // namespace LORAMIX_ABI
}  // namespace loramix
