// Closed experts select zero: what overflows inside them goes nowhere. A weight of 0.0 is a number.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "cpu/on_host.hpp"
#include "support/seed.hpp"

using namespace loramix_test;

namespace {

constexpr Index tokens = 67, d_in = 24, d_out = 19, experts = 3, rank = 2, ranks = experts * rank;
const lm::cpu::Backend<> be;

/// Finite weights whose expert 1 gives +Inf, −Inf or NaN for every token.
Inputs<float> overflowing(const Inputs<float>& in) {
  Inputs<float> big = in;
  for (Index j = rank; j < 2 * rank; ++j) {
    for (Index c = 0; c < d_in; ++c) big.A(j, c) = std::copysign(3e38f, in.A(j, c));
  }
  for (Index t = 0; t < tokens; ++t) {
    for (Index c = 0; c < d_in; ++c) big.x(t, c) = std::copysign(4.0f, in.x(t, c));
  }
  return big;
}

struct Both {
  Inputs<float> calm, wild;  // the same but for A of expert 1
};

Both draw_both(Random& random) {
  Both both;
  both.calm = draw_inputs<float>(random, tokens, d_in, d_out, ranks);
  both.wild = overflowing(both.calm);
  both.calm.x = both.wild.x;
  return both;
}

/// The same bits in everything that expert 1 must not touch.
void check_untouched(const Both& both, const lm::GateForm<float>& form) {
  const Outputs<float> calm = product(be, both.calm, form), wild = product(be, both.wild, form);
  Index not_finite = 0;
  for (Index t = 0; t < tokens; ++t) {
    for (Index j = rank; j < 2 * rank; ++j) not_finite += std::isfinite(wild.u(t, j)) ? 0 : 1;
  }
  REQUIRE(not_finite == tokens * rank);
  CHECK(std::isfinite(largest(wild.y)));
  CHECK(largest(wild.y) > 0);
  const auto finite = [](const auto& m) { return std::isfinite(largest(m)); };
  CHECK(finite(wild.du));
  CHECK(finite(wild.dA));
  CHECK(finite(wild.dB));
  CHECK(finite(wild.dx));
  CHECK(finite(wild.dweights));
  CHECK(finite(wild.did_weights));
  CHECK(finite(wild.dvalues));
  CHECK(finite(wild.dmultiplier));
  CHECK(finite(wild.drank_scale));
  CHECK(same_bits(calm.y, wild.y));
  CHECK(same_bits(calm.du, wild.du));
  CHECK(same_bits(calm.dA, wild.dA));
  CHECK(same_bits(calm.dB, wild.dB));
  CHECK(same_bits(calm.dx, wild.dx));
  CHECK(same_bits(calm.dweights, wild.dweights));
  CHECK(same_bits(calm.did_weights, wild.did_weights));
  CHECK(same_bits(calm.dvalues, wild.dvalues));
  CHECK(same_bits(calm.dmultiplier, wild.dmultiplier));
  CHECK(same_bits(calm.drank_scale, wild.drank_scale));
}

}  // namespace

TEST_CASE("Inf and NaN of a closed expert go nowhere") {
  Random random(seed(40));
  const Both both = draw_both(random);
  lm::Matrix<std::int32_t> ids(tokens, 2);
  for (Index t = 0; t < tokens; ++t) {
    ids(t, 0) = t % 2 == 0 ? 0 : 2;
    ids(t, 1) = t % 3 == 0 ? -1 : 2 - ids(t, 0);
  }
  lm::Matrix<float> id_weights = drawn<lm::Matrix<float>>(random, tokens, 2);
  lm::Matrix<float> weights = drawn<lm::Matrix<float>>(random, tokens, experts);
  lm::Matrix<float> values = drawn<lm::Matrix<float>>(random, tokens, ranks);
  lm::Matrix<float> one_each = drawn<lm::Matrix<float>>(random, tokens, 1);
  lm::Matrix<float> scale = drawn<lm::Matrix<float>>(random, 1, ranks);
  // Factors of closed ranks may be anything, too.
  for (Index t = 0; t < tokens; ++t) {
    weights(t, 1) = std::numeric_limits<float>::quiet_NaN();
    values(t, rank) = std::numeric_limits<float>::infinity();
  }

  SUBCASE("top-k, with every factor") {
    lm::GateForm<float> form = lm::TopKExperts<float>{ids, id_weights, experts}.form(tokens, ranks);
    form.weights = weights;
    form.values = values;
    form.multiplier = {one_each.data(), tokens};
    form.rank_scale = {scale.data(), ranks};
    check_untouched(both, form);
  }
  SUBCASE("one expert per token, none for some") {
    std::vector<std::int32_t> one;
    for (Index t = 0; t < tokens; ++t) one.push_back(t % 3 == 0 ? -1 : t % 3 == 1 ? 0 : 2);
    check_untouched(both, lm::OneExpert<float>{{one.data(), tokens}, {}, experts}.form(tokens, ranks));
  }
  SUBCASE("one expert per segment") {
    const std::vector<lm::Index> offsets{0, 20, 20, tokens};
    const std::vector<std::int32_t> one{2, 1, 0};
    check_untouched(
        both, lm::OneExpert<float>{{one.data(), 3}, lm::Groups<>::by_segment(offsets.data(), 3), experts}.form(tokens,
                                                                                                               ranks));
  }
  SUBCASE("prefix") {
    const std::vector<std::int32_t> counts(tokens, static_cast<std::int32_t>(rank));
    check_untouched(both, lm::RankPrefix<float>{{counts.data(), tokens}}.form(tokens, ranks));
  }
  SUBCASE("subset") {
    std::vector<std::uint8_t> open(tokens * ranks, 1);
    for (Index t = 0; t < tokens; ++t) {
      for (Index j = rank; j < 2 * rank; ++j) open[static_cast<std::size_t>(t * ranks + j)] = 0;
    }
    check_untouched(both, lm::RankSubset<float>{{open.data(), tokens, ranks}}.form(tokens, ranks));
  }
}

TEST_CASE("tokens without a group contribute nothing, whatever they hold") {
  Random random(seed(41));
  Inputs<float> in = draw_inputs<float>(random, tokens, d_in, d_out, ranks);
  std::vector<std::int32_t> group(tokens, 0);
  for (Index t = 0; t < tokens; t += 3) {
    group[static_cast<std::size_t>(t)] = -1;
    for (Index c = 0; c < d_in; ++c) in.x(t, c) = 3e38f;
  }
  for (Index j = 0; j < ranks; ++j) in.A(j, 0) = std::copysign(2.0f, in.A(j, 0));
  const lm::Matrix<float> weights = drawn<lm::Matrix<float>>(random, 1, experts);
  const Outputs<float> out =
      product(be, in, lm::GroupExperts<float>{weights, lm::Groups<>::by_id(group.data(), 1)}.form(tokens, ranks));
  REQUIRE(!std::isfinite(largest(out.u)));
  CHECK(std::isfinite(largest(out.y)));
  CHECK(std::isfinite(largest(out.dB)));
  CHECK(std::isfinite(largest(out.dweights)));
  CHECK(largest(out.dweights) > 0);
  for (Index o = 0; o < d_out; ++o) CHECK(out.y(0, o) == 0);
}

TEST_CASE("a weight of 0.0 is a number: 0 times NaN is NaN") {
  Random random(seed(42));
  const Both both = draw_both(random);
  lm::Matrix<float> weights = drawn<lm::Matrix<float>>(random, tokens, experts);
  for (Index t = 0; t < tokens; ++t) weights(t, 1) = 0.0f;
  const Outputs<float> out = product(be, both.wild, lm::TokenExperts<float>{weights}.form(tokens, ranks));
  for (Index t = 0; t < tokens; ++t) CHECK(std::isnan(out.y(t, 0)));
}

TEST_CASE("NaN in gives NaN out, for that token alone") {
  Random random(seed(43));
  Inputs<float> in = draw_inputs<float>(random, tokens, d_in, d_out, ranks);
  in.x(5, 7) = std::numeric_limits<float>::quiet_NaN();
  const Outputs<float> out = product(be, in, lm::OpenGate<float>{}.form(tokens, ranks));
  for (Index t = 0; t < tokens; ++t) CHECK(std::isnan(out.y(t, 0)) == (t == 5));
}

TEST_CASE("a token without an expert leaves its row of y as it is, even −0, whatever B holds") {
  constexpr Index wide = 2 * 64 + 3;  // whole panels of every machine, and a part of one
  Random random(seed(44));
  for (const Index count : {Index{1}, Index{2}, Index{3}, Index{5}, tokens}) {
    Inputs<float> in = draw_inputs<float>(random, count, d_in, wide, ranks);
    for (Index o = 0; o < wide; ++o) {
      for (Index j = 0; j < ranks; ++j) in.B(o, j) = std::numeric_limits<float>::infinity();
    }
    const auto u = drawn<lm::Matrix<float>>(random, count, ranks), weights = drawn<lm::Matrix<float>>(random, count, 1);
    lm::Matrix<std::int32_t> ids(count, 1);
    for (Index t = 0; t < count; ++t) ids(t, 0) = static_cast<std::int32_t>(t % 3) - 1;
    const lm::GateForm<float> form = lm::TopKExperts<float>{ids, weights, experts}.form(count, ranks);
    for (const auto grouping : {lm::cpu::Grouping::dense, lm::cpu::Grouping::grouped}) {
      const lm::cpu::Backend<> told{{}, {.grouping = grouping}};
      lm::Matrix<float> y(count, wide);
      for (Index i = 0; i < count * wide; ++i) y.data()[i] = -0.0f;
      run_on_host(told, lm::Expand<float, float, float, float, lm::Space::host, lm::Major::column>{u, form, in.B, 2.0f,
                                                                                                   y, lm::Into::add});
      Index kept = 0, written = 0;
      for (Index t = 0; t < count; ++t) {
        for (Index o = 0; o < wide; ++o) {
          kept += ids(t, 0) < 0 && y(t, o) == 0 && std::signbit(y(t, o)) ? 1 : 0;
          written += ids(t, 0) >= 0 && !std::isfinite(y(t, o)) ? 1 : 0;
        }
      }
      CHECK(kept == (count + 2) / 3 * wide);
      CHECK(kept + written == count * wide);
    }
  }
}
