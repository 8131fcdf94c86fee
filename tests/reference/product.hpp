// The gated product as MATH.md section 1 writes it: literal sums, for any scalar with + − × / exp.
//
//   X̂ = X ∘ keep · kept      U = X̂ Aᵀ      H = X sideᵀ      ΔY = s (U ∘ g) Bᵀ
//   dŨ = s dY B   dB = s dYᵀ (U ∘ g)   dU = dŨ ∘ g   dA = dUᵀ X̂   dX = (dU A) ∘ keep · kept + dH side
//   dg_i = dŨ ∘ U ∘ Π_{j≠i} g_j, summed over what one value covers
//
// With a shared A of R_a rows, U_j is U_{j mod R_a} and dU sums over the experts.
#pragma once

#include <cmath>
#include <vector>

#include "reference/grid.hpp"

namespace loramix_test::reference {

/// One factor of a gate: its values, and which of them covers (t, j).
template <class T>
struct Factor {
  Grid<T> values;      // any shape; covers holds flat indices
  Grid<Index> covers;  // [T, R]; −1 = none (closed)
};

template <class T>
struct Gate {
  Grid<std::uint8_t> open;  // [T, R]
  std::vector<Factor<T>> factors;
};

/// Π of the factors at (t, j) but number `skip`.
template <class T>
T product_of_factors(const Gate<T>& gate, Index t, Index j, Index skip = -1) {
  T g = T(1);
  for (Index i = 0; i < static_cast<Index>(gate.factors.size()); ++i) {
    const Factor<T>& f = gate.factors[static_cast<std::size_t>(i)];
    if (i != skip) g = g * f.values[f.covers(t, j)];
  }
  return g;
}

template <class T>
struct Product {
  Grid<T> x;                // [T, d_in]
  Grid<std::uint8_t> keep;  // [T, d_in]
  T kept;                   // 1 / (1 − p̄)
  Grid<T> A;                // [R_a, d_in]
  Grid<T> side;             // [n, d_in]
  Grid<T> B;                // [d_out, R]
  T s;
  Gate<T> gate;
};

template <class T>
T dropped(const Product<T>& p, Index t, Index c) {
  return p.keep(t, c) ? p.x(t, c) * p.kept : T(0);
}

/// U [T, R_a].
template <class T>
Grid<T> shrink(const Product<T>& p) {
  Grid<T> u(p.x.rows(), p.A.rows(), T(0));
  for (Index t = 0; t < u.rows(); ++t) {
    for (Index i = 0; i < u.cols(); ++i) {
      for (Index c = 0; c < p.x.cols(); ++c) u(t, i) += dropped(p, t, c) * p.A(i, c);
    }
  }
  return u;
}

/// H [T, n].
template <class T>
Grid<T> side_rows(const Product<T>& p) {
  Grid<T> h(p.x.rows(), p.side.rows(), T(0));
  for (Index t = 0; t < h.rows(); ++t) {
    for (Index i = 0; i < h.cols(); ++i) {
      for (Index c = 0; c < p.x.cols(); ++c) h(t, i) += p.x(t, c) * p.side(i, c);
    }
  }
  return h;
}

/// U ∘ g [T, R].
template <class T>
Grid<T> gated(const Product<T>& p, const Grid<T>& u) {
  Grid<T> out(u.rows(), p.B.cols(), T(0));
  for (Index t = 0; t < out.rows(); ++t) {
    for (Index j = 0; j < out.cols(); ++j) {
      if (p.gate.open(t, j)) out(t, j) = u(t, j % u.cols()) * product_of_factors(p.gate, t, j);
    }
  }
  return out;
}

/// ΔY [T, d_out].
template <class T>
Grid<T> expand(const Product<T>& p, const Grid<T>& u) {
  const Grid<T> z = gated(p, u);
  Grid<T> y(z.rows(), p.B.rows(), T(0));
  for (Index t = 0; t < y.rows(); ++t) {
    for (Index o = 0; o < y.cols(); ++o) {
      T sum = T(0);
      for (Index j = 0; j < z.cols(); ++j) sum += z(t, j) * p.B(o, j);
      y(t, o) = p.s * sum;
    }
  }
  return y;
}

template <class T>
struct ExpandGradient {
  Grid<T> du;                    // [T, R_a]
  Grid<T> dB;                    // [d_out, R]
  std::vector<Grid<T>> factors;  // shapes of the gate's factors
};

template <class T>
ExpandGradient<T> expand_backward(const Product<T>& p, const Grid<T>& u, const Grid<T>& dy) {
  const Index tokens = u.rows(), ranks = p.B.cols(), width = p.B.rows();
  Grid<T> dut(tokens, ranks, T(0));  // dŨ
  for (Index t = 0; t < tokens; ++t) {
    for (Index j = 0; j < ranks; ++j) {
      T sum = T(0);
      for (Index o = 0; o < width; ++o) sum += dy(t, o) * p.B(o, j);
      dut(t, j) = p.s * sum;
    }
  }
  ExpandGradient<T> g{Grid<T>(tokens, u.cols(), T(0)), Grid<T>(width, ranks, T(0)), {}};
  for (Index t = 0; t < tokens; ++t) {
    for (Index j = 0; j < ranks; ++j) {
      if (p.gate.open(t, j)) g.du(t, j % u.cols()) += dut(t, j) * product_of_factors(p.gate, t, j);
    }
  }
  const Grid<T> z = gated(p, u);
  for (Index o = 0; o < width; ++o) {
    for (Index j = 0; j < ranks; ++j) {
      T sum = T(0);
      for (Index t = 0; t < tokens; ++t) sum += dy(t, o) * z(t, j);
      g.dB(o, j) = p.s * sum;
    }
  }
  for (std::size_t i = 0; i < p.gate.factors.size(); ++i) {
    const Factor<T>& f = p.gate.factors[i];
    Grid<T> d(f.values.rows(), f.values.cols(), T(0));
    for (Index t = 0; t < tokens; ++t) {
      for (Index j = 0; j < ranks; ++j) {
        if (!p.gate.open(t, j)) continue;
        d[f.covers(t, j)] += dut(t, j) * u(t, j % u.cols()) * product_of_factors(p.gate, t, j, static_cast<Index>(i));
      }
    }
    g.factors.push_back(d);
  }
  return g;
}

template <class T>
struct ShrinkGradient {
  Grid<T> dA;     // [R_a, d_in]
  Grid<T> dside;  // [n, d_in]
  Grid<T> dx;     // [T, d_in]
};

template <class T>
ShrinkGradient<T> shrink_backward(const Product<T>& p, const Grid<T>& du, const Grid<T>& dh) {
  ShrinkGradient<T> g{Grid<T>(p.A.rows(), p.A.cols(), T(0)), Grid<T>(p.side.rows(), p.A.cols(), T(0)),
                      Grid<T>(p.x.rows(), p.x.cols(), T(0))};
  for (Index t = 0; t < p.x.rows(); ++t) {
    for (Index c = 0; c < p.x.cols(); ++c) {
      for (Index i = 0; i < p.A.rows(); ++i) g.dA(i, c) += du(t, i) * dropped(p, t, c);
      for (Index i = 0; i < p.side.rows(); ++i) g.dside(i, c) += dh(t, i) * p.x(t, c);
      T sum = T(0);
      for (Index i = 0; i < p.A.rows(); ++i) sum += du(t, i) * p.A(i, c);
      g.dx(t, c) = p.keep(t, c) ? sum * p.kept : T(0);
      for (Index i = 0; i < p.side.rows(); ++i) g.dx(t, c) += dh(t, i) * p.side(i, c);
    }
  }
  return g;
}

/// softmax(h / τ), row by row.
template <class T>
Grid<T> softmax(const Grid<T>& h, T temperature) {
  using std::exp;
  Grid<T> p(h.rows(), h.cols(), T(0));
  for (Index t = 0; t < h.rows(); ++t) {
    T top = h(t, 0), sum = T(0);
    for (Index e = 1; e < h.cols(); ++e) top = top < h(t, e) ? h(t, e) : top;
    for (Index e = 0; e < h.cols(); ++e) sum += exp((h(t, e) - top) / temperature);
    for (Index e = 0; e < h.cols(); ++e) p(t, e) = exp((h(t, e) - top) / temperature) / sum;
  }
  return p;
}

/// dh = p ∘ (dp − ⟨p, dp⟩) / τ.
template <class T>
Grid<T> softmax_backward(const Grid<T>& p, const Grid<T>& dp, T temperature) {
  Grid<T> dh(p.rows(), p.cols(), T(0));
  for (Index t = 0; t < p.rows(); ++t) {
    T inner = T(0);
    for (Index e = 0; e < p.cols(); ++e) inner += p(t, e) * dp(t, e);
    for (Index e = 0; e < p.cols(); ++e) dh(t, e) = p(t, e) * (dp(t, e) - inner) / temperature;
  }
  return dh;
}

}  // namespace loramix_test::reference
