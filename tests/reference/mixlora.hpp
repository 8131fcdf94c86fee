// The MixLoRA block, literally: E feed-forward networks with their own W1, W3, W2, every matrix materialised.
//
//   h_e = silu((W1 + s B1_e A1_e) x̂₁) ∘ (…)    where dropout acts on the adapters' inputs only:
//   t1 = W1 x + s B1_e A1_e x̂,  t3 = W3 x + s B3_e A3_e x̂,  h_e = silu(t1) ∘ t3,
//   y = Σ_e g_e (W2 h_e + s B2_e A2_e ĥ_e)
#pragma once

#include <cmath>
#include <vector>

#include "reference/grid.hpp"

namespace loramix_test::reference {

/// One block. Keep: keep(t, column) and the factor 1/(1 − p̄) of what is kept.
struct MixBlock {
  Index experts = 1, rank = 1, k = 1;
  double scale = 1, kept = 1;
  Grid<double> x, W1, W3, W2, A1, A3, B1, B3, A2, B2, router;
  Grid<std::uint8_t> keep_x, keep_h;  // empty: all

  static double silu(double t) { return t / (1 + std::exp(-t)); }

  /// ids [T, k]: the k largest logits, ties to the lower; from `seen`, what the router sees.
  Grid<std::int32_t> choose(const Grid<double>& seen) const {
    Grid<std::int32_t> ids(x.rows(), k);
    for (Index t = 0; t < x.rows(); ++t) {
      std::vector<char> taken(static_cast<std::size_t>(experts), 0);
      for (Index s = 0; s < k; ++s) {
        Index best = -1;
        for (Index e = 0; e < experts; ++e) {
          if (taken[static_cast<std::size_t>(e)]) continue;
          if (best < 0 || logit(seen, t, e) > logit(seen, t, best)) best = e;
        }
        taken[static_cast<std::size_t>(best)] = 1;
        ids(t, s) = static_cast<std::int32_t>(best);
      }
    }
    return ids;
  }
  double logit(const Grid<double>& seen, Index t, Index e) const {
    double sum = 0;
    for (Index i = 0; i < x.cols(); ++i) sum += router(e, i) * seen(t, i);
    return sum;
  }
  /// Softmax over the chosen logits of a token, with its ids frozen.
  Grid<double> weigh(const Grid<double>& seen, const Grid<std::int32_t>& ids) const {
    Grid<double> g(x.rows(), k);
    for (Index t = 0; t < x.rows(); ++t) {
      double sum = 0;
      for (Index s = 0; s < k; ++s) sum += g(t, s) = std::exp(logit(seen, t, ids(t, s)));
      for (Index s = 0; s < k; ++s) g(t, s) /= sum;
    }
    return g;
  }
  /// A_e x̂ of one token, x̂ = x ∘ keep · kept.
  double down(const Grid<double>& A, Index row, const std::vector<double>& in, const Grid<std::uint8_t>& keep,
              Index t) const {
    double sum = 0;
    for (Index i = 0; i < A.cols(); ++i) {
      const double open = keep.empty() ? 1 : keep(t, i) ? kept : 0;
      sum += A(row, i) * in[static_cast<std::size_t>(i)] * open;
    }
    return sum;
  }
  /// W in + s B_e A_e (in ∘ keep), row o.
  double adapted(const Grid<double>& W, const Grid<double>& A, const Grid<double>& B, Index e, Index o,
                 const std::vector<double>& in, const Grid<std::uint8_t>& keep, Index t) const {
    double sum = 0;
    for (Index i = 0; i < W.cols(); ++i) sum += W(o, i) * in[static_cast<std::size_t>(i)];
    for (Index j = 0; j < rank; ++j) sum += scale * B(o, e * rank + j) * down(A, e * rank + j, in, keep, t);
    return sum;
  }
  /// y [T, d_out]; a negative id contributes nothing.
  Grid<double> forward(const Grid<std::int32_t>& ids, const Grid<double>& g) const {
    Grid<double> y(x.rows(), W2.rows());
    for (Index t = 0; t < x.rows(); ++t) {
      std::vector<double> in(static_cast<std::size_t>(x.cols()));
      for (Index i = 0; i < x.cols(); ++i) in[static_cast<std::size_t>(i)] = x(t, i);
      for (Index s = 0; s < k; ++s) {
        const Index e = ids(t, s);
        if (e < 0) continue;
        std::vector<double> h(static_cast<std::size_t>(W1.rows()));
        for (Index f = 0; f < W1.rows(); ++f) {
          h[static_cast<std::size_t>(f)] =
              silu(adapted(W1, A1, B1, e, f, in, keep_x, t)) * adapted(W3, A3, B3, e, f, in, keep_x, t);
        }
        for (Index o = 0; o < W2.rows(); ++o) y(t, o) += g(t, s) * adapted(W2, A2, B2, e, o, h, keep_h, t);
      }
    }
    return y;
  }
};

}  // namespace loramix_test::reference
