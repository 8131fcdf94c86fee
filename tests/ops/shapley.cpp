// Shapley values: all orders against all coalitions, samples inside their error bar, the closed form in output space and
// in rank space, and the loss that trains a router towards them.
#include <doctest/doctest.h>

#include <cmath>
#include <random>
#include <vector>

#include <loramix/adapter/hydra_lora.hpp>
#include <loramix/adapter/mola.hpp>
#include <loramix/adapter/shapley.hpp>
#include <loramix/adapter/team_lora.hpp>
#include <loramix/cpu/cpu.hpp>
#include <loramix/train/gradient_check.hpp>

#include "core/caught.hpp"
#include "reference/losses.hpp"
#include "support/seed.hpp"

namespace lm = loramix;
using namespace loramix_test;

namespace {

const lm::cpu::Backend<> be;

struct Draws {
  explicit Draws(std::uint64_t site) : engine(seed(site)) {}
  double operator()() { return std::uniform_real_distribution<double>(-1, 1)(engine); }
  template <class M>
  void fill(M& m) {
    for (Index i = 0; i < m.rows() * m.cols(); ++i) m.data()[i] = (*this)();
  }
  std::mt19937_64 engine;
};

lm::VectorView<double> vec(std::vector<double>& v) { return {v.data(), static_cast<Index>(v.size())}; }
bool near(double got, double want, double size) { return std::abs(got - want) <= 1e-12 * size; }

/// A game with a random value for every coalition.
std::vector<double> random_game(Index experts, std::uint64_t site) {
  Draws draw(site);
  std::vector<double> v(std::size_t{1} << experts);
  for (double& value : v) value = draw();
  return v;
}

}  // namespace

TEST_CASE("exact values are those of all orders, and sum to v(all) − v(nobody)") {
  for (const Index experts : {1, 2, 3, 6}) {
    const auto table = random_game(experts, 430 + static_cast<std::uint64_t>(experts));
    Index calls = 0;
    const auto v = [&](std::uint64_t c) {
      ++calls;
      return table[c];
    };
    std::vector<double> phi(static_cast<std::size_t>(experts));
    lm::shapley_exact(experts, v, vec(phi));
    CHECK(calls == Index{1} << experts);
    const auto want = reference::shapley_by_orders(experts, [&](std::uint64_t c) { return table[c]; });
    double sum = 0;
    for (std::size_t e = 0; e < phi.size(); ++e) {
      CHECK(near(phi[e], want[e], 1));
      sum += phi[e];
    }
    CHECK(near(sum, table.back() - table[0], 10));
  }
}

TEST_CASE("sixteen experts: an additive game gives its weights back") {
  std::vector<double> phi(16);
  lm::shapley_exact(
      16,
      [](std::uint64_t c) {
        double sum = 5;
        for (int e = 0; e < 16; ++e) sum += (c >> e & 1) != 0 ? e - 3 : 0;
        return sum;
      },
      vec(phi));
  for (std::size_t e = 0; e < 16; ++e) CHECK(near(phi[e], static_cast<double>(e) - 3, 100));
}

TEST_CASE("samples lie inside their error bar, which shrinks with the root of their number") {
  const auto table = random_game(6, 440);
  const auto v = [&](std::uint64_t c) { return table[c]; };
  std::vector<double> exact(6), few(6), many(6), few_bar(6), many_bar(6), again(6), again_bar(6);
  lm::shapley_exact(6, v, vec(exact));
  const lm::Key key{.seed = 3, .site = lm::site("shapley")};
  lm::shapley_sampled(6, v, 200, key, vec(few), vec(few_bar));
  lm::shapley_sampled(6, v, 5000, key, vec(many), vec(many_bar));
  lm::shapley_sampled(6, v, 200, key, vec(again), vec(again_bar));
  double sum = 0;
  for (std::size_t e = 0; e < 6; ++e) {
    CHECK(std::abs(few[e] - exact[e]) <= 4 * few_bar[e]);
    CHECK(std::abs(many[e] - exact[e]) <= 4 * many_bar[e]);
    CHECK(many_bar[e] / few_bar[e] == doctest::Approx(0.2).epsilon(0.2));
    CHECK((few_bar[e] > 0 && few_bar[e] < 0.1));
    CHECK((few[e] == again[e] && few_bar[e] == again_bar[e]));
    sum += few[e];
  }
  CHECK(near(sum, table.back() - table[0], 10));  // every order spends it all
}

TEST_CASE("games refuse sizes they cannot do") {
  std::vector<double> phi(17), bar(17);
  const auto v = [](std::uint64_t) { return 0.0; };
  check_error(lm::ErrorCode::value, {"shapley_exact", "17", "16"}, [&] { lm::shapley_exact(17, v, vec(phi)); });
  check_error(lm::ErrorCode::shape, {"shapley_exact", "phi", "17", "3"}, [&] { lm::shapley_exact(3, v, vec(phi)); });
  check_error(lm::ErrorCode::value, {"shapley_sampled", "orders", "1", "2"},
              [&] { lm::shapley_sampled(17, v, 1, lm::Key{}, vec(phi), vec(bar)); });
}

namespace {

/// A saved forward of an adapter, and every expert's part of ΔY by running it with the others' B at 0.
template <class A>
struct Parts {
  static constexpr Index tokens = 6, d_in = 7, d_out = 5;

  Parts(typename A::Config config, std::uint64_t site) : adapter(sized(config)), x(tokens, d_in), q(tokens, d_out) {
    Draws draw(site);
    draw.fill(x);
    draw.fill(q);
    A::visit(adapter, [&](const char*, auto v, lm::ParameterGroup) {
      for (Index i = 0; i < v.rows * v.cols; ++i) v.data[i] = draw();
    });
    experts = config.experts;
    work.resize(static_cast<std::size_t>(
        lm::workspace_bytes(be, adapter, tokens, lm::Pass::backward) + lm::workspace_bytes(be, adapter, tokens) +
        lm::shapley_workspace_bytes(be, adapter, tokens) + lm::loss_workspace_bytes<double>(tokens, experts)));
    kept.resize(static_cast<std::size_t>(lm::reserve_bytes(adapter, tokens)));
  }
  static typename A::Config sized(typename A::Config config) {
    config.d_in = d_in;
    config.d_out = d_out;
    config.dropout = 0.5;
    return config;
  }
  auto forward(const A& of, lm::Matrix<double>& y, lm::Keep keep = lm::Keep::z) {
    reserve = lm::Arena<>{kept};
    return lm::forward(be, of, x, y, lm::Arena<>{work},
                       {.save = &reserve,
                        .key = {.seed = 2, .site = lm::site("shapley")},
                        .keep = keep,
                        .into = lm::Into::set,
                        .valid = {valid.data(), static_cast<Index>(valid.size())}});
  }
  lm::Matrix<double> part(Index e) {
    A alone = adapter;
    const Index ranks = adapter.B().cols / experts;
    for (Index j = 0; j < adapter.B().cols; ++j) {
      for (Index o = 0; o < d_out && j / ranks != e; ++o) alone.B()(o, j) = 0;
    }
    lm::Matrix<double> h(tokens, d_out);
    forward(alone, h);
    return h;
  }

  A adapter;
  Index experts;
  lm::Matrix<double> x, q;
  std::vector<std::byte> work, kept;
  std::vector<std::uint8_t> valid;
  lm::Arena<> reserve;
};

/// closed form = exact = rank space, for q and for −q.
template <class A>
void check_closed_forms(const typename A::Config& config, std::uint64_t site) {
  Parts<A> c(config, site);
  const Index E = c.experts, outputs = c.tokens * c.d_out;
  std::vector<lm::Matrix<double>> h;
  for (Index e = 0; e < E; ++e) h.push_back(c.part(e));
  const auto dot = [&](const lm::Matrix<double>& a, const lm::Matrix<double>& b) {
    double sum = 0;
    for (Index i = 0; i < outputs; ++i) sum += a.data()[i] * b.data()[i];
    return sum;
  };
  lm::Matrix<double> y(c.tokens, c.d_out), phi_rows(c.tokens, E), gram(E, E);
  const auto saved = c.forward(c.adapter, y);
  for (const double factor : {1.0, -1.0}) {
    std::vector<double> exact(static_cast<std::size_t>(E)), closed(exact), with_q(exact);
    const auto v = [&](std::uint64_t coalition) {  // ‖q‖² − ‖q − Σ h‖²
      double sum = 0;
      for (Index i = 0; i < outputs; ++i) {
        const double target = factor * c.q.data()[i];
        double left = target;
        for (Index e = 0; e < E; ++e) left -= (coalition >> e & 1) != 0 ? h[static_cast<std::size_t>(e)].data()[i] : 0;
        sum += target * target - left * left;
      }
      return sum;
    };
    lm::shapley_exact(E, v, vec(exact));
    for (Index e = 0; e < E; ++e) {
      with_q[static_cast<std::size_t>(e)] = factor * dot(c.q, h[static_cast<std::size_t>(e)]);
      for (Index j = 0; j < E; ++j) gram(e, j) = dot(h[static_cast<std::size_t>(e)], h[static_cast<std::size_t>(j)]);
    }
    lm::shapley_closed_form(vec(with_q), gram.view(), vec(closed));
    lm::shapley_values(be, c.adapter, saved, c.q, factor, phi_rows, lm::Arena<>{c.work});
    double all = 0, size = 0;
    for (Index e = 0; e < E; ++e) size += gram(e, e) + 1;
    for (Index e = 0; e < E; ++e) {
      double in_rank_space = 0;
      for (Index t = 0; t < c.tokens; ++t) in_rank_space += phi_rows(t, e);
      CHECK(near(closed[static_cast<std::size_t>(e)], exact[static_cast<std::size_t>(e)], size));
      CHECK(near(in_rank_space, exact[static_cast<std::size_t>(e)], size));
      all += in_rank_space;
    }
    CHECK(std::abs(all) > 0.1);
    CHECK(near(all, v((std::uint64_t{1} << E) - 1) - v(0), size));
  }
}

}  // namespace

TEST_CASE("closed form = exact = rank space: own A, one shared A, top-k, competition with negative weights") {
  check_closed_forms<lm::TeamLora<double>>({.experts = 4, .rank = 2, .hidden = 3}, 450);
  check_closed_forms<lm::HydraLora<double>>({.experts = 3, .rank = 2}, 451);
  check_closed_forms<lm::Mola<double>>({.experts = 4, .rank = 3}, 452);
}

TEST_CASE("the values need what forward kept") {
  Parts<lm::TeamLora<double>> c({.experts = 3, .rank = 2, .hidden = 3}, 453);
  lm::Matrix<double> y(c.tokens, c.d_out), phi(c.tokens, 3), wrong(c.tokens, 4);
  const auto call = [&](const auto& saved, lm::Matrix<double>& out) {
    lm::shapley_values(be, c.adapter, saved, c.q, 1, out, lm::Arena<>{c.work});
  };
  check_error(lm::ErrorCode::state, {"shapley_values", "Keep::z"},
              [&] { call(c.forward(c.adapter, y, lm::Keep::recompute), phi); });
  check_error(lm::ErrorCode::state, {"shapley_values", "saved"}, [&] { call(lm::Saved<lm::TeamLora<double>>{}, phi); });
  check_error(lm::ErrorCode::shape, {"shapley_rows", "phi", "4", "3"}, [&] { call(c.forward(c.adapter, y), wrong); });
  check_error(lm::ErrorCode::arena, {"shapley_rows", "work"}, [&] {
    const auto saved = c.forward(c.adapter, y);
    lm::shapley_values(be, c.adapter, saved, c.q, 1, phi, lm::Arena<>{c.work.data(), 256});
  });
}

TEST_CASE("the loss is the mean divergence over valid rows, and its gradient the difference of it") {
  for (const double temperature : {1.0, 0.5}) {
    Draws draw(460);
    lm::Matrix<double> logits(8, 4), dlogits(8, 4), phi(8, 4);
    draw.fill(logits);
    draw.fill(phi);
    const reference::Mask valid{1, 1, 0, 1, 1, 0, 1, 1};
    const auto grid = [](const lm::Matrix<double>& m) {
      Grid<double> g(m.rows(), m.cols());
      for (Index i = 0; i < g.size(); ++i) g[i] = m.data()[i];
      return g;
    };
    lm::Scores<double, lm::Space::host> scores{.logits = logits.view(), .dlogits = dlogits, .valid = {valid.data(), 8}};
    std::vector<std::byte> memory(static_cast<std::size_t>(lm::loss_workspace_bytes<double>(8, 4)));
    const auto literal = [&] { return reference::shapley_divergence(grid(phi), grid(logits), valid, temperature); };
    const double value =
        lm::shapley_loss(be, scores, phi, {.weight = 0.3, .temperature = temperature}, lm::Arena<>{memory});
    CHECK((value > 0 && near(value, literal(), 1)));
    const auto report =
        lm::gradient_check({{"logits", {logits.data(), 32}, {dlogits.data(), 32}}}, [&] { return 0.3 * literal(); });
    CHECK_MESSAGE(report.ok(), report.text());
    for (Index e = 0; e < 4; ++e) CHECK((dlogits(2, e) == 0 && dlogits(5, e) == 0));

    // Experts that contribute alike, but for rounding, ask for uniform logits; of one expert nothing is asked.
    for (Index t = 0; t < 8; ++t) {
      for (Index e = 0; e < 4; ++e) {
        phi(t, e) = 0.1 + (e == 1 ? 1e-17 : 0);
        logits(t, e) = 2;
      }
    }
    CHECK(std::abs(lm::shapley_loss(be, scores, phi, {}, lm::Arena<>{memory})) <= 1e-15);
  }
}

TEST_CASE("a temperature that the scores' type cannot divide by is refused") {
  lm::Matrix<float> logits(2, 3), dlogits(2, 3), phi(2, 3);
  for (Index i = 0; i < 6; ++i) phi.data()[i] = static_cast<float>(i % 3);
  const lm::Scores<float, lm::Space::host> scores{.logits = logits.view(), .dlogits = dlogits.view()};
  std::vector<std::byte> memory(static_cast<std::size_t>(lm::loss_workspace_bytes<float>(2, 3)));
  for (const double bad : {0.0, -1.0, 1e-46, 1e-39, 1e300}) {  // as floats: 0, one without an inverse, infinity
    check_error(lm::ErrorCode::value, {"shapley_loss", "temperature"},
                [&] { lm::shapley_loss(be, scores, phi, {.temperature = bad}, lm::Arena<>{memory}); });
  }
  for (Index i = 0; i < 6; ++i) CHECK(dlogits.data()[i] == 0);
  const float value = lm::shapley_loss(be, scores, phi, {}, lm::Arena<>{memory});
  CHECK((value > 0 && std::isfinite(value)));
}

TEST_CASE("TeamLoRA's S trained towards the values: gradients with the values detached, and the loss falls") {
  using A = lm::TeamLora<double>;
  Parts<A> c({.experts = 3, .rank = 2, .hidden = 4}, 470);
  c.valid = {1, 1, 1, 0, 1, 1};
  lm::Matrix<double> y(c.tokens, c.d_out), dx(c.tokens, c.d_in), phi(c.tokens, 3);
  lm::Arena<> work{c.work};
  auto saved = c.forward(c.adapter, y);
  lm::shapley_values(be, c.adapter, saved, c.q, -1, phi, work);
  const double before = lm::shapley_loss(be, saved, phi, {.weight = 0.7}, work);
  auto gradient = lm::zeros_like(c.adapter);
  lm::backward(be, c.adapter, saved, c.x, c.q, dx, gradient, work);

  std::vector<lm::GradientClaim> claims{{"x", {c.x.data(), c.tokens * c.d_in}, {dx.data(), c.tokens * c.d_in}}};
  A::visit(c.adapter, [&](const char* name, auto v, lm::ParameterGroup) {
    claims.push_back({name, {v.data, v.rows * v.cols}, {}});
  });
  std::size_t next = 1;
  A::visit(gradient, [&](const char*, auto v, lm::ParameterGroup) {
    claims[next++].gradient = {v.data, v.rows * v.cols};
  });
  const auto report = lm::gradient_check(claims, [&] {
    const auto now = c.forward(c.adapter, y);
    double loss = 0.7 * lm::shapley_loss(be, now, phi, {.weight = 0}, work);
    for (Index i = 0; i < c.tokens * c.d_out; ++i) loss += c.q.data()[i] * y.data()[i];
    return loss;
  });
  CHECK_MESSAGE(report.ok(), report.text());

  for (int step = 0; step < 200; ++step) {  // the loss alone, φ held: S learns it
    saved = c.forward(c.adapter, y);
    lm::shapley_loss(be, saved, phi, {}, work);
    auto g = lm::zeros_like(c.adapter);
    lm::Matrix<double> nothing(c.tokens, c.d_out);
    lm::backward(be, c.adapter, saved, c.x, nothing, dx, g, work);
    for (Index i = 0; i < g.parameters().size; ++i) c.adapter.parameters()[i] -= 0.5 * g.parameters()[i];
  }
  saved = c.forward(c.adapter, y);
  CHECK(lm::shapley_loss(be, saved, phi, {.weight = 0}, work) < 0.1 * before);
}
