// The weight-space forms of MATH.md section 4 as literal double sums: DoRA, IA3, MoSLoRA, MultiLoRA, AdaLoRA, prompts.
#pragma once

#include <cmath>
#include <vector>

#include "reference/draws.hpp"
#include "reference/grid.hpp"

namespace loramix_test::reference {

using Values = Grid<double>;

/// X ∘ keep / (1 − p16/65536), token t of the batch being global token first + t.
inline Values dropped(const Values& x, std::uint64_t seed, std::uint64_t site, std::uint64_t step, std::uint64_t first,
                      double p) {
  const auto p16 = static_cast<std::uint32_t>(std::floor(65536 * p + 0.5));
  Values out = x;
  for (Index t = 0; t < x.rows(); ++t) {
    for (Index c = 0; c < x.cols(); ++c) {
      const bool kept = keep(seed, site, step, first + static_cast<std::uint64_t>(t), c, p16);
      out(t, c) = kept ? x(t, c) / (1 - p16 / 65536.0) : 0;
    }
  }
  return out;
}

/// L Rᵀ.
inline Values times_transposed(const Values& left, const Values& right) {
  Values out(left.rows(), right.rows(), 0);
  for (Index i = 0; i < left.rows(); ++i) {
    for (Index j = 0; j < right.rows(); ++j) {
      for (Index k = 0; k < left.cols(); ++k) out(i, j) += left(i, k) * right(j, k);
    }
  }
  return out;
}
/// L R.
inline Values times(const Values& left, const Values& right) {
  Values out(left.rows(), right.cols(), 0);
  for (Index i = 0; i < left.rows(); ++i) {
    for (Index j = 0; j < right.cols(); ++j) {
      for (Index k = 0; k < left.cols(); ++k) out(i, j) += left(i, k) * right(k, j);
    }
  }
  return out;
}
/// a + s b.
inline Values plus(Values a, double s, const Values& b) {
  for (Index i = 0; i < a.size(); ++i) a[i] += s * b[i];
  return a;
}
/// ⟨a, b⟩.
inline double inner(const Values& a, const Values& b) {
  double sum = 0;
  for (Index i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

/// ‖(W + s B A)_i‖ [1, d_out].
inline Values row_norms(const Values& W, const Values& A, const Values& B, double s) {
  const Values merged = plus(W, s, times(B, A));
  Values n(1, W.rows(), 0);
  for (Index i = 0; i < W.rows(); ++i) {
    for (Index c = 0; c < W.cols(); ++c) n[i] += merged(i, c) * merged(i, c);
    n[i] = std::sqrt(n[i]);
  }
  return n;
}

/// DoRA's ΔY for given norms; `base_x` is X, or X̂ with drop_base.
inline Values dora(const Values& base_x, const Values& x_hat, const Values& W, const Values& A, const Values& B,
                   const Values& m, const Values& n, double s) {
  const Values base = times_transposed(base_x, W), low = times_transposed(times_transposed(x_hat, A), B);
  Values y(base.rows(), base.cols());
  for (Index t = 0; t < y.rows(); ++t) {
    for (Index i = 0; i < y.cols(); ++i) {
      const double ratio = n[i] == 0 ? 0 : m[i] / n[i];
      y(t, i) = (ratio - 1) * base(t, i) + ratio * s * low(t, i);
    }
  }
  return y;
}

/// s X̂ Aᵀ S Bᵀ.
inline Values moslora(const Values& x_hat, const Values& A, const Values& S, const Values& B, double s) {
  const Values mixed = times(times_transposed(x_hat, A), S);
  return plus(Values(x_hat.rows(), B.rows(), 0), s, times_transposed(mixed, B));
}

/// Σ_i γ_i ∘ (s X̂ A_iᵀ B_iᵀ).
inline Values multi_lora(const Values& x_hat, const Values& A, const Values& B, const Values& gamma, double s) {
  const Index n = gamma.rows(), r = A.rows() / n;
  Values y(x_hat.rows(), B.rows(), 0);
  for (Index i = 0; i < n; ++i) {
    for (Index t = 0; t < y.rows(); ++t) {
      for (Index o = 0; o < y.cols(); ++o) {
        double sum = 0;
        for (Index j = i * r; j < (i + 1) * r; ++j) {
          double u = 0;
          for (Index c = 0; c < x_hat.cols(); ++c) u += x_hat(t, c) * A(j, c);
          sum += u * B(o, j);
        }
        y(t, o) += gamma(i, o) * s * sum;
      }
    }
  }
  return y;
}

/// s (X̂ Aᵀ ∘ λ) Bᵀ.
inline Values ada_lora(const Values& x_hat, const Values& A, const Values& B, const Values& lambda, double s) {
  Values u = times_transposed(x_hat, A);
  for (Index t = 0; t < u.rows(); ++t) {
    for (Index j = 0; j < u.cols(); ++j) u(t, j) *= lambda[j];
  }
  return plus(Values(u.rows(), B.rows(), 0), s, times_transposed(u, B));
}

/// ‖BᵀB − I‖_F + ‖AAᵀ − I‖_F, or both squared.
inline double orthogonality(const Values& A, const Values& B, bool squared) {
  const auto distance = [squared](const Values& rows) {  // of rows·rowsᵀ from I
    double sum = 0;
    for (Index i = 0; i < rows.rows(); ++i) {
      for (Index j = 0; j < rows.rows(); ++j) {
        double dot = i == j ? -1 : 0;
        for (Index c = 0; c < rows.cols(); ++c) dot += rows(i, c) * rows(j, c);
        sum += dot * dot;
      }
    }
    return squared ? sum : std::sqrt(sum);
  };
  Values transposed(B.cols(), B.rows());
  for (Index i = 0; i < B.rows(); ++i) {
    for (Index j = 0; j < B.cols(); ++j) transposed(j, i) = B(i, j);
  }
  return distance(transposed) + distance(A);
}

/// AdaLoRA's budget at step n, before flooring.
inline double ada_budget(double b0, double bT, double n, double ni, double nf, double N) {
  if (n < ni) return b0;
  if (n >= N - nf) return bT;
  const double left = 1 - (n - ni) / (N - nf - ni);
  return bT + (b0 - bT) * left * left * left;
}

}  // namespace loramix_test::reference
