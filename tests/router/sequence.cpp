// Routing by sequence: SequenceGate against literal loops and finite differences, with a token mask, ragged sequences and
// empty ones; what it refuses.
#include <loramix/router/sequence.hpp>

#include <loramix/cpu/cpu.hpp>
#include <loramix/train/gradient_check.hpp>

#include <random>
#include <vector>

#include "core/caught.hpp"
#include "support/seed.hpp"

namespace lm = loramix;
using lm::Index;
using loramix_test::check_error;

namespace {

constexpr Index T = 14, E = 3, L = 6;
constexpr Index ends[L + 1] = {0, 4, 4, 5, 11, 14, 14};
constexpr std::uint8_t valid[T] = {0, 1, 1, 0, 0, 1, 0, 1, 1, 1, 0, 1, 1, 1};  // none of sequence 2

using Gate = lm::SequenceGate<const double, double>;
using View = lm::MatrixView<double>;

struct Case {
  std::vector<double> h = draw(T * E, 1), bias = draw(E, 2), c = draw(T * E, 3), d = draw(L * E, 4), q = draw(L * E, 5);
  lm::Pooling pooling = lm::Pooling::mean;
  double tau = 0.7;

  static std::vector<double> draw(Index n, std::uint64_t site) {
    std::mt19937_64 engine(loramix_test::seed(site));
    std::uniform_real_distribution<double> uniform(-1, 1);
    std::vector<double> v(static_cast<std::size_t>(n));
    for (double& x : v) x = uniform(engine);
    return v;
  }
  std::vector<double> logits(Index b) const {
    std::vector<double> l(bias);
    for (Index e = 0; e < E; ++e) {
      double sum = 0, n = 0;
      for (Index t = ends[b]; t < ends[b + 1]; ++t) {
        if (valid[t] == 0) continue;
        const double value = h[static_cast<std::size_t>(t * E + e)];
        sum = pooling == lm::Pooling::last ? value : sum + value;
        n = pooling == lm::Pooling::last ? 1 : n + 1;
      }
      if (n > 0) l[static_cast<std::size_t>(e)] += sum / n;
    }
    return l;
  }
  /// Σ c∘g + Σ d∘ℓ + Σ q∘p.
  double loss() const {
    double sum = 0;
    for (Index b = 0; b < L; ++b) {
      const std::vector<double> l = logits(b);
      double norm = 0;
      for (const double v : l) norm += std::exp(v / tau);
      for (Index e = 0; e < E; ++e) {
        const auto i = static_cast<std::size_t>(e), row = static_cast<std::size_t>(b * E + e);
        const double p = std::exp(l[i] / tau) / norm;
        sum += d[row] * l[i] + q[row] * p;
        for (Index t = ends[b]; t < ends[b + 1]; ++t) sum += c[static_cast<std::size_t>(t * E + e)] * p;
      }
    }
    return sum;
  }
};

TEST_CASE("values and gradients of a softmax per sequence") {
  for (const lm::Pooling pooling : {lm::Pooling::mean, lm::Pooling::last}) {
    Case m;
    m.pooling = pooling;
    const lm::cpu::Backend be;
    const std::vector<double> none(E);  // the side rows' own values are not read
    const Gate gate{{none.data(), E, 1}, {m.bias.data(), 1, E}, pooling, m.tau};
    const lm::GateCall<> call{.tokens = T,
                              .batch = {.sequences = lm::Groups<>::by_segment(ends, L), .valid = {valid, T}},
                              .key = lm::no_draws};
    gate.check("test", call);
    std::vector<std::byte> memory(8192, std::byte{0xff});
    lm::Arena<> arena{memory};
    const auto state = gate.carve(arena, T, true), dstate = gate.carve(arena, T, false);
    gate.forward(be, View(m.h.data(), T, E), state, call, lm::Arena<>{});

    std::vector<double> dh(T * E), dbias(E);
    const auto scores = gate.scores(state, {}, {}, call);
    REQUIRE(scores.logits.rows == L);
    for (Index b = 0; b < L; ++b) {
      for (Index e = 0; e < E; ++e) {
        CHECK(std::fabs(scores.logits(b, e) - m.logits(b)[static_cast<std::size_t>(e)]) <= 1e-15);
        scores.dlogits(b, e) += m.d[static_cast<std::size_t>(b * E + e)];
        scores.dp(b, e) += m.q[static_cast<std::size_t>(b * E + e)];
        for (Index t = ends[b]; t < ends[b + 1]; ++t) CHECK(state.weights(t, e) == scores.p(b, e));
      }
    }
    std::copy(m.c.begin(), m.c.end(), dstate.weights.data);
    const lm::SequenceGate<double, double> gradient{{}, {dbias.data(), 1, E}};
    gate.backward(be, {}, state, dstate, View(dh.data(), T, E), call, gradient, lm::Into::add, lm::Arena<>{});
    const lm::GradientReport report = lm::gradient_check(
        {{"h", {m.h.data(), T * E}, {dh.data(), T * E}}, {"bias", {m.bias.data(), E}, {dbias.data(), E}}},
        [&] { return m.loss(); });
    CHECK_MESSAGE(report.ok(), report.text());
    for (const lm::CheckedTensor& tensor : report.tensors) CHECK(tensor.norm > 0);
    for (Index t = 0; t < T; ++t) {
      for (Index e = 0; valid[t] == 0 && e < E; ++e) CHECK(dh[static_cast<std::size_t>(t * E + e)] == 0);
    }
  }
}

TEST_CASE("without sequences every token is its own; groups by id are refused") {
  const Gate gate{{nullptr, 0, 1}, {}};
  gate.check("test", {.tokens = 3});
  const std::int32_t ids[3] = {};
  check_error(lm::ErrorCode::value, {"test", "sequences", "segments"},
              [&] { gate.check("test", {.tokens = 3, .batch = {.sequences = lm::Groups<>::by_id(ids, 1)}}); });
}

TEST_CASE("a temperature that is not above 0 is refused") {
  Gate gate{{nullptr, 0, 1}, {}};
  gate.check("test", {.tokens = 3});
  gate.temperature = -1;
  check_error(lm::ErrorCode::value, {"test", "temperature"}, [&] { gate.check("test", {.tokens = 3}); });
}

TEST_CASE("sequences that do not cover the tokens, overlap or count otherwise are refused") {
  const Gate gate{{nullptr, 2, 1}, {}};
  const auto refused = [&](lm::ErrorCode code, const lm::Groups<>& sequences) {
    check_error(code, {"test", "sequences"},
                [&] { gate.check("test", {.tokens = 5, .batch = {.sequences = sequences}}); });
  };
  const Index short_[] = {0, 3}, falling[] = {0, 4, 2, 5}, good[] = {0, 2, 5};
  gate.check("test", {.tokens = 5, .batch = {.sequences = lm::Groups<>::by_segment(good, 2)}});
  refused(lm::ErrorCode::shape, lm::Groups<>::by_segment(short_, 1));
  refused(lm::ErrorCode::value, lm::Groups<>::by_segment(falling, 3));
  refused(lm::ErrorCode::value, lm::Groups<>::by_segment(good, -1));
  refused(lm::ErrorCode::null, lm::Groups<>::by_segment(nullptr, 2));
  lm::Groups<> other = lm::Groups<>::by_segment(good, 2);
  other.count = 3;
  refused(lm::ErrorCode::shape, other);
}

}  // namespace
