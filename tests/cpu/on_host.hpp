// The gated product on the CPU, forward and backward in one call, for tests of laws: matrices in, matrices out.
#pragma once
#include <doctest/doctest.h>

#include <cstring>
#include <random>

#include <loramix/core/matrix.hpp>
#include <loramix/cpu/cpu.hpp>
#include <loramix/gate/gates.hpp>

#include "conformance/tensor.hpp"
#include "cpu/harness.hpp"
#include "reference/gate_data.hpp"

namespace loramix_test {

namespace lm = loramix;

template <class T>
using RankMajor = lm::Matrix<T, lm::Space::host, lm::Major::column>;

template <class M>
M drawn(Random& random, Index rows, Index cols) {
  M m(rows, cols);
  using T = std::remove_cvref_t<decltype(m(0, 0))>;
  for (Index i = 0; i < rows; ++i) {
    for (Index j = 0; j < cols; ++j) m(i, j) = lm::narrow<T>(draw(random));
  }
  return m;
}

/// What goes in.
template <class T>
struct Inputs {
  lm::Matrix<T> x, A, side;  // [T, d_in], [R_a, d_in], [n, d_in]
  RankMajor<T> B;            // [d_out, R]
  lm::Matrix<T> dy;          // [T, d_out]
  double scale = 1.25;
  lm::Dropout dropout{};
  lm::Matrix<T> y{};  // [T, d_out] what expand adds to; empty: it assigns
};

template <class T>
Inputs<T> draw_inputs(Random& random, Index tokens, Index d_in, Index d_out, Index ranks, Index ranks_of_a = -1) {
  return {drawn<lm::Matrix<T>>(random, tokens, d_in),
          drawn<lm::Matrix<T>>(random, ranks_of_a < 0 ? ranks : ranks_of_a, d_in),
          {},
          drawn<RankMajor<T>>(random, d_out, ranks),
          drawn<lm::Matrix<T>>(random, tokens, d_out)};
}

/// What comes out. Everything is assigned (Into::set), but for y where there was one before.
template <class T>
struct Outputs {
  using Acc = lm::accumulation_t<T>;
  lm::Matrix<Acc> u, du, dA, dside;
  lm::Matrix<T> y, dx;
  RankMajor<Acc> dB;
  lm::Matrix<Acc> h, dh, dweights, did_weights, dvalues, dmultiplier, drank_scale;
};

template <class T>
using Form = lm::GateForm<lm::accumulation_t<T>>;

template <class Be, class Op>
void run_on_host(const Be& be, const Op& op) {
  Scratch scratch(lm::scratch_bytes(be, op));
  lm::execute(be, op, scratch.arena());
  CHECK(scratch.intact());
}

/// U, H; the gate may depend on them: `gate(out)` returns the form.
template <class T, class E, class MakeForm>
Outputs<T> product(const lm::cpu::Backend<E>& be, const Inputs<T>& in, const MakeForm& make_form) {
  using Acc = lm::accumulation_t<T>;
  constexpr lm::Space host = lm::Space::host;
  const Index tokens = in.x.rows(), d_out = in.B.rows(), side = in.side.rows();
  Outputs<T> out;
  out.u = lm::Matrix<Acc>(tokens, in.A.rows());
  out.h = lm::Matrix<Acc>(tokens, side);
  run_on_host(be, lm::Shrink<T, T, Acc, Acc, host>{in.A, in.side, in.x, in.dropout, out.u, out.h});

  const Form<T> form = make_form(out);
  const bool adds = in.y.rows() != 0;
  out.y = adds ? in.y : lm::Matrix<T>(tokens, d_out);
  run_on_host(be, lm::Expand<Acc, T, T, Acc, host, lm::Major::column>{out.u, form, in.B, Acc(in.scale), out.y,
                                                                      adds ? lm::Into::add : lm::Into::set});

  const auto like = [](auto view) { return lm::Matrix<Acc>(view.data == nullptr ? 0 : view.rows, view.cols); };
  out.du = lm::Matrix<Acc>(tokens, in.A.rows());
  out.dB = RankMajor<Acc>(d_out, in.B.cols());
  out.dweights = like(form.weights);
  out.did_weights = like(form.id_weights);
  out.dvalues = like(form.values);
  out.dmultiplier = lm::Matrix<Acc>(1, form.multiplier.size);
  out.drank_scale = lm::Matrix<Acc>(1, form.rank_scale.size);
  const lm::GateGradient<Acc> dgate{out.did_weights,
                                    out.dweights,
                                    out.dvalues,
                                    {out.dmultiplier.data(), form.multiplier.size},
                                    {out.drank_scale.data(), form.rank_scale.size}};
  run_on_host(be, lm::ExpandBackward<Acc, T, T, Acc, Acc, host, lm::Major::column>{
                      out.u, form, in.B, Acc(in.scale), in.dy, out.du, out.dB, dgate, lm::Into::set, lm::Into::set});

  out.dh = lm::Matrix<Acc>(tokens, side);
  for (Index i = 0; i < tokens * side; ++i) out.dh.data()[i] = out.h.data()[i];  // any gradient will do
  out.dA = lm::Matrix<Acc>(in.A.rows(), in.A.cols());
  out.dside = lm::Matrix<Acc>(side, in.A.cols());
  out.dx = lm::Matrix<T>(tokens, in.x.cols());
  run_on_host(be, lm::ShrinkBackward<T, T, Acc, Acc, Acc, host>{in.A, in.side, in.x, in.dropout, out.du, out.dh, out.dA,
                                                                out.dside, out.dx, lm::Into::set, lm::Into::set});
  return out;
}
template <class T, class E, class Score>
Outputs<T> product(const lm::cpu::Backend<E>& be, const Inputs<T>& in, const lm::GateForm<Score>& form) {
  return product(be, in, [&](const Outputs<T>&) { return form; });
}

template <class M>
bool same_bits(const M& a, const M& b) {
  if (a.rows() != b.rows() || a.cols() != b.cols()) return false;
  return a.rows() * a.cols() == 0 ||
         std::memcmp(a.data(), b.data(), static_cast<std::size_t>(a.rows() * a.cols()) * sizeof(*a.data())) == 0;
}
template <class T>
bool same_bits(const Outputs<T>& a, const Outputs<T>& b) {
  return same_bits(a.u, b.u) && same_bits(a.h, b.h) && same_bits(a.y, b.y) && same_bits(a.du, b.du) &&
         same_bits(a.dB, b.dB) && same_bits(a.dA, b.dA) && same_bits(a.dside, b.dside) && same_bits(a.dx, b.dx) &&
         same_bits(a.dweights, b.dweights) && same_bits(a.did_weights, b.did_weights) &&
         same_bits(a.dvalues, b.dvalues) && same_bits(a.dmultiplier, b.dmultiplier) &&
         same_bits(a.drank_scale, b.drank_scale);
}

template <class M>
double largest(const M& m) {
  double most = 0;
  for (Index i = 0; i < m.rows(); ++i) {
    for (Index j = 0; j < m.cols(); ++j) {
      const double v = std::abs(to_double(m(i, j)));
      if (!(v <= most) && most == most) most = v;  // NaN stays
    }
  }
  return most;
}

/// max |a − b| ≤ tolerance · the largest number, for products of doubles whose sums have at most a few hundred terms.
template <class M, class N>
bool close(const M& a, const N& b, double tolerance = 1e-12) {
  if (a.rows() != b.rows() || a.cols() != b.cols()) return false;
  const double size = largest(b);
  for (Index i = 0; i < a.rows(); ++i) {
    for (Index j = 0; j < a.cols(); ++j) {
      if (!(std::abs(to_double(a(i, j)) - to_double(b(i, j))) <= tolerance * size)) return false;
    }
  }
  return size > 0;
}

template <class T>
lm::MatrixView<const T> view_of(const Grid<T>& g) {
  return {g.size() == 0 ? nullptr : &g[0], g.rows(), g.cols()};
}

}  // namespace loramix_test
