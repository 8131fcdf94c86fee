// LoRA on a fused projection: the same as a LoRA per slice, and nothing outside the slices.
#include "adapter/kinds.hpp"

namespace loramix_test {
namespace {

/// The LoRA that slice i is, with its weights.
template <class P>
lm::Lora<P> one(const lm::FusedLora<P>& fused, Index i) {
  const auto& c = fused.config();
  lm::Lora<P> lora(
      {.d_in = c.d_in, .d_out = c.slices[i].width, .rank = c.rank, .alpha = c.alpha, .dropout = c.dropout});
  for (Index j = 0; j < c.rank; ++j) {
    for (Index k = 0; k < c.d_in; ++k) lora.A()(j, k) = fused.A()(fused.first_rank(i) + j, k);
    for (Index o = 0; o < c.slices[i].width; ++o) lora.B()(o, j) = fused.B(i)(o, j);
  }
  return lora;
}

template <class X>
bool near(X got, X want, double slack) {
  const double v = lm::widen<double>(want), rounding = std::is_same_v<X, lm::bfloat16> ? 0x1p-7 : 0;
  return std::abs(lm::widen<double>(got) - v) <= slack + rounding * std::abs(v);
}

// With one A per slice the ranks of all slices are one product, whose register tiles fall differently than in a product
// of one slice's ranks: equal up to rounding. With a shared A the shapes are the same, and so is every bit.
TEST_CASE_TEMPLATE("a fused projection is one LoRA per slice, with a shared A bit for bit", K, FusedKind<float>,
                   SharedKind<float>, FusedKind<lm::bfloat16>, SharedKind<lm::Precision<lm::half, float>>) {
  using A = typename K::Adapter;
  using X = typename A::precision::activation;
  constexpr Index tokens = 70;
  Batch<A> b(K::config(), tokens);
  const auto& config = b.adapter.config();
  auto y = random_matrix<X>(tokens, config.d_out, b.random);
  const auto before = y;
  auto want = y;
  auto grad = lm::zeros_like(b.adapter);
  lm::Arena<> reserve = b.memory.arena();
  auto saved = b.forward(y, {.save = &reserve, .key = b.key});
  b.backward(saved, {}, grad);

  // |x̂| ≤ 2, everything else ≤ 1: sums of absolute terms, times the roundings of 70 tokens, 13 inputs and 3 ranks.
  const double slack = config.shared_A ? 0 : 90 * 0x1p-24 * b.adapter.scale() * tokens * 2 * 13 * 3;
  for (Index i = 0; i < config.slices.size(); ++i) {
    const auto lora = one(b.adapter, i);
    const lm::Slice slice = config.slices[i];
    Memory kept(lm::reserve_bytes(lora, tokens));
    lm::Arena<> one_reserve = kept.arena();
    auto one_saved = lm::forward(b.be, lora, b.x, want.view().col_range(slice.begin, slice.width), b.work.arena(),
                                 {.save = &one_reserve, .key = b.key});
    auto one_grad = lm::zeros_like(lora);
    lm::backward(b.be, lora, one_saved, b.x, lm::MatrixView<const X>(b.dy).col_range(slice.begin, slice.width), {},
                 one_grad, b.work.arena());
    for (Index j = 0; j < config.rank; ++j) {
      for (Index o = 0; o < slice.width; ++o) REQUIRE(near(grad.B(i)(o, j), one_grad.B()(o, j), slack));
      for (Index c = 0; c < config.d_in && !config.shared_A; ++c) {
        REQUIRE(near(grad.A()(b.adapter.first_rank(i) + j, c), one_grad.A()(j, c), slack));
      }
    }
  }
  if (config.shared_A) CHECK(same_bits(y, want));
  for (Index k = 0; k < tokens * config.d_out; ++k) REQUIRE(near(y.data()[k], want.data()[k], slack / tokens));
  CHECK_FALSE(same_bits(y, before));
}

TEST_CASE_TEMPLATE("columns outside the slices keep their bytes, also with Into::set", K, FusedKind<float>,
                   SharedKind<float>) {
  Batch<typename K::Adapter> b(K::config(), 9);
  for (const lm::Into into : {lm::Into::add, lm::Into::set}) {
    auto y = random_matrix<float>(9, 23, b.random);
    for (Index t = 0; t < 9; ++t) y(t, 6) = lm::detail::bit_cast<float>(std::uint32_t{0xffc12345u});  // a NaN's payload
    const auto before = y;
    b.forward(y, {.key = b.key, .into = into});
    Index changed = 0;
    for (Index t = 0; t < 9; ++t) {
      REQUIRE(std::memcmp(&y(t, 4), &before(t, 4), 5 * sizeof(float)) == 0);
      for (const Index c : {0, 3, 9, 13, 14, 22}) changed += y(t, c) != before(t, c);
    }
    CHECK(changed > 40);
  }
}

TEST_CASE("no slice at all, and a slice of width 0") {
  Batch<lm::FusedLora<float>> none({.d_in = 5, .d_out = 7, .slices = {}, .rank = 2}, 3);
  auto y = random_matrix<float>(3, 7, none.random);
  const auto before = y;
  none.forward(y);
  CHECK(same_bits(y, before));

  Batch<lm::FusedLora<float>> empty({.d_in = 5, .d_out = 7, .slices = {{7, 0}, {0, 3}}, .rank = 2}, 3);
  auto grad = lm::zeros_like(empty.adapter);
  lm::Arena<> reserve = empty.memory.arena();
  y = before;
  auto saved = empty.forward(y, {.save = &reserve});
  empty.backward(saved, {}, grad);
  CHECK_FALSE(same_bits(y, before));
}

TEST_CASE("slices that overlap, leave the output, or are too many") {
  const auto make = [](lm::Slices slices) { lm::FusedLora<float>({.d_in = 4, .d_out = 8, .slices = slices}); };
  check_error(lm::ErrorCode::shape, {"FusedLora", "slice 1 overlaps slice 0"}, [&] { make({{0, 4}, {3, 2}}); });
  check_error(lm::ErrorCode::shape, {"slice 0 [5, +4]", "d_out, which is 8"}, [&] { make({{5, 4}}); });
  check_error(lm::ErrorCode::shape, {"slice 0 [-1, +4]"}, [&] { make({{-1, 4}}); });
  check_error(lm::ErrorCode::shape, {"slice 0"}, [&] { make({{1, INT64_MAX}}); });
  check_error(lm::ErrorCode::value, {"Slices", "more than 8"}, [] { lm::Slices{{}, {}, {}, {}, {}, {}, {}, {}, {}}; });
}

TEST_CASE("every slice's parameters are visited once, under their own names") {
  std::string names;
  const auto list = [&](const auto& adapter) {
    names.clear();
    adapter.visit(adapter, [&](const char* name, auto v, lm::ParameterGroup) {
      names += std::string(name) + " " + std::to_string(v.rows) + "x" + std::to_string(v.cols) + "\n";
    });
    return names;
  };
  CHECK(list(lm::FusedLora<float>(FusedKind<float>::config())) ==
        "slice0.lora_A.weight 3x13\nslice1.lora_A.weight 3x13\nslice2.lora_A.weight 3x13\n"
        "slice0.lora_B.weight 4x3\nslice1.lora_B.weight 9x3\nslice2.lora_B.weight 5x3\n");
  CHECK(list(lm::FusedLora<float>(SharedKind<float>::config())) ==
        "lora_A.weight 3x13\nslice0.lora_B.weight 4x3\nslice1.lora_B.weight 9x3\nslice2.lora_B.weight 5x3\n");
  const auto config = lm::FusedLoraConfig::of({.d_in = 8, .d_out = 11, .total_rank = 6});
  CHECK(config.rank == 2);
  CHECK(config.slices[2].begin + config.slices[2].width == 11);
}

}  // namespace
}  // namespace loramix_test
