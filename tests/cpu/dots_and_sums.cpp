// dU and dB of few ranks, out of one reading of dY by pieces of its columns, or out of two where pieces do not fill the lanes.
#include <doctest/doctest.h>

#include <loramix/gate/gates.hpp>
#include <loramix/ops/expand.hpp>

#include "cpu/sums.hpp"
#include "support/seed.hpp"

using namespace loramix_test;

namespace {

using Op = lm::ExpandBackward<float, float, float, float, float, host, lm::Major::column>;

/// A backward of `tokens` tokens with one expert whose gate is its weight: dU = g s dY B, dB (+)= s dYᵀ (U ∘ g), dg = s ⟨U, dY B⟩.
struct Backward {
  Guarded<float> u, B, dy, weights;  // B as it lies: [R, d_out]
  lm::Into into;
  lm::cpu::Tuning tuning;
  static constexpr float scale = 0.75f;

  Backward(Random& random, Index tokens, Index ranks, Index columns, lm::Into into_, const lm::cpu::Tuning& tuning_)
      : u(random, tokens, ranks),
        B(random, ranks, columns),
        dy(random, tokens, columns),
        weights(random, tokens, 1),
        into(into_),
        tuning(tuning_) {}

  template <class Be>
  void run(const Be& be, Index tokens, lm::MatrixView<float> du, lm::MatrixView<float> dB,
           lm::MatrixView<float> dweights) {
    Op op{.u = u.view().row_range(0, tokens),
          .gate = lm::TokenExperts<float>{weights.view().row_range(0, tokens)}.form(tokens, u.view().cols),
          .B = B.view().transposed(),
          .scale = scale,
          .dy = dy.view().row_range(0, tokens),
          .du = du};
    if (dB.data != nullptr) op.dB = dB.transposed();
    op.dgate.weights = dweights;
    op.parameters = into, op.gate_values = lm::Into::set;
    run_on_host(be, op);
  }

  void check(Random& random) {
    const Index tokens = dy.view().rows, columns = dy.view().cols, ranks = B.view().rows;
    const Guarded<float> old_du(random, tokens, ranks), old_dB(random, ranks, columns), old_weights(random, tokens, 1);
    Guarded<float> du = old_du, dB = old_dB, dweights = old_weights;
    const Guarded<float> du_on_lanes = on_lanes(
        old_du,
        [&](const auto& be, lm::MatrixView<float> out) { run(be, tokens, out, (dB = old_dB).view(), dweights.view()); },
        tuning);
    const Guarded<float> dB_on_lanes = on_lanes(
        old_dB, [&](const auto& be, lm::MatrixView<float> out) { run(be, tokens, du.view(), out, dweights.view()); },
        tuning);
    check_sums(du_on_lanes, old_du, lm::Into::set, columns + 2, [&](Index t, Index r, const auto& term) {
      for (Index c = 0; c < columns; ++c) term(scale * weights.at(t, 0) * dy.at(t, c) * B.at(r, c));
    });
    check_sums(dB_on_lanes, old_dB, into, tokens + 2, [&](Index r, Index c, const auto& term) {
      for (Index t = 0; t < tokens; ++t) term(scale * weights.at(t, 0) * u.at(t, r) * dy.at(t, c));
    });
    check_sums(dweights, old_weights, lm::Into::set, columns + ranks + 2, [&](Index t, Index, const auto& term) {
      for (Index r = 0; r < ranks; ++r) {
        for (Index c = 0; c < columns; ++c) term(scale * u.at(t, r) * dy.at(t, c) * B.at(r, c));
      }
    });
    // Without dB, and of fewer tokens: the same bits.
    run(lm::cpu::Backend<>{{}, tuning}, tokens, (du = old_du).view(), {}, dweights.view());
    CHECK(same_bits(du.all, du_on_lanes.all));
    const Index fewer = tokens - 1;
    run(lm::cpu::Backend<>{{}, tuning}, fewer, (du = old_du).view().row_range(0, fewer), dB.view(),
        dweights.view().row_range(0, fewer));
    for (Index r = 0; r < ranks; ++r) du.all(fewer, r) = du_on_lanes.all(fewer, r);  // the token that was left out
    CHECK(same_bits(du.all, du_on_lanes.all));
  }
};

}  // namespace

TEST_CASE("dU and dB of few ranks") {
  Random random(seed(74));
  for (const Index ranks : {1, 2, 3, 5, 7, 8}) {
    for (const Index columns : {130, 192, 261}) {
      for (const Index tokens : {66, 97, 130}) {
        for (const lm::Into into : {lm::Into::set, lm::Into::add}) {
          CAPTURE(ranks);
          CAPTURE(columns);
          CAPTURE(tokens);
          Backward(random, tokens, ranks, columns, into, {.sweep = 64}).check(random);
        }
      }
    }
  }
}

TEST_CASE("dU and dB of few ranks and long rows") {
  Random random(seed(75));
  for (const Index columns : {2048, 6500}) Backward(random, 70, 2, columns, lm::Into::add, {}).check(random);
}
