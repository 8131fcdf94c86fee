// The laws of DESIGN.md section 1, on the composed CPU path in double.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "cpu/on_host.hpp"
#include "support/seed.hpp"

using namespace loramix_test;

namespace {

constexpr Index tokens = 70, d_in = 29, d_out = 23, experts = 4, rank = 3, ranks = experts * rank;
const lm::cpu::Backend<> be;

template <class M, class N>
bool equal(const M& a, const N& b) {
  if (a.rows() != b.rows() || a.cols() != b.cols()) return false;
  for (Index i = 0; i < a.rows(); ++i) {
    for (Index j = 0; j < a.cols(); ++j) {
      if (!(a(i, j) == b(i, j))) return false;
    }
  }
  return largest(a) > 0;
}

template <class M>
bool all_zero(const M& m) {
  return largest(m) == 0;
}

lm::OpenGate<double> open_gate() { return {}; }

Inputs<double> inputs(Random& random) { return draw_inputs<double>(random, tokens, d_in, d_out, ranks); }

lm::Matrix<double> product_of(const lm::Matrix<double>& a, const auto& b_transposed) {
  lm::Matrix<double> out(a.rows(), b_transposed.rows());
  for (Index i = 0; i < out.rows(); ++i) {
    for (Index j = 0; j < out.cols(); ++j) {
      for (Index k = 0; k < a.cols(); ++k) out(i, j) += a(i, k) * b_transposed(j, k);
    }
  }
  return out;
}

/// s B diag(g) A [d_out, d_in].
lm::Matrix<double> delta_weight(const Inputs<double>& in, const std::vector<double>& g) {
  lm::Matrix<double> w(in.B.rows(), in.A.cols());
  for (Index o = 0; o < w.rows(); ++o) {
    for (Index c = 0; c < w.cols(); ++c) {
      for (Index j = 0; j < in.A.rows(); ++j) {
        w(o, c) += in.scale * in.B(o, j) * g[static_cast<std::size_t>(j)] * in.A(j, c);
      }
    }
  }
  return w;
}

}  // namespace

TEST_CASE("an open gate is LoRA") {
  Random random(seed(10));
  const Inputs<double> in = inputs(random);
  const Outputs<double> out = product(be, in, open_gate().form(tokens, ranks));
  const lm::Matrix<double> u = product_of(in.x, in.A);
  lm::Matrix<double> y = product_of(u, in.B);
  for (Index i = 0; i < tokens * d_out; ++i) y.data()[i] *= in.scale;
  CHECK(close(out.u, u));
  CHECK(close(out.y, y));

  SUBCASE("and so is a gate of ones") {
    lm::Matrix<double> ones(tokens, experts);
    std::fill_n(ones.data(), tokens * experts, 1.0);
    const Outputs<double> gated = product(be, in, lm::TokenExperts<double>{ones}.form(tokens, ranks));
    CHECK(same_bits(gated.y, out.y));
    CHECK(same_bits(gated.dB, out.dB));
    CHECK(same_bits(gated.dA, out.dA));
    CHECK(same_bits(gated.dx, out.dx));
  }
}

TEST_CASE("one expert is a one-hot row of weights") {
  Random random(seed(11));
  const Inputs<double> in = inputs(random);
  std::vector<std::int32_t> ids(tokens);
  lm::Matrix<double> one_hot(tokens, experts);
  for (Index t = 0; t < tokens; ++t) {
    ids[static_cast<std::size_t>(t)] = static_cast<std::int32_t>(draw_below(random, experts + 1) - 1);
    if (ids[static_cast<std::size_t>(t)] >= 0) one_hot(t, ids[static_cast<std::size_t>(t)]) = 1;
  }
  const Outputs<double> one =
      product(be, in, lm::OneExpert<double>{{ids.data(), tokens}, {}, experts}.form(tokens, ranks));
  const Outputs<double> hot = product(be, in, lm::TokenExperts<double>{one_hot}.form(tokens, ranks));
  CHECK(equal(one.y, hot.y));
  CHECK(equal(one.dA, hot.dA));
  CHECK(equal(one.dB, hot.dB));
  CHECK(equal(one.dx, hot.dx));
}

TEST_CASE("a prefix is a truncation of A and B") {
  Random random(seed(12));
  const Inputs<double> in = inputs(random);
  for (const Index kept : {Index{1}, Index{5}, ranks}) {
    const std::vector<std::int32_t> counts{static_cast<std::int32_t>(kept)};
    const std::vector<std::int32_t> group(tokens, 0);
    const auto gate = lm::RankPrefix<double>{{counts.data(), 1}, lm::Groups<>::by_id(group.data(), 1)};
    const Outputs<double> prefix = product(be, in, gate.form(tokens, ranks));
    Inputs<double> cut = in;
    cut.A = lm::Matrix<double>(kept, d_in);
    cut.B = RankMajor<double>(d_out, kept);
    for (Index j = 0; j < kept; ++j) {
      for (Index c = 0; c < d_in; ++c) cut.A(j, c) = in.A(j, c);
      for (Index o = 0; o < d_out; ++o) cut.B(o, j) = in.B(o, j);
    }
    const Outputs<double> truncated = product(be, cut, open_gate().form(tokens, kept));
    CHECK(close(prefix.y, truncated.y));
    CHECK(close(prefix.dx, truncated.dx));
    for (Index j = kept; j < ranks; ++j) {
      for (Index c = 0; c < d_in; ++c) CHECK(prefix.dA(j, c) == 0);
      for (Index o = 0; o < d_out; ++o) CHECK(prefix.dB(o, j) == 0);
    }
  }
}

TEST_CASE("a shared A is A repeated") {
  Random random(seed(13));
  Inputs<double> shared = draw_inputs<double>(random, tokens, d_in, d_out, ranks, rank);
  const lm::Matrix<double> weights = drawn<lm::Matrix<double>>(random, tokens, experts);
  Inputs<double> repeated = shared;
  repeated.A = lm::Matrix<double>(ranks, d_in);
  for (Index j = 0; j < ranks; ++j) {
    for (Index c = 0; c < d_in; ++c) repeated.A(j, c) = shared.A(j % rank, c);
  }
  const auto form = lm::TokenExperts<double>{weights}.form(tokens, ranks);
  const Outputs<double> one = product(be, shared, form), many = product(be, repeated, form);
  CHECK(close(one.y, many.y));
  CHECK(close(one.dx, many.dx));
  CHECK(close(one.dB, many.dB));
  CHECK(close(one.dweights, many.dweights));
  lm::Matrix<double> summed(rank, d_in);
  for (Index j = 0; j < ranks; ++j) {
    for (Index c = 0; c < d_in; ++c) summed(j % rank, c) += many.dA(j, c);
  }
  CHECK(close(one.dA, summed));
}

TEST_CASE("permuting the experts changes nothing") {
  Random random(seed(14));
  const Inputs<double> in = inputs(random);
  const lm::Matrix<double> weights = drawn<lm::Matrix<double>>(random, tokens, experts);
  const std::vector<Index> order{2, 0, 3, 1};  // expert e of the permuted adapter was order[e]
  Inputs<double> permuted = in;
  lm::Matrix<double> permuted_weights(tokens, experts);
  for (Index e = 0; e < experts; ++e) {
    const Index was = order[static_cast<std::size_t>(e)];
    for (Index t = 0; t < tokens; ++t) permuted_weights(t, e) = weights(t, was);
    for (Index i = 0; i < rank; ++i) {
      for (Index c = 0; c < d_in; ++c) permuted.A(e * rank + i, c) = in.A(was * rank + i, c);
      for (Index o = 0; o < d_out; ++o) permuted.B(o, e * rank + i) = in.B(o, was * rank + i);
    }
  }
  const Outputs<double> a = product(be, in, lm::TokenExperts<double>{weights}.form(tokens, ranks));
  const Outputs<double> b = product(be, permuted, lm::TokenExperts<double>{permuted_weights}.form(tokens, ranks));
  CHECK(close(a.y, b.y));
  CHECK(close(a.dx, b.dx));
  lm::Matrix<double> back(ranks, d_in);
  for (Index j = 0; j < ranks; ++j) {
    for (Index c = 0; c < d_in; ++c) back(order[static_cast<std::size_t>(j / rank)] * rank + j % rank, c) = b.dA(j, c);
  }
  CHECK(close(a.dA, back));
}

TEST_CASE("gates without tokens fold into the weight: merged is unmerged") {
  static_assert(lm::OpenGate<>::facts.token_invariant && lm::RankScale<>::facts.token_invariant);
  static_assert(lm::GateProduct<lm::OpenGate<>, lm::RankScale<>>::facts.token_invariant);
  static_assert(!lm::TokenExperts<>::facts.token_invariant && !lm::RankPrefix<>::facts.token_invariant);
  static_assert(!lm::GateProduct<lm::RankScale<>, lm::RankPrefix<>>::facts.token_invariant);
  Random random(seed(15));
  const Inputs<double> in = inputs(random);
  lm::Matrix<double> base = drawn<lm::Matrix<double>>(random, d_out, d_in);
  std::vector<double> scale(static_cast<std::size_t>(ranks));
  for (double& v : scale) v = draw(random);
  for (const bool scaled : {false, true}) {
    const std::vector<double> g = scaled ? scale : std::vector<double>(scale.size(), 1.0);
    const auto form =
        scaled ? lm::RankScale<double>{{scale.data(), ranks}}.form(tokens, ranks) : open_gate().form(tokens, ranks);
    const lm::Matrix<double> folded = delta_weight(in, g);
    const Outputs<double> out = product(be, in, form);
    CHECK(close(out.y, product_of(in.x, folded)));
    lm::Matrix<double> merged = base, unmerged = product_of(in.x, base);
    for (Index i = 0; i < d_out * d_in; ++i) merged.data()[i] += folded.data()[i];
    for (Index i = 0; i < tokens * d_out; ++i) unmerged.data()[i] += out.y.data()[i];
    CHECK(close(product_of(in.x, merged), unmerged));
  }
}

TEST_CASE("B = 0: nothing is added, A has no gradient, B has one") {
  Random random(seed(16));
  Inputs<double> in = inputs(random);
  in.B = RankMajor<double>(d_out, ranks);
  const lm::Matrix<double> weights = drawn<lm::Matrix<double>>(random, tokens, experts);
  const Outputs<double> out = product(be, in, lm::TokenExperts<double>{weights}.form(tokens, ranks));
  CHECK(all_zero(out.y));
  CHECK(all_zero(out.dA));
  CHECK(all_zero(out.dx));
  CHECK(all_zero(out.dweights));
  CHECK(largest(out.dB) > 0.1);

  lm::Matrix<double> y = drawn<lm::Matrix<double>>(random, tokens, d_out);
  const lm::Matrix<double> before = y;
  run_on_host(be, lm::Expand<double, double, double, double, lm::Space::host, lm::Major::column>{
                      out.u, open_gate().form(tokens, ranks), in.B, 1.25, y, lm::Into::add});
  CHECK(same_bits(y, before));
}

TEST_CASE("top-E is dense") {
  Random random(seed(17));
  const Inputs<double> in = inputs(random);
  const lm::Matrix<double> weights = drawn<lm::Matrix<double>>(random, tokens, experts);
  lm::Matrix<std::int32_t> ids(tokens, experts);
  lm::Matrix<double> chosen(tokens, experts);
  for (Index t = 0; t < tokens; ++t) {
    std::vector<std::int32_t> order(static_cast<std::size_t>(experts));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);
    for (Index k = 0; k < experts; ++k) {
      ids(t, k) = order[static_cast<std::size_t>(k)];
      chosen(t, k) = weights(t, ids(t, k));
    }
  }
  const Outputs<double> dense = product(be, in, lm::TokenExperts<double>{weights}.form(tokens, ranks));
  const Outputs<double> top = product(be, in, lm::TopKExperts<double>{ids, chosen, experts}.form(tokens, ranks));
  CHECK(same_bits(dense.y, top.y));
  CHECK(same_bits(dense.dA, top.dA));
  CHECK(same_bits(dense.dB, top.dB));
  CHECK(same_bits(dense.dx, top.dx));
  lm::Matrix<double> dweights(tokens, experts);
  for (Index t = 0; t < tokens; ++t) {
    for (Index k = 0; k < experts; ++k) dweights(t, ids(t, k)) = top.did_weights(t, k);
  }
  CHECK(same_bits(dense.dweights, dweights));
}

TEST_CASE("groups by segment, by id and token by token are one gate") {
  Random random(seed(18));
  const Inputs<double> in = inputs(random);
  const std::vector<lm::Index> offsets{0, 0, 30, 30, 64, tokens};
  const Index groups = 5;
  const lm::Matrix<double> weights = drawn<lm::Matrix<double>>(random, groups, experts);
  std::vector<std::int32_t> ids;
  lm::Matrix<double> by_token(tokens, experts);
  for (Index t = 0; t < tokens; ++t) {
    ids.push_back(t < 30 ? 1 : t < 64 ? 3 : 4);
    for (Index e = 0; e < experts; ++e) by_token(t, e) = weights(ids.back(), e);
  }
  const auto run = [&](lm::MatrixView<const double> w, lm::Groups<> g) {
    return product(be, in, lm::GroupExperts<double>{w, g}.form(tokens, ranks));
  };
  const Outputs<double> a = run(weights, lm::Groups<>::by_segment(offsets.data(), groups));
  const Outputs<double> b = run(weights, lm::Groups<>::by_id(ids.data(), groups));
  const Outputs<double> c = run(by_token, {});
  for (const auto* other : {&b, &c}) {
    CHECK(same_bits(a.y, other->y));
    CHECK(same_bits(a.dA, other->dA));
    CHECK(same_bits(a.dB, other->dB));
    CHECK(same_bits(a.dx, other->dx));
  }
  CHECK(close(a.dweights, b.dweights));
}
