// Tokens that are in one list each, prefixes, one expert per token, pairs of experts: whole tiles of neighbours, and rows that
// lie apart.
#include <doctest/doctest.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include <loramix/core/thread_pool.hpp>

#include "conformance/product.hpp"
#include "cpu/on_host.hpp"
#include "support/seed.hpp"

using namespace loramix_test;

namespace {

constexpr lm::cpu::Tuning grouped{.grouping = lm::cpu::Grouping::grouped};

/// Both products of x with a prefix of the ranks for each token, or with two experts, forward and backward, list by list.
template <class T>
struct Lists {
  using Acc = lm::accumulation_t<T>;
  static constexpr lm::Space host = lm::Space::host;

  template <class E>
  Outputs<T> run(const E& executor, const std::vector<Index>& order) const {
    const lm::cpu::Backend<E> be{executor, grouped};
    const Index tokens = static_cast<Index>(order.size()), ranks = in.A.rows();
    const auto picked = [&](const lm::Matrix<T>& m) {
      lm::Matrix<T> out(tokens, m.cols());
      for (Index t = 0; t < tokens; ++t) {
        for (Index c = 0; c < m.cols(); ++c) out(t, c) = m(order[static_cast<std::size_t>(t)], c);
      }
      return out;
    };
    const lm::Matrix<T> x = picked(in.x), dy = picked(in.dy);
    std::vector<std::int32_t> counts;
    lm::Matrix<std::int32_t> ids(tokens, experts.cols());
    lm::Matrix<Acc> weights(tokens, experts.cols());
    for (Index i = 0; i < tokens; ++i) {
      const Index t = order[static_cast<std::size_t>(i)];
      counts.push_back(prefix[static_cast<std::size_t>(t)]);
      for (Index k = 0; k < ids.cols(); ++k) {
        ids(i, k) = experts(t, k);
        weights(i, k) = Acc(1 + t % 7) / Acc(2 + k);
      }
    }
    const lm::GateForm<Acc> form = experts.cols() == 0
                                       ? lm::RankPrefix<Acc>{{counts.data(), tokens}}.form(tokens, ranks)
                                       : lm::TopKExperts<Acc>{ids, weights, number_of_experts}.form(tokens, ranks);
    Outputs<T> out;
    out.u = out.du = lm::Matrix<Acc>(tokens, ranks);
    out.y = lm::Matrix<T>(tokens, in.B.rows());
    out.dx = lm::Matrix<T>(tokens, x.cols());
    out.dA = lm::Matrix<Acc>(ranks, x.cols());
    out.dB = RankMajor<Acc>(in.B.rows(), ranks);
    run_on_host(be, lm::Shrink<T, T, Acc, Acc, host>{in.A, {}, x, {}, out.u, {}, form});
    run_on_host(be,
                lm::Expand<Acc, T, T, Acc, host, lm::Major::column>{out.u, form, in.B, Acc(2), out.y, lm::Into::set});
    run_on_host(be, lm::ExpandBackward<Acc, T, T, Acc, Acc, host, lm::Major::column>{
                        out.u, form, in.B, Acc(2), dy, out.du, out.dB, {}, lm::Into::set});
    run_on_host(be, lm::ShrinkBackward<T, T, Acc, Acc, Acc, host>{
                        in.A, {}, x, {}, out.du, {}, out.dA, {}, out.dx, lm::Into::set, lm::Into::set, form});
    return out;
  }

  Inputs<T> in;
  std::vector<std::int32_t> prefix;
  lm::Matrix<std::int32_t> experts{};  // [T, 2], −1 for none; or empty: prefixes
  Index number_of_experts = 0;
};

template <class T>
Lists<T> draw_prefixes(Index tokens, Index d_in, Index d_out, Index ranks) {
  Random random(seed(60));
  Lists<T> p{draw_inputs<T>(random, tokens, d_in, d_out, ranks), {}};
  for (Index t = 0; t < tokens; ++t) p.prefix.push_back(static_cast<std::int32_t>(draw_below(random, ranks + 1)));
  std::sort(p.prefix.begin(), p.prefix.end());  // in the order of the tokens they are neighbours
  return p;
}

template <class T>
Lists<T> draw_pairs(Index tokens, Index d_in, Index d_out, Index experts, Index rank) {
  Random random(seed(63));
  Lists<T> p{draw_inputs<T>(random, tokens, d_in, d_out, experts * rank), std::vector<std::int32_t>(tokens),
             lm::Matrix<std::int32_t>(tokens, 2), experts};
  for (Index t = 0; t < tokens; ++t) {
    const Index a = draw_below(random, experts + 1), b = draw_below(random, experts + 1);  // the last is none
    p.experts(t, 0) = static_cast<std::int32_t>(a == experts ? -1 : a);
    p.experts(t, 1) = static_cast<std::int32_t>(b == experts || b == a ? -1 : b);
  }
  return p;
}

/// The tokens of `order` give bit by bit what they give in their own order, and whatever the number of threads.
template <class T>
void check_neighbours(const Lists<T>& lists, Index tokens) {
  std::vector<Index> sorted(static_cast<std::size_t>(tokens));
  std::iota(sorted.begin(), sorted.end(), Index{0});
  std::vector<Index> mixed = sorted;
  Random random(seed(62));
  std::shuffle(mixed.begin(), mixed.end(), random);
  const Outputs<T> a = lists.run(lm::SerialExecutor{}, sorted), b = lists.run(lm::SerialExecutor{}, mixed);
  Index same = 0;
  for (Index t = 0; t < tokens; ++t) {
    const Index s = mixed[static_cast<std::size_t>(t)];
    const auto rows = [&](const auto& m, const auto& n) {
      return std::memcmp(&m(t, 0), &n(s, 0), static_cast<std::size_t>(m.cols()) * sizeof(m(0, 0))) == 0;
    };
    same += rows(b.u, a.u) && rows(b.y, a.y) && rows(b.du, a.du) && rows(b.dx, a.dx) ? 1 : 0;
  }
  CHECK(same == tokens);
  CHECK(largest(a.y) > 0);
  for (const Index lanes : {2, 3}) {
    lm::ThreadPool pool(lanes);
    CHECK(same_bits(a, lists.run(pool.executor(), sorted)));
    CHECK(same_bits(b, lists.run(pool.executor(), mixed)));
  }
}

/// Every gate at every shape, by the conformance suite.
template <class P, class Harness>
void check_products(Harness& harness, const std::vector<GateSpec>& gates, const std::vector<ProductShape>& shapes,
                    Random& random) {
  int n = 0;
  for (const GateSpec& gate : gates) {
    for (const ProductShape& shape : shapes) {
      const ProductCase c{gate, shape, n % 2 == 1, n % 4 < 2 ? lm::Into::add : lm::Into::set, n % 3, 0};
      ++n;
      INFO(describe(c));
      ProductTest<P, Harness>(harness, c, random).run_all();
      CHECK(harness.release());
    }
  }
}

}  // namespace

TEST_CASE_TEMPLATE("tokens of two experts each conform", P, float, lm::bfloat16) {
  const std::vector<GateSpec> gates{
      {.name = "top-2", .ids = By::token, .k = 2, .id_weights = true},
      {.name = "top-2 of a segment", .ids = By::segment, .k = 2, .id_weights = true},
      {.name = "top-2, experts of several ranks", .ids = By::token, .k = 2, .id_weights = true, .mixed_ranks = true}};
  // Ranks for dot products, of one packet, of more; one chunk of pairs and several; and too many experts for pairs.
  const std::vector<ProductShape> shapes{
      {300, 70, 83, 4, 5}, {611, 49, 130, 3, 12}, {1050, 33, 67, 3, 16}, {130, 67, 49, 4, 21}, {90, 33, 35, 13, 3}};
  for (const Index lanes : {1, 3}) {
    lm::ThreadPool pool(lanes);
    CpuHarness<decltype(pool.executor())> harness(pool.executor(),
                                                  {.grouping = lm::cpu::Grouping::grouped, .sweep = 64});
    Random random(seed(64));
    check_products<P>(harness, gates, shapes, random);
  }
}

TEST_CASE_TEMPLATE("tokens of two experts give what they give among others", T, float, lm::bfloat16) {
  for (const Index rank : {5, 12, 20}) {
    for (const Index tokens : {65, 300, 700}) check_neighbours(draw_pairs<T>(tokens, 133, 101, 4, rank), tokens);
  }
}

TEST_CASE_TEMPLATE("tokens of a few of many experts conform", P, float, lm::bfloat16) {
  const std::vector<GateSpec> gates{
      {.name = "top-2", .ids = By::token, .k = 2, .id_weights = true},
      {.name = "top-2, experts of several ranks", .ids = By::token, .k = 2, .id_weights = true, .mixed_ranks = true},
      {.name = "top-2 x softmax, with side rows, to a prefix",
       .ids = By::token,
       .k = 2,
       .weights = By::token,
       .prefix = By::segment,
       .computed = true},
      {.name = "one expert per token", .ids = By::token},
      {.name = "one expert per segment", .ids = By::segment}};
  // One job of a sum over tokens and several; lists that are mostly empty; few tokens; several jobs of few experts.
  const std::vector<ProductShape> shapes{{300, 70, 83, 40, 3}, {130, 67, 130, 35, 17}, {67, 90, 64, 150, 9},
                                         {3, 33, 67, 40, 5},   {220, 33, 65, 6, 130},  {40, 120, 33, 5, 260}};
  // More tokens than a chunk, lists longer than what meets eight ranks at once.
  const ProductShape many{4200, 5, 9, 65, 8};
  for (const Index lanes : {1, 3}) {
    lm::ThreadPool pool(lanes);
    // Sums of one panel, or of two and three, and of whole sweeps.
    CpuHarness<decltype(pool.executor())> harness(
        pool.executor(), lanes == 1 ? lm::cpu::Tuning{.sweep = 64, .weights = 4096} : lm::cpu::Tuning{.sweep = 64});
    Random random(seed(65));
    check_products<P>(harness, gates, shapes, random);
    if (lanes == 3) check_products<P>(harness, {gates.front()}, {many}, random);
  }
}

TEST_CASE_TEMPLATE("tokens of a few of many experts give what they give among others", T, float, lm::bfloat16) {
  for (const Index tokens : {65, 300, 4200}) check_neighbours(draw_pairs<T>(tokens, 73, 101, 40, 3), tokens);
}

TEST_CASE_TEMPLATE("tokens of one list each conform", P, float, lm::bfloat16) {
  const std::vector<GateSpec> gates{
      {.name = "prefix per token", .prefix = By::token},
      {.name = "prefix per segment", .prefix = By::segment},
      {.name = "prefix x softmax, with side rows", .weights = By::token, .prefix = By::token, .computed = true},
      {.name = "one expert per token", .ids = By::token},
      {.name = "one expert per segment", .ids = By::segment}};
  const std::vector<ProductShape> shapes{{300, 70, 83, 3, 23}, {257, 49, 130, 2, 40}, {50, 33, 67, 3, 23}};
  for (const lm::cpu::Tuning& tuning :
       {grouped, lm::cpu::Tuning{.grouping = lm::cpu::Grouping::grouped, .sweep = 64, .weights = 640}}) {
    CpuHarness<> harness({}, tuning);
    Random random(seed(61));
    check_products<P>(harness, gates, shapes, random);
  }
}

TEST_CASE_TEMPLATE("neighbours give each token what it gives among others", T, float, lm::bfloat16) {
  for (const Index tokens : {4, 60, 300}) check_neighbours(draw_prefixes<T>(tokens, 261, 203, 69), tokens);
}
