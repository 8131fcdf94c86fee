// MoSLoRA against literal sums: values, gradients, its three starts, merge.
#include <loramix/adapter/moslora.hpp>
#include <loramix/adapter/reparam_forward.hpp>

#include "adapter/weight_space.hpp"

namespace loramix_test {
namespace {

constexpr lm::MosLoraConfig config{.d_in = 13, .d_out = 301, .rank = 5, .alpha = 7, .dropout = 0.5};

template <class P>
reference::Values want(const Batch<lm::MosLora<P>>& b, bool drop) {
  return reference::moslora(drop ? x_hat(b, 0.5) : grid(b.x), grid(b.adapter.A()), grid(b.adapter.mixer()),
                            grid(b.adapter.B()), b.adapter.scale());
}

TEST_CASE("MoSLoRA: ΔY is the literal sum, and gradients are its differences") {
  for (const lm::Keep keep : {lm::Keep::z, lm::Keep::recompute}) {
    for (const Index tokens : {1, 9}) {
      auto small = config;
      small.d_out = 11;
      Batch<lm::MosLora<double>> b(small, tokens);
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

TEST_CASE("PEERS 1.12: the mixer stands between A and B, not transposed: S e_1 e_2ᵀ") {
  Batch<lm::MosLora<double>> b({.d_in = 3, .d_out = 2, .rank = 2, .alpha = 2}, 1);
  for (Index i = 0; i < b.adapter.parameters().size; ++i) b.adapter.parameters()[i] = 0;
  // [mixer]
  b.adapter.A()(0, 1) = 2;      // U = (2 x_1, 0)
  b.adapter.mixer()(0, 1) = 3;  // U S = (0, 6 x_1)
  b.adapter.B()(1, 1) = 5;
  auto y = b.zeros_y();
  b.forward(y);
  CHECK(y(0, 0) == 0);
  CHECK(std::abs(y(0, 1) - 30 * b.x(0, 1)) <= 1e-12);
  // [/mixer]
}

TEST_CASE("more outputs than a block, 16-bit weights, three lanes, frozen, no allocation") {
  Batch<lm::MosLora<lm::bfloat16>> narrow(config, 5);
  auto y16 = narrow.zeros_y();
  narrow.forward(y16);
  check_close(y16, want(narrow, false), 0.3);

  Batch<lm::MosLora<float>> b(config, 70);
  auto y = b.zeros_y(), y3 = y, dx = b.zeros_dx(), dx3 = constant<float>(70, 13, nan), dx_alone = dx;
  auto grad = lm::zeros_like(b.adapter), grad3 = grad;
  poison(grad3);
  lm::Arena<> reserve = b.memory.arena();
  auto saved = b.forward(y, {.save = &reserve, .key = b.key});
  check_close(y, want(b, true), 1e-4);
  b.backward(saved, dx, grad);
  lm::ThreadPool pool(3);
  const lm::cpu::Backend be{pool.executor()};
  Memory f(lm::workspace_bytes(be, b.adapter, 70)), g(lm::workspace_bytes(be, b.adapter, 70, lm::Pass::backward));
  const auto step = [&] {
    reserve.reset();
    auto now = lm::forward(be, b.adapter, b.x, y3, f.arena(), {.save = &reserve, .key = b.key, .into = lm::Into::set});
    lm::backward(be, b.adapter, now, b.x, b.dy, dx3, grad3, g.arena(),
                 {.parameters = lm::Into::set, .input = lm::Into::set});
  };
  step();
  const Index count = allocations();
  step();
  CHECK(allocations() == count);
  CHECK(same_bits(y, y3));
  CHECK(same_bits(dx, dx3));
  CHECK(same_parameters(grad, grad3));
  reserve.reset();
  saved = b.forward(y, {.save = &reserve, .key = b.key});
  b.backward(saved, dx_alone, lm::frozen);
  CHECK(same_bits(dx, dx_alone));
}

TEST_CASE("B = 0: ΔY is 0, dB is not; identity is LoRA; orthogonal is orthogonal; Kaiming is inside its bound") {
  for (const lm::Mixer mixer : {lm::Mixer::kaiming, lm::Mixer::orthogonal, lm::Mixer::identity}) {
    auto c = config;
    c.mixer = mixer;
    Batch<lm::MosLora<double>> b(c, 9);
    lm::initialise(b.adapter, {.seed = 4});
    auto y = b.zeros_y(), dx = b.zeros_dx();
    auto grad = lm::zeros_like(b.adapter);
    lm::Arena<> reserve = b.memory.arena();
    auto saved = b.forward(y, {.save = &reserve, .key = b.key});
    b.backward(saved, dx, grad);
    CHECK(same_bits(y, b.zeros_y()));
    const auto dA = grid(grad.A()), dB = grid(grad.B()), dS = grid(grad.mixer());
    CHECK(reference::inner(dA, dA) == 0);
    CHECK(reference::inner(dS, dS) == 0);
    CHECK(reference::inner(dB, dB) > 0);
    const auto S = grid(b.adapter.mixer()), gram = reference::times_transposed(S, S);
    double off = 0, largest = 0;
    for (Index i = 0; i < 5; ++i) {
      for (Index j = 0; j < 5; ++j) {
        off = std::max(off, std::abs(gram(i, j) - (i == j ? 1.0 : 0.0)));
        largest = std::max(largest, std::abs(S(i, j)));
      }
    }
    CHECK((off <= 1e-12) == (mixer != lm::Mixer::kaiming));
    if (mixer == lm::Mixer::kaiming) CHECK((largest <= 1 / std::sqrt(5.0) && largest > 0.2));
    if (mixer == lm::Mixer::identity) {
      lm::Lora<double> lora(c.lora());
      fill(b.adapter.B(), b.random);
      for (Index i = 0; i < 5 * 13; ++i) lora.A().data[i] = b.adapter.A().data[i];
      for (Index i = 0; i < 5 * 301; ++i) lora.B().data[i] = b.adapter.B().data[i];
      auto y_lora = b.zeros_y();
      b.forward(y);
      lm::forward(b.be, lora, b.x, y_lora, b.work.arena());
      CHECK(same_bits(y, y_lora));
    }
  }
}

TEST_CASE("merge is W + s B Sᵀ A, rounded once, undone bitwise") {
  Batch<lm::MosLora<float>> b(config, 3);
  lm::Matrix<lm::bfloat16> weights = random_matrix<lm::bfloat16>(301, 13, b.random);
  const auto before = weights;
  auto want = grid(weights);
  for (Index o = 0; o < 301; ++o) {
    for (Index c = 0; c < 13; ++c) {
      double sum = 0;
      for (Index j = 0; j < 5; ++j) {
        for (Index k = 0; k < 5; ++k) {
          sum += static_cast<double>(b.adapter.A()(j, c)) * static_cast<double>(b.adapter.mixer()(j, k)) *
                 static_cast<double>(b.adapter.B()(o, k));
        }
      }
      want(o, c) += b.adapter.scale() * sum;
    }
  }
  const auto merged = lm::merge(b.be, b.adapter, weights);
  double worst = 0;
  for (Index i = 0; i < want.size(); ++i) {
    const double error = std::abs(lm::widen<double>(weights.data()[i]) - want[i]);
    REQUIRE(error <= 0x1p-8 * std::abs(want[i]) * (1 + 1e-6) + 1e-12);
    worst = std::max(worst, error);
  }
  CHECK(worst > 0);
  CHECK(std::abs(worst - merged.report.max_rounding) <= 1e-12);
  merged.undo(weights);
  CHECK(same_bits(weights, before));
  b.adapter.mixer()(1, 2) = static_cast<float>(nan);
  check_error(lm::ErrorCode::value, {"merge", "mixer", "[1, 2]"}, [&] { lm::merge(b.be, b.adapter, weights); });
  CHECK(same_bits(weights, before));
}

}  // namespace
}  // namespace loramix_test
