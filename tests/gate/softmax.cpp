// The rows of SoftmaxGate: values and gradient against the reference, ties, infinities, NaN; temperatures that it refuses.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <vector>

#include <loramix/gate/softmax.hpp>

#include "core/caught.hpp"
#include "reference/gate_data.hpp"
#include "support/seed.hpp"

using namespace loramix_test;
namespace lm = loramix;

namespace {

std::vector<double> softmax(const std::vector<double>& logits, double temperature) {
  std::vector<double> p(logits.size());
  lm::detail::softmax_row(lm::SerialTeam{}, static_cast<Index>(p.size()), logits.data(), temperature, p.data());
  return p;
}

constexpr double inf = std::numeric_limits<double>::infinity(), not_a_number = std::numeric_limits<double>::quiet_NaN();

}  // namespace

TEST_CASE("softmax and its gradient are the reference's") {
  Random random(seed(80));
  for (const Index experts : {1, 2, 3, 8, 31}) {
    const Grid<double> h = draw_grid(random, 1, experts), dp = draw_grid(random, 1, experts);
    const double temperature = 0.3;
    const Grid<double> want = reference::softmax(h, temperature);
    const Grid<double> want_dh = reference::softmax_backward(want, dp, temperature);
    std::vector<double> p(static_cast<std::size_t>(experts)), dh(p.size(), 0.25);
    lm::detail::softmax_row(lm::SerialTeam{}, experts, &h[0], temperature, p.data());
    lm::detail::softmax_backward_row(lm::SerialTeam{}, experts, p.data(), &dp[0], temperature, dh.data());
    double sum = 0;
    for (Index e = 0; e < experts; ++e) {
      CHECK(std::abs(p[static_cast<std::size_t>(e)] - want[e]) <= 1e-14);
      CHECK(std::abs(dh[static_cast<std::size_t>(e)] - 0.25 - want_dh[e]) <= 1e-13);  // added to what was there
      sum += p[static_cast<std::size_t>(e)];
    }
    CHECK(std::abs(sum - 1) <= 1e-14);
  }
}

TEST_CASE("softmax at the edges") {
  CHECK(softmax({2, 2, 2, 2}, 1) == std::vector<double>(4, 0.25));
  CHECK(softmax({5}, 1) == std::vector<double>{1});
  CHECK(softmax({1e300, -1e300}, 1) == std::vector<double>{1, 0});
  CHECK(softmax({-inf, 3, 3}, 1) == std::vector<double>{0, 0.5, 0.5});
  for (std::size_t place = 0; place < 3; ++place) {
    std::vector<double> logits{1, 2, 3};
    logits[place] = not_a_number;
    for (const double p : softmax(logits, 1)) CHECK(std::isnan(p));
  }
}

TEST_CASE("a temperature that divides to infinity or NaN is refused") {
  lm::SoftmaxGate<> gate{};
  gate.check("op", {});
  for (const float refused : {0.0F, -1.0F, static_cast<float>(inf), static_cast<float>(not_a_number)}) {
    gate.temperature = refused;
    check_error(lm::ErrorCode::value, {"op", "temperature"}, [&] { gate.check("op", {}); });
  }
}
