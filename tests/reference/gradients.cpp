// The reference against central differences and against dual numbers: MATH.md section 6, dropout 0.5, frozen masks and
// selections.
#include <doctest/doctest.h>

#include <cmath>
#include <string>
#include <vector>

#include "reference/draws.hpp"
#include "reference/dual.hpp"
#include "reference/gate_data.hpp"
#include "support/seed.hpp"

using namespace loramix_test;

namespace {

/// One product and the numbers that its loss ⟨dY, ΔY⟩ depends on.
template <class T>
struct Whole {
  GateData data;
  Grid<T> x, A, B, side, dy;
  std::vector<Grid<T>> factors;  // of the gate; a computed one is overwritten
  Grid<std::uint8_t> keep;

  reference::Product<T> product() const {
    reference::Product<T> p{x, keep, T(2), A, side, B, T(1.25), {}};
    p.gate = truth<T>(data).gate;
    for (std::size_t i = 0; i < factors.size(); ++i) p.gate.factors[i].values = factors[i];
    if (data.spec.computed) p.gate.factors[0].values = reference::softmax(reference::side_rows(p), temperature());
    return p;
  }
  static T temperature() { return T(0.75); }

  T loss() const {
    const reference::Product<T> p = product();
    const Grid<T> y = reference::expand(p, reference::shrink(p));
    T sum = T(0);
    for (Index i = 0; i < y.size(); ++i) sum += dy[i] * y[i];
    return sum;
  }
  /// x, A, B, side, then the factors.
  std::vector<Grid<T>*> tensors() {
    std::vector<Grid<T>*> all{&x, &A, &B, &side};
    for (std::size_t i = data.spec.computed ? 1 : 0; i < factors.size(); ++i) all.push_back(&factors[i]);
    return all;
  }
  std::vector<Grid<T>> gradients() const {
    const reference::Product<T> p = product();
    const Grid<T> u = reference::shrink(p);
    const reference::ExpandGradient<T> e = reference::expand_backward(p, u, dy);
    Grid<T> dh(x.rows(), side.rows(), T(0));
    if (data.spec.computed) dh = reference::softmax_backward(p.gate.factors[0].values, e.factors[0], temperature());
    const reference::ShrinkGradient<T> s = reference::shrink_backward(p, e.du, dh);
    std::vector<Grid<T>> all{s.dx, s.dA, e.dB, s.dside};
    for (std::size_t i = data.spec.computed ? 1 : 0; i < e.factors.size(); ++i) all.push_back(e.factors[i]);
    return all;
  }
};

Whole<double> draw_case(Random& random, const GateSpec& spec, bool shared) {
  const Index tokens = 9, d_in = 6, d_out = 5, experts = 4, rank = 2;
  Whole<double> w;
  w.data = draw_gate(random, spec, tokens, experts, rank);
  w.x = draw_grid(random, tokens, d_in);
  w.A = draw_grid(random, shared ? rank : w.data.ranks, d_in);
  w.B = draw_grid(random, d_out, w.data.ranks);
  w.side = draw_grid(random, spec.computed ? experts : 0, d_in);
  w.dy = draw_grid(random, tokens, d_out);
  w.keep = Grid<std::uint8_t>(tokens, d_in);
  for (Index t = 0; t < tokens; ++t) {
    for (Index c = 0; c < d_in; ++c) w.keep(t, c) = reference::keep(7, 11, 3, static_cast<std::uint64_t>(t), c, 32768);
  }
  for (const auto& f : truth<double>(w.data).gate.factors) w.factors.push_back(f.values);
  return w;
}

double norm(const Grid<double>& g) {
  double sum = 0;
  for (Index i = 0; i < g.size(); ++i) sum += g[i] * g[i];
  return std::sqrt(sum);
}

double distance(Grid<double> a, const Grid<double>& b) {
  for (Index i = 0; i < a.size(); ++i) a[i] -= b[i];
  return norm(a);
}

/// Fourth-order central difference of the loss along one number.
double difference(Whole<double>& w, double& at) {
  const double here = at, step = 1e-3;
  const auto loss = [&](double by) {
    at = here + by;
    return w.loss();
  };
  const double slope = (8 * (loss(step) - loss(-step)) - (loss(2 * step) - loss(-2 * step))) / (12 * step);
  at = here;
  return slope;
}

Whole<Dual<double>> as_dual(const Whole<double>& w) {
  using D = Dual<double>;
  Whole<D> d{w.data, w.x.as<D>(), w.A.as<D>(), w.B.as<D>(), w.side.as<D>(), w.dy.as<D>(), {}, w.keep};
  for (const Grid<double>& f : w.factors) d.factors.push_back(f.as<D>());
  return d;
}

/// Every gradient of one drawn case, number by number.
void check_gradients(Random& random, const GateSpec& spec, bool shared) {
  Whole<double> w = draw_case(random, spec, shared);
  const std::vector<Grid<double>> got = w.gradients();
  const std::vector<Grid<double>*> tensors = w.tensors();
  Whole<Dual<double>> dual = as_dual(w);
  const std::vector<Grid<Dual<double>>*> dual_tensors = dual.tensors();
  REQUIRE(got.size() == tensors.size());

  double largest = 0;
  for (const Grid<double>& g : got) largest = std::max(largest, norm(g));
  CHECK(largest > 1e-3);
  for (std::size_t i = 0; i < got.size(); ++i) {
    INFO("tensor ", i);
    Grid<double> by_difference(got[i].rows(), got[i].cols()), by_dual = by_difference;
    for (Index n = 0; n < got[i].size(); ++n) {
      by_difference[n] = difference(w, (*tensors[i])[n]);
      (*dual_tensors[i])[n].slope = 1;
      by_dual[n] = dual.loss().slope;
      (*dual_tensors[i])[n].slope = 0;
    }
    const double size = norm(got[i]);
    CHECK((size > 1e-4 * largest || got[i].empty()));
    CHECK(distance(got[i], by_difference) <= 1e-7 * size + 1e-8 * largest);
    CHECK(distance(got[i], by_dual) <= 1e-12 * size + 1e-13 * largest);
  }
}

}  // namespace

TEST_CASE("the reference's gradients are those of central differences and of dual numbers") {
  Random random(seed(1));
  for (const GateSpec& spec : gate_specs()) {
    INFO(std::string(spec.name));
    check_gradients(random, spec, false);
    if (spec.by_expert() && !spec.mixed_ranks) {
      INFO("shared A");
      check_gradients(random, spec, true);
    }
  }
}

TEST_CASE("the reference's draws give the known answers of MATH.md") {
  std::uint64_t site = 0xcbf29ce484222325u;
  for (const char* c = "layers.0.mlp.up_proj"; *c != '\0'; ++c) {
    site = (site ^ static_cast<unsigned char>(*c)) * 0x100000001b3u;
  }
  CHECK(site == 0xf13fb8f15d1e4c8fu);
  CHECK(reference::fold(42, site) == 0xa7d0a45eb6eb8f56u);
  const std::uint64_t key = reference::fold(reference::fold(42, site), 3);
  CHECK(key == 0x90ab6ccd94e807c8u);
  CHECK(reference::philox(key, {0, 0, 5, 0}) == reference::Words{0x4c8a82b6, 0x4b0cb6e7, 0x2f59aa34, 0x354403e4});
  const auto bits = [&](std::uint64_t token, std::uint32_t p16) {
    std::string text;
    for (Index i = 0; i < 20; ++i) text += reference::keep(42, site, 3, token, i, p16) ? '1' : '0';
    return text;
  };
  CHECK(bits(5, 32768) == "10101000010110101101");
  CHECK(bits(5, 6554) == "11111101111111111111");
  CHECK(bits((7ull << 32) + 5, 32768) == "01011011001111110101");
}

TEST_CASE("a dual number carries the derivative of + - * / exp") {
  const Dual<double> x(0.7, 1.0);
  const auto close = [](double a, double b) { return std::abs(a - b) <= 1e-15; };
  CHECK(close((x * x * x).slope, 3 * 0.49));
  CHECK(close((Dual<double>(1) / x).slope, -1 / 0.49));
  CHECK(close(exp(x + x).slope, 2 * std::exp(1.4)));
  CHECK(close((x - x * Dual<double>(2)).slope, -1));
}
