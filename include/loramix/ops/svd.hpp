/// The singular values and vectors of a product of two thin matrices, without the product.
///
/// Computes:    s B A = P diag(σ) Qᵀ, σ falling: B = Q_B R_B and Aᵀ = Q_A R_A by Householder's reflections, s R_B R_Aᵀ =
///              U diag(σ) Vᵀ by Jacobi's rotations from one side, P = Q_B U, Q = Q_A V.
/// Source:      Golub and Van Loan, Matrix Computations, 5.2 and 8.6.3.
/// Reads:       B [d_out, R], A [R, d_in] of any type and order, on the host.
/// Writes:      P [d_out, k], σ [k], Q [d_in, k], k = min(d_out, d_in, R); a column of σ = 0 may be 0.
/// Errors:      ranks of A and B that differ; memory.
/// Cost:        4·R²·(d_in + d_out) flop and 12·k²·R per sweep, of which there are about 10; no d_out × d_in matrix.
/// Determinism: double, in one fixed order, on the calling thread.
/// Example:     tests/ops/svd.cpp
#pragma once
#include <cmath>
#include <limits>

#include <loramix/core/check.hpp>
#include <loramix/core/matrix.hpp>
#include <loramix/core/scalars.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// P diag(σ) Qᵀ.
struct LowRankSvd {
  Matrix<double, Space::host, Major::column> left;   // [d_out, k] P
  Buffer<double> sigma;                              // [k], falling
  Matrix<double, Space::host, Major::column> right;  // [d_in, k] Q
};

namespace detail {

using Columns = Matrix<double, Space::host, Major::column>;

template <class View>
Columns columns_of(View v) {
  Columns m(v.rows, v.cols);
  for (Index j = 0; j < v.cols; ++j) {
    for (Index i = 0; i < v.rows; ++i) m(i, j) = widen<double>(v(i, j));
  }
  return m;
}
inline double inner(const double* a, const double* b, Index n) {
  double sum = 0;
  for (Index i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

/// m = Q R with Q [rows, k], R [k, cols], k = min(rows, cols).
struct ThinQr {
  Columns Q, R;

  explicit ThinQr(Columns m) : Q(m.rows(), k_of(m)), R(k_of(m), m.cols()) {
    const Index k = k_of(m), rows = m.rows();
    Buffer<double> length(k);  // ‖v‖² of the reflections, whose v replace the columns of m below the diagonal
    Buffer<double> diagonal(k);
    for (Index p = 0; p < k; ++p) {
      double* const v = &m(p, p);
      const double norm = std::sqrt(inner(v, v, rows - p));
      diagonal[p] = v[0] > 0 ? -norm : norm;
      v[0] -= diagonal[p];
      length[p] = inner(v, v, rows - p);
      for (Index j = p + 1; j < m.cols(); ++j) reflect(v, length[p], &m(p, j), rows - p);
    }
    for (Index j = 0; j < m.cols(); ++j) {
      for (Index i = 0; i < (j < k ? j : k); ++i) R(i, j) = m(i, j);
      if (j < k) R(j, j) = diagonal[j];
    }
    for (Index j = 0; j < k; ++j) {
      Q(j, j) = 1;
      for (Index p = j; p >= 0; --p) reflect(&m(p, p), length[p], &Q(p, j), rows - p);
    }
  }

 private:
  static Index k_of(const Columns& m) { return m.rows() < m.cols() ? m.rows() : m.cols(); }
  /// x −= 2 v ⟨v, x⟩ / ‖v‖².
  static void reflect(const double* v, double squared, double* x, Index n) {
    if (squared == 0) return;
    const double factor = 2 * inner(v, x, n) / squared;
    for (Index i = 0; i < n; ++i) x[i] -= factor * v[i];
  }
};

inline void rotate(double* a, double* b, Index n, double cosine, double sine) {
  for (Index i = 0; i < n; ++i) {
    const double x = a[i];
    a[i] = cosine * x - sine * b[i];
    b[i] = sine * x + cosine * b[i];
  }
}

/// Turns the columns of m [rows, n], rows ≥ n, until they are orthogonal: m V = U diag(σ). Returns V [n, n].
inline Columns orthogonalise(Columns& m) {
  const Index rows = m.rows(), n = m.cols();
  Columns V(n, n);
  for (Index j = 0; j < n; ++j) V(j, j) = 1;
  bool turned = true;
  for (int sweep = 0; turned && sweep < 60; ++sweep) {
    turned = false;
    for (Index i = 0; i < n; ++i) {
      for (Index j = i + 1; j < n; ++j) {
        const double a = inner(&m(0, i), &m(0, i), rows), b = inner(&m(0, j), &m(0, j), rows);
        const double c = inner(&m(0, i), &m(0, j), rows);
        if (!(std::fabs(c) > std::numeric_limits<double>::epsilon() * std::sqrt(a * b))) continue;
        turned = true;
        const double zeta = (b - a) / (2 * c);
        const double tangent = (zeta < 0 ? -1 : 1) / (std::fabs(zeta) + std::sqrt(1 + zeta * zeta));
        const double cosine = 1 / std::sqrt(1 + tangent * tangent);
        rotate(&m(0, i), &m(0, j), rows, cosine, cosine * tangent);
        rotate(&V(0, i), &V(0, j), n, cosine, cosine * tangent);
      }
    }
  }
  return V;
}

/// left [rows, n] · right [n, cols].
inline Columns times(const Columns& left, const Columns& right) {
  Columns out(left.rows(), right.cols());
  for (Index j = 0; j < right.cols(); ++j) {
    for (Index k = 0; k < right.rows(); ++k) {
      for (Index i = 0; i < left.rows(); ++i) out(i, j) += left(i, k) * right(k, j);
    }
  }
  return out;
}

}  // namespace detail

/// The singular value decomposition of scale · B A.
template <class B, class A>
LowRankSvd low_rank_svd(B up, A down, double scale = 1) {
  check::same("low_rank_svd", "B", "columns", up.cols, "the rows of A", down.rows);
  const detail::ThinQr of_B(detail::columns_of(up)), of_A(detail::columns_of(down.transposed()));
  // s R_B R_Aᵀ, standing upright.
  const bool upright = of_B.R.rows() >= of_A.R.rows();
  const detail::ThinQr& tall = upright ? of_B : of_A;
  const detail::ThinQr& wide = upright ? of_A : of_B;
  detail::Columns core = detail::times(tall.R, detail::columns_of(wide.R.view().transposed()));
  const detail::Columns V = detail::orthogonalise(core);
  const Index k = core.cols(), rows = core.rows();

  Buffer<double> norms(k);
  Buffer<Index> order(k);
  for (Index j = 0; j < k; ++j) {
    norms[j] = std::sqrt(detail::inner(&core(0, j), &core(0, j), rows));
    Index place = j;
    for (; place > 0 && norms[order[place - 1]] < norms[j]; --place) order[place] = order[place - 1];
    order[place] = j;
  }
  detail::Columns U(rows, k), turned(V.rows(), k);
  LowRankSvd svd;
  svd.sigma = Buffer<double>(k);
  for (Index j = 0; j < k; ++j) {
    const Index from = order[j];
    svd.sigma[j] = std::fabs(scale) * norms[from];
    const double unit = norms[from] == 0 ? 0 : 1 / norms[from];
    for (Index i = 0; i < rows; ++i) U(i, j) = core(i, from) * unit;
    for (Index i = 0; i < V.rows(); ++i) turned(i, j) = V(i, from) * (scale < 0 ? -1 : 1);
  }
  detail::Columns of_tall = detail::times(tall.Q, U), of_wide = detail::times(wide.Q, turned);
  svd.left = std::move(upright ? of_tall : of_wide);
  svd.right = std::move(upright ? of_wide : of_tall);
  return svd;
}

}  // namespace LORAMIX_ABI
}  // namespace loramix
