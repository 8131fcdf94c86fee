// MoRE in training: the selector really trains, and a new task trains its embedding alone.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <set>

#include <loramix/adapter/forward.hpp>
#include <loramix/cpu/cpu.hpp>
#include <loramix/train/adamw.hpp>
#include <loramix/train/few_shot.hpp>

#include "core/caught.hpp"

namespace loramix_test {
namespace {

namespace lm = loramix;
using lm::Index;
using More = lm::More<float>;

lm::MoreConfig small(Index tasks, lm::StraightThrough through = lm::StraightThrough::probability) {
  return {.d_in = 8, .d_out = 6, .tasks = tasks, .rank = 6, .alpha = 6, .rule = {.straight_through = through}};
}

/// Token t of task t mod n; the targets are x ΔW_τᵀ with ΔW_τ of rank τ + 1.
struct Problem {
  static constexpr Index T = 48, in = 8, out = 6;
  Problem(Index tasks_, std::uint64_t site, std::int32_t only = -1) : tasks(tasks_), x(T, in), want(T, out) {
    const std::uint64_t key = lm::philox_key({.seed = site});
    const auto draw = [key](std::uint64_t row, Index column) {
      return static_cast<float>(2 * lm::draw_uniform(key, lm::Purpose::sampling, row, column) - 1);
    };
    for (Index t = 0; t < T; ++t) {
      const std::int32_t task = static_cast<std::int32_t>(t % 3);
      ids.push_back(only < 0 ? task : 0);
      const Index rank = 1 + (only < 0 ? task : only);
      for (Index c = 0; c < in; ++c) x(t, c) = draw(static_cast<std::uint64_t>(t), c);
      for (Index j = 0; j < rank; ++j) {
        float u = 0;
        for (Index c = 0; c < in; ++c) u += draw(1000 + static_cast<std::uint64_t>(j), c) * x(t, c);
        for (Index o = 0; o < out; ++o) want(t, o) += u * draw(2000 + static_cast<std::uint64_t>(j), o);
      }
    }
  }

  /// One step; the mean squared error before it.
  double step(More& more, lm::AdamW<More>& optimiser) const {
    const lm::cpu::Backend<> be;
    std::vector<std::byte> work(static_cast<std::size_t>(lm::workspace_bytes(be, more, T, lm::Pass::backward))),
        memory(static_cast<std::size_t>(lm::reserve_bytes(more, T)));
    lm::Arena<> reserve{memory};
    auto gradient = lm::zeros_like(more);
    lm::Matrix<float> y(T, out), dy(T, out);
    auto saved = lm::forward(be, more, x, y, lm::Arena<>{work},
                             {.save = &reserve, .tasks = lm::Groups<>::by_id(ids.data(), tasks)});
    double loss = 0;
    for (Index i = 0; i < T * out; ++i) {
      const float error = y.data()[i] - want.data()[i];
      dy.data()[i] = 2 * error / (T * out);
      loss += static_cast<double>(error * error) / (T * out);
    }
    lm::backward(be, more, saved, x, dy, {}, gradient, lm::Arena<>{work});
    optimiser.step(be, more, gradient);
    return loss;
  }

  Index tasks;
  lm::Matrix<float> x, want;
  std::vector<std::int32_t> ids;
};

bool same_bits(lm::VectorView<const float> a, lm::VectorView<const float> b) {
  return a.size == b.size && std::memcmp(a.data, b.data, static_cast<std::size_t>(a.size) * sizeof(float)) == 0;
}
template <lm::Major M>
std::vector<float> values_of(lm::MatrixView<const float, lm::Space::host, M> v) {
  return {v.data, v.data + v.rows * v.cols};
}

TEST_CASE("the selector really trains: ranks change and the loss falls; without straight-through no rank changes") {
  for (const bool through : {true, false}) {
    const Problem problem(3, 1);
    More more(small(3, through ? lm::StraightThrough::probability : lm::StraightThrough::none));
    lm::initialise(more, {.seed = 2});
    lm::AdamW<More> optimiser(more, {.lr = 1e-2});
    std::set<Index> ranks[3];
    double first = 0, last = 0;
    for (int step = 0; step < 600; ++step) {
      for (Index task = 0; task < 3; ++task) ranks[task].insert(more.chosen_rank(task));
      last = problem.step(more, optimiser);
      if (step == 0) first = last;
    }
    std::size_t most = 0;
    for (const std::set<Index>& seen : ranks) most = std::max(most, seen.size());
    MESSAGE("straight-through " << through << ": loss " << first << " -> " << last << ", ranks now "
                                << more.chosen_rank(0) << " " << more.chosen_rank(1) << " " << more.chosen_rank(2));
    CHECK(first > 0.1);
    if (through) {
      CHECK(last < 0.8 * first);
      CHECK(most > 1);
    } else {
      CHECK(most == 1);
    }
  }
}

TEST_CASE("a new task trains its embedding, nothing else; then it is the last of all tasks") {
  const Problem old(3, 3);
  More more(small(3));
  lm::initialise(more, {.seed = 4});
  lm::AdamW<More> optimiser(more, {.lr = 1e-2});
  for (int step = 0; step < 200; ++step) old.step(more, optimiser);

  const Problem fresh(1, 3, 1);  // like task 1
  More one = lm::new_task(more, {.seed = 5});
  const More before = one;
  lm::AdamW<More> few(one, {.lr = 1e-2, .groups = lm::only_new_task()});
  for (int step = 0; step < 200; ++step) fresh.step(one, few);
  CHECK(values_of(std::as_const(one).A()) == values_of(before.A()));
  CHECK(values_of(std::as_const(one).B()) == values_of(before.B()));
  const auto now = std::as_const(one).gate().scorer, then = before.gate().scorer;
  CHECK(values_of(now.projection) == values_of(then.projection));
  CHECK(values_of(now.bias) == values_of(then.bias));
  CHECK(values_of(now.embedding) != values_of(then.embedding));

  const More all = lm::append_task(more, one);
  CHECK(all.config().tasks == 4);
  for (Index task = 0; task < 3; ++task) CHECK(all.chosen_rank(task) == more.chosen_rank(task));
  CHECK(all.chosen_rank(3) == one.chosen_rank(0));
  const std::vector<std::int32_t> ids{3, 0, 1, 2, 3};
  const std::vector<std::int32_t> known{-1, 0, 1, 2, -1}, mine{0, -1, -1, -1, 0};
  const lm::cpu::Backend<> be;
  const auto run = [&](const More& adapter, const std::vector<std::int32_t>& of, lm::Matrix<float>& y) {
    std::vector<std::byte> work(static_cast<std::size_t>(lm::workspace_bytes(be, adapter, 5)));
    lm::forward(be, adapter, old.x.view().row_range(0, 5), y, lm::Arena<>{work},
                {.tasks = lm::Groups<>::by_id(of.data(), adapter.config().tasks)});
  };
  lm::Matrix<float> together(5, 6), apart(5, 6);
  run(all, ids, together);
  run(more, known, apart);
  run(one, mine, apart);
  CHECK(same_bits({together.data(), 30}, {apart.data(), 30}));
}

TEST_CASE("a new task between known ones: sum a_i e_i, a sums to 1") {
  More more(small(3));
  lm::initialise(more, {.seed = 6});
  const double a[] = {0.5, 0.75, -0.25}, bad[] = {0.5, 0.75, 0.25}, exactly[] = {0.0, 1.0, 0.0};
  const More one = lm::new_task(more, std::span<const double>(a));
  const auto e = std::as_const(more).gate().scorer.embedding;
  for (Index c = 0; c < 8; ++c) {
    const double want = 0.5 * double{e(0, c)} + 0.75 * double{e(1, c)} - 0.25 * double{e(2, c)};
    CHECK(one.gate().scorer.embedding(0, c) == static_cast<float>(want));
  }
  CHECK(lm::new_task(more, std::span<const double>(exactly)).chosen_rank(0) == more.chosen_rank(1));
  check_error(lm::ErrorCode::value, {"new_task", "1.5", "1"},
              [&] { lm::new_task(more, std::span<const double>(bad)); });
  check_error(lm::ErrorCode::shape, {"new_task", "2", "3"}, [&] { lm::new_task(more, std::span<const double>(a, 2)); });
  check_error(lm::ErrorCode::shape, {"append_task", "tasks", "3"}, [&] { lm::append_task(more, more); });
}

TEST_CASE("a fresh embedding is the row after those of the known tasks, drawn with their seed and site") {
  for (const bool embedding : {true, false}) {
    lm::MoreConfig config = small(3);
    config.task_embedding = embedding;
    More more(config);
    config.tasks = 4;
    More larger(config);
    const lm::InitialiseOptions options{.seed = 1, .site = "layers.0"};
    lm::initialise(more, options);
    lm::initialise(larger, options);
    const More one = lm::new_task(more, options);
    const auto known = std::as_const(larger).gate().scorer.embedding;
    const std::vector<float> fresh = values_of(one.gate().scorer.embedding);
    CHECK(fresh == values_of(known.row_range(3, 1)));
    for (Index task = 0; task < 3; ++task) CHECK(fresh != values_of(known.row_range(task, 1)));
  }
}

TEST_CASE("a task is appended to an adapter that does the same with it, and to no other") {
  More more(small(3));
  lm::initialise(more, {.seed = 7});
  using Code = lm::ErrorCode;
  const auto with = [](auto&& change) {
    lm::MoreConfig config = small(1);
    change(config);
    return More(config);
  };
  const auto refused = [&](Code code, std::initializer_list<std::string> parts, const More& one) {
    check_error(code, parts, [&] { lm::append_task(more, one); });
  };
  refused(Code::shape, {"append_task", "d_in", "7", "8"}, with([](lm::MoreConfig& c) { c.d_in = 7; }));
  refused(Code::shape, {"append_task", "d_out", "5", "6"}, with([](lm::MoreConfig& c) { c.d_out = 5; }));
  refused(Code::shape, {"append_task", "rank", "5", "6"}, with([](lm::MoreConfig& c) { c.rank = 5; }));
  refused(Code::value, {"append_task", "another alpha"}, with([](lm::MoreConfig& c) { c.alpha = 7; }));
  refused(Code::value, {"append_task", "another law"},
          with([](lm::MoreConfig& c) { c.rule.law = lm::RankLaw::code_squared; }));
  refused(Code::value, {"append_task", "another choice"},
          with([](lm::MoreConfig& c) { c.rule.choice = lm::RankChoice::subset; }));
  refused(Code::value, {"append_task", "another task_embedding"},
          with([](lm::MoreConfig& c) { c.task_embedding = false; }));
  const More trained_otherwise = with([](lm::MoreConfig& c) {
    c.dropout = 0.5;
    c.rule.straight_through = lm::StraightThrough::none;
  });
  CHECK(lm::append_task(more, trained_otherwise).config().tasks == 4);
}

}  // namespace
}  // namespace loramix_test
