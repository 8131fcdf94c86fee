// The laws of a Team, held by the team of one.
#include <doctest/doctest.h>

#include <limits>
#include <type_traits>
#include <vector>

#include <loramix/core/team.hpp>

namespace lm = loramix;
using lm::Index;

namespace {
struct NoMaximum {
  static constexpr int width = 1;
  static Index place() { return 0; }
  template <class F, class Put>
  void sums(Index, Index, const F&, const Put&) const {}
  template <class F>
  void each(Index, const F&) const {}
  template <class F>
  float sum(Index, const F&) const {
    return 0;
  }
  template <class F>
  void once(const F&) const {}
};
static_assert(lm::Team<lm::SerialTeam>);
static_assert(!lm::Team<NoMaximum> && !lm::Team<int>);
static_assert(lm::SerialTeam::width == 1 && std::is_empty_v<lm::SerialTeam>);
constexpr lm::SerialTeam team;
}  // namespace

TEST_CASE("each visits every index once, in order; once runs once") {
  std::vector<Index> seen;
  team.each(5, [&](Index i) { seen.push_back(i); });
  CHECK(seen == std::vector<Index>{0, 1, 2, 3, 4});
  team.each(0, [&](Index i) { seen.push_back(i); });
  CHECK(seen.size() == 5);
  int runs = 0;
  team.once([&] { ++runs; });
  CHECK(runs == 1);
}

TEST_CASE("sum adds in ascending order, in the type of the values") {
  const float values[4] = {1e8f, 3.0f, -1e8f, 1.0f};
  const auto at = [&](Index i) { return values[i]; };
  CHECK(team.sum(4, at) == ((1e8f + 3.0f) + -1e8f) + 1.0f);
  CHECK(team.sum(0, at) == 0.0f);
  static_assert(std::is_same_v<decltype(team.sum(4, at)), float>);
  static_assert(std::is_same_v<decltype(team.sum(1, [](Index) { return 1.0; })), double>);
  CHECK(team.sum(10, [](Index i) { return i; }) == 45);
}

TEST_CASE("sums: every group's, each put once") {
  for (const Index size : {0, 1, 3, 40}) {
    std::vector<Index> got;
    team.sums(
        4, size, [](Index g, Index i) { return 100 * g + i; },
        [&](Index g, Index sum) {
          CHECK(g == static_cast<Index>(got.size()));
          got.push_back(sum);
        });
    REQUIRE(got.size() == 4);
    for (Index g = 0; g < 4; ++g) CHECK(got[static_cast<std::size_t>(g)] == size * 100 * g + size * (size - 1) / 2);
  }
  CHECK(team.place() == 0);
}

TEST_CASE("maximum: the largest, and NaN before all, wherever it stands") {
  constexpr float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
  const auto maximum = [](std::vector<float> v) {
    return team.maximum(static_cast<Index>(v.size()), [&](Index i) { return v[static_cast<std::size_t>(i)]; });
  };
  CHECK(maximum({3}) == 3);
  CHECK(maximum({1, 3, 2}) == 3);
  CHECK(maximum({-5, -3, -4}) == -3);
  CHECK(maximum({-infinity, -infinity}) == -infinity);
  CHECK(maximum({1, infinity, 2}) == infinity);
  for (std::size_t place = 0; place < 4; ++place) {
    std::vector<float> v{1, infinity, -2, 7};
    v[place] = nan;
    CHECK(maximum(v) != maximum(v));
  }
  CHECK(maximum({nan, nan}) != 0);
  static_assert(std::is_same_v<decltype(team.maximum(1, [](Index) { return 1.0; })), double>);
}
