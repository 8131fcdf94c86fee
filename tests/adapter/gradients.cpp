// Every gradient of every adapter against finite differences in double, dropout 0.5, under MATH.md section 6's bounds:
// also of a gate that a router computes, with a loss on its logits, and of a gate that is a parameter.
#include "adapter/kinds.hpp"

#include <loramix/train/gradient_check.hpp>

namespace loramix_test {
namespace {

/// Gradients of Σ dy∘y (+ Σ d∘h where there are side rows), by backward and by differences.
template <class A>
lm::GradientReport check_gradients(Batch<A>& b, lm::Keep keep, double break_dropout = 0) {
  using Saved = decltype(b.forward(std::declval<lm::Matrix<double>&>()));
  constexpr bool routed = requires(Saved s) { s.dh; };
  const auto& config = b.adapter.config();
  auto grad = lm::zeros_like(b.adapter);
  lm::Matrix<double> dx(b.tokens, config.d_in), y(b.tokens, config.d_out), d;
  lm::Arena<> reserve = b.memory.arena();
  auto saved = b.forward(y, {.save = &reserve, .key = b.key, .keep = keep});
  if constexpr (routed) {
    d = random_matrix<double>(b.tokens, saved.dh.cols, b.random);
    for (Index t = 0; t < d.rows(); ++t) {  // what a balance loss does
      for (Index e = 0; e < d.cols(); ++e) saved.dh(t, e) += d(t, e);
    }
  }
  b.backward(saved, dx, grad);
  if (break_dropout != 0) grad.parameters()[0] *= 1 + break_dropout;

  std::vector<lm::GradientClaim> claims{
      {"x", {b.x.data(), b.tokens * config.d_in}, {dx.data(), b.tokens * config.d_in}}};
  A::visit(b.adapter, [&](const char* name, auto view, lm::ParameterGroup) {
    claims.push_back({name, {view.data, view.rows * view.cols}, {}});
  });
  std::size_t next = 1;
  A::visit(grad, [&](const char*, auto view, lm::ParameterGroup) {
    claims[next++].gradient = {view.data, view.rows * view.cols};
  });
  return lm::gradient_check(claims, [&] {
    reserve.reset();
    const auto now = b.forward(y, {.save = &reserve, .key = b.key, .into = lm::Into::set});
    double loss = 0;
    for (Index t = 0; t < b.tokens; ++t) {
      for (Index o = 0; o < config.d_out; ++o) loss += b.dy(t, o) * y(t, o);
      if constexpr (routed) {
        for (Index e = 0; e < d.cols(); ++e) loss += d(t, e) * now.h(t, e);
      }
    }
    return loss;
  });
}

TEST_CASE_TEMPLATE("gradients equal finite differences", K, LoraKind<double>, RankStabilisedKind<double>,
                   FusedKind<double>, SharedKind<double>, MixtureKind<double>, ScaledKind<double>) {
  for (const Index tokens : {1, 9, 66}) {
    for (const lm::Keep keep : {lm::Keep::z, lm::Keep::recompute}) {
      Batch<typename K::Adapter> b(K::config(), tokens, static_cast<std::uint64_t>(tokens));
      const lm::GradientReport report = check_gradients(b, keep);
      CHECK_MESSAGE(report.ok(), report.text());
      for (const lm::CheckedTensor& tensor : report.tensors) CHECK_MESSAGE(tensor.norm > 0, tensor.name);
    }
  }
}

TEST_CASE("the check sees a gradient that is wrong in its sixth digit") {
  Batch<lm::Lora<double>> b({.d_in = 3, .d_out = 2, .rank = 1, .dropout = 0.5}, 4);
  CHECK(check_gradients(b, lm::Keep::z).ok());
  CHECK_FALSE(check_gradients(b, lm::Keep::z, 1e-4).ok());
}

TEST_CASE_TEMPLATE("a frozen adapter gives the same dx; an empty dx gives the same gradient", K,
                   LORAMIX_TEST_KINDS(double)) {
  Batch<typename K::Adapter> b(K::config(), 9);
  auto both = lm::zeros_like(b.adapter), alone = lm::zeros_like(b.adapter);
  auto dx = b.zeros_dx(), dx_alone = b.zeros_dx(), y = b.zeros_y();
  const auto run = [&](lm::MatrixView<double> into, auto& grad) {
    lm::Arena<> reserve = b.memory.arena();
    auto saved = b.forward(y, {.save = &reserve, .key = b.key});
    b.backward(saved, into, grad);
  };
  run(dx, both);
  run(dx_alone, lm::frozen);
  run({}, alone);
  CHECK(same_bits(dx, dx_alone));
  CHECK(same_parameters(both, alone));
}

TEST_CASE_TEMPLATE("Keep::recompute changes no bit and keeps less", K, LORAMIX_TEST_KINDS(float)) {
  Batch<typename K::Adapter> b(K::config(), 70);
  auto y = b.zeros_y(), again_y = b.zeros_y(), dx = b.zeros_dx(), again_dx = b.zeros_dx();
  auto grad = lm::zeros_like(b.adapter), again = lm::zeros_like(b.adapter);
  lm::Arena<> reserve = b.memory.arena();
  auto saved = b.forward(y, {.save = &reserve, .key = b.key});
  b.backward(saved, dx, grad);
  const Index kept = reserve.used();
  reserve.reset();
  saved = b.forward(again_y, {.save = &reserve, .key = b.key, .keep = lm::Keep::recompute});
  const Index recomputed = reserve.used();
  b.backward(saved, again_dx, again);
  CHECK(same_bits(y, again_y));
  CHECK(same_bits(dx, again_dx));
  CHECK(same_parameters(grad, again));
  if (lm::parameter_count(b.adapter) != 0) CHECK(recomputed < kept);
}

TEST_CASE_TEMPLATE("saving gives the bits of inference, and so do three threads", K, LORAMIX_TEST_KINDS(float)) {
  Batch<typename K::Adapter> b(K::config(), 200);
  auto inference = b.zeros_y(), saving = b.zeros_y(), threaded = b.zeros_y();
  auto dx = b.zeros_dx(), threaded_dx = b.zeros_dx();
  auto grad = lm::zeros_like(b.adapter), threaded_grad = lm::zeros_like(b.adapter);
  b.forward(inference, {.key = b.key});
  lm::Arena<> reserve = b.memory.arena();
  auto saved = b.forward(saving, {.save = &reserve, .key = b.key});
  b.backward(saved, dx, grad);
  CHECK(same_bits(inference, saving));

  lm::ThreadPool pool(3);
  const lm::cpu::Backend be{pool.executor()};
  Memory work(lm::workspace_bytes(be, b.adapter, 200, lm::Pass::backward) + lm::workspace_bytes(be, b.adapter, 200));
  reserve.reset();
  saved = lm::forward(be, b.adapter, b.x, threaded, work.arena(), {.save = &reserve, .key = b.key});
  lm::backward(be, b.adapter, saved, b.x, b.dy, threaded_dx, threaded_grad, work.arena());
  CHECK(same_bits(inference, threaded));
  CHECK(same_bits(dx, threaded_dx));
  CHECK(same_parameters(grad, threaded_grad));
}

TEST_CASE("without a key the adapter's dropout is off, and dropout_off says so while saving") {
  Batch<lm::Lora<float>> b(LoraKind<float>::config(), 9);
  auto plain = LoraKind<float>::config();
  plain.dropout = 0;
  Batch<lm::Lora<float>> without(plain, 9);
  auto y = b.zeros_y(), y_off = b.zeros_y(), want = b.zeros_y(), dropped = b.zeros_y();
  lm::Arena<> reserve = b.memory.arena();
  b.forward(y);
  b.forward(y_off, {.save = &reserve, .dropout_off = true});
  b.forward(dropped, {.key = b.key});
  without.forward(want, {.key = b.key});
  CHECK(same_bits(y, want));
  CHECK(same_bits(y_off, want));
  CHECK_FALSE(same_bits(dropped, want));
}

}  // namespace
}  // namespace loramix_test
