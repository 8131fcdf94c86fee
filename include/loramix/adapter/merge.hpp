/// Folding an adapter into the weights it adapts, and taking it out again to the last bit.
///
/// Computes:    W ← round(W + s B diag(g) A), summed in double, rounded once to nearest even straight from double
///              (MATH.md section 4, "Merging"). g: the gate's rank scale where it has one.
/// Reads:       A [R, d_in], B [d_out, R].
/// Writes:      W [d_out, d_in] of any storage type, in place. The token keeps the bytes there were.
/// Errors:      shape, null, alias; weights that are not finite (ErrorCode::value): before any write. A gate that
///              depends on the token does not compile: no exact merge exists.
/// Cost:        2·R·d_in·d_out flop in double; the token holds a copy of W.
/// Determinism: every element is one sum in rank order, whatever the threads.
/// Example:     examples/demo
#pragma once
#include <cmath>

#include <loramix/core/adapter.hpp>
#include <loramix/gate/gates.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// How far rounding to the storage type moved the merged weights from the exact sum.
struct MergeReport {
  double max_rounding = 0;
  double rms_rounding = 0;
};

/// What merge returns: a report, and the bytes that restore W.
template <class T>
class Merged {
 public:
  Merged(MatrixView<const T> before, MergeReport report_) : report(report_), before_(before.rows, before.cols) {
    copy(before, before_.view());
  }
  /// Restores the bytes that merge found.
  void undo(MatrixView<T> weights) const {
    check::shape("undo", "weights", weights, "the merged rows", before_.rows(), "the merged columns", before_.cols());
    copy(before_.view(), weights);
  }

  MergeReport report;

 private:
  static void copy(MatrixView<const T> from, MatrixView<T> to) {
    for (Index i = 0; i < from.rows && from.cols != 0; ++i) {
      std::memcpy(to.row(i), from.row(i), static_cast<std::size_t>(from.cols) * sizeof(T));
    }
  }
  Matrix<T> before_;
};

namespace detail {

template <class View>
void check_finite(const char* op, const char* name, View v) {
  for (Index i = 0; i < v.rows; ++i) {
    for (Index j = 0; j < v.cols; ++j) {
      if (std::isfinite(widen<double>(v(i, j)))) continue;
      fail(check::detail::about(ErrorCode::value, op, name) << " is not finite at [" << i << ", " << j << "]");
    }
  }
}

/// Row `o` of W + s B diag(g) A; returns {largest, squared sum} of the rounding errors.
template <class T, class W, class Score, Major M>
MergeReport merge_row(MatrixView<const W> A, MatrixView<const W, Space::host, M> B, VectorView<const Score> g,
                      double scale, Index o, T* weights) {
  constexpr Index block = 64;
  MergeReport row;
  for (Index c = 0; c < A.cols; c += block) {
    const Index n = A.cols - c < block ? A.cols - c : block;
    double sum[block] = {};
    for (Index j = 0; j < A.rows; ++j) {
      const double b = widen<double>(B(o, j)) * (g.data == nullptr ? 1.0 : widen<double>(g[j]));
      for (Index i = 0; i < n; ++i) sum[i] += b * widen<double>(A(j, c + i));
    }
    for (Index i = 0; i < n; ++i) {
      const double exact = widen<double>(weights[c + i]) + scale * sum[i];
      weights[c + i] = narrow<T>(exact);
      const double error = std::fabs(widen<double>(weights[c + i]) - exact);
      if (!(error <= row.max_rounding)) row.max_rounding = error;
      row.rms_rounding += error * error;
    }
  }
  return row;
}

/// One product into the rows of W; adds to `total` (squared sums, not yet the root).
template <class Backend, class T, class W, class Score, Major M>
void merge_product(const Backend& be, MatrixView<const W> A, MatrixView<const W, Space::host, M> B,
                   VectorView<const Score> g, double scale, MatrixView<T> weights, MergeReport& total) {
  Buffer<MergeReport> rows(weights.rows);
  be.run(weights.rows, [&](Index o, Index) { rows[o] = merge_row(A, B, g, scale, o, weights.row(o)); });
  for (const MergeReport& row : rows) {
    if (!(row.max_rounding <= total.max_rounding)) total.max_rounding = row.max_rounding;
    total.rms_rounding += row.rms_rounding;
  }
}

inline void finish(MergeReport& total, Index elements) {
  if (elements != 0) total.rms_rounding = std::sqrt(total.rms_rounding / static_cast<double>(elements));
}

}  // namespace detail

/// Folds the adapter into `weights` [d_out, d_in].
template <class Backend, ProductAdapter A, class T>
  requires(A::space == Space::host)
Merged<T> merge(const Backend& be, const A& adapter, MatrixView<T> weights) {
  using Gate = decltype(adapter.gate());
  static_assert(Gate::facts.token_invariant,
                "loramix: this adapter's gate depends on the token: no exact merge exists");
  const auto down = adapter.A();
  const auto up = adapter.B();
  check::shape("merge", "weights", weights, "d_out of the adapter", up.rows, "d_in of the adapter", down.cols);
  check::disjoint("merge", "weights", weights, "A", down);
  check::disjoint("merge", "weights", weights, "B", up);
  detail::check_finite("merge", "A", down);
  detail::check_finite("merge", "B", up);
  Merged<T> merged(weights, {});
  detail::merge_product(be, down, up, adapter.gate().form(0, up.cols).rank_scale, adapter.scale(), weights,
                        merged.report);
  detail::finish(merged.report, weights.rows * weights.cols);
  return merged;
}

/// The same for an owning matrix.
template <class Backend, Adapter A, class T>
Merged<T> merge(const Backend& be, const A& adapter, Matrix<T>& weights) {
  return merge(be, adapter, weights.view());
}

}  // namespace LORAMIX_ABI
}  // namespace loramix
