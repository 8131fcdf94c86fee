/// What all losses share: where scores come from, how a value is returned, and sums over the rows that count.
///
/// Computes:    a loss is mean or ratio of sums over valid rows (MATH.md section 5): every row writes its terms, ColumnSum
///              adds them in a fixed order, one team turns sums into the value and a slope per (group, expert), and rows
///              add weight · slope to their gradient. Rows that do not count are skipped, whatever they hold, NaN too.
/// Reads:       a Scores, or what forward saved: anything with a member `scores` (and call.batch).
/// Writes:      the value, not multiplied with the weight: returned on the host; on the device written to
///              options.value [1] without waiting (empty: not wanted) and that view is returned.
/// Adds to:     weight · dL/dp to Scores::dp, or weight · dL/dℓ to Scores::dlogits [rows, E]: before backward. Weight 0:
///              the value only.
/// Errors:      shapes; no rows for gradients (inference); a small workspace. Before any write.
/// Cost:        loss_workspace_bytes; O(T·E) operations; no allocation.
/// Determinism: sums over tokens as ops/column_sum.hpp: the same bits for any number of threads.
/// Example:     tests/ops/losses.cpp
#pragma once
#include <type_traits>

#include <loramix/gate/computed.hpp>
#include <loramix/ops/column_sum.hpp>
#include <loramix/ops/rows.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

namespace detail {

template <class F>
struct source_of;
template <class Score, Space S>
struct source_of<Scores<Score, S>> {
  using score = Score;
  static constexpr Space space = S;
  static const Scores<Score, S>& scores(const Scores<Score, S>& from) { return from; }
  static Batch<S> batch(const Scores<Score, S>&) { return {}; }
};
template <class F>
  requires requires(const F& from) {
    from.scores.logits;
    from.call.batch;
  }
struct source_of<F> : source_of<std::remove_cvref_t<decltype(std::declval<const F&>().scores)>> {
  static const auto& scores(const F& from) { return from.scores; }
  static auto batch(const F& from) { return from.call.batch; }
};

}  // namespace detail

/// A Scores, or what a saving forward returned.
template <class F>
concept ScoreSource = requires {
  detail::source_of<F>::space;
};

template <class F>
using score_t = typename detail::source_of<F>::score;
template <class F>
inline constexpr Space space_of = detail::source_of<F>::space;

/// What a loss returns: the number on the host, its address on the device.
template <class Score, Space S>
using loss_value_t = std::conditional_t<S == Space::host, Score, VectorView<Score, S>>;

namespace detail {

/// Memory of every loss on scores.
template <class Score, Space S>
struct LossScratch {
  MatrixView<Score, S> terms;   // [T, columns] what rows contribute
  MatrixView<Score, S> sums;    // [groups, columns]
  MatrixView<Score, S> slopes;  // [groups, E]
  VectorView<Score, S> value;   // [1]
};

template <class Score, Space S>
LossScratch<Score, S> carve_loss(Arena<S>& arena, Index rows, Index groups, Index columns, Index slopes) {
  return {arena.template matrix<Score>(rows, columns), arena.template matrix<Score>(groups, columns),
          arena.template matrix<Score>(groups, slopes), arena.template vector<Score>(1)};
}

/// Cuts the memory of a loss, or refuses.
template <class Score, Space S>
LossScratch<Score, S> loss_scratch(const char* op, Arena<S> work, Index rows, Index groups, Index columns,
                                   Index slopes) {
  work.require(op, "work", carved_bytes<S>([&](Arena<S>& a) { carve_loss<Score>(a, rows, groups, columns, slopes); }));
  return carve_loss<Score>(work, rows, groups, columns, slopes);
}

/// sums = the terms, by group.
template <class Backend, class Score, Space S>
void sum_terms(const Backend& be, const LossScratch<Score, S>& scratch, const Groups<S>& groups = {}) {
  run_checked(be, ColumnSum<Score, Score, S>{scratch.terms, groups, scratch.sums, Into::set}, Arena<S>{});
}

/// Where the value is written: the caller's place on the device, scratch on the host.
template <class Score, Space S>
VectorView<Score, S> value_place(const LossScratch<Score, S>& scratch, VectorView<Score, S> wanted) {
  return S == Space::host || wanted.empty() ? scratch.value : wanted;
}
template <class Score, Space S>
loss_value_t<Score, S> returned(VectorView<Score, S> place, VectorView<Score, S> wanted) {
  if constexpr (S == Space::host) {
    if (!wanted.empty()) wanted[0] = place[0];
    return place[0];
  } else {
    return wanted;
  }
}

template <class Score, Space S>
void check_value_place(const char* op, VectorView<Score, S> value) {
  check::view(op, "value", value);
  if (!value.empty()) check::same(op, "value", "size", value.size, "a number's", 1);
}
template <Space S>
void check_mask(const char* op, VectorView<const std::uint8_t, S> valid, Index rows) {
  check_optional(op, "valid", valid, "the number of rows", rows);
}

/// values [rows, E] and the place of their gradient.
template <class Score, Space S>
void check_scores(const char* op, const char* what, MatrixView<const Score, S> values, const char* gradient,
                  MatrixView<Score, S> slopes, double weight, VectorView<const std::uint8_t, S> valid) {
  check::view(op, what, values);
  check::at_least(op, "the number of experts", values.cols, 1);
  check_mask(op, valid, values.rows);
  if (weight == 0) return;
  if (slopes.data == nullptr && !values.empty()) {
    fail(check::detail::about(ErrorCode::state, op, gradient)
         << " has no address: gradients of losses need a forward that saves for training, and a gate that has "
         << what);
  }
  check::shape(op, gradient, slopes, "the rows of its values", values.rows, "the number of experts", values.cols);
  check::disjoint(op, gradient, slopes, what, values);
}

/// The sequences of a loss that looks at each.
template <class Score, Space S>
Index check_sequences(const char* op, const Groups<S>& sequences, Index rows) {
  if (!sequences.per_token()) check_groups<Score>(op, "sequences", sequences, rows, sequences.count);
  return sequences.size(rows);
}

/// Whether row t counts.
template <Space S>
LORAMIX_HD bool counts(const VectorView<const std::uint8_t, S>& valid, Index t) {
  return valid.data == nullptr || valid[t] != 0;
}

/// What was chosen before capacity.
template <class Score, Space S>
LORAMIX_HD MatrixView<const std::int32_t, S> choices(const Scores<Score, S>& scores) {
  return scores.chosen.data != nullptr ? scores.chosen : scores.ids;
}
template <class Score, Space S>
void check_choices(const char* op, const Scores<Score, S>& scores) {
  const auto chosen = choices(scores);
  check::view(op, "chosen", chosen);
  check::same(op, "chosen", "rows", chosen.rows, "the rows of the scores", scores.p.rows);
  check::at_least(op, "the number of chosen experts", chosen.cols, 1);
}

/// Row body: values(t, :) += weight · slopes(group of t, :) where t counts.
template <class Score, Space S>
struct SpreadSlopes {
  MatrixView<Score, S> gradient;      // [T, E]
  MatrixView<const Score, S> slopes;  // [groups, E]
  Groups<S> groups;
  bool grouped;  // else all rows have slopes' only row
  VectorView<const std::uint8_t, S> valid;
  Score weight;

  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index t) const {
    const Index g = grouped ? groups.of(t) : Index{0};
    if (!counts(valid, t) || g < 0 || g >= slopes.rows) return;
    team.each(gradient.cols, [&](Index e) { gradient(t, e) += weight * slopes(g, e); });
  }
};

/// One team: value = sum / rows, 0 without any.
template <class Acc, Space S>
struct MeanValue {
  MatrixView<const Acc, S> sums;  // [1, 2 or more]: sum, rows
  Acc entries;                    // of a row
  VectorView<Acc, S> value;

  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index) const {
    team.once([&] { value[0] = sums(0, 1) > Acc(0) ? sums(0, 0) / (entries * sums(0, 1)) : Acc(0); });
  }
};

/// CV² of n numbers q: unbiased variance / (mean² + 1e-10), 0 for one; and its derivative.
template <class Score>
struct SquaredVariation {
  Score n, mean, variance;
  static constexpr double epsilon = 1e-10;

  LORAMIX_HD Score below() const { return mean * mean + Score(epsilon); }
  LORAMIX_HD Score value() const { return variance / below(); }
  LORAMIX_HD Score slope(Score q) const {
    if (!(n > Score(1))) return Score(0);
    return Score(2) * (q - mean) / ((n - Score(1)) * below()) - Score(2) * variance * mean / (n * below() * below());
  }
};

/// Of the q(i), i in [0, items), for which open(i).
template <class Score, Team Tm, class Q, class Open>
LORAMIX_HD SquaredVariation<Score> squared_variation(const Tm& team, Index items, const Q& q, const Open& open) {
  const Score n = team.sum(items, [&](Index i) { return open(i) ? Score(1) : Score(0); });
  const Score total = team.sum(items, [&](Index i) { return open(i) ? q(i) : Score(0); });
  const Score mean = n > Score(0) ? total / n : Score(0);
  const Score squares = team.sum(items, [&](Index i) { return open(i) ? (q(i) - mean) * (q(i) - mean) : Score(0); });
  return {n, mean, n > Score(1) ? squares / (n - Score(1)) : Score(0)};
}

}  // namespace detail

/// Bytes of workspace that any loss on scores, and telemetry, take for `rows` rows of `experts` scores in `groups`
/// sequences.
template <class Score, Space S = Space::host>
Index loss_workspace_bytes(Index rows, Index experts, Index groups = 1) {
  check::at_least("loss_workspace_bytes", "rows", rows, 0);
  check::at_least("loss_workspace_bytes", "experts", experts, 0);
  check::at_least("loss_workspace_bytes", "groups", groups, 0);
  return Arena<S>::with_alignment(carved_bytes<S>(
      [&](Arena<S>& a) { detail::carve_loss<Score>(a, rows, groups > 1 ? groups : 1, 2 * experts + 3, experts); }));
}

}  // namespace LORAMIX_ABI
}  // namespace loramix
