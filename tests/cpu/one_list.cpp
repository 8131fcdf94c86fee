// Tokens that are in one list each, prefixes and one expert per token: whole tiles of neighbours, and rows that lie apart.
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

/// Both products of x with a prefix of the ranks for each token, forward and backward, computed prefix by prefix.
template <class T>
struct Prefixes {
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
    for (const Index t : order) counts.push_back(prefix[static_cast<std::size_t>(t)]);
    const lm::GateForm<Acc> form = lm::RankPrefix<Acc>{{counts.data(), tokens}}.form(tokens, ranks);
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
};

template <class T>
Prefixes<T> draw_prefixes(Index tokens, Index d_in, Index d_out, Index ranks) {
  Random random(seed(60));
  Prefixes<T> p{draw_inputs<T>(random, tokens, d_in, d_out, ranks), {}};
  for (Index t = 0; t < tokens; ++t) p.prefix.push_back(static_cast<std::int32_t>(draw_below(random, ranks + 1)));
  std::sort(p.prefix.begin(), p.prefix.end());  // in the order of the tokens they are neighbours
  return p;
}

}  // namespace

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
    int n = 0;
    for (const GateSpec& gate : gates) {
      for (const ProductShape& shape : shapes) {
        const ProductCase c{gate, shape, n % 2 == 1, n % 4 < 2 ? lm::Into::add : lm::Into::set, n % 3, 0};
        ++n;
        INFO(describe(c));
        ProductTest<P, CpuHarness<>>(harness, c, random).run_all();
        CHECK(harness.release());
      }
    }
  }
}

TEST_CASE_TEMPLATE("neighbours give each token what it gives among others", T, float, lm::bfloat16) {
  for (const Index tokens : {4, 60, 300}) {
    const Prefixes<T> p = draw_prefixes<T>(tokens, 261, 203, 69);
    std::vector<Index> sorted(static_cast<std::size_t>(tokens));
    std::iota(sorted.begin(), sorted.end(), Index{0});
    std::vector<Index> mixed = sorted;
    Random random(seed(62));
    std::shuffle(mixed.begin(), mixed.end(), random);
    const Outputs<T> a = p.run(lm::SerialExecutor{}, sorted), b = p.run(lm::SerialExecutor{}, mixed);
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
      CHECK(same_bits(a, p.run(pool.executor(), sorted)));
      CHECK(same_bits(b, p.run(pool.executor(), mixed)));
    }
  }
}
