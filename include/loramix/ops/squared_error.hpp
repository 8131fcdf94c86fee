/// Mean squared error over valid rows.
///
/// Computes:    mean over all entries of valid rows of (y − target)², 0 without any; dy = 2(y − target)/(rows·C).
/// Source:      MATH.md section 5.
/// Reads:       y, target [T, C]; valid [T].
/// Writes:      the value (ops/loss.hpp); dy with Into::set: rows that do not count get 0.
/// Adds to:     dy [T, C], may be empty.
/// Errors:      shapes, null, aliases; small workspace.
/// Cost:        O(T·C); loss_workspace_bytes(T, C) is enough.
/// Determinism: ops/loss.hpp
/// Example:     tests/ops/losses.cpp
#pragma once
#include <loramix/ops/logit_loss.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// Options of squared_error_loss.
template <class Acc, Space S = Space::host>
struct SquaredErrorOptions {
  double weight = 1;
  VectorView<const std::uint8_t, S> valid{};  // [T]
  Into into = Into::add;
  VectorView<Acc, S> value{};  // [1]
};

namespace detail {

/// Row body: terms(t) = Σ (y − target)², 1.
template <class T, class Acc, Space S>
struct SquaredErrorTerms {
  MatrixView<const T, S> y, target;
  VectorView<const std::uint8_t, S> valid;
  MatrixView<Acc, S> terms;  // [T, 2]

  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index t) const {
    const bool in = counts(valid, t);
    const Acc sum = team.sum(in ? y.cols : 0, [&](Index c) {
      const Acc error = widen<Acc>(y(t, c)) - widen<Acc>(target(t, c));
      return error * error;
    });
    team.once([&] {
      terms(t, 0) = sum;
      terms(t, 1) = in ? Acc(1) : Acc(0);
    });
  }
};

/// Row body: its gradient.
template <class T, class Acc, Space S>
struct SquaredErrorSlopes {
  MatrixView<const T, S> y, target;
  VectorView<const std::uint8_t, S> valid;
  MatrixView<const Acc, S> sums;  // [1, 2]
  MatrixView<T, S> dy;
  Acc weight;
  Into into;

  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index t) const {
    if (!counts(valid, t) || weight == Acc(0)) {
      if (into == Into::set) team.each(y.cols, [&](Index c) { dy(t, c) = narrow<T>(Acc(0)); });
      return;
    }
    const Acc each = Acc(2) * weight / (sums(0, 1) * Acc(y.cols));
    team.each(y.cols, [&](Index c) {
      const Acc slope = each * (widen<Acc>(y(t, c)) - widen<Acc>(target(t, c)));
      dy(t, c) = narrow<T>(into == Into::add ? widen<Acc>(dy(t, c)) + slope : slope);
    });
  }
};

}  // namespace detail

/// Adds to dy.
template <class Backend, class Y, class Z, class T, Space S>
loss_value_t<accumulation_t<T>, S> squared_error_loss(const Backend& be, MatrixView<Y, S> y, MatrixView<Z, S> target,
                                                      MatrixView<T, S> dy,
                                                      const SquaredErrorOptions<accumulation_t<T>, S>& options,
                                                      Arena<S> work) {
  using Acc = accumulation_t<T>;
  const char* const op = "squared_error_loss";
  const MatrixView<const T, S> from = y, to = target;
  check::view(op, "y", from);
  check::shape(op, "target", to, "the rows of y", from.rows, "the columns of y", from.cols);
  detail::check_mask(op, options.valid, from.rows);
  detail::check_value_place(op, options.value);
  check::view(op, "dy", dy);
  if (dy.data != nullptr) {
    check::shape(op, "dy", dy, "the rows of y", from.rows, "the columns of y", from.cols);
    check::disjoint(op, "dy", dy, "y", from);
    check::disjoint(op, "dy", dy, "target", to);
  }
  const auto scratch = detail::loss_scratch<Acc>(op, work, from.rows, 1, 2, 0);
  for_rows<S>(be, from.rows, detail::SquaredErrorTerms<T, Acc, S>{from, to, options.valid, scratch.terms});
  detail::sum_terms(be, scratch);
  const auto place = detail::value_place(scratch, options.value);
  const Index entries = from.cols == 0 ? 1 : from.cols;  // rows without entries add 0
  for_rows<S>(be, 1, detail::MeanValue<Acc, S>{scratch.sums, static_cast<Acc>(entries), place});
  if (dy.data != nullptr && (options.weight != 0 || options.into == Into::set)) {
    for_rows<S>(be, from.rows,
                detail::SquaredErrorSlopes<T, Acc, S>{from, to, options.valid, scratch.sums, dy,
                                                      static_cast<Acc>(options.weight), options.into});
  }
  return detail::returned(place, options.value);
}

}  // namespace LORAMIX_ABI
}  // namespace loramix
