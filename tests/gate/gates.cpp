// What the gates say of themselves, and the normal form they lower to.
#include <doctest/doctest.h>

#include <cstdint>
#include <vector>

#include <loramix/gate/gates.hpp>
#include <loramix/gate/softmax.hpp>

#include "core/caught.hpp"

namespace lm = loramix;
using lm::Index, lm::Slots, lm::Sparsity;

namespace {

constexpr Index T = 5, R = 6, E = 3;

/// Views of memory that is never read: lowering copies nothing.
template <class V>
const V* at(int place) {
  return reinterpret_cast<const V*>(static_cast<std::uintptr_t>(4096 * (place + 1)));
}
const lm::Groups<> groups = lm::Groups<>::by_id(at<std::int32_t>(0), 4);
const lm::MatrixView<const float> weights(at<float>(1), 4, E, 5), values(at<float>(2), T, R, 7);
const lm::MatrixView<const float> id_weights(at<float>(3), T, 2, 4);
const lm::MatrixView<const std::int32_t> ids(at<std::int32_t>(4), T, 2, 3);
const lm::MatrixView<const std::uint8_t> subset(at<std::uint8_t>(5), 4, R, 9);
const lm::VectorView<const float> multiplier(at<float>(6), 4), scale(at<float>(7), R);
const lm::VectorView<const std::int32_t> prefix(at<std::int32_t>(8), 4), one(at<std::int32_t>(9), 4);
const Index* const rank_offsets = at<Index>(10);

/// The slots that a form fills, as bits.
unsigned filled(const lm::GateForm<float>& f) {
  return (f.ids.data != nullptr ? Slots::ids : 0u) | (f.id_weights.data != nullptr ? Slots::id_weights : 0u) |
         (f.prefix.data != nullptr ? Slots::prefix : 0u) | (f.subset.data != nullptr ? Slots::subset : 0u) |
         (f.weights.data != nullptr ? Slots::weights : 0u) | (f.values.data != nullptr ? Slots::values : 0u) |
         (f.multiplier.data != nullptr ? Slots::multiplier : 0u) |
         (f.rank_scale.data != nullptr ? Slots::rank_scale : 0u);
}

template <class G>
lm::GateForm<float> lowered(const G& gate, Index experts) {
  const lm::GateForm<float> f = gate.form(T, R);
  CHECK(f.tokens == T);
  CHECK(f.ranks == R);
  CHECK(f.experts == experts);
  CHECK(filled(f) == G::facts.slots);
  return f;
}

bool same(const lm::Groups<>& a, const lm::Groups<>& b) {
  return a.ids == b.ids && a.offsets == b.offsets && a.count == b.count;
}
template <class V>
bool same(const V& a, const V& b) {
  return a.data == b.data && a.rows == b.rows && a.cols == b.cols && a.stride == b.stride;
}

}  // namespace

TEST_CASE("each gate fills the slots that its facts name, with the views it was given") {
  lowered(lm::OpenGate<float>{}, 1);
  CHECK(same(lowered(lm::TokenExperts<float>{weights}, E).weights, weights));
  CHECK(lowered(lm::TokenExperts<float>{weights}, E).weight_groups.per_token());
  CHECK(same(lowered(lm::GroupExperts<float>{weights, groups}, E).weights, weights));
  CHECK(same(lowered(lm::GroupExperts<float>{weights, groups}, E).weight_groups, groups));
  CHECK(same(lowered(lm::TopKExperts<float>{ids, id_weights, E}, E).ids, ids));
  CHECK(same(lowered(lm::TopKExperts<float>{ids, id_weights, E}, E).id_weights, id_weights));
  const auto single = lowered(lm::OneExpert<float>{one, groups, E, rank_offsets}, E);
  CHECK(same(single.ids, {one.data, 4, 1, 1}));
  CHECK(same(single.id_groups, groups));
  CHECK(single.rank_offsets == rank_offsets);
  CHECK(same(lowered(lm::RankValues<float>{values}, 1).values, values));
  CHECK(lowered(lm::RankScale<float>{scale}, 1).rank_scale.data == scale.data);
  CHECK(lowered(lm::RankPrefix<float>{prefix, groups}, 1).prefix.data == prefix.data);
  CHECK(same(lowered(lm::RankPrefix<float>{prefix, groups}, 1).prefix_groups, groups));
  CHECK(same(lowered(lm::RankSubset<float>{subset, groups}, 1).subset, subset));
  CHECK(same(lowered(lm::RankSubset<float>{subset, groups}, 1).subset_groups, groups));
  CHECK(lowered(lm::Multiplier<float>{multiplier, groups}, 1).multiplier.data == multiplier.data);
  CHECK(same(lowered(lm::Multiplier<float>{multiplier, groups}, 1).multiplier_groups, groups));

  SUBCASE("a top-k gate without weights fills one slot less") {
    CHECK(filled(lm::TopKExperts<float>{ids, {}, E}.form(T, R)) == Slots::ids);
  }
}

TEST_CASE("a product has the slots of its factors, whatever their order") {
  const lm::RankPrefix<float> p{prefix, groups};
  const lm::RankScale<float> s{scale};
  const lm::Multiplier<float> m{multiplier, groups};
  const lm::OneExpert<float> o{one, groups, E, rank_offsets};
  const auto expect_all = [](const lm::GateForm<float>& f) {
    CHECK(f.prefix.data == prefix.data);
    CHECK(same(f.prefix_groups, groups));
    CHECK(f.rank_scale.data == scale.data);
    CHECK(f.multiplier.data == multiplier.data);
    CHECK(same(f.multiplier_groups, groups));
    CHECK(same(f.ids, {one.data, 4, 1, 1}));
    CHECK(same(f.id_groups, groups));
    CHECK(f.rank_offsets == rank_offsets);
  };
  expect_all(lowered(lm::GateProduct(p, s, m, o), E));
  expect_all(lowered(lm::GateProduct(o, m, s, p), E));
  expect_all(lowered(lm::GateProduct(m, o, p, s), E));
  expect_all(lowered(lm::GateProduct(lm::GateProduct(m, o), lm::GateProduct(p, s)), E));

  SUBCASE("rank offsets come from the factor that has them") {
    const lm::GroupExperts<float> g{weights, groups};
    CHECK(lowered(lm::GateProduct(o, g), E).rank_offsets == rank_offsets);
    CHECK(lowered(lm::GateProduct(g, o), E).rank_offsets == rank_offsets);
  }
  SUBCASE("factors must agree about the number of experts") {
    const lm::OneExpert<float> other{one, groups, E + 1};
    loramix_test::check_error(lm::ErrorCode::shape, {"GateProduct", "experts", "4", "3"}, [&] {
      lm::GateProduct(lm::GroupExperts<float>{weights, groups}, other).form(T, R);
    });
  }
}

TEST_CASE("a product's facts follow from its factors'") {
  using lm::GateProduct, lm::OneExpert, lm::RankPrefix, lm::RankScale, lm::TopKExperts, lm::TokenExperts;
  static_assert(GateProduct<RankScale<>>::facts.token_invariant);
  static_assert(!GateProduct<RankScale<>, lm::Multiplier<>>::facts.token_invariant);
  static_assert(GateProduct<TokenExperts<>, RankScale<>>::facts.sparsity == Sparsity::dense);
  static_assert(GateProduct<TopKExperts<>, RankScale<>>::facts.sparsity == Sparsity::k_blocks);
  static_assert(GateProduct<RankScale<>, TopKExperts<>>::facts.sparsity == Sparsity::k_blocks);
  static_assert(GateProduct<RankPrefix<>, TopKExperts<>>::facts.sparsity == Sparsity::segments);
  static_assert(GateProduct<TopKExperts<>, RankPrefix<>>::facts.sparsity == Sparsity::segments);
  static_assert(GateProduct<RankPrefix<>, RankScale<>>::facts.slots == (Slots::prefix | Slots::rank_scale));
  static_assert(lm::detail::slots_are_distinct(Slots::ids | Slots::id_weights, Slots::weights, Slots::prefix));
  static_assert(!lm::detail::slots_are_distinct(unsigned{Slots::ids}, Slots::ids | Slots::id_weights));
  static_assert(
      !lm::detail::slots_are_distinct(unsigned{Slots::weights}, unsigned{Slots::prefix}, unsigned{Slots::weights}));
  static_assert(lm::Gate<lm::SoftmaxGate<>> && lm::ComputedGate<lm::SoftmaxGate<>> &&
                !lm::GivenGate<lm::SoftmaxGate<>>);
  static_assert(lm::GivenGate<GateProduct<RankPrefix<>, RankScale<>>> && !lm::ComputedGate<lm::OpenGate<>>);
  static_assert(!lm::Gate<int>);
}
