// Sums over tokens whose ranks are rows of two gradients, in one pass: every way in which tiles of ranks meet their border;
// and the same under dropout.
#include <doctest/doctest.h>

#include <vector>

#include <loramix/gate/gates.hpp>
#include <loramix/ops/shrink.hpp>

#include "cpu/sums.hpp"
#include "support/seed.hpp"

using namespace loramix_test;

template <class T>
void check_gradients(Random& random, Index ranks, Index rows, Index tokens, Index d, lm::Into into, bool dropped) {
  using Op = lm::ShrinkBackward<T, T, float, float, float, host>;
  CAPTURE(ranks);
  CAPTURE(rows);
  CAPTURE(tokens);
  CAPTURE(dropped);
  Guarded<T> A(random, ranks, d), side(random, rows, d), x(random, tokens, d);
  Guarded<float> du(random, tokens, ranks), dh(random, tokens, rows);
  // dside, dA, and rows that are nobody's: what leaves the one does not fall into the other by chance.
  const Index behind = rows + ranks;
  const Guarded<float> old(random, behind + 8, d);
  lm::Dropout dropout;
  if (dropped) dropout = lm::make_dropout("test", 0.5, {.seed = 3, .first_token = 9});
  const auto all = on_lanes(old, [&](const auto& be, lm::MatrixView<float> out) {
    Op op{A.view(), side.view(), x.view(), dropout, du.view(), dh.view(), out.row_range(rows, ranks)};
    if (rows != 0) op.dside = out.row_range(0, rows);
    op.parameters = into;
    run_on_host(be, op);
  });
  check_sums(all, old, into, tokens, behind, [&](Index i, Index j, const auto& term) {
    for (Index t = 0; t < tokens; ++t) {
      const double kept = dropped && i >= rows ? (dropout.keep(t, j) ? 2 : 0) : 1;
      term((i < rows ? dh.at(t, i) : du.at(t, i - rows)) * kept * x.at(t, j));
    }
  });
}

TEST_CASE_TEMPLATE("dA and the gradient of side rows", T, float, lm::bfloat16) {
  Random random(seed(71));
  constexpr Index d = 2 * 48 + 5;  // whole panels at every width, and a part
  for (const Index ranks : {5, 8, 13, 15, 35, 150}) {
    for (const Index rows : {0, 1, 8, 20, 170}) {
      for (const Index tokens : {0, 3, 16, 70}) {
        for (const lm::Into into : {lm::Into::set, lm::Into::add}) {
          for (const bool dropped : {false, true}) check_gradients<T>(random, ranks, rows, tokens, d, into, dropped);
        }
      }
    }
  }
}

TEST_CASE("dA of few ranks over long rows") {
  constexpr Index d = 32730;  // two sweeps of 8 ranks, each as long as they get
  Random random(seed(73));
  for (const Index ranks : {3, 8, 32}) {
    for (const bool dropped : {false, true}) check_gradients<float>(random, ranks, 0, 30, d, lm::Into::add, dropped);
  }
}

TEST_CASE("ranks that no prefix reaches") {
  Random random(seed(72));
  using Op = lm::ShrinkBackward<float, float, float, float, float, host>;
  constexpr Index d = 2 * 48 + 5, ranks = 69, tokens = 130;
  for (const std::int32_t longest : {1, 5, 16, 20, 69}) {
    for (const lm::Into into : {lm::Into::set, lm::Into::add}) {
      CAPTURE(longest);
      Guarded<float> A(random, ranks, d), side(random, 0, d), x(random, tokens, d);
      Guarded<float> du(random, tokens, ranks), dh(random, tokens, 0);
      std::vector<std::int32_t> prefix;
      for (Index t = 0; t < tokens; ++t) {
        prefix.push_back(t % 3 == 0 ? longest : longest / 2);
        for (Index i = prefix.back(); i < ranks; ++i) du.all(t, i) = 0;  // as expand's backward leaves it
      }
      const lm::GateForm<float> open =
          lm::RankPrefix<float>{lm::VectorView<const std::int32_t>{prefix.data(), tokens}}.form(tokens, ranks);
      const Guarded<float> old(random, ranks, d);
      const auto all = on_lanes(old, [&](const auto& be, lm::MatrixView<float> out) {
        Op op{A.view(), side.view(), x.view(), {}, du.view(), dh.view(), out};
        op.parameters = into;
        op.select = open;
        run_on_host(be, op);
      });
      check_sums(all, old, into, tokens, [&](Index i, Index j, const auto& term) {
        for (Index t = 0; t < tokens; ++t) term(du.at(t, i) * x.at(t, j));
      });
    }
  }
}
