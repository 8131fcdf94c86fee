/// Folding an adapter into weights in device memory, and taking it out again to the last bit.
///
/// Computes:    W ← round(W + s B diag(g) A), summed in double, rounded once straight from double, as on the host (merge.hpp);
///              where a compiler fuses a multiplication with an addition, the double before the rounding may differ in its
///              last bits. g: the gate's rank scale, where it has one.
/// Reads:       A [R_a, d_in], B [d_out, R], g [R].
/// Writes:      W [d_out, d_in]; MergePlaces: `before` [d_out, d_in] gets W as it was, copied back it undoes the merge;
///              `report` [1] gets the rounding errors. Either may be empty.
/// Errors:      shape, null, alias, small workspace; what the backend refuses. A gate that depends on the token does not
///              compile. Weights that are not finite are not refused, as the host cannot see them: the report is NaN then.
/// Cost:        2·R·d_in·d_out flop in double; merge_bytes(d_out) of workspace; two launches.
/// Determinism: every element is one sum in rank order; errors are summed row by row.
/// Example:     tests/gpu/merge.cu
#pragma once
#include <loramix/adapter/merge.hpp>
#include <loramix/ops/rows.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// Where merge leaves what it found.
template <class T>
struct MergePlaces {
  MatrixView<T, Space::device> before{};            // [d_out, d_in]
  VectorView<MergeReport, Space::device> report{};  // [1]
};

namespace detail {

/// Row body over rows of W.
template <class T, class W, class Score, Major M>
struct MergeRow {
  MatrixView<const W, Space::device> A;     // [R_a, d_in]
  MatrixView<const W, Space::device, M> B;  // [d_out, R]
  VectorView<const Score, Space::device> g;
  double scale;
  MatrixView<T, Space::device> weights, before;
  VectorView<MergeReport, Space::device> rows;  // squared sums, not yet the root

  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index o) const {
    double largest = 0, squares = 0;  // of this thread
    team.each(weights.cols, [&](Index c) {
      double sum = 0;
      for (Index j = 0; j < B.cols; ++j) {
        const double b = widen<double>(B(o, j)) * (g.data == nullptr ? 1.0 : widen<double>(g[j]));
        sum += b * widen<double>(A(j % A.rows, c));
      }
      const T old = weights(o, c);
      if (before.data != nullptr) before(o, c) = old;
      const double exact = widen<double>(old) + scale * sum;
      weights(o, c) = narrow<T>(exact);
      const double error = std::fabs(widen<double>(weights(o, c)) - exact);
      if (!(error <= largest)) largest = error;
      squares += error * error;
    });
    const double most = team.maximum(Tm::width, [&](Index) { return largest; });
    const double sum = team.sum(Tm::width, [&](Index) { return squares; });
    team.once([&] { rows[o] = {most, sum}; });
  }
};

/// Row body of one row: the rows' errors in one report.
struct MergeTotal {
  VectorView<const MergeReport, Space::device> rows;
  Index elements;
  MergeReport* report;
  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index) const {
    const double most = rows.size == 0 ? 0 : team.maximum(rows.size, [&](Index o) { return rows[o].max_rounding; });
    const double sum = team.sum(rows.size, [&](Index o) { return rows[o].rms_rounding; });
    team.once([&] { *report = {most, elements == 0 ? 0 : std::sqrt(sum / static_cast<double>(elements))}; });
  }
};

}  // namespace detail

/// Workspace of merge for weights [d_out, ·].
inline Index merge_bytes(Index d_out) {
  return carved_bytes<Space::device>([&](Arena<Space::device>& arena) { arena.template vector<MergeReport>(d_out); });
}

/// Folds the adapter into `weights` [d_out, d_in]; undo: copy `places.before` back.
template <class Backend, ProductAdapter A, class T>
  requires(A::space == Space::device)
void merge(const Backend& be, const A& adapter, MatrixView<T, Space::device> weights, const MergePlaces<T>& places,
           Arena<Space::device> work) {
  using Gate = decltype(adapter.gate());
  static_assert(
      Gate::facts.token_invariant,
      "loramix: this adapter's gate depends on the token: no exact merge exists; merge_average says what one costs");
  static_assert((Gate::facts.slots & ~static_cast<unsigned>(Slots::rank_scale)) == 0,
                "loramix: merge folds a gate's rank scale; this gate fills other slots of the normal form");
  const char* const op = "merge";
  const auto down = std::as_const(adapter).A();
  const auto up = std::as_const(adapter).B();
  if (down.rows != up.cols && (down.rows == 0 || up.cols % down.rows != 0)) {
    fail(check::detail::about(ErrorCode::shape, op, "A")
         << " has " << down.rows << " rows, which do not divide the " << up.cols << " ranks of B");
  }
  check::shape(op, "weights", weights, "d_out of the adapter", up.rows, "d_in of the adapter", down.cols);
  check::disjoint(op, "weights", weights, "A", down);
  check::disjoint(op, "weights", weights, "B", up);
  check::view(op, "before", places.before);
  check::view(op, "report", places.report);
  if (places.before.data != nullptr) {
    check::shape(op, "before", places.before, "the rows of weights", weights.rows, "the columns of weights",
                 weights.cols);
    check::disjoint(op, "before", places.before, "weights", weights);
  }
  if (places.report.data != nullptr) check::same(op, "report", "size", places.report.size, "the number of merges", 1);
  work.require(op, "work", merge_bytes(weights.rows));
  const auto rows = work.template vector<MergeReport>(weights.rows);
  const auto g = std::as_const(adapter).gate().form(0, up.cols).rank_scale;
  using W = std::remove_const_t<std::remove_pointer_t<decltype(down.data)>>;
  using Score = std::remove_const_t<std::remove_pointer_t<decltype(g.data)>>;
  constexpr Major M = decltype(up)::major;
  for_rows<Space::device>(be, weights.rows,
                          detail::MergeRow<T, W, Score, M>{down, up, g, adapter.scale(), weights, places.before, rows});
  if (places.report.data == nullptr) return;
  for_rows<Space::device>(be, 1, detail::MergeTotal{rows, weights.rows * weights.cols, places.report.data});
}

}  // namespace LORAMIX_ABI
}  // namespace loramix
