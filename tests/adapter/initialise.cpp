// Starting values: golden numbers from an independent Philox, bounds, names, and what an adapter counts and visits.
#include <loramix/adapter/mix_lora.hpp>
#include <loramix/adapter/mola.hpp>

#include "adapter/kinds.hpp"

namespace loramix_test {
namespace {

TEST_CASE("known starting values") {  // computed in Python from MATH.md section 1
  lm::Lora<double> lora({.d_in = 16, .d_out = 3, .rank = 3});
  lm::initialise(lora, {.seed = 7, .site = "layers.0.mlp.up_proj"});
  CHECK(lora.A()(0, 0) == 0x1.7b74185800000p-5);
  CHECK(lora.A()(0, 1) == -0x1.57bb441600000p-3);
  CHECK(lora.A()(1, 4) == -0x1.00f32e7a00000p-3);
  CHECK(lora.A()(2, 15) == -0x1.c73316b400000p-4);

  lm::Lora<float> single({.d_in = 16, .d_out = 3, .rank = 3});
  lm::initialise(single, {.seed = 7});
  CHECK(single.A()(0, 0) == -0x1.2bc80a0000000p-3f);
  CHECK(single.A()(1, 4) == 0x1.531edc0000000p-3f);
  lm::Lora<lm::bfloat16> rounded({.d_in = 16, .d_out = 3, .rank = 3});
  lm::initialise(rounded, {.seed = 7});
  CHECK(rounded.A()(0, 0) == lm::narrow<lm::bfloat16>(-0x1.2bc809ba00000p-3));

  lm::AdaLora<double> normal({.d_in = 16, .d_out = 3, .rank = 4});
  lm::initialise(normal, {.seed = 7});
  CHECK(std::abs(normal.A()(0, 0) - 0.021589016441319137) <= 1e-16);
  CHECK(std::abs(normal.A()(0, 1) + 0.02816022562420978) <= 1e-16);
  CHECK(std::abs(normal.A()(3, 7) - 0.015357155655661162) <= 1e-16);
}

TEST_CASE("A is uniform in ±1/sqrt(d_in), B is 0") {
  lm::Lora<float> lora({.d_in = 400, .d_out = 30, .rank = 50});
  Random random(1);
  fill_parameters(lora, random);
  lm::initialise(lora, {.seed = seed()});
  double sum = 0, squares = 0, largest = 0;
  for (Index j = 0; j < 50; ++j) {
    for (Index c = 0; c < 400; ++c) {
      const double v = lora.A()(j, c);
      sum += v;
      squares += v * v;
      largest = std::max(largest, std::abs(v));
    }
    for (Index o = 0; o < 30; ++o) REQUIRE(lora.B()(o, j) == 0);
  }
  const double n = 50 * 400, bound = 1 / 20.0;
  CHECK(largest <= bound);
  CHECK(largest > 0.999 * bound);
  CHECK(std::abs(sum / n) <= 5 * bound / std::sqrt(3 * n));  // five standard errors
  CHECK(std::abs(squares / n / (bound * bound / 3) - 1) <= 5 * std::sqrt(0.8 / n));
}

TEST_CASE_TEMPLATE("the same seed and site start alike; others do not", K, LoraKind<float>, FusedKind<float>,
                   SharedKind<float>, MixtureKind<float>, ScaledKind<float>) {
  using A = typename K::Adapter;
  const auto start = [](std::uint64_t seed, const char* site) {
    A adapter(K::config());
    lm::initialise(adapter, {.seed = seed, .site = site});
    return adapter;
  };
  CHECK(same_parameters(start(7, "up"), start(7, "up")));
  CHECK_FALSE(same_parameters(start(7, "up"), start(7, "down")));
  CHECK_FALSE(same_parameters(start(7, "up"), start(7, "")));
  CHECK_FALSE(same_parameters(start(7, "up"), start(8, "up")));
  const A adapter = start(7, "up");
  CHECK(adapter.A()(0, 0) != adapter.A()(1, 0));
}

TEST_CASE_TEMPLATE("parameters begin on boundaries of every type, costs are per token, copies share nothing", K,
                   LoraKind<float>, FusedKind<float>) {
  using A = typename K::Adapter;
  static_assert(lm::Adapter<A> && lm::Adapter<lm::gradient_t<A>>);
  static_assert(lm::Adapter<typename A::template rebind<double>>);
  A adapter(K::config());
  A::visit(adapter, [&](const char* name, auto view, lm::ParameterGroup) {
    const Index begin = view.data - adapter.parameters().data;
    if (std::strstr(name, "slice") == nullptr) CHECK(begin % 32 == 0);  // slices of A are rows of one matrix
  });
  CHECK(adapter.cost(20).forward_flop == 20 * adapter.cost(1).forward_flop);

  A copy = adapter;  // a value: copies share nothing
  copy.parameters()[0] = 1;
  CHECK(adapter.parameters()[0] == 0);
}

TEST_CASE("roles are told apart by their letters, wherever these lie") {
  const char letters[] = "A", more[] = "AB", none[] = "";  // no literals: a compiler may merge those
  const lm::ParameterGroup elsewhere{letters}, longer{more}, empty{none};
  CHECK(elsewhere.is(lm::group::A));
  CHECK(lm::group::A.is(elsewhere));
  CHECK_FALSE(elsewhere.is(lm::group::B));
  for (const lm::ParameterGroup& other : {longer, empty}) {
    CHECK_FALSE(other.is(lm::group::A));
    CHECK_FALSE(lm::group::A.is(other));
  }
  CHECK(lm::MixLora<float>({.experts = 3, .rank = 1}).tensors(elsewhere) == 3);
  CHECK(lm::Mola<float>({.experts = 3, .rank = 1}).tensors(elsewhere) == 3);
}

struct NoGate {
  int A() const { return 0; }
};
static_assert(lm::ProductAdapter<lm::Lora<float>> && lm::ProductAdapter<lm::Lora<lm::bfloat16>>);
static_assert(lm::ProductAdapter<::Mixture<double>> && lm::ProductAdapter<lm::AdaLora<float>>);
static_assert(lm::FusedAdapter<lm::FusedLora<lm::half>> && !lm::ProductAdapter<lm::FusedLora<float>>);
static_assert(!lm::Adapter<NoGate> && !lm::Adapter<int> && !lm::ProductAdapter<lm::Matrix<float>>);

}  // namespace
}  // namespace loramix_test
