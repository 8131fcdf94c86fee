// Task gates by themselves: scores of a table and of embeddings, temperature, ties, bad logits, what losses add.
#include <loramix/router/rank_selector.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include <loramix/cpu/cpu.hpp>

#include "core/caught.hpp"
#include "reference/tasks.hpp"
#include "support/seed.hpp"

namespace loramix_test {
namespace {

namespace lm = loramix;
using lm::Index;

/// A gate's State and what it needs.
template <class Gate>
struct Run {
  explicit Run(const Gate& gate_, bool training = false)
      : gate(gate_),
        memory(lm::Arena<>::with_alignment(
            lm::carved_bytes<lm::Space::host>([&](lm::Arena<>& arena) { gate.carve(arena, 4, training); }))) {
    lm::Arena<> arena{memory.data(), memory.size()};
    state = gate.carve(arena, 4, training);
    gate.forward(lm::cpu::Backend<>{}, {}, state, call, lm::Arena<>{});
  }
  Gate gate;
  lm::Buffer<std::byte> memory;
  std::int32_t ids[4] = {1, -1, 0, 1};
  lm::GateCall<> call{4, {.tasks = lm::Groups<>::by_id(ids, 2)}};
  typename Gate::State state{};
};

TEST_CASE("a table of logits and a temperature: softmax(e / temperature)") {
  const float e[] = {0.5f, -1.0f, 2.0f, 0.0f, 0.25f, -0.5f};
  for (const double temperature : {1.0, 0.3}) {
    const lm::TaskSoftmaxGate<const float, double> gate{{{e, 2, 3}}, temperature};
    const Run run(gate);
    for (Index task = 0; task < 2; ++task) {
      reference::Values logits;
      for (Index i = 0; i < 3; ++i) logits.push_back(double{e[task * 3 + i]} / temperature);
      const auto p = reference::TaskProduct::softmax(logits);
      for (Index i = 0; i < 3; ++i) {
        CHECK(run.state.logits(task, i) == double{e[task * 3 + i]});
        CHECK(std::abs(run.state.weights(task, i) - p[static_cast<std::size_t>(i)]) <= 1e-15);
      }
    }
    const auto form = gate.form(run.state, run.call, 6);
    CHECK(form.weight_groups.of(0) == 1);
    CHECK(form.weight_groups.of(1) == -1);
    CHECK(form.experts == 3);
  }
}

TEST_CASE("equal logits: uniform weights, and the smallest rank") {
  const float e[] = {1, 2, 3, 4}, w[] = {1, 1, 1, 1, 1, 1};
  const lm::TaskSoftmaxGate<const float, float> soft{{{e, 2, 2}, {w, 3, 2}}};
  const Run weights(soft);
  for (Index i = 0; i < 6; ++i) CHECK(weights.state.weights.data[i] == 1.0f / 3);
  for (const lm::RankChoice choice : {lm::RankChoice::argmax, lm::RankChoice::subset}) {
    const lm::RankSelectorGate<const float, float> ranks{{{e, 2, 2}, {w, 3, 2}}, {.choice = choice}};
    const Run chosen(ranks);
    for (Index task = 0; task < 2; ++task) {
      CHECK(chosen.state.chosen(task, 0) == 0);
      CHECK(chosen.state.count[task] == (choice == lm::RankChoice::subset ? 3 : 1));
      CHECK(ranks.chosen_rank(task) == chosen.state.count[task]);
    }
  }
}

TEST_CASE("NaN and infinite logits: NaN weights of that task alone, ranks in range") {
  const float nan = std::numeric_limits<float>::quiet_NaN(), huge = std::numeric_limits<float>::infinity();
  const float e[] = {0, nan, 1, 2, 0, 1, -huge, 5, 4};
  const lm::TaskScorer<const float, float> table{{e, 3, 3}};
  const Run weights(lm::TaskSoftmaxGate<const float, float>{table});
  const Run ranks(lm::RankSelectorGate<const float, float>{table});
  for (Index i = 0; i < 3; ++i) {
    CHECK(weights.state.weights(0, i) != weights.state.weights(0, i));
    CHECK(weights.state.weights(1, i) == weights.state.weights(1, i));
  }
  CHECK(weights.state.weights(2, 0) == 0);
  CHECK(ranks.state.count[0] == 3);  // the largest of the numbers
  CHECK(ranks.state.multiplier[0] != ranks.state.multiplier[0]);
  CHECK(ranks.state.count[1] == 1);
  CHECK(ranks.state.count[2] == 2);
  CHECK(ranks.state.multiplier[2] == 2.0f / 3);
}

TEST_CASE("training states begin with no gradient from losses; scores show them by task") {
  const float e[] = {0, 1, 2, 3, 1, 0};
  const lm::RankSelectorGate<const float, float> gate{{{e, 2, 3}}};
  const Run run(gate, true);
  for (Index i = 0; i < 6; ++i) CHECK((run.state.dp.data[i] == 0 && run.state.dlogits.data[i] == 0));
  const auto scores = gate.scores(run.state, {}, {});
  CHECK(scores.dp.data == run.state.dp.data);
  CHECK(scores.logits.rows == 2);
  CHECK_FALSE(scores.by_token);
  CHECK(scores.ids(0, 0) == 2);
  CHECK(scores.ids(1, 0) == 0);
  const Run inference(gate);
  CHECK(inference.state.dp.data == nullptr);
}

TEST_CASE("a call without tasks, or with others, is refused and named") {
  const float e[] = {0, 1, 2, 3};
  const lm::TaskSoftmaxGate<const float, float> gate{{{e, 2, 2}}};
  const std::int32_t ids[] = {0, 1};
  using Code = lm::ErrorCode;
  check_error(Code::value, {"op", "tasks", "2", "5"}, [&] { gate.check("op", {5, {}}); });
  check_error(Code::shape, {"op", "tasks", "3", "2"}, [&] {
    gate.check("op", {2, {.tasks = lm::Groups<>::by_id(ids, 3)}});
  });
  gate.check("op", {2, {.tasks = lm::Groups<>::by_id(ids, 2)}});
}

TEST_CASE("a temperature that is not above 0 is refused") {
  const float e[] = {0, 1, 2, 3};
  const std::int32_t ids[] = {0, 1};
  const lm::GateCall<> call{2, {.tasks = lm::Groups<>::by_id(ids, 2)}};
  lm::TaskSoftmaxGate<const float, float> gate{{{e, 2, 2}}};
  gate.check("op", call);
  gate.temperature = 0;
  check_error(lm::ErrorCode::value, {"op", "temperature"}, [&] { gate.check("op", call); });
}

}  // namespace
}  // namespace loramix_test
