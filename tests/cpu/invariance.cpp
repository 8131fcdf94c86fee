// A token's result depends on its own row, ids and global id only (MATH.md section 6, ii): within a class of T by default,
// at every T on the composed path and with Order::fixed.
#include <doctest/doctest.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "cpu/on_host.hpp"
#include "support/seed.hpp"

using namespace loramix_test;

namespace {

constexpr Index tokens = 130, d_in = 261, d_out = 67, experts = 5, rank = 3, ranks = experts * rank;
using Backend = lm::cpu::Backend<>;
const Backend by_class;
const Backend always[] = {{{}, {.path = lm::cpu::Path::composed}}, {{}, {.order = lm::cpu::Order::fixed}}};

/// Top-2 of the token × a prefix of its task × its own multiplier.
template <class T>
struct Batch {
  using Score = lm::accumulation_t<T>;
  Inputs<T> in;
  lm::Matrix<std::int32_t> ids;
  lm::Matrix<Score> weights, multiplier;
  std::vector<std::int32_t> task;
  std::vector<std::int32_t> counts{2, 9, 15};

  Outputs<T> run(const Backend& be = by_class) const {
    const Index n = in.x.rows();
    const lm::GateProduct gate(lm::TopKExperts<Score>{ids, weights, experts},
                               lm::RankPrefix<Score>{{counts.data(), 3}, lm::Groups<>::by_id(task.data(), 3)},
                               lm::Multiplier<Score>{{multiplier.data(), n}});
    return product(be, in, gate.form(n, ranks));
  }
  /// The batch of tokens `rows`, in that order.
  Batch select(const std::vector<Index>& rows) const {
    const auto pick = [&](const auto& m) {
      auto out = std::remove_cvref_t<decltype(m)>(static_cast<Index>(rows.size()), m.cols());
      for (Index t = 0; t < out.rows(); ++t) {
        for (Index c = 0; c < m.cols(); ++c) out(t, c) = m(rows[static_cast<std::size_t>(t)], c);
      }
      return out;
    };
    Batch b = *this;
    b.in.x = pick(in.x);
    b.in.dy = pick(in.dy);
    if (in.y.rows() != 0) b.in.y = pick(in.y);
    b.ids = pick(ids);
    b.weights = pick(weights);
    b.multiplier = pick(multiplier);
    b.task.clear();
    for (const Index t : rows) b.task.push_back(task[static_cast<std::size_t>(t)]);
    return b;
  }
};

template <class T>
Batch<T> draw_batch(Random& random) {
  using Score = lm::accumulation_t<T>;
  Batch<T> b;
  b.in = draw_inputs<T>(random, tokens, d_in, d_out, ranks);
  b.ids = lm::Matrix<std::int32_t>(tokens, 2);
  for (Index t = 0; t < tokens; ++t) {
    b.ids(t, 0) = static_cast<std::int32_t>(draw_below(random, experts));
    b.ids(t, 1) = static_cast<std::int32_t>((b.ids(t, 0) + 1 + draw_below(random, experts - 1)) % experts);
    b.task.push_back(static_cast<std::int32_t>(draw_below(random, 3)));
  }
  b.weights = drawn<lm::Matrix<Score>>(random, tokens, 2);
  b.multiplier = drawn<lm::Matrix<Score>>(random, tokens, 1);
  return b;
}

std::vector<Index> iota(Index begin, Index end) {
  std::vector<Index> rows(static_cast<std::size_t>(end - begin));
  std::iota(rows.begin(), rows.end(), begin);
  return rows;
}

/// Row t of a and row s of b.
template <class T>
bool same_row(const Outputs<T>& a, Index t, const Outputs<T>& b, Index s) {
  const auto same = [&](const auto& m, const auto& n) {
    return std::memcmp(&m(t, 0), &n(s, 0), static_cast<std::size_t>(m.cols()) * sizeof(m(0, 0))) == 0;
  };
  return same(a.u, b.u) && same(a.y, b.y) && same(a.du, b.du) && same(a.dx, b.dx);
}

}  // namespace

TEST_CASE_TEMPLATE("the order of the tokens changes no token", T, float, lm::bfloat16) {
  Random random(seed(30));
  const Batch<T> batch = draw_batch<T>(random);
  std::vector<Index> order = iota(0, tokens);
  std::shuffle(order.begin(), order.end(), random);
  const Outputs<T> a = batch.run(), b = batch.select(order).run();
  Index same = 0;
  for (Index t = 0; t < tokens; ++t) same += same_row(b, t, a, order[static_cast<std::size_t>(t)]) ? 1 : 0;
  CHECK(same == tokens);
}

TEST_CASE_TEMPLATE("replacing the other tokens changes no token", T, float, lm::bfloat16) {
  Random random(seed(31));
  const Batch<T> batch = draw_batch<T>(random);
  const Outputs<T> a = batch.run();
  for (const Index t : {Index{0}, Index{63}, Index{64}, Index{77}, tokens - 1}) {
    Batch<T> other = batch;
    const T nan = lm::narrow<T>(std::numeric_limits<float>::quiet_NaN());
    for (Index i = 0; i < tokens; ++i) {
      for (Index c = 0; i != t && c < d_in; ++c) other.in.x(i, c) = i % 2 == 0 ? nan : lm::narrow<T>(draw(random));
      for (Index c = 0; i != t && c < d_out; ++c) other.in.dy(i, c) = i % 3 == 0 ? nan : lm::narrow<T>(draw(random));
      if (i != t) other.task[static_cast<std::size_t>(i)] = -1;
    }
    CHECK(same_row(other.run(), t, a, t));
  }
}

/// Whether the first `count` tokens alone give what they give among the first `among`.
template <class T>
void check_count(const Backend& be, const Batch<T>& batch, Index count, Index among) {
  CAPTURE(count);
  CAPTURE(among);
  const Outputs<T> some = batch.select(iota(0, count)).run(be), all = batch.select(iota(0, among)).run(be);
  Index same = 0;
  for (Index t = 0; t < count; ++t) same += same_row(some, t, all, t) ? 1 : 0;
  CHECK(same == count);
}

TEST_CASE_TEMPLATE("the number of tokens changes no token of its class", T, float, double, lm::bfloat16, lm::half) {
  Random random(seed(32));
  Batch<T> batch = draw_batch<T>(random);
  for (const bool adds : {false, true}) {
    CAPTURE(adds);
    if (adds) batch.in.y = drawn<lm::Matrix<T>>(random, tokens, d_out);
    for (const Index count : {1, 2, 3}) check_count(by_class, batch, count, 4);
    for (const Index count : {5, 16, 63}) check_count(by_class, batch, count, 64);
    for (const Index count : {65, 67, 129}) check_count(by_class, batch, count, tokens);
  }
}

TEST_CASE_TEMPLATE("the number of tokens changes no token where one order is asked for", T, float, double,
                   lm::bfloat16) {
  Random random(seed(32));
  const Batch<T> batch = draw_batch<T>(random);
  for (const Backend& be : always) {
    for (const Index count : {1, 2, 4, 5, 16, 63, 64, 65, 129}) check_count(be, batch, count, tokens);
  }
}

TEST_CASE_TEMPLATE("micro-batches that give their first token drop what the batch drops", T, float, lm::bfloat16) {
  Random random(seed(33));
  Batch<T> batch = draw_batch<T>(random);
  const auto dropout = [](std::uint64_t first) {
    return lm::make_dropout("test", 0.5, {.seed = 5, .site = lm::site("here"), .step = 9, .first_token = first});
  };
  const std::uint64_t base = (std::uint64_t{1} << 32) - 50;  // token ids cross 32 bits
  batch.in.dropout = dropout(base);
  const Backend& be = always[1];  // the parts are of several classes
  const Outputs<T> all = batch.run(be);
  const std::vector<Index> cuts{0, 1, 40, 64, 129, tokens};
  for (std::size_t i = 0; i + 1 < cuts.size(); ++i) {
    Batch<T> part = batch.select(iota(cuts[i], cuts[i + 1]));
    part.in.dropout = dropout(base + static_cast<std::uint64_t>(cuts[i]));
    const Outputs<T> some = part.run(be);
    for (Index t = cuts[i]; t < cuts[i + 1]; ++t) CHECK(same_row(some, t - cuts[i], all, t));
  }
  batch.in.dropout = dropout(base + 1);
  CHECK(!same_row(batch.run(be), 3, all, 3));
}
