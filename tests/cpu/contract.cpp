// Contractions whose ranks end inside a packet: those behind the last whole one are dot products, in whichever job they fall; and
// how contractions are cut into jobs.
#include <doctest/doctest.h>

#include <algorithm>
#include <vector>

#include <loramix/ops/shrink.hpp>

#include "cpu/sums.hpp"
#include "support/seed.hpp"

using namespace loramix_test;

TEST_CASE("U does not depend on side rows: activations that are computed again without them are the same") {
  using Op = lm::Shrink<float, float, float, float, host>;
  Random random(seed(76));
  constexpr Index d = 301, tokens = 70;
  const lm::cpu::Backend<> be{};
  for (const Index ranks : {3, 5, 6, 9, 10, 12, 13, 18, 24, 40, 56}) {
    for (const Index rows : {3, 8}) {
      CAPTURE(ranks);
      CAPTURE(rows);
      Guarded<float> A(random, ranks, d), side(random, rows, d), x(random, tokens, d);
      lm::Matrix<float> u(tokens, ranks), alone(tokens, ranks), h(tokens, rows);
      run_on_host(be, Op{A.view(), side.view(), x.view(), {}, u, h, {}});
      run_on_host(be, Op{A.view(), {}, x.view(), {}, alone, {}, {}});
      CHECK(std::equal(u.data(), u.data() + tokens * ranks, alone.data()));
    }
  }
}

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

TEST_CASE("few tokens, and side rows, which see no dropout") {
  using Op = lm::Shrink<float, float, float, float, host>;
  struct Shape {
    Index tokens, ranks, rows, d;
  };
  // Jobs of 1 to 64 tokens, whose weights lie or are copied as lanes have it; and fewer ranks whose sweep is the longer one.
  const std::vector<Shape> shapes{{1, 8, 0, 301},    {3, 20, 3, 301},   {4, 40, 0, 301},
                                  {5, 8, 3, 301},    {10, 20, 0, 301},  {23, 33, 8, 301},
                                  {64, 40, 3, 1301}, {72, 224, 8, 600}, {72, 64, 8, 2100}};
  Random random(seed(76));
  for (const Shape& s : shapes) {
    for (const double p : {0., 0.5}) {
      CAPTURE(s.tokens);
      CAPTURE(s.ranks);
      CAPTURE(p);
      Guarded<float> A(random, s.ranks, s.d), side(random, s.rows, s.d), x(random, s.tokens, s.d);
      const Guarded<float> old(random, s.tokens, s.ranks + s.rows);
      const lm::Dropout dropout = lm::make_dropout("test", p, {.seed = 7, .site = 1, .step = 2});
      const auto all = on_lanes(old, [&](const auto& be, lm::MatrixView<float> out) {
        Op op{A.view(), side.view(), x.view(), dropout, out.col_range(0, s.ranks), {}, {}};
        if (s.rows != 0) op.h = out.col_range(s.ranks, s.rows);
        run_on_host(be, op);
      });
      check_sums(all, old, lm::Into::set, s.d, [&](Index t, Index r, const auto& term) {
        for (Index k = 0; k < s.d; ++k) {
          if (r >= s.ranks)
            term(x.at(t, k) * side.at(r - s.ranks, k));
          else if (!dropout.on() || dropout.keep(t, k))
            term(x.at(t, k) * A.at(r, k) * dropout.kept_scale());
        }
      });
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
