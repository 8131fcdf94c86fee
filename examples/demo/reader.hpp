// A network that reads sequences of tokens, before which prompts can stand.
#pragma once
#include "linears.hpp"

namespace demo {

/// Reads an image as 8 tokens, its rows: a token is 8 pixels and where the row stands. One layer of attention and one
/// feed-forward layer, both added to what they read; the mean over tokens says the digit.
class Reader : public Linears {
 public:
  static constexpr const char* site = "demo.reader";
  static constexpr bool row_per_image = false;
  static constexpr Index d = 32;
  struct Trace {
    Index images;
    Matrix tokens, embedded;  // [8·images, 16], [8·images, d] (where prompts are put before them)
    Matrix x, q, k, v, p, a;  // [n·images, d or n] n tokens, queries, keys, values, attention, what it reads
    Matrix h, f;              // [n·images, d or 2d] after attention, after ReLU
    Matrix pooled, logits;    // [images, d or classes]
  };

  Reader()
      : Linears({{"embedding", 2 * side, d, true},
                 {"attention.q", d, d},
                 {"attention.k", d, d},
                 {"attention.v", d, d},
                 {"attention.o", d, d},
                 {"feed_forward.up", d, 2 * d},
                 {"feed_forward.down", 2 * d, d},
                 {"head", d, classes}}) {}
  static Index rows(Index images) { return images * side; }

  template <class At>
  const Matrix& forward(const Matrix& images, Trace& t, At&& at) const {
    t.images = images.rows();
    t.tokens.resize(rows(t.images), 2 * side);
    t.tokens.leftCols(side) = Eigen::Map<const Matrix>(images.data(), rows(t.images), side);
    for (Index i = 0; i < t.images; ++i) t.tokens.block(i * side, side, side, side).setIdentity();
    if constexpr (requires { at.prepend(t.embedded, t.x); }) {
      at.linear(0, t.tokens, t.embedded);
      at.prepend(t.embedded, t.x);
    } else {
      at.linear(0, t.tokens, t.x);
    }
    attend(t, at);
    Matrix y;
    at.linear(4, t.a, y);
    t.h = t.x + y;
    at.linear(5, t.h, t.f);
    t.f = t.f.cwiseMax(0);
    at.linear(6, t.f, y);
    y += t.h;
    t.pooled.resize(t.images, d);
    for (Index i = 0; i < t.images; ++i) t.pooled.row(i) = y.middleRows(i * n(t), n(t)).colwise().mean();
    at.linear(7, t.pooled, t.logits);
    return t.logits;
  }
  template <class At>
  void backward(Trace& t, Matrix& dy, At&& at) const {
    Matrix dpooled, df, dx, da;
    at.linear_backward(7, t.pooled, dy, dpooled);
    Matrix dh(t.h.rows(), d);
    for (Index i = 0; i < t.images; ++i) {
      dh.middleRows(i * n(t), n(t)).rowwise() = dpooled.row(i) / static_cast<float>(n(t));
    }
    Matrix passed = dh;
    at.linear_backward(6, t.f, passed, df);
    relu_backward(t.f, df);
    at.linear_backward(5, t.h, df, dx);
    dh += dx;
    passed = dh;
    at.linear_backward(4, t.a, passed, da);
    attend_backward(t, da, dh, at);
    if constexpr (requires { at.prepend_backward(t.embedded, dh); })
      at.prepend_backward(t.embedded, dh);
    else
      at.linear_backward(0, t.tokens, dh, dx);
  }

 private:
  /// Rows of one image.
  static Index n(const Trace& t) { return t.images == 0 ? 0 : t.x.rows() / t.images; }
  static float scale() { return 1 / std::sqrt(static_cast<float>(d)); }

  template <class At>
  static void attend(Trace& t, At& at) {
    at.linear(1, t.x, t.q);
    at.linear(2, t.x, t.k);
    at.linear(3, t.x, t.v);
    t.p.resize(t.x.rows(), n(t));
    t.a.resize(t.x.rows(), d);
    for (Index i = 0; i < t.images; ++i) {
      const auto of = [&](Matrix& m) { return m.middleRows(i * n(t), n(t)); };
      auto p = of(t.p);
      p.noalias() = of(t.q) * of(t.k).transpose() * scale();
      p = (p.colwise() - p.rowwise().maxCoeff().eval()).array().exp();
      p.array().colwise() /= p.rowwise().sum().eval().array();
      of(t.a).noalias() = p * of(t.v);
    }
  }
  /// dx += what queries, keys and values read.
  template <class At>
  static void attend_backward(Trace& t, Matrix& da, Matrix& dx, At& at) {
    Matrix dq(t.x.rows(), d), dk(t.x.rows(), d), dv(t.x.rows(), d), dp(n(t), n(t)), passed;
    for (Index i = 0; i < t.images; ++i) {
      const auto of = [&](Matrix& m) { return m.middleRows(i * n(t), n(t)); };
      const auto p = of(t.p);
      dp.noalias() = of(da) * of(t.v).transpose();
      dp.colwise() -= dp.cwiseProduct(p).rowwise().sum().eval();
      dp.array() *= p.array() * scale();
      of(dv).noalias() = p.transpose() * of(da);
      of(dq).noalias() = dp * of(t.k);
      of(dk).noalias() = dp.transpose() * of(t.q);
    }
    at.linear_backward(1, t.x, dq, passed);
    dx += passed;
    at.linear_backward(2, t.x, dk, passed);
    dx += passed;
    at.linear_backward(3, t.x, dv, passed);
    dx += passed;
  }
};

}  // namespace demo
