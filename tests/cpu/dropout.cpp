// Dropout masks drawn many columns at a time, and kept as bits: the bits of core/draws.hpp, and the same results.
#include <doctest/doctest.h>

#include <vector>

#include "adapter/kinds.hpp"
#include "cpu/harness.hpp"

using namespace loramix_test;

TEST_CASE("masks of whole rows are the masks of their columns") {
  Random random(51);
  for (const Index columns : {1, 7, 8, 9, 63, 64, 127, 128, 129, 500, 1025}) {
    for (const double p : {0.1, 0.5, 0.99}) {
      CAPTURE(columns);
      const lm::Dropout dropout = lm::make_dropout(
          "test", p,
          {.seed = 42, .site = lm::site("layers.0"), .step = 3, .first_token = (std::uint64_t{7} << 32) - 2});
      lm::Matrix<std::uint8_t> bits(5, lm::mask_bytes(columns));
      const lm::cpu::Backend<> be;
      const lm::Dropout kept = lm::draw_mask(be, dropout, 5, columns, bits.view());
      Index wrong = 0, open = 0;
      for (Index t = 0; t < 5; ++t) {
        for (Index i = 0; i < columns; ++i) {
          wrong += (bits(t, i / 8) >> (i % 8) & 1) != (dropout.keep(t, i) ? 1 : 0);
          wrong += kept.keep(t, i) != dropout.keep(t, i);
          open += dropout.keep(t, i) ? 1 : 0;
        }
      }
      CHECK(wrong == 0);
      if (columns > 100 && p == 0.5) CHECK((open > 0 && open < 5 * columns));
    }
  }
}

TEST_CASE_TEMPLATE("a step that keeps its mask gives the bits of one that draws it again", P, float, lm::bfloat16) {
  using A = lm::Lora<P>;
  for (const Index tokens : {3, 20, 70}) {
    CAPTURE(tokens);
    const auto run = [&](bool keep) {
      Batch<A> batch({.d_in = 133, .d_out = 11, .rank = 5, .alpha = 7, .dropout = 0.5}, tokens);
      lm::Matrix<std::uint8_t> mask(tokens, lm::mask_bytes(133));
      lm::Arena<> reserve = batch.memory.arena();
      lm::ForwardOptions<lm::Space::host> options{.save = &reserve, .key = Batch<A>::key};
      if (keep) options.mask = mask.view();
      auto y = batch.zeros_y(), dx = batch.zeros_dx();
      auto grad = lm::zeros_like(batch.adapter);
      auto saved = batch.forward(y, options);
      CHECK((saved.dropout.mask != nullptr) == keep);
      batch.backward(saved, dx, grad);
      return std::tuple(y, dx, grad);
    };
    const auto [y, dx, grad] = run(false);
    const auto [kept_y, kept_dx, kept_grad] = run(true);
    CHECK(same_bits(y, kept_y));
    CHECK(same_bits(dx, kept_dx));
    CHECK(same_parameters(grad, kept_grad));
  }
}

TEST_CASE("a mask of another size is refused") {
  using A = lm::Lora<float>;
  Batch<A> batch({.d_in = 13, .d_out = 11, .rank = 5, .dropout = 0.5}, 4);
  lm::Matrix<std::uint8_t> mask(4, 13);
  lm::Arena<> reserve = batch.memory.arena();
  auto y = batch.zeros_y();
  check_error(lm::ErrorCode::shape, {"forward: mask has columns 13, but mask_bytes of d_in is 64"},
              [&] { batch.forward(y, {.save = &reserve, .key = Batch<A>::key, .mask = mask.view()}); });
}
