// TeamLoRA's gate against the literal reference, and its gradients against finite differences.
#include <loramix/router/competition.hpp>

#include "router/routing.hpp"

using namespace loramix_test;

namespace {

struct Team {
  Team(Index experts, Index hidden_, std::uint64_t site)
      : E(experts),
        hidden(hidden_),
        S1(hidden != 0 ? hidden : E, 1),
        b1(1, hidden),
        S2(hidden != 0 ? E : 0, hidden),
        b2(1, E),
        M(E, E) {
    Uniform random(site);
    for (lm::Matrix<double>* m : {&b1, &S2, &b2, &M}) {
      for (Index i = 0; i < m->rows() * m->cols(); ++i) m->data()[i] = random();
    }
  }
  template <class W>
  lm::CompetitionGate<W, double> gate(lm::Competition form) {
    return {S1.view(), b1.view(), hidden != 0 ? S2.view() : lm::MatrixView<double>{}, b2.view(), M.view(), form};
  }
  Index E, hidden;
  lm::Matrix<double> S1, b1, S2, b2, M;
};

lm::VectorView<double> flat(lm::Matrix<double>& m) { return {m.data(), m.rows() * m.cols()}; }
reference::Row row(const lm::Matrix<double>& m, Index t) {
  reference::Row out;
  for (Index c = 0; c < m.cols(); ++c) out.push_back(m(t, c));
  return out;
}
Grid<double> grid(const lm::Matrix<double>& m) {
  Grid<double> out(m.rows(), m.cols());
  for (Index i = 0; i < out.size(); ++i) out[i] = m.data()[i];
  return out;
}

template <class F>
void for_cases(const F& f) {
  for (const Index experts : {1, 2, 5}) {
    for (const Index hidden : {0, 7}) {
      for (const lm::Competition form : {lm::Competition::learned, lm::Competition::identity, lm::Competition::equal}) {
        CAPTURE(experts);
        CAPTURE(hidden);
        CAPTURE(static_cast<int>(form));
        f(Team(experts, hidden, static_cast<std::uint64_t>(310 + experts)), form);
      }
    }
  }
}

}  // namespace

TEST_CASE("the competition is the literal one") {
  for_cases([](Team team, lm::Competition form) {
    Routed<lm::CompetitionGate<const double, double>> r(team.gate<const double>(form), {40});
    Uniform random(320);
    for (Index i = 0; i < r.h.rows() * r.h.cols(); ++i) r.h.data()[i] = 2 * random();
    for (Index c = 0; c < r.h.cols(); ++c) r.h(3, c) = 0;  // ties
    r.h(5, 0) = not_a_number;
    r.gate.forward(r.be, r.h.view(), r.state, r.call, r.arena);
    Index wrong = 0;
    for (Index t = 0; t < 40; ++t) {
      const auto want = reference::competition(row(r.h, t), row(team.b1, 0), grid(team.S2), row(team.b2, 0),
                                               grid(team.M), static_cast<reference::Ablation>(static_cast<int>(form)));
      for (Index e = 0; e < team.E; ++e) {
        const std::size_t i = static_cast<std::size_t>(e);
        wrong += !near(r.state.logits(t, e), want.logits[i]) + !near(r.state.p(t, e), want.phi[i]);
        wrong += !near(r.state.weights(t, e), want.omega[i]);
      }
    }
    CHECK(wrong == 0);
  });
}

TEST_CASE("its gradients equal finite differences, with losses on logits and probabilities, added or assigned") {
  for_cases([](Team team, lm::Competition form) {
    const Index T = 9;
    Routed<lm::CompetitionGate<const double, double>> r(team.gate<const double>(form), {T});
    Team gradient(team.E, team.hidden, 330);
    Uniform random(321);
    lm::Matrix<double> c(T, team.E), dp(T, team.E), dl(T, team.E);
    for (Index i = 0; i < T * r.h.cols(); ++i) r.h.data()[i] = 2 * random();
    for (lm::Matrix<double>* m : {&c, &dp, &dl}) {
      for (Index i = 0; i < T * team.E; ++i) m->data()[i] = random();
    }
    const auto loss = [&] {
      r.gate.forward(r.be, r.h.view(), r.state, r.call, r.arena);
      double sum = 0;
      for (Index t = 0; t < T; ++t) {
        for (Index e = 0; e < team.E; ++e) {
          sum += c(t, e) * r.state.weights(t, e) + dp(t, e) * r.state.p(t, e) + dl(t, e) * r.state.logits(t, e);
        }
      }
      return sum;
    };
    for (const lm::Into into : {lm::Into::set, lm::Into::add}) {  // what was there is overwritten, then doubled
      loss();
      for (Index t = 0; t < T; ++t) {
        for (Index e = 0; e < team.E; ++e) {
          r.state.dp(t, e) = dp(t, e);
          r.state.dlogits(t, e) = dl(t, e);
          r.dstate.weights(t, e) = c(t, e);
        }
      }
      r.backward(gradient.gate<double>(form), into);
    }
    for (lm::Matrix<double>* m : {&gradient.b1, &gradient.S2, &gradient.b2, &gradient.M, &r.dh}) {
      for (Index i = 0; i < m->rows() * m->cols(); ++i) m->data()[i] /= 2;
    }
    std::vector<lm::GradientClaim> claims{
        {"h", flat(r.h), flat(r.dh)}, {"b2", flat(team.b2), flat(gradient.b2)}, {"M", flat(team.M), flat(gradient.M)}};
    if (team.hidden != 0) {
      claims.push_back({"b1", flat(team.b1), flat(gradient.b1)});
      claims.push_back({"S2", flat(team.S2), flat(gradient.S2)});
    }
    const lm::GradientReport report = lm::gradient_check(claims, loss);
    CHECK_MESSAGE(report.ok(), report.text());
  });
}
