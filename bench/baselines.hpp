// What stands beside every row, written as the best of its kind would write it, on the same operands, in the same
// rounds. Products are Eigen's, without temporaries, split over the backend's lanes as a framework's thread pool does.
//
//   EigenProduct   the whole gated product in rank space: U = X Aᵀ, U ∘ g, Y += s U Bᵀ (B rank-major). The strongest peer
//   ExpertLoop     the direct port of the public classes: expert by expert (its tokens gathered where not all are), a
//                  [tokens, d_out] product of each kept for the gate's gradient
//   TokenGather    what serves many adapters on CPUs elsewhere: A and B of a token's experts copied, then multiplied. Forward
//   BaseGemm       Y = X Wᵀ, and dX = dY W where there is a backward: what the frozen linear costs
#pragma once
#include <Eigen/Core>
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include <loramix/core/matrix.hpp>

namespace bench {

namespace lm = loramix;
using lm::Index;

template <class T, lm::Major M = lm::Major::row>
using View = lm::MatrixView<T, lm::Space::host, M>;

// The operands of one gated product, of which the benchmarked op and its baselines each read and add to the same.
template <class T>
struct Operands {
  View<const T> x;                     // [T, d_in]
  View<T> y;                           // [T, d_out]
  View<const T> A;                     // [R, d_in]
  View<const T, lm::Major::column> B;  // [d_out, R], stored rank-major
  View<const T> dy;                    // [T, d_out]
  View<T> dx;                          // [T, d_in]
  View<T> dA;                          // [R, d_in]
  View<T, lm::Major::column> dB;       // [d_out, R]
  T scale = 1;
};

template <class T, lm::Major M>
auto eigen(View<T, M> v) {
  using Plain = std::remove_const_t<T>;
  using Matrix =
      Eigen::Matrix<Plain, Eigen::Dynamic, Eigen::Dynamic, M == lm::Major::row ? Eigen::RowMajor : Eigen::ColMajor>;
  using Map = Eigen::Map<std::conditional_t<std::is_const_v<T>, const Matrix, Matrix>, 0, Eigen::OuterStride<>>;
  return Map(v.data, v.rows, v.cols, Eigen::OuterStride<>(v.stride));
}

// c += s · a · b (or c = …), cut along the longer side of c.
template <class Backend, class T, lm::Major MA, lm::Major MB>
void product(const Backend& be, bool add, View<T> c, T s, View<const T, MA> a, View<const T, MB> b) {
  const bool by_rows = c.rows > c.cols;
  const Index length = by_rows ? c.rows : c.cols, lanes = be.lanes();
  const Index part = std::max<Index>(8, (length + lanes - 1) / lanes);
  be.run((length + part - 1) / part, [&](Index job, Index) {
    const Index begin = job * part, n = std::min(part, length - begin);
    auto out = eigen(by_rows ? c.row_range(begin, n) : c.col_range(begin, n));
    const auto left = eigen(by_rows ? a.row_range(begin, n) : a);
    const auto right = eigen(by_rows ? b : b.col_range(begin, n));
    if (add)
      out.noalias() += s * left * right;
    else
      out.noalias() = s * left * right;
  });
}

template <class T>
class Scratch {
 public:
  Scratch() = default;
  Scratch(Index rows, Index cols) : m_(rows, cols) {}
  operator View<T>() { return m_.view(); }
  operator View<const T>() const { return m_.view(); }
  View<T> rows(Index n) { return m_.view().row_range(0, n); }
  View<const T> rows(Index n) const { return m_.view().row_range(0, n); }

 private:
  lm::Matrix<T> m_;
};

// Which tokens one expert sees, with which weights. No ids: all tokens.
template <class T>
struct Assignment {
  Index rank_begin, ranks;
  std::vector<Index> tokens;
  std::vector<T> weights;   // one per token; empty: 1
  bool contiguous = false;  // tokens are a range: no gather
  bool shared = false;      // A is the first `ranks` rows, for every expert
  Index rank_begin_of_A() const { return shared ? 0 : rank_begin; }
};

// g [T, R] as the rank-space form multiplies it: 0 where closed.
template <class T>
lm::Matrix<T> dense_gate(Index tokens, Index ranks, const std::vector<Assignment<T>>& experts) {
  lm::Matrix<T> g(tokens, ranks);
  for (const auto& e : experts) {
    for (std::size_t i = 0; i < e.tokens.size(); ++i) {
      for (Index j = 0; j < e.ranks; ++j) g(e.tokens[i], e.rank_begin + j) = e.weights.empty() ? T(1) : e.weights[i];
    }
  }
  return g;
}

// U [T, R_a] is kept for backward; where R_a < R it is repeated for every expert, as the gate is multiplied in. The gate
// is dense [T, R] (null: open); its gradient is rank space's.
template <class T>
class EigenProduct {
 public:
  EigenProduct(Index tokens, Index ranks, Index ranks_of_A, const lm::Matrix<T>* gate)
      : gate_(gate),
        u_(tokens, ranks_of_A),
        du_(tokens, ranks_of_A),
        gated_(gate == nullptr ? 0 : tokens, ranks),
        dgated_(gate == nullptr ? 0 : tokens, ranks) {}

  template <class Backend>
  void forward(const Backend& be, const Operands<T>& o) {
    product<Backend, T>(be, false, u_, T(1), o.x, o.A.transposed());
    product<Backend, T>(be, true, o.y, o.scale, gated(be), o.B.transposed());
  }
  template <class Backend>
  void backward(const Backend& be, const Operands<T>& o) {
    product<Backend, T>(be, false, gate_ == nullptr ? du_ : dgated_, o.scale, o.dy, o.B);
    product<Backend, T>(be, true, o.dB.transposed(), o.scale, gated(be).transposed(), o.dy);
    if (gate_ != nullptr) gate_backward(be);
    product<Backend, T>(be, true, o.dA, T(1), View<const T>(du_).transposed(), o.x);
    product<Backend, T>(be, true, o.dx, T(1), View<const T>(du_), o.A);
  }

 private:
  // f(rows of the gate, the same of U, dU, U ∘ g and its gradient), over all lanes.
  template <class Backend, class F>
  void by_rows(const Backend& be, const F& f) {
    const View<const T> g = gate_->view();
    const View<T> u = u_, du = du_, z = gated_, dz = dgated_;
    const Index part = (g.rows + be.lanes() - 1) / be.lanes(), ranks_of_A = u.cols;
    be.run(be.lanes(), [&](Index job, Index) {
      const Index begin = std::min(g.rows, job * part), n = std::min(part, g.rows - begin);
      for (Index r = 0; n != 0 && r < g.cols; r += ranks_of_A) {
        const auto of = [&](auto view) { return eigen(view.row_range(begin, n).col_range(r, ranks_of_A)); };
        f(r == 0, of(g), eigen(u.row_range(begin, n)), eigen(du.row_range(begin, n)), of(z), of(dz));
      }
    });
  }
  template <class Backend>
  View<const T> gated(const Backend& be) {
    if (gate_ == nullptr) return u_;
    by_rows(be, [](bool, auto g, auto u, auto, auto z, auto) { z = u.cwiseProduct(g); });
    return gated_;
  }
  template <class Backend>
  void gate_backward(const Backend& be) {
    std::atomic<T> sum{0};  // stands for dg: one more pass over [T, R]
    by_rows(be, [&](bool first, auto g, auto u, auto du, auto, auto dz) {
      sum.store(dz.cwiseProduct(u).sum(), std::memory_order_relaxed);
      if (first)
        du = dz.cwiseProduct(g);
      else
        du += dz.cwiseProduct(g);
    });
  }

  const lm::Matrix<T>* gate_;
  Scratch<T> u_, du_, gated_, dgated_;
};

template <class T>
class ExpertLoop {
 public:
  ExpertLoop(const Operands<T>& o, const std::vector<Assignment<T>>& experts) : experts_(experts) {
    Index most = 0, ranks = 0;
    for (const auto& e : experts) {
      const Index n = static_cast<Index>(e.tokens.size());
      most = std::max(most, n), ranks = std::max(ranks, e.ranks);
      kept_.push_back({Scratch<T>(n, e.ranks), Scratch<T>(n, o.y.cols)});
      dweights_.emplace_back(e.tokens.size());
    }
    dh_ = Scratch<T>(most, ranks);
    x_ = Scratch<T>(most, o.x.cols), dx_ = Scratch<T>(most, o.x.cols), dy_ = Scratch<T>(most, o.y.cols);
  }

  template <class Backend>
  void forward(const Backend& be, const Operands<T>& o) {
    for (std::size_t e = 0; e < experts_.size(); ++e) {
      const Assignment<T>& a = experts_[e];
      const auto x = gather(be, a, o.x, x_);
      product<Backend, T>(be, false, kept_[e].h, T(1), x, o.A.row_range(a.rank_begin_of_A(), a.ranks).transposed());
      product<Backend, T>(be, false, kept_[e].out, o.scale, View<const T>(kept_[e].h),
                          o.B.col_range(a.rank_begin, a.ranks).transposed());
      const View<T> out = kept_[e].out;
      rows(be, a, [&](Index i, Index t) { eigen(o.y.row_range(t, 1)) += weight(a, i) * eigen(out.row_range(i, 1)); });
    }
  }
  template <class Backend>
  void backward(const Backend& be, const Operands<T>& o) {
    for (std::size_t e = 0; e < experts_.size(); ++e) {
      const Assignment<T>& a = experts_[e];
      const Index n = static_cast<Index>(a.tokens.size());
      const auto A = o.A.row_range(a.rank_begin_of_A(), a.ranks);
      const auto B = o.B.col_range(a.rank_begin, a.ranks);
      const View<T> out = kept_[e].out, dy = dy_.rows(n), dx = dx_.rows(n), dh(dh_.rows(n).data, n, a.ranks);
      rows(be, a, [&](Index i, Index t) {
        const auto row = eigen(o.dy.row_range(t, 1));
        if (!a.weights.empty()) {
          dweights_[e][static_cast<std::size_t>(i)] = row.cwiseProduct(eigen(out.row_range(i, 1))).sum();
        }
        eigen(dy.row_range(i, 1)) = weight(a, i) * row;
      });
      product<Backend, T>(be, true, o.dB.col_range(a.rank_begin, a.ranks).transposed(), o.scale,
                          View<const T>(kept_[e].h).transposed(), View<const T>(dy));
      product<Backend, T>(be, false, dh, o.scale, View<const T>(dy), B);
      const auto x = gather(be, a, o.x, x_);
      product<Backend, T>(be, true, o.dA.row_range(a.rank_begin_of_A(), a.ranks), T(1), View<const T>(dh).transposed(),
                          x);
      product<Backend, T>(be, false, dx, T(1), View<const T>(dh), A);
      rows(be, a, [&](Index i, Index t) { eigen(o.dx.row_range(t, 1)) += eigen(dx.row_range(i, 1)); });
    }
  }

 private:
  struct Kept {
    Scratch<T> h, out;
  };
  static T weight(const Assignment<T>& a, Index i) {
    return a.weights.empty() ? T(1) : a.weights[static_cast<std::size_t>(i)];
  }
  template <class Backend, class F>
  static void rows(const Backend& be, const Assignment<T>& a, const F& f) {
    const Index n = static_cast<Index>(a.tokens.size()), part = (n + be.lanes() - 1) / be.lanes();
    be.run(be.lanes(), [&](Index job, Index) {
      for (Index i = job * part; i < std::min(n, (job + 1) * part); ++i) f(i, a.tokens[static_cast<std::size_t>(i)]);
    });
  }
  template <class Backend>
  static View<const T> gather(const Backend& be, const Assignment<T>& a, View<const T> x, Scratch<T>& into) {
    const Index n = static_cast<Index>(a.tokens.size());
    if (n == 0) return x.row_range(0, 0);
    if (a.contiguous) return x.row_range(a.tokens[0], n);
    const View<T> out = into.rows(n);
    rows(be, a, [&](Index i, Index t) { eigen(out.row_range(i, 1)) = eigen(x.row_range(t, 1)); });
    return out;
  }

  std::vector<Assignment<T>> experts_;
  std::vector<Kept> kept_;
  std::vector<std::vector<T>> dweights_;
  Scratch<T> dh_, x_, dx_, dy_;
};

// Token t's experts' A and B beside each other, as many copies as tokens use them.
template <class T>
class TokenGather {
 public:
  TokenGather(Index tokens, const Operands<T>& o, const std::vector<Assignment<T>>& experts) : of_token_(tokens) {
    for (const Assignment<T>& e : experts) {
      for (std::size_t i = 0; i < e.tokens.size(); ++i) {
        of_token_[static_cast<std::size_t>(e.tokens[i])].push_back(
            {e.rank_begin, e.ranks, e.weights.empty() ? T(1) : e.weights[i]});
      }
    }
    for (const auto& parts : of_token_) {
      begin_.push_back(ranks_);
      for (const Part& p : parts) ranks_ += p.ranks;
    }
    A_ = lm::Matrix<T>(ranks_, o.A.cols), B_ = lm::Matrix<T>(ranks_, o.B.rows), u_ = lm::Matrix<T>(ranks_, 1);
  }
  // Values that are copied.
  static Index elements(const Operands<T>& o, const std::vector<Assignment<T>>& experts) {
    Index ranks = 0;
    for (const Assignment<T>& e : experts) ranks += e.ranks * static_cast<Index>(e.tokens.size());
    return ranks * (o.A.cols + o.B.rows);
  }

  template <class Backend>
  void forward(const Backend& be, const Operands<T>& o) {
    be.run(static_cast<Index>(of_token_.size()), [&](Index t, Index) {
      const auto& parts = of_token_[static_cast<std::size_t>(t)];
      Index r = begin_[static_cast<std::size_t>(t)];
      for (const Part& p : parts) {
        eigen(A_.view().row_range(r, p.ranks)) = eigen(o.A.row_range(p.begin, p.ranks));
        eigen(B_.view().row_range(r, p.ranks)) = eigen(o.B.col_range(p.begin, p.ranks).transposed());
        auto u = eigen(u_.view().row_range(r, p.ranks));
        u.noalias() = eigen(A_.view().row_range(r, p.ranks)) * eigen(o.x.row_range(t, 1)).transpose();
        eigen(o.y.row_range(t, 1)).noalias() +=
            (o.scale * p.weight) * u.transpose() * eigen(B_.view().row_range(r, p.ranks));
        r += p.ranks;
      }
    });
  }
  template <class Backend>
  void backward(const Backend&, const Operands<T>&) {}

 private:
  struct Part {
    Index begin, ranks;
    T weight;
  };
  std::vector<std::vector<Part>> of_token_;
  std::vector<Index> begin_;
  Index ranks_ = 0;
  lm::Matrix<T> A_, B_, u_;
};

template <class T>
class BaseGemm {
 public:
  BaseGemm(Index tokens, Index d_in, Index d_out) : w_(d_out, d_in), y_(tokens, d_out), dx_(tokens, d_in) {
    for (Index i = 0; i < d_out; ++i) {
      for (Index j = 0; j < d_in; ++j) w_(i, j) = T(1) / T(1 + (i * 31 + j) % 127);
    }
  }
  template <class Backend>
  void forward(const Backend& be, const Operands<T>& o) {
    product<Backend, T>(be, false, y_, T(1), o.x, std::as_const(w_).view().transposed());
  }
  template <class Backend>
  void backward(const Backend& be, const Operands<T>& o) {
    product<Backend, T>(be, false, dx_, T(1), o.dy, std::as_const(w_).view());
  }

 private:
  lm::Matrix<T> w_;
  Scratch<T> y_, dx_;
};

}  // namespace bench
