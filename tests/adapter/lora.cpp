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

TEST_CASE_TEMPLATE("without a token, an input or an output nothing happens, and gradients are set to zero", K,
                   LORAMIX_TEST_KINDS(double)) {
  Batch<typename K::Adapter> b(K::config(), 0);
  auto grad = lm::zeros_like(b.adapter);
  poison(grad);
  lm::Arena<> reserve = b.memory.arena();
  auto y = b.zeros_y();
  auto saved = b.forward(y, {.save = &reserve, .key = b.key});
  b.backward(saved, b.zeros_dx(), grad, {.parameters = lm::Into::set});
  CHECK(same_parameters(grad, lm::zeros_like(b.adapter)));
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

TEST_CASE_TEMPLATE("Into::set never reads y, dx or the gradient, and equals adding to zero", K,
                   LORAMIX_TEST_KINDS(double)) {
  Batch<typename K::Adapter> b(K::config(), 9);
  auto added_y = b.zeros_y(), added_dx = b.zeros_dx();
  auto set_dx = constant<double>(9, K::config().d_in, nan);
  auto set_y = added_y;
  if constexpr (requires { K::config().slices; }) {  // columns outside the slices stay what they are
    for (const lm::Slice& slice : K::config().slices) {
      for (Index t = 0; t < 9; ++t) std::fill_n(&set_y(t, slice.begin), slice.width, nan);
    }
  } else {
    set_y = constant<double>(9, K::config().d_out, nan);
  }
  auto added = lm::zeros_like(b.adapter), set = lm::zeros_like(b.adapter);
  poison(set);
  lm::Arena<> reserve = b.memory.arena();
  auto saved = b.forward(added_y, {.save = &reserve, .key = b.key});
  b.backward(saved, added_dx, added);
  reserve.reset();
  saved = b.forward(set_y, {.save = &reserve, .key = b.key, .into = lm::Into::set});
  b.backward(saved, set_dx, set, {lm::Into::set, lm::Into::set});
  CHECK(same_bits(added_y, set_y));
  CHECK(same_bits(added_dx, set_dx));
  CHECK(same_parameters(added, set));
}

TEST_CASE_TEMPLATE("adding twice to a gradient and to dx doubles them", K, LORAMIX_TEST_KINDS(double)) {
  Batch<typename K::Adapter> b(K::config(), 9);
  auto once = lm::zeros_like(b.adapter), twice = lm::zeros_like(b.adapter);
  auto dx = b.zeros_dx(), dx2 = b.zeros_dx();
  for (int run = 0; run < 3; ++run) {
    auto y = b.zeros_y();
    lm::Arena<> reserve = b.memory.arena();
    auto saved = b.forward(y, {.save = &reserve, .key = b.key});
    b.backward(saved, run == 0 ? dx : dx2, run == 0 ? once : twice);
  }
  for (Index i = 0; i < once.parameters().size; ++i) {
    REQUIRE(twice.parameters()[i] == 2 * once.parameters()[i]);  // v + v is exact
  }
  for (Index i = 0; i < 9 * K::config().d_in; ++i) REQUIRE(dx2.data()[i] == 2 * dx.data()[i]);
}

TEST_CASE_TEMPLATE("micro-batches that say their first token are the large batch", K, LORAMIX_TEST_KINDS(double)) {
  using A = typename K::Adapter;
  constexpr Index tokens = 13;
  Batch<A> b(K::config(), tokens);
  const auto step = [&](Index begin, Index count, lm::Matrix<double>& y, lm::Matrix<double>& dx, auto& grad) {
    lm::Key key = b.key;
    key.first_token += static_cast<std::uint64_t>(begin);
    lm::Arena<> reserve = b.memory.arena();
    const auto x = lm::MatrixView<const double>(b.x).row_range(begin, count);
    const auto dy = lm::MatrixView<const double>(b.dy).row_range(begin, count);
    auto saved = lm::forward(b.be, b.adapter, x, y.view().row_range(begin, count), b.work.arena(), {&reserve, key});
    lm::backward(b.be, b.adapter, saved, x, dy, dx.view().row_range(begin, count), grad, b.work.arena());
  };
  auto whole_y = b.zeros_y(), part_y = b.zeros_y(), whole_dx = b.zeros_dx(), part_dx = b.zeros_dx();
  auto whole = lm::zeros_like(b.adapter), parts = lm::zeros_like(b.adapter);
  step(0, tokens, whole_y, whole_dx, whole);
  step(0, 5, part_y, part_dx, parts);
  step(5, 1, part_y, part_dx, parts);
  step(6, 7, part_y, part_dx, parts);
  CHECK(same_bits(whole_y, part_y));
  CHECK(same_bits(whole_dx, part_dx));
  for (Index i = 0; i < whole.parameters().size; ++i) {  // sums of 13 terms below 40, in another order
    REQUIRE(std::abs(whole.parameters()[i] - parts.parameters()[i]) <= 13 * 0x1p-52 * 13 * 40);
  }
  auto other_y = b.zeros_y();
  step(0, 5, other_y, part_dx, parts);
  lm::Key wrong = b.key;  // without .first_token the second micro-batch draws the first one's masks
  lm::forward(b.be, b.adapter, lm::MatrixView<const double>(b.x).row_range(5, 8), other_y.view().row_range(5, 8),
              b.work.arena(), {.key = wrong});
  if (lm::parameter_count(b.adapter) != 0) CHECK_FALSE(same_bits(whole_y, other_y));
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
