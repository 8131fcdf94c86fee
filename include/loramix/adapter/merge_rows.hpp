/// Merging row by row, for adapters whose change is not a sum of s B A alone.
///
/// Computes:    W[o, :] ← round(f(o, W[o, :])), f in double, one rounding to nearest even (MATH.md section 4,
///              "Merging").
/// Reads:       W [d_out, d_in], widened.
/// Writes:      W, and the rounding errors into a MergeReport.
/// Errors:      the caller's checks come first.
/// Cost:        f's, and one row of doubles per lane.
/// Determinism: rows are independent; errors are summed in row order.
/// Example:     adapter/dora_forward.hpp; tests/adapter/dora.cpp
#pragma once
#include <loramix/adapter/merge.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace detail {

/// exact(o, row) turns row o of W, in double, into what it is to become.
template <class Backend, class T, class F>
void merge_rows(const Backend& be, MatrixView<T> weights, MergeReport& total, const F& exact) {
  Buffer<MergeReport> rows(weights.rows);
  Matrix<double> lanes(be.lanes(), weights.cols);
  be.run(weights.rows, [&](Index o, Index lane) {
    double* const row = lanes.view().row(lane);
    for (Index c = 0; c < weights.cols; ++c) row[c] = widen<double>(weights(o, c));
    exact(o, row);
    for (Index c = 0; c < weights.cols; ++c) {
      weights(o, c) = narrow<T>(row[c]);
      const double error = std::fabs(widen<double>(weights(o, c)) - row[c]);
      if (!(error <= rows[o].max_rounding)) rows[o].max_rounding = error;
      rows[o].rms_rounding += error * error;
    }
  });
  for (const MergeReport& row : rows) {
    if (!(row.max_rounding <= total.max_rounding)) total.max_rounding = row.max_rounding;
    total.rms_rounding += row.rms_rounding;
  }
  finish(total, weights.rows * weights.cols);
}

}  // namespace detail
}  // namespace LORAMIX_ABI
}  // namespace loramix
