/// Losses on logits: the router's z-loss, cross-entropy of any logits, and MoA's routing loss, which is one.
///
/// Computes:    z-loss: mean over valid rows of lse(ℓ)², dℓ = 2·lse·softmax(ℓ)/T, whatever the temperature of p.
///              cross-entropy: mean over rows with label ≥ 0 of lse(ℓ) − ℓ_label, dℓ = (softmax(ℓ) − onehot)/rows.
///              routing: cross-entropy of the router's logits with the labels of its rows (MoA: sequences, −1 = none).
/// Source:      MATH.md section 5; Zoph et al. 2022 (z-loss).
/// Reads:       logits [T, C], raw; labels [T], −1 = none; valid [T].
/// Writes:      the value (ops/loss.hpp); dlogits with Into::set: rows that do not count get 0.
/// Adds to:     dlogits [T, C].
/// Errors:      shapes; on the host labels ≥ C (on the device they count as −1); small workspace.
/// Cost:        O(T·C); loss_workspace_bytes.
/// Determinism: ops/loss.hpp
/// Example:     tests/ops/losses.cpp
#pragma once
#include <cmath>

#include <loramix/ops/loss.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// Options of z_loss.
template <class Score, Space S = Space::host>
struct ZLossOptions {
  double weight = 1;
  VectorView<Score, S> value{};  // [1]
};
/// labels: default the batch's.
template <class Score, Space S = Space::host>
struct RoutingLossOptions {
  double weight = 1;
  VectorView<const std::int32_t, S> labels{};  // [rows]
  VectorView<Score, S> value{};                // [1]
};
/// valid: rows that may count beside their label; into: dlogits.
template <class Acc, Space S = Space::host>
struct CrossEntropyOptions {
  double weight = 1;
  VectorView<const std::uint8_t, S> valid{};  // [T]
  Into into = Into::add;
  VectorView<Acc, S> value{};  // [1]
};

namespace detail {

/// Which rows count, and for what.
template <Space S>
struct CountedRows {
  VectorView<const std::uint8_t, S> valid;   // [T] or empty
  VectorView<const std::int32_t, S> labels;  // [T], or empty: all, without a label
  Index classes;

  LORAMIX_HD Index label(Index t) const { return labels.data == nullptr ? Index{-1} : Index{labels[t]}; }
  LORAMIX_HD bool operator()(Index t) const {
    return counts(valid, t) && (labels.data == nullptr || (label(t) >= 0 && label(t) < classes));
  }
};

/// Row body: terms(t) = lse² or lse − ℓ_label, 1, lse; zeros where t does not count.
template <class T, class Acc, Space S>
struct LogitTerms {
  MatrixView<const T, S> logits;
  CountedRows<S> in;
  MatrixView<Acc, S> terms;  // [T, 3]

  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index t) const {
    using std::exp;
    using std::log;
    if (!in(t)) {
      team.each(3, [&](Index c) { terms(t, c) = Acc(0); });
      return;
    }
    const Acc top = team.maximum(logits.cols, [&](Index c) { return widen<Acc>(logits(t, c)); });
    const Acc sum = team.sum(logits.cols, [&](Index c) { return Acc(exp(widen<Acc>(logits(t, c)) - top)); });
    team.once([&] {
      const Acc lse = top + Acc(log(sum));
      terms(t, 0) = in.labels.data == nullptr ? lse * lse : lse - widen<Acc>(logits(t, in.label(t)));
      terms(t, 1) = Acc(1);
      terms(t, 2) = lse;
    });
  }
};

/// Row body: the gradient of either.
template <class T, class Acc, Space S>
struct LogitSlopes {
  MatrixView<const T, S> logits;
  CountedRows<S> in;
  MatrixView<const Acc, S> terms;  // [T, 3]
  MatrixView<const Acc, S> sums;   // [1, 3]
  MatrixView<T, S> dlogits;
  Acc weight;
  Into into;

  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index t) const {
    using std::exp;
    if (!in(t) || weight == Acc(0)) {
      if (into == Into::set) team.each(logits.cols, [&](Index c) { dlogits(t, c) = narrow<T>(Acc(0)); });
      return;
    }
    const Acc lse = terms(t, 2), each = weight / sums(0, 1);
    const bool z = in.labels.data == nullptr;
    const Index label = in.label(t);
    team.each(logits.cols, [&](Index c) {
      const Acc p = exp(widen<Acc>(logits(t, c)) - lse);
      const Acc slope = each * (z ? Acc(2) * lse * p : p - (c == label ? Acc(1) : Acc(0)));
      dlogits(t, c) = narrow<T>(into == Into::add ? widen<Acc>(dlogits(t, c)) + slope : slope);
    });
  }
};

template <Space S>
void check_labels(const char* op, VectorView<const std::int32_t, S> labels, Index rows, Index classes) {
  check::view(op, "labels", labels);
  check::same(op, "labels", "size", labels.size, "the number of rows", rows);
  if constexpr (S == Space::host) {
    for (Index t = 0; t < rows; ++t) {
      if (labels[t] < classes) continue;
      fail(check::detail::about(ErrorCode::value, op, "labels")
           << " has label " << labels[t] << " in row " << t << ", but there are " << classes << " classes");
    }
  }
}

/// Value and gradient of either; weight 0: the value, and with Into::set a gradient of 0.
template <class Backend, class T, class Acc, Space S>
loss_value_t<Acc, S> logit_loss(const Backend& be, const char* op, MatrixView<const T, S> logits,
                                const CountedRows<S>& in, MatrixView<T, S> dlogits, double weight, Into into,
                                VectorView<Acc, S> value, Arena<S> work) {
  check_value_place(op, value);
  const auto scratch = loss_scratch<Acc>(op, work, logits.rows, 1, 3, 0);
  for_rows<S>(be, logits.rows, LogitTerms<T, Acc, S>{logits, in, scratch.terms});
  sum_terms(be, scratch);
  const auto place = value_place(scratch, value);
  for_rows<S>(be, 1, MeanValue<Acc, S>{scratch.sums, Acc(1), place});
  if (dlogits.data != nullptr && (weight != 0 || into == Into::set)) {
    for_rows<S>(
        be, logits.rows,
        LogitSlopes<T, Acc, S>{logits, in, scratch.terms, scratch.sums, dlogits, static_cast<Acc>(weight), into});
  }
  return returned(place, value);
}

}  // namespace detail

/// Keeps router logits small; adds to Scores::dlogits.
template <class Backend, ScoreSource F>
loss_value_t<score_t<F>, space_of<F>> z_loss(const Backend& be, const F& from,
                                             const ZLossOptions<score_t<F>, space_of<F>>& options,
                                             Arena<space_of<F>> work) {
  using Score = score_t<F>;
  constexpr Space S = space_of<F>;
  const Scores<Score, S>& scores = detail::source_of<F>::scores(from);
  detail::check_scores("z_loss", "logits", scores.logits, "dlogits", scores.dlogits, options.weight, scores.valid);
  const detail::CountedRows<S> in{scores.valid, {}, scores.logits.cols};
  return detail::logit_loss(be, "z_loss", scores.logits, in, scores.dlogits, options.weight, Into::add, options.value,
                            work);
}

/// Cross-entropy of the router with the labels of its rows; adds to Scores::dlogits.
template <class Backend, ScoreSource F>
loss_value_t<score_t<F>, space_of<F>> routing_loss(const Backend& be, const F& from,
                                                   const RoutingLossOptions<score_t<F>, space_of<F>>& options,
                                                   Arena<space_of<F>> work) {
  using Score = score_t<F>;
  constexpr Space S = space_of<F>;
  const char* const op = "routing_loss";
  const Scores<Score, S>& scores = detail::source_of<F>::scores(from);
  VectorView<const std::int32_t, S> labels = options.labels;
  if (labels.data == nullptr) labels = detail::source_of<F>::batch(from).labels;
  detail::check_scores(op, "logits", scores.logits, "dlogits", scores.dlogits, options.weight, scores.valid);
  detail::check_labels(op, labels, scores.logits.rows, scores.logits.cols);
  const detail::CountedRows<S> in{scores.valid, labels, scores.logits.cols};
  return detail::logit_loss(be, op, scores.logits, in, scores.dlogits, options.weight, Into::add, options.value, work);
}

/// Cross-entropy of any logits; dlogits may be empty.
template <class Backend, class L, class T, Space S>
loss_value_t<accumulation_t<T>, S> cross_entropy_loss(const Backend& be, MatrixView<L, S> logits,
                                                      VectorView<const std::int32_t, S> labels,
                                                      MatrixView<T, S> dlogits,
                                                      const CrossEntropyOptions<accumulation_t<T>, S>& options,
                                                      Arena<S> work) {
  const char* const op = "cross_entropy_loss";
  const MatrixView<const T, S> from = logits;
  check::view(op, "logits", from);
  check::at_least(op, "the number of classes", from.cols, 1);
  detail::check_mask(op, options.valid, from.rows);
  detail::check_labels(op, labels, from.rows, from.cols);
  check::view(op, "dlogits", dlogits);
  const bool wanted = dlogits.data != nullptr;
  if (wanted) {
    check::shape(op, "dlogits", dlogits, "the rows of logits", from.rows, "the classes of logits", from.cols);
    check::disjoint(op, "dlogits", dlogits, "logits", from);
  }
  const detail::CountedRows<S> in{options.valid, labels, from.cols};
  return detail::logit_loss(be, op, from, in, dlogits, wanted ? options.weight : 0, options.into, options.value, work);
}

}  // namespace LORAMIX_ABI
}  // namespace loramix
