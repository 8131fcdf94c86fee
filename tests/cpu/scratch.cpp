// What a query says of some tokens is enough for any call with fewer, for workspace is made once, for the largest batch; and no
// product writes behind what its query said.
#include <doctest/doctest.h>

#include <algorithm>
#include <string>
#include <vector>

#include <loramix/cpu/cpu.hpp>
#include <loramix/ops/expand.hpp>
#include <loramix/ops/shrink.hpp>

#include "conformance/gates.hpp"
#include "cpu/on_host.hpp"
#include "support/seed.hpp"

using namespace loramix_test;

namespace {

constexpr lm::Space host = lm::Space::host;
constexpr Index most_tokens = 4200;

/// Sizes are all that a query reads, and whether there is a view.
template <class V>
V sized(Index rows, Index cols) {
  static float somewhere[4];
  return {reinterpret_cast<decltype(V::data)>(somewhere), rows, cols};
}

struct Gate {
  Index experts, rank, chosen;  // none chosen: prefixes, or, of one expert, no selection
  bool prefix = false;
  Index ranks() const { return experts * rank; }
  lm::GateForm<float> form(Index tokens) const {
    static const std::int32_t id = 0;
    lm::GateForm<float> f{.tokens = tokens, .ranks = ranks(), .experts = experts};
    if (chosen != 0) f.ids = {&id, tokens, chosen};
    if (prefix) f.prefix = {&id, tokens};
    return f;
  }
};

/// f(bytes of every product) of so many tokens.
template <class T, lm::Major M, class F>
void each_query(const lm::cpu::Backend<>& be, const Gate& gate, Index tokens, Index d_in, Index d_out, const F& f) {
  const Index R = gate.ranks(), n = 8;
  const auto form = gate.form(tokens);
  const auto x = sized<lm::MatrixView<const T>>(tokens, d_in), dy = sized<lm::MatrixView<const T>>(tokens, d_out);
  const auto A = sized<lm::MatrixView<const T>>(R, d_in), side = sized<lm::MatrixView<const T>>(n, d_in);
  const auto B = sized<lm::MatrixView<const T, host, M>>(d_out, R);
  const auto u = sized<lm::MatrixView<float>>(tokens, R), h = sized<lm::MatrixView<float>>(tokens, n);
  f("shrink", lm::scratch_bytes(be, lm::Shrink<T, T, float, float, host>{A, side, x, {}, u, h, form}));
  f("expand", lm::scratch_bytes(
                  be, lm::Expand<float, T, T, float, host, M>{u, form, B, 1, sized<lm::MatrixView<T>>(tokens, d_out)}));
  f("expand_backward",
    lm::scratch_bytes(be, lm::ExpandBackward<float, T, T, float, float, host, M>{
                              u, form, B, 1, dy, u, sized<lm::MatrixView<float, host, M>>(d_out, R)}));
  lm::ShrinkBackward<T, T, float, float, float, host> back{A, side, x, {}, u, h};
  back.dA = sized<lm::MatrixView<float>>(R, d_in);
  back.dside = sized<lm::MatrixView<float>>(n, d_in);
  back.dx = sized<lm::MatrixView<T>>(tokens, d_in);
  back.select = form;
  f("shrink_backward", lm::scratch_bytes(be, back));
}

/// f(tokens) for numbers at which something changes, and others.
std::vector<Index> numbers_of_tokens() {
  std::vector<Index> all;
  for (Index t = 1; t <= 300; ++t) all.push_back(t);
  for (Index t = 301; t <= most_tokens; t += t % 512 < 8 || t % 120 < 4 ? 1 : 3) all.push_back(t);
  return all;
}

}  // namespace

TEST_CASE_TEMPLATE("scratch for many tokens is enough for fewer", T, float, lm::bfloat16) {
  const std::vector<Gate> gates{{1, 8, 0},   {1, 64, 0}, {8, 16, 2},   {8, 8, 2},     {16, 16, 2},      {4, 16, 1},
                                {64, 16, 2}, {64, 4, 1}, {512, 16, 2}, {1024, 16, 2}, {1, 64, 0, true}, {20, 8, 1}};
  using Tuning = lm::cpu::Tuning;
  const std::vector<Tuning> tunings{{}, {.grouping = lm::cpu::Grouping::grouped}, {.sweep = 64, .weights = 640}};
  for (const Gate& gate : gates) {
    for (const Index d : {256, 1024}) {
      CAPTURE(gate.experts);
      CAPTURE(gate.rank);
      CAPTURE(gate.chosen);
      CAPTURE(d);
      std::vector<Index> most(8 * tunings.size(), 0);
      Index falls = 0;
      for (const Index tokens : numbers_of_tokens()) {
        std::size_t i = 0;
        const auto grows = [&](const char* op, Index bytes) {
          if (bytes < most[i]) {
            if (falls++ == 0)
              MESSAGE(std::string(op) << ": " << bytes << " bytes for " << tokens << " tokens, " << most[i]
                                      << " for fewer");
          } else {
            most[i] = bytes;
          }
          ++i;
        };
        for (const Tuning& tuning : tunings) {
          const lm::cpu::Backend<> be{{}, tuning};
          each_query<T, lm::Major::column>(be, gate, tokens, d, 2 * d, grows);
          each_query<T, lm::Major::row>(be, gate, tokens, d, 2 * d, grows);
        }
      }
      CHECK(falls == 0);
    }
  }
}

TEST_CASE_TEMPLATE("scratch for ranks and side rows is enough for either alone", T, float, lm::bfloat16) {
  const lm::cpu::Backend<> be;
  Index less = 0;
  for (const Index ranks : {1, 8, 17, 64, 128, 224, 300}) {
    for (const Index rows : {1, 8, 32, 100}) {
      for (const Index d : {100, 600, 2100}) {
        for (const Index tokens : {4, 64, 65, 72, 600}) {
          const auto A = sized<lm::MatrixView<const T>>(ranks, d), side = sized<lm::MatrixView<const T>>(rows, d);
          const auto x = sized<lm::MatrixView<const T>>(tokens, d);
          const auto u = sized<lm::MatrixView<float>>(tokens, ranks), h = sized<lm::MatrixView<float>>(tokens, rows);
          const auto forward = [&](const auto& a, const auto& s) {
            return lm::scratch_bytes(be, lm::Shrink<T, T, float, float, host>{a, s, x, {}, u, h});
          };
          const auto backward = [&](const auto& a, const auto& s) {
            lm::ShrinkBackward<T, T, float, float, float, host> op{a, s, x, {}, u, h};
            op.dA = sized<lm::MatrixView<float>>(a.rows, d), op.dside = sized<lm::MatrixView<float>>(s.rows, d);
            op.dx = sized<lm::MatrixView<T>>(tokens, d);
            return lm::scratch_bytes(be, op);
          };
          const lm::MatrixView<const T> none{nullptr, 0, d};
          less += forward(A, side) < std::max(forward(A, none), forward(none, side)) ? 1 : 0;
          less += backward(A, side) < std::max(backward(A, none), backward(none, side)) ? 1 : 0;
        }
      }
    }
  }
  CHECK(less == 0);
}

TEST_CASE_TEMPLATE("no product writes behind its scratch", T, float, lm::bfloat16) {
  Random random(seed(77));
  const auto below = [&](Index n) { return draw_below(random, n); };
  for (int i = 0; i < 60; ++i) {
    // Blocks of weights so small that ranks, side rows and both together go by sweeps of different width.
    lm::cpu::Tuning tuning{.grouping = static_cast<lm::cpu::Grouping>(below(3))};
    tuning.weights = Index{640} << below(8), tuning.sweep = Index{64} << below(5);
    const Index tokens = 1 + below(below(2) == 0 ? 8 : 300), d_in = 1 + below(900), d_out = 1 + below(900);
    const Index experts = 1 + below(12), rank = 1 + below(20), ranks = experts * rank;
    const lm::cpu::Backend<> be{{}, tuning};
    CAPTURE(tuning.weights);
    CAPTURE(tuning.sweep);
    CAPTURE(tokens);
    CAPTURE(d_in);
    CAPTURE(d_out);
    CAPTURE(experts);
    CAPTURE(rank);
    for (const GateSpec& spec : gate_specs()) {
      if (spec.computed || spec.mixed_ranks || below(3) != 0) continue;
      CAPTURE(spec.name);
      Inputs<T> in = draw_inputs<T>(random, tokens, d_in, d_out, ranks);
      in.side = drawn<lm::Matrix<T>>(random, below(2) * below(30), d_in);
      if (below(2) == 0) in.dropout = lm::make_dropout("test", 0.25, {.seed = 1, .site = 2, .step = 3});
      CpuHarness<> memory;
      LoweredGate<CpuHarness<>, float> gate(memory, draw_gate(random, spec, tokens, experts, rank), 1);
      const Outputs<T> out = product(be, in, gate.form());
      lm::Matrix<float> u(tokens, ranks), dA(ranks, d_in);
      lm::Matrix<T> dx(tokens, d_in);
      run_on_host(be, lm::Shrink<T, T, float, float, host>{in.A, {}, in.x, in.dropout, u, {}, gate.form()});
      run_on_host(be,
                  lm::ShrinkBackward<T, T, float, float, float, host>{
                      in.A, {}, in.x, in.dropout, out.du, {}, dA, {}, dx, lm::Into::set, lm::Into::set, gate.form()});
      CHECK(largest(out.y) < 1e30);  // NaN is not
    }
  }
}
