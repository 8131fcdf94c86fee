/// Products of matrices that have no tokens: scores of tasks, and what their gradients are made of.
///
/// Computes:    out[i, :] (+)= Σ_k left[i, k] right[k, :], a row body.
/// Reads:       left [rows, n] in either order, right [n, columns].
/// Adds to:     out [rows, columns], or assigns with Into::set.
/// Errors:      none: routers check.
/// Cost:        2·rows·n·columns flop.
/// Determinism: k ascends; cpu/small_product.hpp may round once where others round twice.
/// Example:     router/task.hpp
#pragma once
#include <loramix/core/scalars.hpp>
#include <loramix/ops/rows.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

namespace detail {

/// The body.
template <class Score, class W, class G, Space S, Major M>
struct SmallProduct {
  MatrixView<const Score, S, M> left;  // [rows, n]
  MatrixView<W, S> right;              // [n, columns]
  MatrixView<G, S> out;                // [rows, columns]
  Into into;

  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index i) const {
    team.each(out.cols, [&](Index c) {
      Score sum = Score(0);
      for (Index k = 0; k < right.rows; ++k) sum += left(i, k) * widen<Score>(right(k, c));
      G& cell = out(i, c);
      cell = narrow<G>(into == Into::add ? widen<Score>(cell) + sum : sum);
    });
  }
};

}  // namespace detail

}  // namespace LORAMIX_ABI
}  // namespace loramix
