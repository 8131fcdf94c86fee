/// Losses that keep experts evenly used, of one layer.
///
/// Computes:    balance: κ Σ_i f_i P_i, P_i the mean of p before top-k, f from counts before capacity, constant:
///                switch_transformer  f = count/T,     κ = E, top-1 only     1 at balance
///                mixtral             f = count/T,     κ = E                 k at balance
///                mola                f = count/(kT),  κ = E                 1 at balance
///                importance_cv2      CV² of Σ_t p                           0 at balance
///              localised (LoRAMoE): CV² of all Q_{b,e} = (1 ± δ) Σ_{t in b} p_{t,e}, + where (e < ⌊E/2⌋ and type_b = 1)
///                or (e ≥ ⌊E/2⌋ and type_b = 0), over the sequences b that hold a valid token.
///              sequence-wise (DeepSeek): mean over those sequences of Σ_i f_i P_i, f_i = E·count_i/(k·T_b) constant.
/// Source:      MATH.md section 5; Fedus et al. 2021, Jiang et al. 2024, Gao et al. 2024, Shazeer et al. 2017, Dou et al.
///              2024, DeepSeek-AI 2024.
/// Reads:       Scores: p [T, E], chosen [T, k], valid [T]; counts [E + 1] of expert_counts, sequences, types [sequences].
/// Writes:      the value (ops/loss.hpp).
/// Adds to:     Scores::dp [T, E].
/// Errors:      shapes; switch_transformer with k ≠ 1; nothing chosen and no counts; small workspace.
/// Cost:        O(T·E·k); loss_workspace_bytes.
/// Determinism: ops/loss.hpp
/// Example:     tests/ops/losses.cpp
#pragma once
#include <loramix/ops/loss.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// The forms of balance_loss.
enum class Balance { switch_transformer, mixtral, mola, importance_cv2 };

/// counts: of expert_counts, perhaps summed over ranks by the caller; empty: this batch's own.
template <class Score, Space S = Space::host>
struct BalanceOptions {
  Balance form = Balance::mixtral;
  double weight = 1;
  VectorView<const Score, S> counts{};  // [E + 1]
  VectorView<Score, S> value{};         // [1]
};
/// sequences: default the batch's. types: 1 = knowledge kept by the first half of the experts, 0 = the other half's tasks.
template <class Score, Space S = Space::host>
struct LocalisedOptions {
  double weight = 1;
  double delta = 0.1;
  VectorView<const std::int32_t, S> types{};  // [sequences]
  Groups<S> sequences{};
  VectorView<Score, S> value{};  // [1]
};
/// sequences: default the batch's.
template <class Score, Space S = Space::host>
struct SequenceBalanceOptions {
  double weight = 1;
  Groups<S> sequences{};
  VectorView<Score, S> value{};  // [1]
};

namespace detail {

/// Row body: terms(t) = p, how often each expert was chosen, and 1; zeros where t does not count.
template <class Score, Space S>
struct BalanceTerms {
  Scores<Score, S> scores;
  MatrixView<Score, S> terms;  // [T, 2E + 1]

  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index t) const {
    const Index E = scores.p.cols;
    const bool in = counts(scores.valid, t);
    const MatrixView<const std::int32_t, S> chosen = choices(scores);
    team.each(E, [&](Index e) {
      terms(t, e) = in ? scores.p(t, e) : Score(0);
      Score count = Score(0);
      for (Index s = 0; in && s < chosen.cols; ++s) count += chosen(t, s) == e ? Score(1) : Score(0);
      terms(t, E + e) = count;
    });
    team.once([&] { terms(t, 2 * E) = in ? Score(1) : Score(0); });
  }
};

/// One team: value and slopes of a balance form.
template <class Score, Space S>
struct BalanceValue {
  MatrixView<const Score, S> sums;    // [1, 2E + 1]
  VectorView<const Score, S> counts;  // [E + 1]
  Balance form;
  Score slots;                  // k
  MatrixView<Score, S> slopes;  // [1, E]
  VectorView<Score, S> value;

  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index) const {
    const Index E = slopes.cols;
    if (form == Balance::importance_cv2) {
      const auto q = [&](Index e) { return sums(0, e); };
      const auto cv = squared_variation<Score>(team, E, q, [](Index) { return true; });
      team.each(E, [&](Index e) { slopes(0, e) = cv.slope(q(e)); });
      team.once([&] { value[0] = cv.value(); });
      return;
    }
    const Score tokens = sums(0, 2 * E);
    Score counted = counts[E];
    if (form == Balance::mola) counted *= slots;
    team.each(E, [&](Index e) {
      const bool any = tokens > Score(0) && counted > Score(0);
      slopes(0, e) = any ? Score(E) * (counts[e] / counted) / tokens : Score(0);
    });
    const Score sum = team.sum(E, [&](Index e) { return slopes(0, e) * sums(0, e); });
    team.once([&] { value[0] = sum; });
  }
};

/// One team: value and slopes of LoRAMoE's loss.
template <class Score, Space S>
struct LocalisedValue {
  MatrixView<const Score, S> sums;          // [sequences, 2E + 1]
  VectorView<const std::int32_t, S> types;  // [sequences]
  Score delta;
  MatrixView<Score, S> slopes;  // [sequences, E]
  VectorView<Score, S> value;

  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index) const {
    const Index E = slopes.cols, all = slopes.rows * E;
    const auto open = [&](Index i) { return sums(i / E, 2 * E) > Score(0); };
    const auto factor = [&](Index i) {
      const bool own = types[i / E] == (i % E < E / 2 ? 1 : 0);
      return own ? Score(1) + delta : Score(1) - delta;
    };
    const auto q = [&](Index i) { return factor(i) * sums(i / E, i % E); };
    const auto cv = squared_variation<Score>(team, all, q, open);
    team.each(all, [&](Index i) { slopes(i / E, i % E) = open(i) ? factor(i) * cv.slope(q(i)) : Score(0); });
    team.once([&] { value[0] = cv.value(); });
  }
};

/// One team: value and slopes of DeepSeek's loss.
template <class Score, Space S>
struct SequenceBalanceValue {
  MatrixView<const Score, S> sums;  // [sequences, 2E + 1]
  Score slots;                      // k
  MatrixView<Score, S> slopes;      // [sequences, E]
  VectorView<Score, S> value;

  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index) const {
    const Index E = slopes.cols, all = slopes.rows * E;
    const Score n = team.sum(slopes.rows, [&](Index b) { return sums(b, 2 * E) > Score(0) ? Score(1) : Score(0); });
    team.each(all, [&](Index i) {
      const Index b = i / E, e = i % E;
      const Score tokens = sums(b, 2 * E);
      slopes(b, e) = tokens > Score(0) ? Score(E) * (sums(b, E + e) / (slots * tokens)) / (tokens * n) : Score(0);
    });
    const Score sum = team.sum(all, [&](Index i) { return slopes(i / E, i % E) * sums(i / E, i % E); });
    team.once([&] { value[0] = sum; });
  }
};

template <class Score, Space S>
Score slots_of(const Scores<Score, S>& scores) {
  return static_cast<Score>(choices(scores).cols);
}

/// sums [groups, 2E + 1] of p, counts and valid rows.
template <class Backend, class Score, Space S>
LossScratch<Score, S> balance_sums(const Backend& be, const Scores<Score, S>& scores,
                                   const LossScratch<Score, S>& scratch, const Groups<S>& groups) {
  for_rows<S>(be, scores.p.rows, BalanceTerms<Score, S>{scores, scratch.terms});
  LossScratch<Score, S> out = scratch;
  if (groups.per_token() && scratch.sums.rows != 1) {
    out.sums = scratch.terms;  // every row is a sequence
  } else {
    sum_terms(be, scratch, groups);
  }
  return out;
}

template <class Backend, class Score, Space S>
void spread(const Backend& be, const Scores<Score, S>& scores, const LossScratch<Score, S>& scratch, double weight,
            const Groups<S>& groups, bool grouped) {
  if (weight == 0) return;
  for_rows<S>(
      be, scores.p.rows,
      SpreadSlopes<Score, S>{scores.dp, scratch.slopes, groups, grouped, scores.valid, static_cast<Score>(weight)});
}

}  // namespace detail

/// How often each expert was chosen by valid rows, and their number: counts [E + 1], assigned.
template <class Backend, ScoreSource F>
void expert_counts(const Backend& be, const F& from, VectorView<score_t<F>, space_of<F>> counts,
                   Arena<space_of<F>> work) {
  using Score = score_t<F>;
  constexpr Space S = space_of<F>;
  const char* const op = "expert_counts";
  const Scores<Score, S>& scores = detail::source_of<F>::scores(from);
  const Index E = scores.p.cols;
  detail::check_scores(op, "p", scores.p, "dp", scores.dp, 0, scores.valid);
  detail::check_choices(op, scores);
  check::view(op, "counts", counts);
  check::same(op, "counts", "size", counts.size, "the number of experts and one", E + 1);
  const auto scratch = detail::loss_scratch<Score>(op, work, scores.p.rows, 1, 2 * E + 1, E);
  for_rows<S>(be, scores.p.rows, detail::BalanceTerms<Score, S>{scores, scratch.terms});
  const MatrixView<Score, S> out{counts.data, 1, counts.size};
  execute(be, ColumnSum<Score, Score, S>{scratch.terms.col_range(E, E + 1), {}, out, Into::set}, Arena<S>{});
}

/// Load balance over the batch; adds to dp.
template <class Backend, ScoreSource F>
loss_value_t<score_t<F>, space_of<F>> balance_loss(const Backend& be, const F& from,
                                                   const BalanceOptions<score_t<F>, space_of<F>>& options,
                                                   Arena<space_of<F>> work) {
  using Score = score_t<F>;
  constexpr Space S = space_of<F>;
  const char* const op = "balance_loss";
  const Scores<Score, S>& scores = detail::source_of<F>::scores(from);
  const Index E = scores.p.cols;
  const bool chosen = options.form != Balance::importance_cv2;
  detail::check_scores(op, "p", scores.p, "dp", scores.dp, options.weight, scores.valid);
  detail::check_value_place(op, options.value);
  if (chosen && (options.counts.empty() || options.form == Balance::mola)) detail::check_choices(op, scores);
  if (chosen && !options.counts.empty()) {
    check::view(op, "counts", options.counts);
    check::same(op, "counts", "size", options.counts.size, "the number of experts and one", E + 1);
  }
  if (options.form == Balance::switch_transformer && !detail::choices(scores).empty()) {
    check::same(op, "chosen", "columns", detail::choices(scores).cols, "k of the Switch form", 1);
  }
  auto scratch = detail::loss_scratch<Score>(op, work, scores.p.rows, 1, 2 * E + 1, E);
  scratch = detail::balance_sums(be, scores, scratch, Groups<S>{});
  const auto place = detail::value_place(scratch, options.value);
  const VectorView<const Score, S> own{scratch.sums.data + E, E + 1};
  for_rows<S>(be, 1,
              detail::BalanceValue<Score, S>{scratch.sums, options.counts.empty() ? own : options.counts, options.form,
                                             detail::slots_of(scores), scratch.slopes, place});
  detail::spread(be, scores, scratch, options.weight, Groups<S>{}, false);
  return detail::returned(place, options.value);
}

/// LoRAMoE's localised balance of a dense softmax gate; adds to dp.
template <class Backend, ScoreSource F>
loss_value_t<score_t<F>, space_of<F>> localised_loss(const Backend& be, const F& from,
                                                     const LocalisedOptions<score_t<F>, space_of<F>>& options,
                                                     Arena<space_of<F>> work) {
  using Score = score_t<F>;
  constexpr Space S = space_of<F>;
  const char* const op = "localised_loss";
  const Scores<Score, S>& scores = detail::source_of<F>::scores(from);
  const Index E = scores.p.cols;
  const Groups<S> groups =
      options.sequences.per_token() ? detail::source_of<F>::batch(from).sequences : options.sequences;
  detail::check_scores(op, "p", scores.p, "dp", scores.dp, options.weight, scores.valid);
  detail::check_value_place(op, options.value);
  const Index sequences = detail::check_sequences<Score>(op, groups, scores.p.rows);
  check::view(op, "types", options.types);
  check::same(op, "types", "size", options.types.size, "the number of sequences", sequences);
  auto scratch = detail::loss_scratch<Score>(op, work, scores.p.rows, sequences, 2 * E + 1, E);
  scratch = detail::balance_sums(be, scores, scratch, groups);
  const auto place = detail::value_place(scratch, options.value);
  for_rows<S>(be, 1,
              detail::LocalisedValue<Score, S>{scratch.sums, options.types, static_cast<Score>(options.delta),
                                               scratch.slopes, place});
  detail::spread(be, scores, scratch, options.weight, groups, true);
  return detail::returned(place, options.value);
}

/// DeepSeek's balance inside every sequence; adds to dp.
template <class Backend, ScoreSource F>
loss_value_t<score_t<F>, space_of<F>> sequence_balance_loss(
    const Backend& be, const F& from, const SequenceBalanceOptions<score_t<F>, space_of<F>>& options,
    Arena<space_of<F>> work) {
  using Score = score_t<F>;
  constexpr Space S = space_of<F>;
  const char* const op = "sequence_balance_loss";
  const Scores<Score, S>& scores = detail::source_of<F>::scores(from);
  const Index E = scores.p.cols;
  const Groups<S> groups =
      options.sequences.per_token() ? detail::source_of<F>::batch(from).sequences : options.sequences;
  detail::check_scores(op, "p", scores.p, "dp", scores.dp, options.weight, scores.valid);
  detail::check_value_place(op, options.value);
  detail::check_choices(op, scores);
  const Index sequences = detail::check_sequences<Score>(op, groups, scores.p.rows);
  auto scratch = detail::loss_scratch<Score>(op, work, scores.p.rows, sequences, 2 * E + 1, E);
  scratch = detail::balance_sums(be, scores, scratch, groups);
  const auto place = detail::value_place(scratch, options.value);
  for_rows<S>(be, 1,
              detail::SequenceBalanceValue<Score, S>{scratch.sums, detail::slots_of(scores), scratch.slopes, place});
  detail::spread(be, scores, scratch, options.weight, groups, true);
  return detail::returned(place, options.value);
}

}  // namespace LORAMIX_ABI
}  // namespace loramix
