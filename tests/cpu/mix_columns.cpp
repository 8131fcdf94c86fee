// The rows of a MixLoRA block on packets (cpu/mixlora.hpp) give what the bodies of ops/mixlora.hpp give in double.
#include <doctest/doctest.h>

#include <cmath>
#include <random>
#include <vector>

#include <loramix/cpu/cpu.hpp>

#include "support/seed.hpp"

namespace loramix_test {
namespace {

namespace lm = loramix;
using lm::Index;

// What a float computation of so many steps may be off, as a share of the absolute terms: every step rounds once, σ errs
// by a few units.
constexpr double units(double steps) { return steps * 0x1p-24; }

struct Row {
  std::vector<float> t1, t3, q, dhbar, sum, du, dv;
  Row(Index n, std::mt19937_64& random) {
    std::uniform_real_distribution<float> draw(-4, 4);
    for (auto* v : {&t1, &t3, &q, &dhbar, &sum, &du, &dv}) {
      for (Index i = 0; i < n; ++i) v->push_back(draw(random));
    }
  }
};
std::vector<double> wide(const std::vector<float>& v) { return {v.begin(), v.end()}; }

}  // namespace

TEST_CASE("a MixLoRA row on packets: forward and backward, every tail, with and without dropout") {
  std::mt19937_64 random(seed(77));
  const float g = 0.625f;
  for (const Index n : {1, 7, 8, 15, 16, 33, 64, 255, 256}) {
    for (const bool drop : {false, true}) {
      CAPTURE(n);
      CAPTURE(drop);
      lm::detail::MixMask mask;
      mask.token = 3;
      mask.column = 256;
      if (drop) mask.dropout = lm::make_dropout("test", 0.5, {.seed = 42, .site = lm::site("mix"), .step = 1});
      const double kept = mask.dropout.kept_scale();
      const Row start(n, random);

      Row got = start;
      std::vector<double> t1 = wide(start.t1), t3 = wide(start.t3), sum = wide(start.sum);
      lm::cpu::detail::mix_columns(n, mask, g, got.t1.data(), got.t3.data(), got.sum.data());
      lm::detail::mix_row(lm::SerialTeam{}, n, mask, double{g}, t1.data(), t3.data(), sum.data());
      for (std::size_t i = 0; i < t1.size(); ++i) {
        const double h = std::abs(sum[i] - start.sum[i]);
        CHECK(std::abs(got.sum[i] - sum[i]) <= units(16) * (h + std::abs(start.sum[i])));
        CHECK(std::abs(got.t1[i] - t1[i]) <= units(16) * kept * h);
      }

      got = start;
      t1 = wide(start.t1), t3 = wide(start.t3);
      std::vector<double> q = wide(start.q), du = wide(start.du), dv = wide(start.dv), dhbar = wide(start.dhbar);
      const double dg = lm::detail::mix_row_backward(lm::SerialTeam{}, n, mask, double{g}, dhbar.data(), t1.data(),
                                                     t3.data(), q.data(), du.data(), dv.data());
      const double got_dg = lm::cpu::detail::mix_columns_backward(
          n, mask, g, got.dhbar.data(), got.t1.data(), got.t3.data(), got.q.data(), got.du.data(), got.dv.data());
      double terms = 0;
      for (std::size_t i = 0; i < t1.size(); ++i) {
        const double a = start.t1[i], b = std::abs(start.t3[i]), sigma = 1 / (1 + std::exp(-a));
        const double d = std::abs(start.dhbar[i]) + kept * std::abs(start.q[i]), act = std::abs(a) * sigma;
        const double dt1 = g * d * b * sigma * (1 + std::abs(a)), dt3 = g * d * act;
        terms += act * b * d;
        CHECK(std::abs(got.t1[i] - t1[i]) <= units(32) * dt1);
        CHECK(std::abs(got.t3[i] - t3[i]) <= units(32) * dt3);
        CHECK(std::abs(got.q[i] - q[i]) <= units(32) * g * kept * act * b);
        CHECK(std::abs(got.du[i] - du[i]) <= units(32) * (dt1 + std::abs(start.du[i])));
        CHECK(std::abs(got.dv[i] - dv[i]) <= units(32) * (dt3 + std::abs(start.dv[i])));
      }
      CHECK(std::abs(got_dg - dg) <= units(32 + static_cast<double>(n)) * terms);
    }
  }
}

}  // namespace loramix_test
