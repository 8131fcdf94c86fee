// What peers' routers get wrong (docs/peers.md 1.8 and 1.14), beside what tests/adapter and tests/ops show already.
#include "adapter/kinds.hpp"

#include <loramix/adapter/mola.hpp>

namespace loramix_test {

TEST_CASE("mixlora-dynamic: temperature divides logits, not probabilities") {
  // p of one token at τ: softmax(ℓ/τ) sums to 1; softmax(ℓ)/τ would not.
  Batch<lm::Mola<double>> b(
      {.d_in = 13, .d_out = 11, .experts = 4, .rank = 2, .alpha = 3, .rule = {.k = 4, .temperature = 0.5}}, 5);
  auto y = b.zeros_y();
  lm::Arena<> reserve = b.memory.arena();
  const auto saved = b.forward(y, {.save = &reserve, .key = b.key});
  for (Index t = 0; t < 5; ++t) {
    double sum = 0, norm = 0;
    for (Index e = 0; e < 4; ++e) norm += std::exp(saved.scores.logits(t, e) / 0.5);
    for (Index e = 0; e < 4; ++e) {
      sum += saved.scores.p(t, e);
      CHECK(std::abs(saved.scores.p(t, e) - std::exp(saved.scores.logits(t, e) / 0.5) / norm) <= 1e-14);
    }
    CHECK(std::abs(sum - 1) <= 1e-14);
  }
}

TEST_CASE("Lily's batch mean: a token's gate does not depend on the batch it comes in") {
  Batch<lm::Mola<float>> b({.d_in = 13, .d_out = 11, .experts = 4, .rank = 2, .alpha = 3}, 9);
  auto y = b.zeros_y(), other = b.zeros_y();
  b.forward(y);
  for (Index t = 0; t < 9; ++t) {  // all other rows are new
    if (t == 4) continue;
    for (Index i = 0; i < 13; ++i) b.x(t, i) = static_cast<float>(b.random());
  }
  b.forward(other);
  for (Index o = 0; o < 11; ++o) CHECK(y(4, o) == other(4, o));
  CHECK_FALSE(same_bits(y, other));
}

}  // namespace loramix_test
