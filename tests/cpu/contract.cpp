// Contractions whose ranks end inside a packet: those behind the last whole one are dot products, in whichever job they fall; and
// how contractions are cut into jobs.
#include <doctest/doctest.h>

#include <algorithm>
#include <vector>

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

TEST_CASE("contractions are cut into jobs that cover them, and no lane has much more than its share") {
  using Contraction = lm::cpu::detail::PanelContraction<float, float, lm::Major::row>;
  for (const Index lanes : {1, 2, 4}) {
    for (const Index tokens : {256, 512, 513, 1024, 4000}) {
      for (const Index ranks : {9, 24, 64, 72, 96, 104, 136, 200, 256, 264, 512}) {
        CAPTURE(lanes);
        CAPTURE(tokens);
        CAPTURE(ranks);
        const Contraction::Jobs jobs(tokens, ranks, lanes);
        std::vector<Index> of_lane(static_cast<std::size_t>(lanes));
        Index all = 0;
        for (Index job = 0; job < jobs.count(); ++job) {  // each by the lane that is free first
          const Index begin = job % jobs.rank_jobs * jobs.ranks, of_job = std::min(jobs.ranks, ranks - begin);
          CHECK(of_job > 0);
          const Index work = of_job * jobs.tokens.count(job / jobs.rank_jobs);
          *std::min_element(of_lane.begin(), of_lane.end()) += work;
          all += work;
        }
        CHECK(all == tokens * ranks);
        const Index share = all / lanes, packets = tokens / lanes * lm::cpu::detail::width;
        CHECK(*std::max_element(of_lane.begin(), of_lane.end()) <= share + share / 8 + packets);
      }
    }
  }
}
