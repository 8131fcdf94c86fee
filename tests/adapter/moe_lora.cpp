// MOELoRA: values and gradients against literal loops, tasks mixed in one batch, merging task by task.
#include "adapter/tasks.hpp"

namespace loramix_test {
namespace {

lm::MoeLoraConfig small(bool shared) {
  return {.d_in = 7,
          .d_out = 5,
          .tasks = 3,
          .experts = 2,
          .rank = 6,
          .alpha = 3,
          .dropout = 0.5,
          .embedding = 11,
          .shared_A = shared};
}

reference::Values want_of(const reference::TaskProduct& p) {
  return p.delta([&](int tau, int j) { return reference::moe_lora_gate(p, tau, j); });
}

TEST_CASE("MOELoRA equals the literal sums; scale is alpha over the total rank") {
  for (const bool shared : {false, true}) {
    Batch<lm::MoeLora<double>> b(small(shared), 9);
    CHECK(b.adapter.scale() == 0.5);
    CHECK(b.adapter.A().rows == (shared ? 3 : 6));
    for (const bool dropout : {false, true}) {
      auto y = b.zeros_y();
      b.forward(y, {.key = dropout ? b.key : lm::no_draws, .tasks = groups_of(mixed, 3)});
      CHECK(distance(y, want_of(literal(b, mixed, dropout))) <= 1e-13);
    }
    Batch<lm::MoeLora<float>> single(small(shared), 9);
    auto y = single.zeros_y();
    single.forward(y, {.tasks = groups_of(mixed, 3)});
    CHECK(distance(y, want_of(literal(single, mixed, false))) <= 1e-5);
  }
}

TEST_CASE("MOELoRA's gradients equal differences of the literal sums, dropout 0.5") {
  for (const bool shared : {false, true}) {
    for (const lm::Keep keep : {lm::Keep::z, lm::Keep::recompute}) {
      Batch<lm::MoeLora<double>> b(small(shared), 9);
      const auto report = check_against(
          b, mixed, [&] { return want_of(literal(b, mixed, true)); }, keep);
      CHECK_MESSAGE(report.ok(), report.text());
      for (const lm::CheckedTensor& tensor : report.tensors) CHECK_MESSAGE(tensor.norm > 0, tensor.name);
    }
    lm::MoeLora<double> adapter(small(shared));
    lm::initialise(adapter, {.seed = seed(2)});
    const auto report =
        lm::gradient_check(lm::cpu::Backend{}, adapter, {.tokens = 9, .batch = {.tasks = groups_of(mixed, 3)}});
    CHECK_MESSAGE(report.ok(), report.text());
  }
}

TEST_CASE("losses on the tasks' scores reach embeddings and gate") {
  Batch<lm::MoeLora<double>> b(small(false), 9);
  auto y = b.zeros_y();
  lm::Arena<> reserve = b.memory.arena();
  auto saved = b.forward(y, {.save = &reserve, .key = b.key, .tasks = groups_of(mixed, 3)});
  const auto scores = std::as_const(b.adapter).gate().scores(saved.state, saved.h, saved.dh);
  const auto dp = random_matrix<double>(3, 2, b.random), dl = random_matrix<double>(3, 2, b.random);
  for (Index t = 0; t < 3; ++t) {
    for (Index e = 0; e < 2; ++e) {
      scores.dp(t, e) += dp(t, e);
      scores.dlogits(t, e) += dl(t, e);
    }
  }
  auto grad = lm::zeros_like(b.adapter);
  for (Index i = 0; i < 9 * 5; ++i) b.dy.data()[i] = 0;  // only the loss
  b.backward(saved, {}, grad);
  const auto mine = b.adapter.gate().scorer, theirs = grad.gate().scorer;
  const auto claim = [](const char* name, auto v, auto g) {
    return lm::GradientClaim{name, {const_cast<double*>(v.data), v.rows * v.cols}, {g.data, g.rows * g.cols}};
  };
  const auto report = lm::gradient_check(
      {claim("embedding", mine.embedding, theirs.embedding), claim("gate", mine.projection, theirs.projection)}, [&] {
        const auto p = literal(b, mixed, true);
        double loss = 0;
        for (int t = 0; t < 3; ++t) {
          const auto l = p.logits(t), q = p.softmax(l);
          for (int e = 0; e < 2; ++e) loss += dp(t, e) * p.at(q, e) + dl(t, e) * p.at(l, e);
        }
        return loss;
      });
  CHECK_MESSAGE(report.ok(), report.text());
}

// PEERS 1.7: the public code broadcasts the gate over the first axis, which in a batch-first model is the sequence.
TEST_CASE("defect of MOELoRA-peft, batch-first gate: each sequence of a batch gets its own task's gate") {
  Batch<lm::MoeLora<float>> b(small(false), 9);
  // [tasks]
  const Index offsets[]{0, 4, 4, 7, 9};
  const std::vector<std::int32_t> of_sequence{2, 0, -1, 1}, by_token{2, 2, 2, 2, -1, -1, -1, 1, 1};
  auto segments = b.zeros_y(), tokens = b.zeros_y();
  b.forward(segments, {.tasks = lm::Groups<>::by_segment(offsets, 4, of_sequence.data(), 3)});
  b.forward(tokens, {.tasks = groups_of(by_token, 3)});
  CHECK(same_bits(segments, tokens));
  // [/tasks]
  for (std::int32_t task = 0; task < 3; ++task) {  // alone: the same rows, in the same class of T
    const std::vector<std::int32_t> all(9, task);
    auto alone = b.zeros_y();
    b.forward(alone, {.tasks = groups_of(all, 3)});
    bool same = true, other = false;
    for (Index t = 0; t < 9; ++t) {
      for (Index o = 0; o < 5; ++o) {
        const bool equal = alone(t, o) == tokens(t, o);
        if (by_token[static_cast<std::size_t>(t)] == task)
          same = same && equal;
        else
          other = other || !equal;
      }
    }
    CHECK(same);
    CHECK(other);
  }
}

TEST_CASE("a token of no task contributes nothing, whatever it holds") {
  Batch<lm::MoeLora<float>> b(small(false), 9), clean(small(false), 9);
  for (Index c = 0; c < 7; ++c) b.x(2, c) = static_cast<float>(nan);
  auto y = b.zeros_y(), want = b.zeros_y(), dx = b.zeros_dx(), want_dx = b.zeros_dx();
  auto grad = lm::zeros_like(b.adapter), want_grad = lm::zeros_like(b.adapter);
  const auto run = [](auto& batch, auto& out, auto& into, auto& gradient) {
    lm::Arena<> reserve = batch.memory.arena();
    auto saved = batch.forward(out, {.save = &reserve, .dropout_off = true, .tasks = groups_of(mixed, 3)});
    batch.backward(saved, into, gradient);
  };
  run(b, y, dx, grad);
  run(clean, want, want_dx, want_grad);
  CHECK(same_bits(y, want));
  CHECK(same_bits(dx, want_dx));
  for (Index o = 0; o < 5; ++o) CHECK((y(2, o) == 0 && y(7, o) == 0));
  for (Index c = 0; c < 7; ++c) CHECK((dx(2, c) == 0 && dx(7, c) == 0));
  const std::vector<std::int32_t> none(9, -1);
  auto nothing = b.zeros_y();
  clean.forward(nothing, {.tasks = groups_of(none, 3)});
  CHECK(same_bits(nothing, b.zeros_y()));
}

TEST_CASE("merged for a task, undone bitwise") {
  for (const bool shared : {false, true}) {
    Batch<lm::MoeLora<double>> b(small(shared), 9);
    check_merged_by_task(b);
  }
}

TEST_CASE("a batch without tasks, with another number of them or a bad id is refused before any write") {
  Batch<lm::MoeLora<float>> b(small(false), 9);
  auto y = b.zeros_y();
  using Code = lm::ErrorCode;
  check_error(Code::value, {"forward", "tasks", "3", "9"}, [&] { b.forward(y); });
  check_error(Code::shape, {"forward", "tasks", "4", "3"}, [&] { b.forward(y, {.tasks = groups_of(mixed, 4)}); });
  const std::vector<std::int32_t> bad{0, 0, 0, 0, 3, 0, 0, 0, 0};
  check_error(Code::value, {"group id 3"}, [&] { b.forward(y, {.tasks = groups_of(bad, 3)}); });
  CHECK(same_bits(y, b.zeros_y()));
  auto config = small(false);
  config.rank = 5;
  check_error(Code::value, {"MoeLora", "rank", "5", "2"}, [&] { lm::MoeLora<float>{config}; });
  config = small(false);
  config.tasks = 0;
  check_error(Code::value, {"MoeLora", "tasks"}, [&] { lm::MoeLora<float>{config}; });
}

TEST_CASE("MOELoRA starts as MATH says: A of variance 1e-4, embeddings of variance 1, B = 0") {
  lm::MoeLora<float> adapter({.d_in = 200, .d_out = 3, .tasks = 50, .experts = 2, .rank = 20});
  lm::initialise(adapter, {.seed = seed(3)});
  const auto mean_square = [](auto v) {
    double sum = 0;
    for (const double value : values_of(v)) sum += value * value;
    return sum / static_cast<double>(v.rows * v.cols);
  };
  // 4000 and 3200 values: the mean square of normals lies within 5·√(2/n) of the variance.
  CHECK(std::abs(mean_square(adapter.A()) / 1e-4 - 1) <= 0.112);
  CHECK(std::abs(mean_square(adapter.gate().scorer.embedding) - 1) <= 0.125);
  CHECK(mean_square(adapter.B()) == 0);
  CHECK(mean_square(adapter.gate().scorer.projection) <= 1.0 / 64);
  CHECK(adapter.config().embedding == 64);
  CHECK(lm::parameter_count(adapter) == adapter.cost(1).parameters);
  CHECK(lm::MoeLoraConfig::of({.d_in = 4, .d_out = 3, .total_rank = 17, .experts = 4}).rank == 16);
}

TEST_CASE("bfloat16 weights with float scores: gradients of the embeddings are float") {
  using A = lm::MoeLora<lm::Precision<float, lm::bfloat16>>;
  Batch<A> b(small(false), 9);
  auto y = b.zeros_y();
  auto grad = lm::zeros_like(b.adapter), twice = lm::zeros_like(b.adapter);
  const auto run = [&](auto& into, lm::BackwardOptions options) {
    lm::Arena<> reserve = b.memory.arena();
    auto saved = b.forward(y, {.save = &reserve, .key = b.key, .into = lm::Into::set, .tasks = groups_of(mixed, 3)});
    b.backward(saved, {}, into, options);
  };
  run(grad, {});
  CHECK(distance(y, want_of(literal(b, mixed, true))) <= 1e-5);
  poison(twice);
  run(twice, {.parameters = lm::Into::set});
  CHECK(same_parameters(grad, twice));
}

}  // namespace
}  // namespace loramix_test
