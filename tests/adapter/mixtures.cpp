// The token-routed mixtures: values by literal sums, every gradient by differences, and the laws of MATH.md section 6.
#include "adapter/kinds.hpp"

#include <algorithm>

#include <loramix/adapter/hydra_lora.hpp>
#include <loramix/adapter/lora_moe.hpp>
#include <loramix/adapter/moa.hpp>
#include <loramix/adapter/mola.hpp>
#include <loramix/adapter/served.hpp>
#include <loramix/adapter/team_lora.hpp>
#include <loramix/bench/layer.hpp>
#include <loramix/train/gradient_check.hpp>

#include "reference/routing.hpp"

namespace loramix_test {
namespace {

// [config]
constexpr lm::MixtureConfig mixture{.d_in = 13, .d_out = 11, .experts = 3, .rank = 2, .alpha = 3, .dropout = 0.5};
// [/config]
lm::MolaConfig mola(lm::TopKRule rule, Index experts = 5) {
  return {.d_in = 13, .d_out = 11, .experts = experts, .rank = 2, .alpha = 3, .dropout = 0.5, .rule = rule};
}
lm::TeamLoraConfig team(Index hidden, lm::Competition competition = lm::Competition::learned, Index experts = 3) {
  return {13, 11, experts, 2, 3, 0.5, hidden, competition};
}
const std::vector<lm::TopKRule>& rules() {
  using lm::Scoring;
  // [rules]
  static const std::vector<lm::TopKRule> all{
      {},
      {.k = 1, .renormalise = false},
      {.k = 3, .scoring = Scoring::sigmoid, .route_scale = 2.5},
      {.k = 2, .scoring = Scoring::sigmoid, .renormalise = false},
      {.k = 5, .temperature = 0.7, .top_p = 0.8},
      {.k = 2, .noise = true},
      {.k = 2, .jitter = 0.3},
      {.k = 2, .renormalise = false, .capacity = 0.8},
      {.k = 2, .capacity = 0.8, .order = lm::CapacityOrder::priority},
      {.k = 2, .capacity = 1, .noise = true, .jitter = 0.1},
  };
  // [/rules]
  return all;
}

/// Whether no choice is nearer than 1e-3 to another one.
template <class A>
bool clear_choices(const A& adapter, const lm::Saved<A>& saved) {
  const auto& s = saved.scores;
  if (s.chosen.data == nullptr) return true;
  bool clear = true;
  std::vector<double> weights;
  for (Index t = 0; t < s.logits.rows; ++t) {
    double sum = 0;
    for (Index e = 0; e < s.logits.cols; ++e) {
      for (Index f = 0; f < e; ++f) clear = clear && std::abs(s.logits(t, e) - s.logits(t, f)) > 2e-3;
    }
    for (Index i = 0; i < s.chosen.cols && s.chosen(t, i) >= 0; ++i) {
      sum += s.p(t, s.chosen(t, i));
      weights.push_back(s.weights(t, i));
      if constexpr (requires { adapter.config().rule; }) {
        clear = clear && std::abs(sum - adapter.config().rule.top_p) > 1e-3;
      }
    }
  }
  std::sort(weights.begin(), weights.end());
  for (std::size_t i = 1; i < weights.size(); ++i)
    clear = clear && (weights[i] == 1 || weights[i] > weights[i - 1] + 1e-4);
  return clear;
}

/// Gradients of Σ dy∘y and of losses on the probabilities and logits of valid tokens.
template <class A>
void check_gradients(const typename A::Config& config, lm::Keep keep, Index tokens = 7) {
  const std::vector<std::uint8_t> valid{1, 1, 0, 1, 1, 0, 1};
  for (std::uint64_t site = 0; site < 400; ++site) {
    Batch<A> b(config, tokens, 700 + site);
    lm::Matrix<double> dx(tokens, config.d_in), y(tokens, config.d_out);
    lm::Arena<> reserve = b.memory.arena();
    lm::ForwardOptions<lm::Space::host> options{.save = &reserve, .key = b.key, .keep = keep};
    options.valid = {valid.data(), tokens};
    auto saved = b.forward(y, options);
    if (!clear_choices(b.adapter, saved)) continue;
    const auto scores = saved.scores;
    auto dp = random_matrix<double>(tokens, scores.p.cols, b.random);
    auto dl = random_matrix<double>(tokens, scores.p.cols, b.random);
    for (Index t = 0; t < tokens; ++t) {
      for (Index e = 0; e < dp.cols(); ++e) {
        if (valid[static_cast<std::size_t>(t)] == 0) dp(t, e) = dl(t, e) = 0;
        scores.dp(t, e) += dp(t, e);
        scores.dlogits(t, e) += dl(t, e);
      }
    }
    auto grad = lm::zeros_like(b.adapter);
    b.backward(saved, dx, grad);
    std::vector<lm::GradientClaim> claims{{"x", {b.x.data(), tokens * config.d_in}, {dx.data(), tokens * config.d_in}}};
    A::visit(b.adapter, [&](const char* name, auto view, lm::ParameterGroup) {
      claims.push_back({name, {view.data, view.rows * view.cols}, {}});
    });
    std::size_t next = 1;
    A::visit(grad, [&](const char*, auto view, lm::ParameterGroup) {
      claims[next++].gradient = {view.data, view.rows * view.cols};
    });
    options.into = lm::Into::set;
    const lm::GradientReport report = lm::gradient_check(claims, [&] {
      reserve.reset();
      auto now = b.forward(y, options);
      const auto& s = now.scores;
      double loss = 0;
      for (Index t = 0; t < tokens; ++t) {
        for (Index o = 0; o < config.d_out; ++o) loss += b.dy(t, o) * y(t, o);
        for (Index e = 0; e < dp.cols(); ++e) loss += dp(t, e) * s.p(t, e) + dl(t, e) * s.logits(t, e);
      }
      return loss;
    });
    CHECK_MESSAGE(report.ok(), report.text());
    return;
  }
  FAIL("no batch with clear choices");
}

/// ΔY by literal sums in double: s Σ_e g_e (x̂ A_eᵀ) B_eᵀ, g the gate's weights as saved.
template <class A>
lm::Matrix<double> literal(const Batch<A>& b, const Grid<double>& gate, bool shared) {
  const auto& c = b.adapter.config();
  const auto a = b.adapter.A();
  const auto up = b.adapter.B();
  lm::Matrix<double> y(b.tokens, c.d_out);
  for (Index t = 0; t < b.tokens; ++t) {
    for (Index e = 0; e < c.experts; ++e) {
      for (Index j = 0; j < c.rank; ++j) {
        double u = 0;
        for (Index i = 0; i < c.d_in; ++i) {
          const bool keep = reference::keep(b.key.seed, b.key.site, b.key.step,
                                            b.key.first_token + static_cast<std::uint64_t>(t), i, 32768);
          u += keep ? 2 * b.x(t, i) * a((shared ? 0 : e * c.rank) + j, i) : 0;
        }
        for (Index o = 0; o < c.d_out; ++o)
          y(t, o) += c.alpha / static_cast<double>(c.rank) * gate(t, e) * u * up(o, e * c.rank + j);
      }
    }
  }
  return y;
}
template <class A>
reference::Row logits_of(const Batch<A>& b, lm::MatrixView<const double> side, Index t) {
  reference::Row h(static_cast<std::size_t>(side.rows), 0.0);
  for (Index e = 0; e < side.rows; ++e) {
    for (Index i = 0; i < side.cols; ++i) h[static_cast<std::size_t>(e)] += side(e, i) * b.x(t, i);
  }
  return h;
}
template <class T>
double distance(const lm::Matrix<T>& a, const lm::Matrix<T>& b) {
  double most = 0;
  for (Index i = 0; i < a.rows() * a.cols(); ++i) {
    const double gap = std::abs(static_cast<double>(a.data()[i]) - static_cast<double>(b.data()[i]));
    most = gap <= most ? most : gap;
    if (std::isnan(gap)) return gap;
  }
  return most;
}

/// y, dx and the gradient of one step.
template <class A>
struct Step {
  explicit Step(Batch<A>& b) : y(b.zeros_y()), dx(b.zeros_dx()), gradient(lm::zeros_like(b.adapter)) {
    lm::Arena<> reserve = b.memory.arena();
    auto saved = b.forward(y, {.save = &reserve, .key = b.key});
    b.backward(saved, dx, gradient);
  }
  lm::Matrix<typename A::precision::activation> y, dx;
  lm::gradient_t<A> gradient;
};
template <class View>
void copy(View from, auto to) {
  for (Index i = 0; i < from.rows; ++i) {
    for (Index j = 0; j < from.cols; ++j) to(i, j) = lm::widen<std::remove_cvref_t<decltype(to(i, j))>>(from(i, j));
  }
}
template <class V, class W>
double gap(V a, W b) {
  REQUIRE(a.rows == b.rows);
  double most = 0;
  for (Index i = 0; i < a.rows; ++i) {
    for (Index j = 0; j < a.cols; ++j)
      most = std::max(most, std::abs(lm::widen<double>(a(i, j)) - lm::widen<double>(b(i, j))));
  }
  return most;
}
/// Puts a's A and B (and x, dy) into b.
template <class A, class B>
void same_case(const Batch<A>& a, Batch<B>& b) {
  copy(a.adapter.A(), b.adapter.A());
  copy(a.adapter.B(), b.adapter.B());
  copy(a.x.view(), b.x.view());
  copy(a.dy.view(), b.dy.view());
}

}  // namespace

TEST_CASE("mixtures: cost() counts the ranks that a token is given, those of the router, and all parameters") {
  const auto flop = [](Index down, Index up) { return 2.0 * 100 * static_cast<double>(down * 13 + up * 11); };
  const auto check = [&](const auto& adapter, double forward) {
    const lm::Cost cost = adapter.cost(100);
    CHECK(cost.forward_flop == forward);
    CHECK(cost.backward_flop == 2 * forward);
    CHECK(cost.parameters == lm::parameter_count(adapter));
  };
  check(lm::LoraMoe<float>(mixture), flop(6 + 3, 6));
  check(lm::HydraLora<float>(mixture), flop(2 + 3, 6));
  check(lm::Mola<float>(mola({.k = 2})), flop(2 * 2 + 5, 2 * 2));
  check(lm::Moa<float>({.d_in = 13, .d_out = 11, .experts = 3, .rank = 2}), flop(2 + 3, 2));
  check(lm::Served<float>({13, 11, {{3, 1, true}, {5, 1, true}}}), flop(5, 5));

  const lm::Dora<float> dora({.d_in = 13, .d_out = 11, .rank = 2});
  const lm::Cost frozen = lm::bench::Layer<lm::Dora<float>>(dora, 100).frozen_cost(100);  // no gradient of its weight
  CHECK(frozen.forward_flop == 2.0 * 100 * 13 * 11);
  CHECK(frozen.backward_flop == frozen.forward_flop);
  CHECK(frozen.parameters == 0);
}

TEST_CASE("gradients of the mixtures equal finite differences") {
  for (const lm::Keep keep : {lm::Keep::z, lm::Keep::recompute}) {
    check_gradients<lm::LoraMoe<double>>(mixture, keep);
    check_gradients<lm::HydraLora<double>>(mixture, keep);
    for (const Index hidden : {0, 6}) {
      for (const auto form : {lm::Competition::learned, lm::Competition::identity, lm::Competition::equal}) {
        check_gradients<lm::TeamLora<double>>(team(hidden, form), keep);
      }
    }
  }
}

TEST_CASE("gradients of every rule of choice equal finite differences") {
  for (const lm::TopKRule& rule : rules()) {
    CAPTURE(rule.k);
    check_gradients<lm::Mola<double>>(mola(rule), lm::Keep::z);
  }
}

TEST_CASE("the library's own check agrees") {
  const lm::cpu::Backend be;
  CHECK(lm::gradient_check(be, lm::LoraMoe<double>(mixture)).ok());
  CHECK(lm::gradient_check(be, lm::TeamLora<double>(team(6))).ok());
}

TEST_CASE("values are the literal sums") {
  const auto check = [](auto& b, bool shared, const auto& weights) {
    Grid<double> gate(b.tokens, b.adapter.config().experts);
    for (Index t = 0; t < b.tokens; ++t) weights(t, gate);
    lm::Arena<> reserve = b.memory.arena();
    auto y = b.zeros_y();
    b.forward(y, {.save = &reserve, .key = b.key});
    CHECK(distance(y, literal(b, gate, shared)) <= 1e-13);
  };
  const auto dense = [](const auto& b) {
    return [&b](Index t, Grid<double>& gate) {
      const reference::Row p = reference::softmax_of(logits_of(b, b.adapter.side(), t), 1);
      for (Index e = 0; e < gate.cols(); ++e) gate(t, e) = p[static_cast<std::size_t>(e)];
    };
  };
  Batch<lm::LoraMoe<double>> moe(mixture, 9, 1);
  check(moe, false, dense(moe));
  Batch<lm::HydraLora<double>> hydra(mixture, 9, 2);
  check(hydra, true, dense(hydra));

  for (const double jitter : {0.0, 0.4}) {
    Batch<lm::Mola<double>> b(mola({.k = 2, .jitter = jitter}), 9, 3);
    const std::uint64_t key = reference::fold(reference::fold(b.key.seed, b.key.site), b.key.step);
    check(b, false, [&](Index t, Grid<double>& gate) {
      reference::Row logits(5, 0.0);
      for (Index i = 0; i < 13; ++i) {  // purpose 2, the router's input alone
        const auto words =
            reference::philox(key, {static_cast<std::uint32_t>(i / 4), 2u, static_cast<std::uint32_t>(100 + t), 0u});
        const double u = (words[static_cast<std::size_t>(i % 4)] + 0.5) / 4294967296.0;
        for (Index e = 0; e < 5; ++e) {
          logits[static_cast<std::size_t>(e)] += b.adapter.side()(e, i) * b.x(t, i) * (1 - jitter + 2 * jitter * u);
        }
      }
      const reference::Route r = reference::route(logits, {});
      for (std::size_t s = 0; s < 2; ++s) gate(t, r.ids[s]) = r.weights[s];
    });
  }
  Batch<lm::TeamLora<double>> lora(team(0), 9, 4);
  check(lora, false, [&](Index t, Grid<double>& gate) {
    const auto g = lora.adapter.gate();
    Grid<double> M(3, 3);
    reference::Row b2;
    for (Index e = 0; e < 3; ++e) {
      b2.push_back(g.b2(0, e));
      for (Index f = 0; f < 3; ++f) M(e, f) = g.M(e, f);
    }
    const auto row = reference::competition(logits_of(lora, g.S1, t), {}, {}, b2, M, reference::Ablation::none);
    for (Index e = 0; e < 3; ++e) gate(t, e) = row.omega[static_cast<std::size_t>(e)];
  });
}

TEST_CASE("top-k of all experts is the dense mixture, in value and gradient") {
  Batch<lm::LoraMoe<double>> dense(mixture, 9);
  Batch<lm::Mola<double>> all(mola({.k = 3}, 3), 9);
  same_case(dense, all);
  copy(dense.adapter.side(), all.adapter.side());
  const Step want(dense);
  const Step got(all);
  CHECK(distance(got.y, want.y) <= 1e-14);
  CHECK(distance(got.dx, want.dx) <= 1e-13);
  CHECK(gap(got.gradient.side(), want.gradient.side()) <= 1e-13);
  CHECK(gap(got.gradient.A(), want.gradient.A()) <= 1e-13);
  CHECK(gap(got.gradient.B(), want.gradient.B()) <= 1e-13);
}

TEST_CASE("HydraLoRA and TeamLoRA of one expert are LoRA, bit for bit") {
  const lm::LoraConfig one{.d_in = 13, .d_out = 11, .rank = 2, .alpha = 3, .dropout = 0.5};
  Batch<lm::Lora<float>> lora(one, 9);
  const Step want(lora);
  const auto check = [&](auto& b) {
    same_case(lora, b);
    const Step got(b);
    CHECK(same_bits(got.y, want.y));
    CHECK(same_bits(got.dx, want.dx));
    CHECK(gap(got.gradient.A(), want.gradient.A()) == 0);
    CHECK(gap(got.gradient.B(), want.gradient.B()) == 0);
  };
  // [hydra]
  lm::MixtureConfig config = mixture;
  config.experts = 1;
  Batch<lm::HydraLora<float>> hydra(config, 9, 5);
  check(hydra);
  // [/hydra]
  // [team]
  Batch<lm::TeamLora<float>> competing(team(6, lm::Competition::learned, 1), 9, 6);
  competing.adapter.gate().M(0, 0) = 1;
  check(competing);
  // [/team]
  competing.adapter.gate().M(0, 0) = 2;
  CHECK(distance(Step(competing).y, want.y) > 0.01);
}

TEST_CASE("TeamLoRA whose experts do not interact is the split softmax mixture") {
  Batch<lm::LoraMoe<double>> split(mixture, 9);
  const Step want(split);
  for (const auto form : {lm::Competition::identity, lm::Competition::learned}) {
    Batch<lm::TeamLora<double>> b(team(0, form), 9, 7);
    same_case(split, b);
    copy(split.adapter.side(), b.adapter.gate().S1);
    for (Index e = 0; e < 3; ++e) {
      b.adapter.gate().b2(0, e) = 0.5;  // a shift of all
      for (Index f = 0; f < 3; ++f) b.adapter.gate().M(e, f) = form == lm::Competition::identity ? 9 : e == f;
    }
    const Step got(b);
    CHECK(distance(got.y, want.y) <= 1e-14);
    CHECK(distance(got.dx, want.dx) <= 1e-13);
    CHECK(gap(got.gradient.gate().S1, want.gradient.side()) <= 1e-13);
  }
  Batch<lm::TeamLora<double>> equal(team(0, lm::Competition::equal), 9, 8);
  Batch<lm::LoraMoe<double>> uniform(mixture, 9, 8);
  same_case(equal, uniform);
  for (Index e = 0; e < 3; ++e) {
    for (Index f = 0; f < 3; ++f) equal.adapter.gate().M(e, f) = e == f;
    for (Index i = 0; i < 13; ++i) uniform.adapter.side()(e, i) = 0;
  }
  CHECK(distance(Step(equal).y, Step(uniform).y) <= 1e-14);
}

TEST_CASE_TEMPLATE("with B = 0 nothing comes out, and only B is told to move", A, lm::LoraMoe<float>,
                   lm::HydraLora<float>, lm::Mola<float>, lm::TeamLora<float>) {
  typename A::Config config;
  config.d_in = 13;
  config.d_out = 11;
  config.experts = 3;
  config.rank = 2;
  config.dropout = 0.5;
  Batch<A> b(config, 9);
  fill(b.adapter.B(), b.random, 0);
  const Step step(b);
  for (Index i = 0; i < 9 * 11; ++i) CHECK(step.y.data()[i] == 0);
  for (Index i = 0; i < 9 * 13; ++i) CHECK(step.dx.data()[i] == 0);
  A::visit(step.gradient, [](const char* name, auto view, lm::ParameterGroup) {
    double norm = 0;
    for (Index i = 0; i < view.rows; ++i) {
      for (Index j = 0; j < view.cols; ++j) norm += std::abs(static_cast<double>(view(i, j)));
    }
    CHECK_MESSAGE((norm > 0) == (std::string(name) == "lora_B.weight"), name);
  });
}

TEST_CASE("permuted experts are the same mixture; uniform routing is LoRA of all ranks at scale s/E") {
  Batch<lm::Mola<double>> b(mola({.k = 2}), 9), c(mola({.k = 2}), 9);
  for (Index e = 0; e < 5; ++e) {
    const Index to = (e * 2 + 1) % 5;
    for (Index i = 0; i < 13; ++i) {
      c.adapter.side()(to, i) = b.adapter.side()(e, i);
      for (Index j = 0; j < 2; ++j) c.adapter.A()(to * 2 + j, i) = b.adapter.A()(e * 2 + j, i);
    }
    for (Index o = 0; o < 11; ++o) {
      for (Index j = 0; j < 2; ++j) c.adapter.B()(o, to * 2 + j) = b.adapter.B()(o, e * 2 + j);
    }
  }
  CHECK(distance(Step(b).y, Step(c).y) <= 1e-13);

  Batch<lm::LoraMoe<double>> uniform(mixture, 9);
  fill(uniform.adapter.side(), uniform.random, 0);
  Batch<lm::Lora<double>> lora({.d_in = 13, .d_out = 11, .rank = 6, .alpha = 3, .dropout = 0.5}, 9);
  same_case(uniform, lora);  // s = 3/2 shared by three experts; α/R = 3/6
  CHECK(distance(Step(uniform).y, Step(lora).y) <= 1e-14);
}

TEST_CASE("saving gives the bits of inference; threads and micro-batches change none") {
  const auto check = [](auto& b) {
    const Index T = b.tokens;
    auto inference = b.zeros_y();
    b.forward(inference, {.key = b.key});
    const Step one(b);
    CHECK(same_bits(inference, one.y));
    for (const Index lanes : {2, 3}) {
      lm::ThreadPool pool(static_cast<int>(lanes));
      const lm::cpu::Backend be{pool.executor()};
      Memory work(lm::workspace_bytes(be, b.adapter, T, lm::Pass::backward) + lm::workspace_bytes(be, b.adapter, T));
      lm::Arena<> reserve = b.memory.arena();
      auto y = b.zeros_y();
      auto dx = b.zeros_dx();
      auto grad = lm::zeros_like(b.adapter);
      auto saved = lm::forward(be, b.adapter, b.x, y, work.arena(), {.save = &reserve, .key = b.key});
      lm::backward(be, b.adapter, saved, b.x, b.dy, dx, grad, work.arena());
      CHECK(same_bits(y, one.y));
      CHECK(same_bits(dx, one.dx));
      CHECK(same_parameters(grad, one.gradient));
    }
    auto halves = b.zeros_y();
    for (const Index half : {Index{0}, T / 2}) {
      lm::Key key = b.key;
      key.first_token += static_cast<std::uint64_t>(half);
      lm::forward(b.be, b.adapter, std::as_const(b.x).view().row_range(half, T / 2),
                  halves.view().row_range(half, T / 2), b.work.arena(), {.key = key});
    }
    CHECK(same_bits(halves, one.y));
  };
  Batch<lm::LoraMoe<float>> moe(mixture, 40);
  check(moe);
  Batch<lm::HydraLora<float>> hydra(mixture, 40);
  check(hydra);
  Batch<lm::TeamLora<float>> competing(team(6), 40);
  check(competing);
  Batch<lm::Mola<float>> plain(mola({}), 40), drawn(mola({.k = 2, .noise = true, .jitter = 0.2}), 40);
  check(plain);
  check(drawn);
}

TEST_CASE("jitter moves the router's input in training, and nothing else") {
  Batch<lm::Mola<float>> plain(mola({.k = 5}), 9), jittered(mola({.k = 5, .jitter = 0.5}), 9);
  const auto run = [](auto& b, const lm::Key& key) {
    auto y = b.zeros_y();
    b.forward(y, {.key = key});
    return y;
  };
  CHECK(same_bits(run(plain, lm::no_draws), run(jittered, lm::no_draws)));  // inference
  CHECK_FALSE(same_bits(run(plain, plain.key), run(jittered, plain.key)));
  for (auto* b : {&plain, &jittered}) fill(b->adapter.side(), b->random, 0);  // a router that does not look
  CHECK(same_bits(run(plain, plain.key), run(jittered, plain.key)));
  const auto bytes = [](auto& b, lm::Pass pass) { return lm::workspace_bytes(b.be, b.adapter, 64, pass); };
  CHECK(bytes(jittered, lm::Pass::forward) == bytes(plain, lm::Pass::forward) + 64 * 13 * 4);
  CHECK(bytes(jittered, lm::Pass::backward) == bytes(plain, lm::Pass::backward) + 2 * 64 * 13 * 4);
}

TEST_CASE("jitter in 16 bits, frozen, and with exactly the workspace that was asked for") {
  using A = lm::Mola<lm::Precision<lm::bfloat16, float>>;
  Batch<A> b(mola({.k = 5, .jitter = 0.5}), 9);
  Batch<lm::Mola<float>> wide(mola({.k = 5, .jitter = 0.5}), 9);
  same_case(b, wide);
  copy(b.adapter.side(), wide.adapter.side());
  const Index there = lm::workspace_bytes(b.be, b.adapter, 9);
  const Index back = lm::workspace_bytes(b.be, b.adapter, 9, lm::Pass::backward);
  b.work = Memory(there > back ? there : back);
  auto y = b.zeros_y(), dx = b.zeros_dx();
  lm::Arena<> reserve = b.memory.arena();
  auto saved = b.forward(y, {.save = &reserve, .key = b.key});
  b.backward(saved, dx, lm::frozen);
  const Step want(wide);
  const auto largest = [](const auto& m) {
    double most = 0;
    for (Index i = 0; i < m.rows() * m.cols(); ++i) most = std::max(most, std::abs(lm::widen<double>(m.data()[i])));
    return most;
  };
  CHECK(gap(y.view(), want.y.view()) <= 0x1p-6 * largest(want.y));  // x, y, the router's x and its gradient are rounded
  CHECK(gap(dx.view(), want.dx.view()) <= 0x1p-5 * largest(want.dx));
}

TEST_CASE("a selection bias chooses, and weighs nothing") {
  Batch<lm::Mola<double>> b(mola({.k = 2, .scoring = lm::Scoring::sigmoid, .renormalise = false}), 9);
  const std::vector<float> bias{0, 0, 0, 100, 100};
  lm::Arena<> reserve = b.memory.arena();
  auto y = b.zeros_y();
  lm::ForwardOptions<lm::Space::host> options{.save = &reserve, .key = b.key};
  options.selection_bias = {bias.data(), 5};
  auto saved = b.forward(y, options);
  const auto& scores = saved.scores;
  for (Index t = 0; t < 9; ++t) {
    for (Index s = 0; s < 2; ++s) {
      CHECK(scores.chosen(t, s) >= 3);
      CHECK(scores.weights(t, s) <= 1);
    }
  }
  options.selection_bias.size = 4;
  reserve.reset();
  CHECK_THROWS_AS(b.forward(y, options), lm::Error);
}

}  // namespace loramix_test
