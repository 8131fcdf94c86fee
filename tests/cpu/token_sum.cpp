// Sums over tokens whose ranks are rows of two gradients, in one pass: every way in which tiles of ranks meet their border.
#include <doctest/doctest.h>

#include <loramix/ops/shrink.hpp>

#include "cpu/sums.hpp"
#include "support/seed.hpp"

using namespace loramix_test;

TEST_CASE_TEMPLATE("dA and the gradient of side rows", T, float, lm::bfloat16) {
  Random random(seed(71));
  using Op = lm::ShrinkBackward<T, T, float, float, float, host>;
  constexpr Index d = 2 * 48 + 5;  // whole panels at every width, and a part
  for (const Index ranks : {5, 8, 13, 15, 35, 150}) {
    for (const Index rows : {0, 1, 8, 20, 170}) {
      for (const Index tokens : {0, 3, 16, 70}) {
        for (const lm::Into into : {lm::Into::set, lm::Into::add}) {
          CAPTURE(ranks);
          CAPTURE(rows);
          CAPTURE(tokens);
          Guarded<T> A(random, ranks, d), side(random, rows, d), x(random, tokens, d);
          Guarded<float> du(random, tokens, ranks), dh(random, tokens, rows);
          // dside, dA, and rows that are nobody's: what leaves the one does not fall into the other by chance.
          const Index behind = rows + ranks;
          const Guarded<float> old(random, behind + 8, d);
          const auto all = on_lanes(old, [&](const auto& be, lm::MatrixView<float> out) {
            Op op{A.view(), side.view(), x.view(), {}, du.view(), dh.view(), out.row_range(rows, ranks)};
            if (rows != 0) op.dside = out.row_range(0, rows);
            op.parameters = into;
            run_on_host(be, op);
          });
          check_sums(all, old, into, tokens, behind, [&](Index i, Index j, const auto& term) {
            for (Index t = 0; t < tokens; ++t) term((i < rows ? dh.at(t, i) : du.at(t, i - rows)) * x.at(t, j));
          });
        }
      }
    }
  }
}
