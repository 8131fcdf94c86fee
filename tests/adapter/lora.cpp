// LoRA and rsLoRA: values against literal sums, edge sizes, the halves of Into, micro-batches, mixed precision.
#include "adapter/kinds.hpp"

namespace loramix_test {
namespace {

/// s (x̂ Aᵀ) Bᵀ as MATH.md section 1 writes it, in double, with the sum of absolute terms beside it.
struct Literal {
  double value = 0, absolute = 0;
};
template <class A, class X>
Literal delta(const A& lora, const lm::Matrix<X>& x, Index t, Index o, const lm::Matrix<std::uint8_t>& keep,
              double kept) {
  Literal sum;
  for (Index j = 0; j < lora.A().rows; ++j) {
    Literal u;
    for (Index c = 0; c < x.cols(); ++c) {
      if (keep(t, c) == 0) continue;
      const double term = lm::widen<double>(x(t, c)) * kept * lm::widen<double>(lora.A()(j, c));
      u.value += term;
      u.absolute += std::abs(term);
    }
    sum.value += lora.scale() * u.value * lm::widen<double>(lora.B()(o, j));
    sum.absolute += std::abs(lora.scale() * u.absolute * lm::widen<double>(lora.B()(o, j)));
  }
  return sum;
}

template <class T>
double round_off() {
  if (std::is_same_v<T, lm::bfloat16>) return 0x1p-8;
  if (std::is_same_v<T, lm::half>) return 0x1p-11;
  return std::is_same_v<T, float> ? 0x1p-24 : 0x1p-53;
}

TEST_CASE("the scale is alpha / r, and alpha / sqrt(r) rank-stabilised") {
  CHECK(lm::Lora<float>({.d_in = 4, .d_out = 4, .rank = 8, .alpha = 16}).scale() == 2);
  const double stabilised =
      lm::Lora<float>({.d_in = 4, .d_out = 4, .rank = 8, .alpha = 16, .rank_stabilised = true}).scale();
  CHECK(std::abs(stabilised - 5.656854) <= 5e-7);
  CHECK(lm::Lora<float>({.d_in = 4, .d_out = 4, .rank = 0}).scale() == 0);
}

TEST_CASE_TEMPLATE("y += s (x A^T) B^T, with and without dropout", P, double, float, lm::bfloat16, lm::half,
                   lm::Precision<lm::bfloat16, float>, lm::Precision<float, lm::bfloat16>) {
  using X = typename lm::precision_t<P>::activation;
  using Acc = typename lm::precision_t<P>::accumulation;
  for (const Index tokens : {1, 6, 67}) {
    Batch<lm::Lora<P>> b({.d_in = 270, .d_out = 261, .rank = 5, .alpha = 7, .dropout = 0.25}, tokens);
    for (const bool drop : {false, true}) {
      const auto before = random_matrix<X>(tokens, 261, b.random);
      auto y = before;
      const lm::Key key = drop ? b.key : lm::no_draws;
      b.forward(y, {.key = key});
      const lm::Dropout dropout = lm::make_dropout("test", 0.25, key);
      lm::Matrix<std::uint8_t> keep(tokens, 270);
      for (Index i = 0; i < tokens * 270; ++i) keep.data()[i] = dropout.keep(i / 270, i % 270);
      double worst = 0, largest = 0;
      for (Index t = 0; t < tokens; ++t) {
        for (Index o = 0; o < 261; ++o) {
          const Literal want = delta(b.adapter, b.x, t, o, keep, dropout.kept_scale());
          const double old = lm::widen<double>(before(t, o)), got = lm::widen<double>(y(t, o));
          // One rounding to X at the end; d_in + R + 5 roundings of the accumulation type before it.
          const double tolerance = 280 * round_off<Acc>() * (want.absolute + std::abs(old)) +
                                   1.01 * round_off<X>() * std::abs(old + want.value);
          const double error = std::abs(got - (old + want.value));
          if (!(error <= tolerance)) worst = std::isnan(error) ? error : std::max(worst, error / tolerance);
          largest = std::max(largest, std::abs(want.value));
        }
      }
      CHECK(worst == 0);
      CHECK(largest > 1);
    }
  }
}

TEST_CASE("inputs or outputs of width 0") {
  for (const bool no_input : {true, false}) {
    const lm::LoraConfig config{.d_in = no_input ? 0 : 5, .d_out = no_input ? 5 : 0, .rank = 3};
    Batch<lm::Lora<float>> b(config, 4);
    lm::initialise(b.adapter, {.seed = 1});
    fill(b.adapter.B(), b.random);
    auto y = constant<float>(4, config.d_out, 1);
    auto dx = constant<float>(4, config.d_in, nan);
    auto grad = lm::zeros_like(b.adapter);
    poison(grad);
    lm::Arena<> reserve = b.memory.arena();
    auto saved = b.forward(y, {.save = &reserve, .key = b.key});
    b.backward(saved, dx, grad, {lm::Into::set, lm::Into::set});
    CHECK(same_bits(y, constant<float>(4, config.d_out, 1)));
    CHECK(same_bits(dx, b.zeros_dx()));
    CHECK(same_parameters(grad, lm::zeros_like(b.adapter)));
  }
}

TEST_CASE("rank 0 adds nothing, and sets zero") {
  Batch<lm::Lora<float>> b({.d_in = 13, .d_out = 11, .rank = 0}, 5);
  auto y = random_matrix<float>(5, 11, b.random);
  const auto before = y;
  lm::Arena<> reserve = b.memory.arena();
  auto saved = b.forward(y, {.save = &reserve});
  CHECK(same_bits(y, before));
  y = constant<float>(5, 11, nan);
  b.forward(y, {.into = lm::Into::set});
  CHECK(same_bits(y, b.zeros_y()));
  auto dx = constant<float>(5, 13, nan);
  auto grad = lm::zeros_like(b.adapter);
  b.backward(saved, dx, grad, {.input = lm::Into::set});
  CHECK(same_bits(dx, b.zeros_dx()));
}

TEST_CASE("a step takes the workspace that was asked for, with and without dropout, where rows of x are long") {
  struct Shape {
    Index d_in, rank, tokens;
  };
  for (const Shape& s : {Shape{4096, 32, 64}, Shape{4096, 32, 200}, Shape{8192, 16, 70}, Shape{14336, 8, 3}}) {
    for (const double dropout : {0.0, 0.5}) {
      CAPTURE(s.d_in);
      CAPTURE(s.tokens);
      CAPTURE(dropout);
      Batch<lm::Lora<float>> b({.d_in = s.d_in, .d_out = 48, .rank = s.rank, .dropout = dropout}, s.tokens);
      b.work = Memory(std::max(lm::workspace_bytes(b.be, b.adapter, s.tokens),
                               lm::workspace_bytes(b.be, b.adapter, s.tokens, lm::Pass::backward)));
      auto y = b.zeros_y(), dx = b.zeros_dx();
      lm::Arena<> reserve = b.memory.arena();
      auto saved = b.forward(y, {.save = &reserve, .key = b.key});
      auto gradient = lm::zeros_like(b.adapter);
      CHECK_NOTHROW(b.backward(saved, dx, gradient));
    }
  }
}

TEST_CASE("B = 0: the output is exactly 0, A has no gradient, B has one") {
  Batch<lm::Lora<double>> b(LoraKind<double>::config(), 9);
  lm::initialise(b.adapter, {.seed = 7});
  auto y = constant<double>(9, 11, nan);
  lm::Arena<> reserve = b.memory.arena();
  auto saved = b.forward(y, {.save = &reserve, .key = b.key, .into = lm::Into::set});
  CHECK(same_bits(y, b.zeros_y()));
  auto grad = lm::zeros_like(b.adapter);
  b.backward(saved, {}, grad);
  double a = 0, up = 0;
  for (Index j = 0; j < 5; ++j) {
    for (Index c = 0; c < 13; ++c) a += std::abs(grad.A()(j, c));
    for (Index o = 0; o < 11; ++o) up += std::abs(grad.B()(o, j));
  }
  CHECK(a == 0);
  CHECK(up > 1);
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

TEST_CASE("gradients of 16-bit weights and activations are the float gradients of the rounded values") {
  const auto check = [](auto tag) {
    using P = decltype(tag);
    using X = typename P::activation;
    Batch<lm::Lora<P>> b(LoraKind<P>::config(), 9);
    Batch<lm::Lora<double>> exact(LoraKind<double>::config(), 9);
    for (Index j = 0; j < 5; ++j) {
      for (Index c = 0; c < 13; ++c) exact.adapter.A()(j, c) = lm::widen<double>(b.adapter.A()(j, c));
      for (Index o = 0; o < 11; ++o) exact.adapter.B()(o, j) = lm::widen<double>(b.adapter.B()(o, j));
    }
    for (Index i = 0; i < 9 * 13; ++i) exact.x.data()[i] = lm::widen<double>(b.x.data()[i]);
    for (Index i = 0; i < 9 * 11; ++i) exact.dy.data()[i] = lm::widen<double>(b.dy.data()[i]);
    auto grad = lm::zeros_like(b.adapter);
    static_assert(std::is_same_v<typename decltype(grad)::element, float>);
    auto want = lm::zeros_like(exact.adapter);
    auto dx = b.zeros_dx();
    auto want_dx = exact.zeros_dx();
    const auto run = [](auto& batch, auto& into_dx, auto& into) {
      auto y = batch.zeros_y();
      lm::Arena<> reserve = batch.memory.arena();
      auto saved = batch.forward(y, {.save = &reserve, .key = batch.key});
      batch.backward(saved, into_dx, into);
    };
    run(b, dx, grad);
    run(exact, want_dx, want);
    // All factors are at most 1 (x̂ at most 2): no sum of absolute terms is above s · 9 · 2 · 13 · 5, 40 roundings.
    const double tolerance = 40 * 0x1p-24 * b.adapter.scale() * 9 * 2 * 13 * 5;
    double largest = 0;
    const auto compare = [&](auto got, auto wanted, double rounding) {
      for (Index i = 0; i < got.rows; ++i) {
        for (Index j = 0; j < got.cols; ++j) {
          REQUIRE(std::abs(lm::widen<double>(got(i, j)) - wanted(i, j)) <=
                  tolerance + rounding * std::abs(wanted(i, j)));
          largest = std::max(largest, std::abs(wanted(i, j)));
        }
      }
    };
    compare(grad.A(), want.A(), 0);
    compare(grad.B(), want.B(), 0);
    compare(dx.view(), want_dx.view(), 1.01 * round_off<X>());
    CHECK(largest > 1);
  };
  check(lm::Precision<lm::bfloat16>{});
  check(lm::Precision<lm::half>{});
  check(lm::Precision<lm::bfloat16, float>{});
  check(lm::Precision<float, lm::half>{});
}

}  // namespace
}  // namespace loramix_test
