// Contractions whose ranks end inside a packet: those behind the last whole one are dot products, in whichever job they fall.
#include <doctest/doctest.h>

#include <loramix/ops/shrink.hpp>

#include "cpu/sums.hpp"
#include "support/seed.hpp"

using namespace loramix_test;

TEST_CASE("ranks and side rows that end inside a packet") {
  using Op = lm::Shrink<float, float, float, float, host>;
  Random random(seed(75));
  constexpr Index d = 1301;  // two sweeps of 97 ranks and more, and a part of a packet
  // 97 ranks on three lanes, 65 on two: a job of one rank, where packets are of 16.
  for (const Index ranks : {9, 17, 20, 24, 65, 97}) {
    for (const Index rows : {0, 3, 8}) {
      for (const Index tokens : {65, 74}) {
        CAPTURE(ranks);
        CAPTURE(rows);
        CAPTURE(tokens);
        Guarded<float> A(random, ranks, d), side(random, rows, d), x(random, tokens, d);
        const Guarded<float> old(random, tokens, ranks + rows);
        const auto all = on_lanes(old, [&](const auto& be, lm::MatrixView<float> out) {
          Op op{A.view(), side.view(), x.view(), {}, out.col_range(0, ranks), {}, {}};
          if (rows != 0) op.h = out.col_range(ranks, rows);
          run_on_host(be, op);
        });
        check_sums(all, old, lm::Into::set, d, [&](Index t, Index r, const auto& term) {
          for (Index k = 0; k < d; ++k) term(x.at(t, k) * (r < ranks ? A.at(r, k) : side.at(r - ranks, k)));
        });
      }
    }
  }
}
