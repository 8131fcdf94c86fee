// The routers that choose: ids, weights and gradients against the literal reference, over rows made to be difficult.
#include "core/caught.hpp"
#include "router/routing.hpp"

using namespace loramix_test;

namespace {

using Gate = lm::TopKGate<double, double>;

/// Random rows, then rows of ties, NaN and infinities.
double difficult(Uniform& random, Index t) {
  const double v = 3 * random();
  if (t % 8 < 3) return v;
  if (t % 8 == 3) return std::round(v);
  if (t % 8 == 4) return 1.5;
  if (t % 8 == 5) return random.below(4) == 0 ? not_a_number : std::round(v);
  if (t % 8 == 6) return random.below(3) == 0 ? -inf : v;
  return t % 16 == 7 ? -inf : v * 100;
}

reference::RouteRule literal(const lm::TopKRule& rule, const std::vector<float>& bias) {
  return {static_cast<int>(rule.k),  rule.scoring == lm::Scoring::sigmoid,
          rule.renormalise,          rule.temperature,
          rule.route_scale,          rule.top_p,
          {bias.begin(), bias.end()}};
}

struct Sizes {
  Index experts, k;
};
constexpr Sizes sizes[] = {{1, 1}, {2, 1}, {3, 3}, {8, 2}, {8, 8}, {31, 5}};

template <class F>
void for_rules(Index k, const F& f) {
  for (const lm::Scoring scoring : {lm::Scoring::softmax, lm::Scoring::sigmoid}) {
    for (const bool renormalise : {true, false}) {
      for (const double top_p : {0.0, 0.6137}) {
        for (const bool noise : {false, true}) {
          f(lm::TopKRule{.k = k,
                         .scoring = scoring,
                         .renormalise = renormalise,
                         .temperature = noise ? 1 : 0.7,
                         .route_scale = top_p > 0 ? 2.5 : 1,
                         .top_p = top_p,
                         .noise = noise});
        }
      }
    }
  }
}

lm::MatrixView<const double> rows_of(Index n) { return {nullptr, n, 0}; }

}  // namespace

TEST_CASE("choices, weights and gradients are the literal ones") {
  Uniform random(300);
  for (const auto [experts, k] : sizes) {
    for_rules(k, [&, experts = experts, k = k](const lm::TopKRule& rule) {
      for (const bool biased : {false, true}) {
        std::vector<float> bias;
        for (Index e = 0; biased && e < experts; ++e) bias.push_back(static_cast<float>(0.2 * random()));
        const Index T = 48;
        const lm::Key key{.seed = 3, .site = 5, .step = 7, .first_token = 1000};
        const std::uint64_t folded = reference::fold(reference::fold(3, 5), 7);
        Routed<Gate> r({rows_of(rule.noise ? 2 * experts : experts), rule},
                       {T, {}, key, {bias.data(), static_cast<Index>(bias.size())}});
        for (Index t = 0; t < T; ++t) {
          for (Index e = 0; e < r.h.cols(); ++e) r.h(t, e) = e < experts ? difficult(random, t) : random();
        }
        r.forward();
        const reference::RouteRule want_rule = literal(rule, bias);
        for (Index t = 0; t < T; ++t) {
          for (Index s = 0; s < k; ++s) r.dstate.weights(t, s) = random();
          for (Index e = 0; e < experts; ++e) {
            CHECK(r.state.dp(t, e) == 0);
            CHECK(r.state.dlogits(t, e) == 0);
            r.state.dp(t, e) = random();
            r.state.dlogits(t, e) = random();
            r.dh(t, e) = 0.25;
          }
        }
        r.backward(lm::frozen);
        Index wrong = 0;
        for (Index t = 0; t < T; ++t) {
          reference::Row logits, dw, dp;
          std::vector<double> n;
          for (Index e = 0; e < experts; ++e) {
            n.push_back(rule.noise
                            ? reference::normal(folded, 1, 1000 + static_cast<std::uint64_t>(t), static_cast<int>(e))
                            : 0);
            logits.push_back(rule.noise ? reference::noisy(r.h(t, e), r.h(t, experts + e), n.back()) : r.h(t, e));
            dp.push_back(r.state.dp(t, e));
            wrong += !near(r.state.logits(t, e), logits.back());
            logits.back() = r.state.logits(t, e);  // the last bit must not decide a tie
          }
          for (Index s = 0; s < k; ++s) dw.push_back(r.dstate.weights(t, s));
          const reference::Route want = reference::route(logits, want_rule);
          for (Index s = 0; s < k; ++s) {
            const std::size_t i = static_cast<std::size_t>(s);
            wrong += r.state.ids(t, s) != want.ids[i] || r.state.chosen(t, s) != want.ids[i];
            wrong += r.state.ids(t, s) < -1 || r.state.ids(t, s) >= experts;
            wrong += !near(r.state.weights(t, s), want.weights[i]);
          }
          const reference::Row dl = reference::route_backward(want, want_rule, dw, dp);
          for (Index e = 0; e < experts; ++e) {
            const std::size_t i = static_cast<std::size_t>(e);
            wrong += !near(r.state.p(t, e), want.p[i]);
            const double dlogit = dl[i] + r.state.dlogits(t, e);
            wrong += !near(r.dh(t, e), dlogit + 0.25, 1e-11);
            if (rule.noise) {
              const double slope = 1 / (1 + std::exp(-r.h(t, experts + e)));
              wrong += !near(r.dh(t, experts + e), dlogit * n[i] * slope, 1e-11);
            }
          }
        }
        CHECK_MESSAGE(wrong == 0, "experts ", experts, " k ", rule.k, " sigmoid ", rule.scoring == lm::Scoring::sigmoid,
                      " renormalise ", rule.renormalise, " top_p ", rule.top_p, " noise ", rule.noise, " biased ",
                      biased);
      }
    });
  }
}

TEST_CASE("ties, NaN, one choice and a prefix that ends exactly") {
  const auto run = [](lm::TopKRule rule, std::vector<double> logits) {
    Routed<Gate> r({rows_of(static_cast<Index>(logits.size())), rule}, {1});
    for (std::size_t e = 0; e < logits.size(); ++e) r.h(0, static_cast<Index>(e)) = logits[e];
    r.forward();
    for (Index s = 0; s < rule.k; ++s) r.dstate.weights(0, s) = 0.3 + 1.7 * static_cast<double>(s);
    r.backward(lm::frozen);
    return r;
  };
  auto r = run({.k = 2}, {1, 2, 2, 2});
  CHECK(r.state.ids(0, 0) == 1);
  CHECK(r.state.ids(0, 1) == 2);
  CHECK(r.state.weights(0, 0) == 0.5);
  r = run({.k = 2}, {not_a_number, 1, not_a_number, 0});
  CHECK(r.state.ids(0, 0) == 1);
  CHECK(r.state.ids(0, 1) == 3);
  CHECK(std::isnan(r.state.weights(0, 0)));
  r = run({.k = 3}, {not_a_number, not_a_number, -inf});
  CHECK(r.state.ids(0, 0) == 2);
  CHECK(r.state.ids(0, 1) == 0);
  CHECK(r.state.ids(0, 2) == 1);
  for (const lm::Scoring scoring : {lm::Scoring::softmax, lm::Scoring::sigmoid}) {
    for (const bool renormalise : {true, false}) {
      r = run({.k = 2, .scoring = scoring, .renormalise = renormalise}, {-inf, -inf, -inf});
      for (Index s = 0; s < 2; ++s) CHECK(r.state.weights(0, s) == 0);
      for (Index e = 0; e < 3; ++e) CHECK(r.dh(0, e) == 0);
    }
    r = run({.k = 1, .scoring = scoring, .route_scale = 2.7}, {0.1, 0.7, -3});  // the documented trap
    CHECK(r.state.weights(0, 0) == 2.7);
    for (Index e = 0; e < 3; ++e) CHECK(r.dh(0, e) == 0);
  }
  r = run({.k = 4, .top_p = 0.5}, {1, 1, 1, 1});
  CHECK(r.state.ids(0, 1) == 1);
  CHECK(r.state.ids(0, 2) == -1);
  CHECK(r.state.weights(0, 1) == 0.5);
  r = run({.k = 4, .top_p = 1}, {1, 1, 1, 1});
  CHECK(r.state.ids(0, 3) == 3);
}

TEST_CASE("top-k of all experts is the dense softmax, and the chosen's softmax is its renormalisation") {
  Uniform random(301);
  const Index E = 6;
  Routed<Gate> all({rows_of(E), {.k = E, .temperature = 0.6}}, {20});
  Routed<Gate> two({rows_of(E), {.k = 2, .temperature = 0.6}}, {20});
  for (Index i = 0; i < all.h.rows() * E; ++i) all.h.data()[i] = two.h.data()[i] = random();
  all.forward();
  two.forward();
  for (Index t = 0; t < 20; ++t) {
    for (Index s = 0; s < E; ++s) CHECK(near(all.state.weights(t, s), all.state.p(t, all.state.ids(t, s)), 1e-15));
    const reference::Row chosen =
        reference::softmax_of({two.h(t, two.state.ids(t, 0)), two.h(t, two.state.ids(t, 1))}, 0.6);
    for (Index s = 0; s < 2; ++s) CHECK(near(two.state.weights(t, s), chosen[static_cast<std::size_t>(s)], 1e-15));
  }
}

TEST_CASE("noise is drawn in training only") {
  Routed<Gate> quiet({rows_of(8), {.k = 2, .noise = true}}, {3});
  for (Index i = 0; i < 24; ++i) quiet.h.data()[i] = static_cast<double>(i % 5);
  quiet.forward();
  for (Index t = 0; t < 3; ++t) {
    for (Index e = 0; e < 4; ++e) CHECK(quiet.state.logits(t, e) == quiet.h(t, e));
  }
}

TEST_CASE("capacity keeps what came first or weighs most, and padding takes no place") {
  Uniform random(302);
  for (const lm::CapacityOrder order : {lm::CapacityOrder::arrival, lm::CapacityOrder::priority}) {
    for (const double cf : {0.25, 0.5, 1.0, 1.25, 8.0}) {
      for (const bool masked : {false, true}) {
        for (const bool renormalise : {true, false}) {
          const Index T = 37, E = 4, k = 2;
          std::vector<std::uint8_t> valid;
          for (Index t = 0; masked && t < T; ++t) valid.push_back(random.below(3) != 0);
          lm::GateCall<> call{T};
          call.batch.valid = {valid.data(), static_cast<Index>(valid.size())};
          Routed<Gate> r({rows_of(E), {.k = k, .renormalise = renormalise, .capacity = cf, .order = order}}, call);
          for (Index t = 0; t < T; ++t) {
            for (Index e = 0; e < E; ++e)
              r.h(t, e) = t % 5 == 0 ? 1 : t == 7 ? not_a_number : random() - static_cast<double>(e);
          }
          r.forward();
          std::vector<reference::Ids> chosen;
          std::vector<reference::Row> weights;
          for (Index t = 0; t < T; ++t) {
            chosen.push_back({r.state.chosen(t, 0), r.state.chosen(t, 1)});
            weights.push_back({r.state.weights(t, 0), r.state.weights(t, 1)});
          }
          const auto want =
              reference::with_capacity(chosen, weights, E, cf, order == lm::CapacityOrder::priority, valid);
          Index wrong = 0, dropped = 0;
          for (Index t = 0; t < T; ++t) {
            for (Index s = 0; s < k; ++s) {
              wrong += r.state.ids(t, s) != want[static_cast<std::size_t>(t)][static_cast<std::size_t>(s)];
              dropped += r.state.ids(t, s) != r.state.chosen(t, s);
            }
          }
          CHECK(wrong == 0);
          CHECK((dropped > 0) == (cf < 8));
        }
      }
    }
  }
  CHECK(lm::detail::expert_capacity(1.0, 2, 6, 3) == 4);
  CHECK(lm::detail::expert_capacity(1.1, 2, 50, 10) == 11);  // 11.000000000000002 in double
  CHECK(lm::detail::expert_capacity(1.25, 1, 3, 4) == 1);
}

TEST_CASE("a rule out of range is refused by name") {
  const auto refusal = [](lm::TopKRule rule, std::vector<float> bias = {}) -> std::string {
    const Gate gate{rows_of(4), rule};
    try {
      gate.check("forward", {1, {}, lm::no_draws, {bias.data(), static_cast<Index>(bias.size())}});
    } catch (const lm::Error& error) {
      return error.what();
    }
    return "";
  };
  CHECK(refusal({}) == "");
  CHECK(refusal({.k = 0}).find("forward: top-k is 0, must be at least 1") != std::string::npos);
  CHECK(refusal({.k = 5}).find("experts is 4, must be at least 5") != std::string::npos);
  CHECK(refusal({.temperature = 0}).find("temperature must be above 0 and finite") != std::string::npos);
  CHECK(refusal({.temperature = 1e-46}) == "");
  const lm::TopKGate<float, float> in_float{{nullptr, 4, 0}, {.temperature = 1e-46}};  // 0 as a float
  check_error(lm::ErrorCode::value, {"forward", "temperature must be above 0"},
              [&] { in_float.check("forward", lm::GateCall<>{1}); });
  CHECK(refusal({.top_p = 1.5}).find("top_p must be in [0, 1]") != std::string::npos);
  CHECK(refusal({.capacity = -1}).find("capacity must be in [0, 1e6]") != std::string::npos);
  CHECK(refusal({.jitter = 1}).find("jitter must be in [0, 1)") != std::string::npos);
  CHECK(refusal({}, {1, 2, 3}).find("selection bias has size 3, but the number of experts is 4") != std::string::npos);
}
