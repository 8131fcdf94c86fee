// What the pages in docs/ show and no other test does.
#include "adapter/kinds.hpp"

#include <loramix/adapter/team_lora.hpp>

namespace loramix_test {
namespace {

TEST_CASE("docs/adapters/team_lora.md: S that reads tasks") {
  Random random(1);
  const lm::cpu::Backend be;
  const lm::Matrix<double> x = random_matrix<double>(5, 32, random);
  lm::Matrix<double> y(5, 48), weights = random_matrix<double>(48, 32, random);
  const lm::Matrix<double> before = weights;
  const std::int32_t task_of_token[]{2, 2, 2, 2, 2};
  Memory scratch(1 << 20);
  const lm::Arena<> work = scratch.arena();
  const auto train = [&random](auto& adapter) { fill_parameters(adapter, random); };
  // [team-by-task]
  lm::TeamLora<double> team({.d_in = 32, .d_out = 48, .experts = 4, .rank = 2, .reads = lm::Reads::task, .tasks = 3});
  train(team);
  lm::forward(be, team, x, y, work, {.tasks = lm::Groups<>::by_id(task_of_token, 3)});
  const auto merged = lm::merge(be, team, weights, {.task = 2});  // exact for that task
  // [/team-by-task]
  double largest = 0;
  for (Index t = 0; t < 5; ++t) {
    for (Index o = 0; o < 48; ++o) {
      double want = 0;
      for (Index c = 0; c < 32; ++c) want += x(t, c) * (weights(o, c) - before(o, c));
      largest = std::max(largest, std::abs(want));
      CHECK(std::abs(y(t, o) - want) <= 1e-12 * 32 * 48);
    }
  }
  CHECK(largest > 0.1);
  merged.undo(weights);
  CHECK(same_bits(weights, before));
}

}  // namespace
}  // namespace loramix_test
