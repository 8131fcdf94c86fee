// Any user scalar with + − × / exp works through the composed path: dual numbers, against the reference.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>

#include <loramix/gate/softmax.hpp>

#include "conformance/gates.hpp"
#include "cpu/on_host.hpp"
#include "cpu/user_scalars.hpp"
#include "support/seed.hpp"

using namespace loramix_test;

namespace {

using D = Dual<double>;

template <class M>
Grid<D> grid_of(const M& m) {
  Grid<D> g(m.rows(), m.cols());
  for (Index i = 0; i < g.rows(); ++i) {
    for (Index j = 0; j < g.cols(); ++j) g(i, j) = m(i, j);
  }
  return g;
}

template <class M>
M drawn_dual(Random& random, Index rows, Index cols) {
  M m(rows, cols);
  for (Index i = 0; i < rows; ++i) {
    for (Index j = 0; j < cols; ++j) m(i, j) = D(draw(random), draw(random));
  }
  return m;
}

bool agree(const Grid<D>& got, const Grid<D>& want) {
  double size = 0;
  for (Index i = 0; i < want.size(); ++i) size = std::max({size, std::abs(want[i].value), std::abs(want[i].slope)});
  for (Index i = 0; i < want.size(); ++i) {
    if (!(std::abs(got[i].value - want[i].value) <= 1e-12 * size)) return false;
    if (!(std::abs(got[i].slope - want[i].slope) <= 1e-12 * size)) return false;
  }
  return got.rows() == want.rows() && got.cols() == want.cols() && (want.empty() || size > 0);
}

}  // namespace

TEST_CASE("dual numbers go through the composed path: values and slopes are the reference's") {
  constexpr Index tokens = 66, d_in = 21, d_out = 13, experts = 3, rank = 4, ranks = experts * rank;
  constexpr lm::Space host = lm::Space::host;
  Random random(seed(50));
  const lm::cpu::Backend<> be;
  Inputs<D> in{drawn_dual<lm::Matrix<D>>(random, tokens, d_in), drawn_dual<lm::Matrix<D>>(random, ranks, d_in),
               drawn_dual<lm::Matrix<D>>(random, experts, d_in), drawn_dual<RankMajor<D>>(random, d_out, ranks),
               drawn_dual<lm::Matrix<D>>(random, tokens, d_out)};
  in.dropout = lm::make_dropout("test", 0.5, {.seed = 1, .site = 2, .step = 3});
  const lm::SoftmaxGate<D, D> softmax{in.side, D(0.75)};
  lm::Matrix<D> scale = drawn_dual<lm::Matrix<D>>(random, 1, ranks);

  // The composed path; dH is that of the softmax.
  lm::Matrix<D> weights(tokens, experts), dweights(tokens, experts), u(tokens, ranks), h(tokens, experts);
  lm::Matrix<D> y(tokens, d_out), du(tokens, ranks), dh(tokens, experts), dscale(1, ranks);
  lm::Matrix<D> dA(ranks, d_in), dside(experts, d_in), dx(tokens, d_in);
  RankMajor<D> dB(d_out, ranks);
  run_on_host(be, lm::Shrink<D, D, D, D, host>{in.A, in.side, in.x, in.dropout, u, h});
  for (Index t = 0; t < tokens; ++t) softmax.forward_row(lm::SerialTeam{}, t, &h(t, 0), {weights});
  lm::GateForm<D> form = softmax.form({weights}, {.tokens = tokens}, ranks);
  form.rank_scale = {scale.data(), ranks};
  run_on_host(be, lm::Expand<D, D, D, D, host, lm::Major::column>{u, form, in.B, D(1.25), y, lm::Into::set});
  lm::GateGradient<D> dgate{.weights = dweights, .rank_scale = {dscale.data(), ranks}};
  run_on_host(be, lm::ExpandBackward<D, D, D, D, D, host, lm::Major::column>{u, form, in.B, D(1.25), in.dy, du, dB,
                                                                             dgate, lm::Into::set, lm::Into::set});
  for (Index t = 0; t < tokens; ++t) {
    softmax.backward_row(lm::SerialTeam{}, t, &h(t, 0), {weights}, {dweights}, &dh(t, 0));
  }
  run_on_host(be, lm::ShrinkBackward<D, D, D, D, D, host>{in.A, in.side, in.x, in.dropout, du, dh, dA, dside, dx,
                                                          lm::Into::set, lm::Into::set});

  // The reference.
  reference::Product<D> p{grid_of(in.x),
                          Grid<std::uint8_t>(tokens, d_in),
                          D(2),
                          grid_of(in.A),
                          grid_of(in.side),
                          grid_of(in.B),
                          D(1.25),
                          {}};
  for (Index t = 0; t < tokens; ++t) {
    for (Index c = 0; c < d_in; ++c) p.keep(t, c) = in.dropout.keep(t, c);
  }
  const Grid<D> want_h = reference::side_rows(p), want_p = reference::softmax(want_h, D(0.75));
  GateData data = draw_gate(random, {.name = "", .weights = By::token, .rank_scale = true}, tokens, experts, rank);
  NamedGate<D> named = truth<D>(data, &want_p);
  named.gate.factors[1].values = grid_of(scale);
  p.gate = named.gate;
  const Grid<D> want_u = reference::shrink(p);
  const auto expanded = reference::expand_backward(p, want_u, grid_of(in.dy));
  const Grid<D> want_dh = reference::softmax_backward(want_p, expanded.factors[0], D(0.75));
  const auto shrunk = reference::shrink_backward(p, expanded.du, want_dh);
  CHECK(agree(grid_of(u), want_u));
  CHECK(agree(grid_of(h), want_h));
  CHECK(agree(grid_of(weights), want_p));
  CHECK(agree(grid_of(y), reference::expand(p, want_u)));
  CHECK(agree(grid_of(du), expanded.du));
  CHECK(agree(grid_of(dB), expanded.dB));
  CHECK(agree(grid_of(dweights), expanded.factors[0]));
  CHECK(agree(grid_of(dscale), expanded.factors[1]));
  CHECK(agree(grid_of(dh), want_dh));
  CHECK(agree(grid_of(dA), shrunk.dA));
  CHECK(agree(grid_of(dside), shrunk.dside));
  CHECK(agree(grid_of(dx), shrunk.dx));

  // The gradients of the composed path, along the slopes of everything that went in, are the slope of its loss.
  double loss = 0, along = 0;
  const auto add_along = [&](const auto& grad, const auto& input) {
    const Grid<D> g = grid_of(grad), v = grid_of(input);
    for (Index i = 0; i < g.size(); ++i) along += g[i].value * v[i].slope;
  };
  for (Index i = 0; i < tokens * d_out; ++i) {
    const D dy = in.dy.data()[i], out = y.data()[i];
    loss += dy.value * out.slope;  // dY itself is constant in the loss
  }
  add_along(dx, in.x);
  add_along(dA, in.A);
  add_along(dB, in.B);
  add_along(dside, in.side);
  add_along(dscale, scale);
  CHECK(std::abs(loss) > 1);
  CHECK(std::abs(loss - along) <= 1e-11 * (std::abs(loss) + 100));
}
