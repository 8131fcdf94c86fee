// What peers get wrong about dropout (docs/peers.md 1.6, 1.9 and 3.18).
#include "adapter/kinds.hpp"

#include <loramix/adapter/hydra_lora.hpp>

#include "reference/draws.hpp"

namespace loramix_test {
namespace {

using Config = lm::LoraConfig;

bool kept(const lm::Key& key, Index t, Index i, std::uint32_t p16) {
  return reference::keep(key.seed, key.site, key.step, key.first_token + static_cast<std::uint64_t>(t), i, p16);
}

/// dA and dX of LoRA by literal sums. `theirs`: as mLoRA and MoE-PEFT have it, x undropped in dA and no mask in dX.
struct Gradients {
  lm::Matrix<double> dA, dx;
};
Gradients literal(Batch<lm::Lora<double>>& b, bool theirs) {
  const auto& c = b.adapter.config();
  const double p = c.dropout, s = b.adapter.scale();
  Gradients g{lm::Matrix<double>(c.rank, c.d_in), lm::Matrix<double>(b.tokens, c.d_in)};
  const std::uint32_t p16 = lm::dropout_p16("test", p);
  const double scale = 1 / (1 - p16 / 65536.0);
  for (Index t = 0; t < b.tokens; ++t) {
    for (Index j = 0; j < c.rank; ++j) {
      double du = 0;
      for (Index o = 0; o < c.d_out; ++o) du += s * b.dy(t, o) * b.adapter.B()(o, j);
      for (Index i = 0; i < c.d_in; ++i) {
        const double mask = theirs || kept(b.key, t, i, p16) ? scale : 0;
        g.dA(j, i) += du * mask * b.x(t, i);
        g.dx(t, i) += du * b.adapter.A()(j, i) * mask;
      }
    }
  }
  return g;
}
double off(const lm::Matrix<double>& got, const lm::Matrix<double>& want) {
  double error = 0, norm = 0;
  for (Index i = 0; i < want.rows() * want.cols(); ++i) {
    error += (got.data()[i] - want.data()[i]) * (got.data()[i] - want.data()[i]);
    norm += want.data()[i] * want.data()[i];
  }
  return std::sqrt(error / norm);
}

}  // namespace

TEST_CASE("mLoRA, MoE-PEFT and fms-acceleration#97: backward multiplies with the dropped x, and by the mask") {
  Batch<lm::Lora<double>> b({.d_in = 24, .d_out = 16, .rank = 4, .alpha = 8, .dropout = 0.1}, 64);
  auto y = b.zeros_y(), dx = b.zeros_dx();
  auto grad = lm::zeros_like(b.adapter);
  lm::Arena<> reserve = b.memory.arena();
  auto saved = b.forward(y, {.save = &reserve, .key = b.key});
  b.backward(saved, dx, grad);
  const Gradients right = literal(b, false), theirs = literal(b, true);
  lm::Matrix<double> dA(4, 24);
  for (Index i = 0; i < 4 * 24; ++i) dA.data()[i] = grad.A().data[i];
  CHECK(off(dA, right.dA) <= 1e-13);
  CHECK(off(dx, right.dx) <= 1e-13);
  CHECK(off(theirs.dA, right.dA) > 0.25);  // 0.32 and 0.31 in docs/adapters/lora.md
  CHECK(off(theirs.dx, right.dx) > 0.25);
}

TEST_CASE("torchtune#996: dropout is applied where a key is given, to p of the values, and scaled by 1/(1 - p)") {
  constexpr Index T = 64, d = 250;
  Batch<lm::Lora<double>> b({.d_in = d, .d_out = 1, .rank = 1, .alpha = 1, .dropout = 0.1}, T);
  for (Index i = 0; i < d; ++i) b.adapter.A()(0, i) = 1;
  b.adapter.B()(0, 0) = 1;
  b.x = constant<double>(T, d, 1);
  auto with = b.zeros_y(), without = b.zeros_y();
  b.forward(with, {.key = b.key});
  b.forward(without);
  double sum = 0, dropped = 0;
  for (Index t = 0; t < T; ++t) {
    CHECK(without(t, 0) == d);
    sum += with(t, 0);
    for (Index i = 0; i < d; ++i) dropped += !kept(b.key, t, i, lm::dropout_p16("test", 0.1));
  }
  const double n = T * d, p = 6554 / 65536.0;
  CHECK(std::abs(sum - (n - dropped) / (1 - p)) <= 1e-9 * n);
  CHECK(std::abs(dropped / n - p) <= 5 * std::sqrt(p * (1 - p) / n));  // five standard errors
}

TEST_CASE("HydraLoRA's loop: one mask and one X A^T for all experts, not E of each") {
  // With equal heads a convex gate changes nothing: dropout alone would, were it drawn anew for every expert.
  Batch<lm::HydraLora<double>> b({.d_in = 13, .d_out = 11, .experts = 4, .rank = 3, .alpha = 3, .dropout = 0.5}, 9);
  Batch<lm::Lora<double>> one({.d_in = 13, .d_out = 11, .rank = 3, .alpha = 3, .dropout = 0.5}, 9);
  for (Index j = 0; j < 3; ++j) {
    for (Index i = 0; i < 13; ++i) one.adapter.A()(j, i) = b.adapter.A()(j, i);
    for (Index o = 0; o < 11; ++o) {
      one.adapter.B()(o, j) = b.adapter.B()(o, j);
      for (Index e = 1; e < 4; ++e) b.adapter.B()(o, e * 3 + j) = b.adapter.B()(o, j);
    }
  }
  one.x = b.x;
  auto y = b.zeros_y(), want = one.zeros_y();
  b.forward(y, {.key = b.key});
  one.forward(want, {.key = b.key});
  for (Index i = 0; i < 9 * 11; ++i) CHECK(std::abs(y.data()[i] - want.data()[i]) <= 1e-13);
  const double shared = b.adapter.cost(100).forward_flop, own = 2.0 * 100 * (4 * 3 + 4) * 13 + 2.0 * 100 * 4 * 3 * 11;
  CHECK(shared == own - 2.0 * 100 * 3 * 3 * 13);  // three shrinks of three rows less
}

}  // namespace loramix_test
