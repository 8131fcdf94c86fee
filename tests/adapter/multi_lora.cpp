// MultiLoRA against literal sums: values, gradients, γ = 0, merge.
#include <loramix/adapter/multi_lora.hpp>
#include <loramix/adapter/reparam_forward.hpp>

#include "adapter/weight_space.hpp"

namespace loramix_test {
namespace {

constexpr lm::MultiLoraConfig config{.d_in = 13, .d_out = 11, .experts = 3, .rank = 2, .alpha = 3, .dropout = 0.5};

template <class P>
reference::Values want(const Batch<lm::MultiLora<P>>& b, bool drop) {
  return reference::multi_lora(drop ? x_hat(b, 0.5) : grid(b.x), grid(b.adapter.A()), grid(b.adapter.B()),
                               grid(b.adapter.gamma()), b.adapter.scale());
}

TEST_CASE("MultiLoRA: ΔY is the literal sum, and gradients are its differences") {
  for (const lm::Keep keep : {lm::Keep::z, lm::Keep::recompute}) {
    for (const Index tokens : {1, 9}) {
      Batch<lm::MultiLora<double>> b(config, tokens);
      CHECK(b.adapter.scale() == 1.5);  // r of one LoRA
      auto y = b.zeros_y(), dx = b.zeros_dx();
      auto grad = lm::zeros_like(b.adapter);
      lm::Arena<> reserve = b.memory.arena();
      auto saved = b.forward(y, {.save = &reserve, .key = b.key, .keep = keep});
      check_close(y, want(b, true), 1e-12);
      b.backward(saved, dx, grad);
      check_gradients(b.adapter, grad, b.x, dx, [&] { return reference::inner(grid(b.dy), want(b, true)); });
    }
  }
}

TEST_CASE("MATH 6: γ = 0 at start: ΔY is 0 and only γ has a gradient; A and B are Kaiming") {
  Batch<lm::MultiLora<double>> b(config, 9);
  lm::initialise(b.adapter, {.seed = 4});
  auto y = b.zeros_y(), dx = b.zeros_dx();
  auto grad = lm::zeros_like(b.adapter);
  lm::Arena<> reserve = b.memory.arena();
  auto saved = b.forward(y, {.save = &reserve, .key = b.key});
  b.backward(saved, dx, grad);
  CHECK(same_bits(y, b.zeros_y()));
  const auto dA = grid(grad.A()), dB = grid(grad.B()), dgamma = grid(grad.gamma());
  CHECK(reference::inner(dA, dA) == 0);
  CHECK(reference::inner(dB, dB) == 0);
  CHECK(reference::inner(dgamma, dgamma) > 0);
  const auto A = grid(b.adapter.A()), B = grid(b.adapter.B());
  double a = 0, bb = 0;
  for (Index i = 0; i < A.size(); ++i) a = std::max(a, std::abs(A[i]));
  for (Index i = 0; i < B.size(); ++i) bb = std::max(bb, std::abs(B[i]));
  CHECK((a <= 1 / std::sqrt(13.0) && a > 0.9 / std::sqrt(13.0)));
  CHECK((bb <= 1 / std::sqrt(2.0) && bb > 0.9 / std::sqrt(2.0)));
}

TEST_CASE("γ = 1 is one LoRA of rank n·r, three lanes change no bit, rank 0 adds nothing") {
  Batch<lm::MultiLora<float>> b(config, 70);
  for (Index i = 0; i < 33; ++i) b.adapter.gamma().data[i] = 1;
  lm::Lora<float> lora({.d_in = 13, .d_out = 11, .rank = 6, .alpha = 9, .dropout = 0.5});
  for (Index i = 0; i < 6 * 13; ++i) lora.A().data[i] = b.adapter.A().data[i];
  for (Index i = 0; i < 6 * 11; ++i) lora.B().data[i] = b.adapter.B().data[i];
  auto y = b.zeros_y(), y_lora = y, y3 = y, dx = b.zeros_dx(), dx3 = dx;
  lm::forward(b.be, lora, b.x, y_lora, b.work.arena(), {.key = b.key});
  auto grad = lm::zeros_like(b.adapter), grad3 = grad;
  lm::Arena<> reserve = b.memory.arena();
  auto saved = b.forward(y, {.save = &reserve, .key = b.key});
  b.backward(saved, dx, grad);
  CHECK(same_bits(y, y_lora));
  lm::ThreadPool pool(3);
  const lm::cpu::Backend be{pool.executor()};
  Memory work(lm::workspace_bytes(be, b.adapter, 70, lm::Pass::backward) + lm::workspace_bytes(be, b.adapter, 70));
  reserve.reset();
  saved = lm::forward(be, b.adapter, b.x, y3, work.arena(), {.save = &reserve, .key = b.key});
  lm::backward(be, b.adapter, saved, b.x, b.dy, dx3, grad3, work.arena());
  CHECK(same_bits(y, y3));
  CHECK(same_bits(dx, dx3));
  CHECK(same_parameters(grad, grad3));
  Batch<lm::MultiLora<float>> none({.d_in = 13, .d_out = 11, .experts = 2, .rank = 0}, 5);
  auto nothing = none.zeros_y();
  none.forward(nothing);
  CHECK(same_bits(nothing, none.zeros_y()));
  check_error(lm::ErrorCode::value, {"MultiLora", "experts", "0"},
              [] { lm::MultiLora<float>({.d_in = 1, .d_out = 1, .experts = 0, .rank = 1}); });
}

TEST_CASE("merge is W + s Σ diag(γ_i) B_i A_i, undone bitwise") {
  Batch<lm::MultiLora<float>> b(config, 9);
  lm::Matrix<float> weights = random_matrix<float>(11, 13, b.random);
  const auto before = weights;
  auto y = b.zeros_y();
  b.forward(y);
  const auto base = base_output(grid(b.x), grid(weights));
  // [merge]
  const auto merged = lm::merge(b.be, b.adapter, weights);
  check_close(y, reference::plus(base_output(grid(b.x), grid(weights)), -1, base), 1e-5);
  CHECK(merged.report.max_rounding > 0);
  merged.undo(weights);
  CHECK(same_bits(weights, before));
  // [/merge]
}

}  // namespace
}  // namespace loramix_test
