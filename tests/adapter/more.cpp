// MoRE: values against literal loops, gradients against differences of its surrogate (everything called constant frozen),
// the laws, merging task by task, and the defects of the released code (PEERS 1.3).
#include "adapter/tasks.hpp"

#include <loramix/ops/contrastive_loss.hpp>
#include <loramix/train/few_shot.hpp>

namespace loramix_test {
namespace {

using lm::RankChoice;
using lm::RankLaw;
using lm::StraightThrough;

lm::MoreConfig small(lm::RankRule rule = {}, bool embedding = true) {
  return {.d_in = 7,
          .d_out = 5,
          .tasks = 3,
          .rank = 6,
          .alpha = 3,
          .dropout = 0.5,
          .rule = rule,
          .task_embedding = embedding};
}
std::vector<lm::MoreConfig> every_form() {
  return {small(),
          small({.law = RankLaw::code_squared}),
          small({.law = RankLaw::none}),
          small({.law = RankLaw::none, .straight_through = StraightThrough::raw_logit}),
          small({.straight_through = StraightThrough::none}),
          small({.choice = RankChoice::subset}),
          small({.law = RankLaw::code_squared, .choice = RankChoice::subset}),
          small({.choice = RankChoice::subset, .straight_through = StraightThrough::raw_logit}),
          small({.choice = RankChoice::random}),
          small({}, false),
          small({.law = RankLaw::none, .choice = RankChoice::random}, false)};
}
template <class A>
reference::MoreSelection selection(const Batch<A>& b, const reference::TaskProduct& p, bool draws) {
  const lm::RankRule rule = b.adapter.config().rule;
  using namespace reference;
  return {p,
          rule.law == RankLaw::paper_linear   ? Law::paper_linear
          : rule.law == RankLaw::code_squared ? Law::code_squared
                                              : Law::none,
          rule.straight_through == StraightThrough::probability ? Through::probability
          : rule.straight_through == StraightThrough::raw_logit ? Through::raw_logit
                                                                : Through::none,
          rule.choice == RankChoice::subset            ? Choice::subset
          : rule.choice == RankChoice::random && draws ? Choice::random
                                                       : Choice::argmax,
          fold(fold(b.key.seed, b.key.site), b.key.step)};
}
template <class A>
reference::Values want_of(const Batch<A>& b, bool draws) {
  const auto p = literal(b, mixed, draws);
  const auto g = selection(b, p, draws);
  return p.delta([&](int tau, int j) { return g(p, tau, j); });
}
template <class A>
void choose(A& adapter, Index task, Index rank) {  // by the bias: the others stay below
  const auto scorer = adapter.gate().scorer;
  for (Index c = 0; c < scorer.embedding.cols; ++c) scorer.embedding(task, c) = 0;
  for (Index j = 0; j < scorer.columns(); ++j) scorer.bias(0, j) = j + 1 == rank ? 1.0f : 0.0f;
}

TEST_CASE("MoRE equals the literal sums: every law, choice and ablation") {
  for (const lm::MoreConfig& config : every_form()) {
    Batch<lm::More<double>> b(config, 9);
    for (const bool draws : {false, true}) {
      auto y = b.zeros_y();
      b.forward(y, {.key = draws ? b.key : lm::no_draws, .tasks = groups_of(mixed, 3)});
      CHECK(distance(y, want_of(b, draws)) <= 1e-13);
    }
    const auto chosen = selection(b, literal(b, mixed, false), false);
    for (Index task = 0; task < 3; ++task) {
      CHECK(b.adapter.chosen_rank(task) == chosen.count[static_cast<std::size_t>(task)]);
    }
  }
  check_error(lm::ErrorCode::value, {"chosen_rank", "task", "3"}, [] { lm::More<float>(small()).chosen_rank(3); });
}

TEST_CASE("MoRE's gradients equal differences of the frozen surrogate, dropout 0.5") {
  for (const lm::MoreConfig& config : every_form()) {
    for (const lm::Keep keep : {lm::Keep::z, lm::Keep::recompute}) {
      Batch<lm::More<double>> b(config, 9);
      const auto chosen = selection(b, literal(b, mixed, true), true);
      const auto report = check_against(
          b, mixed,
          [&] {
            const auto now = literal(b, mixed, true);
            return now.delta([&](int tau, int j) { return chosen(now, tau, j); });
          },
          keep);
      CHECK_MESSAGE(report.ok(), report.text());
      const bool through = config.rule.straight_through != StraightThrough::none;
      for (const lm::CheckedTensor& tensor : report.tensors) {
        const bool selector = tensor.name.find("lora_") == std::string::npos && tensor.name != "x";
        const bool there = tensor.name.find("gate.") == std::string::npos || config.task_embedding;
        CHECK_MESSAGE((tensor.norm > 0) == (there && (through || !selector)), tensor.name);
      }
    }
  }
}

TEST_CASE("a new task between known ones: the gradient of its weights a equals differences of the frozen surrogate") {
  Batch<lm::More<double>> known(small(), 9), b(small(), 9);
  std::vector<double> a{0.5, 0.75, -0.25}, da(3, 1.0);  // added to
  b.adapter = lm::new_task(known.adapter, std::span<const double>(a));
  const std::vector<std::int32_t> tasks{0, 0, -1, 0, 0, 0, 0, -1, 0};
  const auto chosen = selection(b, literal(b, tasks, true), true);
  auto grad = lm::zeros_like(b.adapter);
  auto dx = b.zeros_dx(), y = b.zeros_y();
  lm::Arena<> reserve = b.memory.arena();
  auto saved = b.forward(y, {.save = &reserve, .key = b.key, .tasks = groups_of(tasks, 1)});
  b.backward(saved, dx, grad);
  lm::task_weight_gradient(known.adapter, grad, std::span<double>(da));
  for (double& d : da) d -= 1;
  const auto loss = [&] {
    const auto from = known.adapter.gate().scorer.embedding;
    for (Index c = 0; c < from.cols; ++c) {
      double& e = b.adapter.gate().scorer.embedding(0, c);
      e = 0;
      for (std::size_t i = 0; i < 3; ++i) e += a[i] * from(static_cast<Index>(i), c);
    }
    const auto now = literal(b, tasks, true);
    const reference::Values delta = now.delta([&](int tau, int j) { return chosen(now, tau, j); });
    double sum = 0;
    for (std::size_t i = 0; i < delta.size(); ++i) sum += b.dy.data()[i] * delta[i];
    return sum;
  };
  const auto report = lm::gradient_check({{"a", {a.data(), 3}, {da.data(), 3}}}, loss);
  CHECK_MESSAGE(report.ok(), report.text());
  CHECK(report.tensors[0].norm > 0);
  check_error(lm::ErrorCode::shape, {"task_weight_gradient", "2", "3"},
              [&] { lm::task_weight_gradient(known.adapter, grad, std::span<double>(da.data(), 2)); });
}

TEST_CASE("lr_linear: forward as none; gradients of A[j] and B[:, j] times j/r_max, of nothing else") {
  for (const lm::Into into : {lm::Into::add, lm::Into::set}) {
    Batch<lm::More<double>> b(small({.law = RankLaw::lr_linear}), 9), plain(small({.law = RankLaw::none}), 9);
    auto y = b.zeros_y(), want = b.zeros_y(), dx = b.zeros_dx(), want_dx = b.zeros_dx();
    auto grad = lm::zeros_like(b.adapter), want_grad = lm::zeros_like(plain.adapter);
    for (Index i = 0; i < grad.parameters().size; ++i) grad.parameters()[i] = into == lm::Into::add ? 0.25 : nan;
    const auto run = [](auto& batch, auto& out, auto& input, auto& gradient, lm::BackwardOptions options) {
      lm::Arena<> reserve = batch.memory.arena();
      auto saved = batch.forward(out, {.save = &reserve, .key = batch.key, .tasks = groups_of(mixed, 3)});
      batch.backward(saved, input, gradient, options);
    };
    run(b, y, dx, grad, {.parameters = into});
    run(plain, want, want_dx, want_grad, {});
    CHECK(same_bits(y, want));
    CHECK(same_bits(dx, want_dx));
    const double start = into == lm::Into::add ? 0.25 : 0;
    double largest = 0;
    for (Index j = 0; j < 6; ++j) {
      const double ratio = static_cast<double>(j + 1) / 6;
      for (Index c = 0; c < 7; ++c) {
        CHECK(std::abs(grad.A()(j, c) - start - ratio * want_grad.A()(j, c)) <= 1e-14);
        largest = std::max(largest, std::abs(want_grad.A()(j, c)));
      }
      for (Index o = 0; o < 5; ++o) CHECK(std::abs(grad.B()(o, j) - start - ratio * want_grad.B()(o, j)) <= 1e-14);
    }
    CHECK(largest > 0.1);
    const auto got = grad.gate().scorer, reference_scorer = want_grad.gate().scorer;
    for (Index j = 0; j < 6; ++j) {
      CHECK(std::abs(got.bias(0, j) - start - reference_scorer.bias(0, j)) <= 1e-15);
    }
  }
}

TEST_CASE("a prefix of r ranks is LoRA with A and B truncated to r") {
  for (Index r = 1; r <= 6; ++r) {
    Batch<lm::More<float>> b(small({.law = RankLaw::none}), 9);
    choose(b.adapter, 1, r);
    CHECK(b.adapter.chosen_rank(1) == r);
    const std::vector<std::int32_t> all(9, 1);
    lm::Lora<float> lora({.d_in = 7, .d_out = 5, .rank = r, .alpha = 0.5 * static_cast<double>(r), .dropout = 0.5});
    for (Index j = 0; j < r; ++j) {
      for (Index c = 0; c < 7; ++c) lora.A()(j, c) = b.adapter.A()(j, c);
      for (Index o = 0; o < 5; ++o) lora.B()(o, j) = b.adapter.B()(o, j);
    }
    auto y = b.zeros_y(), want = b.zeros_y();
    b.forward(y, {.key = b.key, .tasks = groups_of(all, 3)});
    lm::forward(b.be, lora, b.x, want, b.work.arena(), {.key = b.key});
    for (Index i = 0; i < 45; ++i) CHECK(std::abs(y.data()[i] - want.data()[i]) <= 1e-5f);
  }
}

TEST_CASE("equal logits choose one rank: ties go to the smaller, on every task; any maximum rank") {
  for (const Index rank : {1, 2, 33}) {
    lm::More<float> more({.d_in = 5, .d_out = 4, .tasks = 2, .rank = rank});
    CHECK(more.chosen_rank(0) == 1);  // all zeros
    lm::initialise(more, {.seed = seed(4)});
    for (Index task = 0; task < 2; ++task) {
      CHECK(more.chosen_rank(task) >= 1);
      CHECK(more.chosen_rank(task) <= rank);
    }
    choose(more, 1, rank);
    CHECK(more.chosen_rank(1) == rank);
    CHECK(lm::parameter_count(more) == more.cost(1).parameters);
  }
}

TEST_CASE("a NaN logit makes its task's output NaN, other tasks' not, and no rank out of range") {
  for (const lm::RankChoice choice : {RankChoice::argmax, RankChoice::subset}) {
    Batch<lm::More<float>> b(small({.choice = choice}), 9);
    b.adapter.gate().scorer.embedding(1, 0) = static_cast<float>(nan);
    auto y = b.zeros_y();
    b.forward(y, {.tasks = groups_of(mixed, 3)});
    CHECK(b.adapter.chosen_rank(1) >= 1);
    CHECK(b.adapter.chosen_rank(1) <= 6);
    for (Index t = 0; t < 9; ++t) CHECK((y(t, 0) != y(t, 0)) == (mixed[static_cast<std::size_t>(t)] == 1));
    lm::Matrix<float> weights(5, 7);
    check_error(lm::ErrorCode::value, {"merge", "task"}, [&] { lm::merge(b.be, b.adapter, weights, {.task = 1}); });
  }
}

// The task is a global of the process there.
TEST_CASE("defect of MoRE's code, one task per batch: tasks of one batch, −1 = none, do not see each other") {
  Batch<lm::More<float>> b(small(), 9);
  const auto step = [&](const std::vector<std::int32_t>& tasks, lm::Matrix<float>& y, lm::Matrix<float>& dx) {
    auto grad = lm::zeros_like(b.adapter);
    lm::Arena<> reserve = b.memory.arena();
    auto saved = b.forward(y, {.save = &reserve, .key = b.key, .tasks = groups_of(tasks, 3)});
    b.backward(saved, dx, grad);
  };
  auto y = b.zeros_y(), dx = b.zeros_dx();
  step(mixed, y, dx);
  for (std::int32_t task = -1; task < 3; ++task) {
    auto alone_y = b.zeros_y(), alone_dx = b.zeros_dx();
    step(std::vector<std::int32_t>(9, task), alone_y, alone_dx);
    for (Index t = 0; t < 9; ++t) {
      if (mixed[static_cast<std::size_t>(t)] != task) continue;
      for (Index o = 0; o < 5; ++o) CHECK(y(t, o) == alone_y(t, o));
      for (Index i = 0; i < b.x.cols(); ++i) CHECK(dx(t, i) == alone_dx(t, i));
      if (task < 0) CHECK(y(t, 0) == 0);
    }
  }
  check_error(lm::ErrorCode::value, {"forward", "tasks"}, [&] { b.forward(y); });
}

TEST_CASE("random ranks follow the counters: the step changes them, nothing else does; without a key the argmax") {
  Batch<lm::More<float>> b(small({.law = RankLaw::none, .choice = RankChoice::random}), 9);
  std::vector<Index> seen;
  for (std::uint64_t step = 0; step < 40; ++step) {
    auto y = b.zeros_y(), again = b.zeros_y();
    lm::Key key = b.key;
    key.step = step;
    lm::Arena<> reserve = b.memory.arena();
    const auto saved = b.forward(y, {.save = &reserve, .key = key, .tasks = groups_of(mixed, 3)});
    b.forward(again, {.key = key, .tasks = groups_of(mixed, 3)});
    CHECK(same_bits(y, again));
    for (Index task = 0; task < 3; ++task) {
      const Index r = saved.state.count[task];
      CHECK(r >= 1);
      CHECK(r <= 6);
      seen.push_back(r);
    }
  }
  for (Index r = 1; r <= 6; ++r) CHECK(std::count(seen.begin(), seen.end(), r) >= 5);  // of 120, 20 expected
}

TEST_CASE("merged for a task, undone bitwise") {
  for (const lm::MoreConfig& config : every_form()) {
    Batch<lm::More<double>> b(config, 9);
    check_merged_by_task(b);
  }
}

// The released code calls init_task_map() before it tests whether that was done: the gate never gets a gradient.
TEST_CASE("defect of MoRE's code, dead gate: embeddings, W_g and b_g get a gradient from the first step on") {
  Batch<lm::More<double>> b(small(), 9);
  for (int step = 0; step < 3; ++step) {
    auto y = b.zeros_y();
    auto grad = lm::zeros_like(b.adapter);
    lm::Arena<> reserve = b.memory.arena();
    auto saved = b.forward(y, {.save = &reserve, .key = b.key, .tasks = groups_of(mixed, 3)});
    b.backward(saved, {}, grad);
    const auto scorer = grad.gate().scorer;
    for (const auto& values : {values_of(scorer.embedding), values_of(scorer.projection), values_of(scorer.bias)}) {
      double norm = 0;
      for (const double v : values) norm += v * v;
      CHECK(norm > 0);
    }
  }
}

// There the map task → rank is made at the first forward and kept, and after loading it is made from other embeddings.
TEST_CASE("defect of MoRE's code, frozen rank map: ranks are chosen from the parameters as they are") {
  Batch<lm::More<float>> b(small({.law = RankLaw::none}), 9);
  const std::vector<std::int32_t> all(9, 0);
  for (const Index r : {5, 2, 6, 1}) {
    choose(b.adapter, 0, r);
    auto y = b.zeros_y();
    lm::Arena<> reserve = b.memory.arena();
    const auto saved = b.forward(y, {.save = &reserve, .key = b.key, .tasks = groups_of(all, 3)});
    CHECK(saved.state.count[0] == r);
    CHECK(b.adapter.chosen_rank(0) == r);
    lm::More<float> copy(b.adapter.config());  // what a file holds: parameters, nothing else
    std::memcpy(copy.parameters().data, b.adapter.parameters().data,
                static_cast<std::size_t>(copy.parameters().size) * sizeof(float));
    CHECK(copy.chosen_rank(0) == r);
  }
}

// There get_delta_weight multiplies all of A and B, without truncation and without the factors.
TEST_CASE("defect of MoRE's code, merge ignoring truncation: closed ranks do not reach the merged weights") {
  for (const RankLaw law : {RankLaw::paper_linear, RankLaw::code_squared, RankLaw::lr_linear, RankLaw::none}) {
    lm::More<double> more(small({.law = law}));
    for (Index i = 0; i < more.parameters().size; ++i) more.parameters()[i] = 1;
    const auto scorer = more.gate().scorer;
    for (Index c = 0; c < 7; ++c) scorer.embedding(1, c) = 0;
    for (Index j = 0; j < 6; ++j) scorer.bias(0, j) = j == 3 ? 1 : 0;
    lm::Matrix<double> weights(5, 7);
    lm::merge(lm::cpu::Backend{}, more, weights, {.task = 1});  // r = 4 of 6, s = 1/2, all weights 1
    const double want = law == RankLaw::paper_linear   ? 0.5 * 4 * (4.0 / 6)
                        : law == RankLaw::code_squared ? 0.5 * (1 + 4 + 9 + 16) / 36
                                                       : 0.5 * 4;
    for (Index i = 0; i < 35; ++i) CHECK(std::abs(weights.data()[i] - want) <= 1e-14);
  }
}

TEST_CASE("the contrastive loss trains embeddings beside the product: both gradients in one buffer") {
  Batch<lm::More<double>> b(small(), 9);
  const std::vector<std::int32_t> labels{1, 0, 2, -1, 1, 2, 0, 0, 2};  // every token is a sequence
  std::vector<std::byte> work(static_cast<std::size_t>(lm::contrastive_workspace_bytes<double>(9, 3, 7)));
  auto grad = lm::zeros_like(b.adapter);
  auto dx = b.zeros_dx();
  // [contrastive]
  const auto loss = [&](lm::MatrixView<double> into_x, lm::MatrixView<double> into_e) {
    return lm::contrastive_loss(b.be, b.x.view(), std::as_const(b.adapter).gate().scorer.embedding,
                                lm::VectorView<const std::int32_t>{labels.data(), 9}, into_x, into_e, {.weight = 0.1},
                                lm::Arena<>{work});
  };
  // [/contrastive]
  auto y = b.zeros_y();
  lm::Arena<> reserve = b.memory.arena();
  // [step]
  auto saved = b.forward(y, {.save = &reserve, .key = b.key, .tasks = groups_of(mixed, 3)});
  loss(dx, grad.gate().scorer.embedding);
  b.backward(saved, dx, grad);
  // [/step]

  const auto chosen = selection(b, literal(b, mixed, true), true);
  const auto e = b.adapter.gate().scorer.embedding, de = grad.gate().scorer.embedding;
  const auto report =
      lm::gradient_check({{"x", {b.x.data(), 63}, {dx.data(), 63}}, {"e", {e.data, 21}, {de.data, 21}}}, [&] {
        const auto now = literal(b, mixed, true);
        const auto delta = now.delta([&](int tau, int j) { return chosen(now, tau, j); });
        double sum = 0, entropy = 0;
        for (Index i = 0; i < 45; ++i) sum += b.dy.data()[i] * delta[static_cast<std::size_t>(i)];
        int counted = 0;
        for (int t = 0; t < 9; ++t) {
          const int label = labels[static_cast<std::size_t>(t)];
          if (label < 0) continue;
          reference::Values cosines;
          for (int task = 0; task < 3; ++task) {
            double inner = 0, xx = 0, ee = 0;
            for (int c = 0; c < 7; ++c) {
              const double xc = now.at(now.x, t * 7 + c), ec = now.at(now.e, task * 7 + c);
              inner += xc * ec;
              xx += xc * xc;
              ee += ec * ec;
            }
            cosines.push_back(inner / std::sqrt(xx * ee) / 0.05);
          }
          entropy -= std::log(now.at(now.softmax(cosines), label));
          ++counted;
        }
        return sum + 0.1 * entropy / counted;
      });
  CHECK_MESSAGE(report.ok(), report.text());
}

TEST_CASE("backward refuses a gradient of other shapes, though it is padded to the same size") {
  lm::MoreConfig config = small({}, false), other = config;
  config.rank = other.rank = 8;
  config.tasks = 4;  // logits [4, 8] and [3, 8] both take 32 places
  Batch<lm::More<double>> b(config, 9);
  auto grad = lm::zeros_like(b.adapter), wrong = lm::zeros_like(lm::More<double>(other));
  const auto before = wrong;
  REQUIRE(wrong.parameters().size == grad.parameters().size);
  auto y = b.zeros_y(), dx = b.zeros_dx();
  lm::Arena<> reserve = b.memory.arena();
  auto saved = b.forward(y, {.save = &reserve, .key = b.key, .tasks = groups_of(mixed, 4)});
  check_error(lm::ErrorCode::shape, {"backward", "grad", "other shapes"}, [&] { b.backward(saved, dx, wrong); });
  CHECK(same_parameters(wrong, before));
  CHECK(same_bits(dx, b.zeros_dx()));
  b.backward(saved, dx, grad);
  CHECK_FALSE(same_bits(dx, b.zeros_dx()));
}

TEST_CASE("B = 0 at the start: nothing is added, and only B has a gradient") {
  Batch<lm::More<double>> b(small(), 9);
  lm::initialise(b.adapter, {.seed = seed(5)});
  auto y = b.zeros_y();
  auto grad = lm::zeros_like(b.adapter);
  lm::Arena<> reserve = b.memory.arena();
  auto saved = b.forward(y, {.save = &reserve, .key = b.key, .tasks = groups_of(mixed, 3)});
  b.backward(saved, {}, grad);
  CHECK(same_bits(y, b.zeros_y()));
  lm::More<double>::visit(grad, [](const char* name, auto view, lm::ParameterGroup) {
    double norm = 0;
    for (const double v : values_of(view)) norm += v * v;
    CHECK_MESSAGE((norm > 0) == (std::string(name) == "lora_B.weight"), name);
  });
}

}  // namespace
}  // namespace loramix_test
