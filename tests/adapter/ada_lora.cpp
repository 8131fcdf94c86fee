// AdaLoRA against literal sums: the product, its gradients, importance, budget, pruning, orthogonality, rank 0.
#include <loramix/adapter/ada_lora.hpp>
#include <loramix/train/ada_budget.hpp>

#include "adapter/weight_space.hpp"

namespace loramix_test {
namespace {

using A = lm::AdaLora<double>;
using Gradient = lm::gradient_t<A>;
constexpr lm::AdaLoraConfig config{.d_in = 13, .d_out = 11, .rank = 5, .alpha = 7, .dropout = 0.5};

reference::Values want(const Batch<A>& b, double s) {
  return reference::ada_lora(x_hat(b, 0.5), grid(b.adapter.A()), grid(b.adapter.B()), grid(b.adapter.lambda()), s);
}
double norm(const reference::Values& v) { return std::sqrt(reference::inner(v, v)); }

TEST_CASE("AdaLoRA: ΔY is the literal sum, and gradients are its differences") {
  for (const lm::Keep keep : {lm::Keep::z, lm::Keep::recompute}) {
    Batch<A> b(config, 9);
    auto y = b.zeros_y(), dx = b.zeros_dx();
    auto grad = lm::zeros_like(b.adapter);
    lm::Arena<> reserve = b.memory.arena();
    auto saved = b.forward(y, {.save = &reserve, .key = b.key, .keep = keep});
    check_close(y, want(b, 7.0 / 5), 1e-12);
    b.backward(saved, dx, grad);
    check_gradients(b.adapter, grad, b.x, dx, [&] { return reference::inner(grid(b.dy), want(b, 7.0 / 5)); });
  }
}

TEST_CASE("MATH 6: λ = 0 at start: ΔY is 0 and only λ has a gradient") {
  Batch<A> b(config, 9);
  lm::initialise(b.adapter, {.seed = 3});
  auto y = b.zeros_y(), dx = b.zeros_dx();
  auto grad = lm::zeros_like(b.adapter);
  lm::Arena<> reserve = b.memory.arena();
  auto saved = b.forward(y, {.save = &reserve, .key = b.key});
  b.backward(saved, dx, grad);
  CHECK(same_bits(y, b.zeros_y()));
  CHECK(norm(grid(grad.A())) == 0);
  CHECK(norm(grid(grad.B())) == 0);
  CHECK(norm(grid(grad.lambda())) > 0);
  const double deviation = norm(grid(b.adapter.A())) / std::sqrt(65.0);
  CHECK((deviation > 0.014 && deviation < 0.027));
}

TEST_CASE("the scale per active rank, and its limits") {
  auto c = config;
  c.per_active_rank = true;
  c.active_rank = 2;
  Batch<A> b(c, 3);
  CHECK(b.adapter.scale() == 7 / (2 + 1e-5));
  b.adapter.set_active_rank(-1);
  CHECK(b.adapter.scale() == 7 / (5 + 1e-5));
  check_error(lm::ErrorCode::value, {"active_rank", "5", "6"}, [&] { b.adapter.set_active_rank(6); });
}

TEST_CASE("MATH 4: the budget: b(n_i) = b_0, b(N − n_f) = b_T, cubic between, floored") {
  // [budget]
  const lm::AdaBudgetOptions o{
      .total_steps = 100, .initial_steps = 10, .final_steps = 20, .initial_budget = 48.5, .final_budget = 12.25};
  CHECK(lm::budget_at(o, 0) == 48);
  CHECK(lm::budget_at(o, 10) == 48);
  // [/budget]
  CHECK(lm::budget_at(o, 80) == 12);
  CHECK(lm::budget_at(o, 1000) == 12);
  CHECK(lm::budget_at(o, 45) == static_cast<Index>(std::floor(12.25 + 36.25 / 8)));
  for (Index n = 0; n <= 120; ++n) {
    CHECK(lm::budget_at(o, n) ==
          static_cast<Index>(std::floor(reference::ada_budget(48.5, 12.25, static_cast<double>(n), 10, 20, 100))));
    if (n > 0) CHECK(lm::budget_at(o, n) <= lm::budget_at(o, n - 1));
  }
}

/// Layers of ranks 3, 0 and 2, with their gradients.
struct Layers {
  std::vector<A> adapters;
  std::vector<Gradient> gradients;
  std::vector<A*> layers;
  std::vector<Gradient*> grads;
  Layers() {
    Random random(5);
    for (const Index rank : {3, 0, 2}) {
      adapters.emplace_back(lm::AdaLoraConfig{.d_in = 4, .d_out = 6, .rank = rank});
      fill_parameters(adapters.back(), random);
      gradients.push_back(lm::zeros_like(adapters.back()));
      fill_parameters(gradients.back(), random);
    }
    for (A& a : adapters) layers.push_back(&a);
    for (Gradient& g : gradients) grads.push_back(&g);
  }
};

TEST_CASE(
    "importance and uncertainty: the new mean enters the deviation; scores are literal sums (rank-0 layers too)") {
  Layers l;
  lm::AdaBudget<A> budget(l.layers, {.total_steps = 10, .initial_budget = 5, .final_budget = 5});
  const lm::cpu::Backend be;
  std::vector<double> want;
  constexpr double beta = 0.85;
  const auto averaged = [&](double w1, double g1, double w2, double g2) {  // two steps of one value
    const double first = std::abs(w1 * g1), second = std::abs(w2 * g2);
    const double i1 = (1 - beta) * first, u1 = (1 - beta) * std::abs(first - i1);
    const double i2 = beta * i1 + (1 - beta) * second, u2 = beta * u1 + (1 - beta) * std::abs(second - i2);
    return i2 * u2;
  };
  for (std::size_t i = 0; i < 3; ++i) {
    A& a = l.adapters[i];
    Gradient& g = l.gradients[i];
    for (Index j = 0; j < a.config().rank; ++j) {
      double in = 0, out = 0;  // the second step has −2 times the gradient
      for (Index c = 0; c < 4; ++c) in += averaged(a.A()(j, c), g.A()(j, c), a.A()(j, c), -2 * g.A()(j, c)) / 4;
      for (Index o = 0; o < 6; ++o) out += averaged(a.B()(o, j), g.B()(o, j), a.B()(o, j), -2 * g.B()(o, j)) / 6;
      const double w = a.lambda()(0, j), d = g.lambda()(0, j);
      want.push_back(averaged(w, d, w, -2 * d) + in + out);
    }
  }
  budget.measure(be, l.layers, l.grads);
  for (Gradient& g : l.gradients) {
    for (Index i = 0; i < g.parameters().size; ++i) g.parameters()[i] *= -2;
  }
  budget.measure(be, l.layers, l.grads);
  CHECK(budget.prune(be, l.layers, 0));
  REQUIRE(budget.scores().size == 5);
  for (Index j = 0; j < 5; ++j) {
    CHECK(want[static_cast<std::size_t>(j)] > 0);
    CHECK(std::abs(budget.scores()[j] - want[static_cast<std::size_t>(j)]) <= 1e-14);
  }
}

TEST_CASE("pruning: the best over all layers stay, ties go to the lower layer and rank, NaN goes first, λ may return") {
  Layers l;
  const lm::cpu::Backend be;
  const auto with_scores = [&](std::initializer_list<double> products, double budget_) {
    // |w ∂w| of λ only: A and B get no gradient.
    lm::AdaBudget<A> budget(l.layers, {.total_steps = 10, .initial_budget = budget_, .final_budget = budget_});
    auto p = products.begin();
    for (std::size_t i = 0; i < 3; ++i) {
      l.gradients[i] = lm::zeros_like(l.adapters[i]);
      for (Index j = 0; j < l.adapters[i].config().rank; ++j) {
        l.adapters[i].lambda()(0, j) = 0.5;
        l.gradients[i].lambda()(0, j) = *p++;
      }
    }
    budget.measure(be, l.layers, l.grads);
    CHECK(budget.prune(be, l.layers, 0));
    std::string alive;
    for (std::size_t i = 0; i < 3; ++i) {
      Index n = 0;
      for (Index j = 0; j < l.adapters[i].config().rank; ++j) {
        alive += l.adapters[i].lambda()(0, j) == 0.5 ? '1' : '0';
        n += l.adapters[i].lambda()(0, j) == 0.5;
      }
      CHECK(l.adapters[i].active_rank() == n);
    }
    for (Index j = 0; j < 5; ++j) CHECK((budget.kept()[j] != 0) == (alive[static_cast<std::size_t>(j)] == '1'));
    return alive;
  };
  CHECK(with_scores({1, 5, 2, 4, 3}, 2) == "01010");
  CHECK(with_scores({1, 5, 2, 4, 3}, 3.9) == "01011");
  CHECK(with_scores({1, 1, 1, 1, 1}, 2) == "11000");
  CHECK(with_scores({1, 2, 1, 2, 1}, 3) == "11010");
  CHECK(with_scores({nan, 1, nan, 2, 3}, 4) == "11011");
  CHECK(with_scores({1, 5, 2, 4, 3}, 0) == "00000");  // PEERS 1.13: kthvalue(k = 0) fails
  CHECK(with_scores({1, 5, 2, 4, 3}, 9) == "11111");

  // A pruned rank has λ = 0, a number: it keeps its gradient, an optimiser moves it, and it is alive again.
  Batch<A> b(config, 9);
  b.adapter.lambda()(0, 2) = 0;
  auto y = b.zeros_y(), dx = b.zeros_dx();
  auto grad = lm::zeros_like(b.adapter);
  lm::Arena<> reserve = b.memory.arena();
  auto saved = b.forward(y, {.save = &reserve, .key = b.key});
  b.backward(saved, dx, grad);
  CHECK(grad.lambda()(0, 2) != 0);
  std::vector<A*> one{&b.adapter};
  std::vector<Gradient*> g{&grad};
  // [prune]
  lm::AdaBudget<A> budget(one, {.total_steps = 10, .interval = 3, .initial_budget = 5, .final_budget = 5});
  b.adapter.lambda()(0, 2) -= 0.1 * grad.lambda()(0, 2);
  const double back = b.adapter.lambda()(0, 2);
  budget.measure(be, one, g);
  CHECK_FALSE(budget.prune(be, one, 2));
  CHECK(budget.prune(be, one, 3));
  CHECK(b.adapter.lambda()(0, 2) == back);
  // [/prune]
}

TEST_CASE(
    "orthogonality: literal value, gradients by differences, 0 at 0, rank 0, squared; the value without its weight") {
  const lm::cpu::Backend be;
  for (const bool squared : {false, true}) {
    Layers l;
    for (Gradient& g : l.gradients) g = Gradient(g.config());
    Memory memory(lm::orthogonality_bytes<A>(3));
    double value = nan;
    // [orthogonality]
    const lm::OrthogonalityOptions options{.weight = 0.5, .squared = squared};
    const std::span<A* const> layers(l.layers);
    const std::span<Gradient* const> grads(l.grads);
    lm::orthogonality_loss(be, layers, grads, options, {&value, 1}, memory.arena());
    // [/orthogonality]
    const auto literal = [&] {
      double sum = 0;
      for (const A& a : l.adapters) sum += reference::orthogonality(grid(a.A()), grid(a.B()), squared) / 3;
      return sum;
    };
    CHECK(std::abs(value - literal()) <= 1e-13 * value);
    const auto at = [](auto view) { return lm::VectorView<double>{view.data, view.rows * view.cols}; };
    const lm::GradientReport report = lm::gradient_check({{"A0", at(l.adapters[0].A()), at(l.gradients[0].A())},
                                                          {"B0", at(l.adapters[0].B()), at(l.gradients[0].B())},
                                                          {"A2", at(l.adapters[2].A()), at(l.gradients[2].A())},
                                                          {"B2", at(l.adapters[2].B()), at(l.gradients[2].B())}},
                                                         [&] { return 0.5 * literal(); });
    CHECK_MESSAGE(report.ok(), report.text());
    for (const lm::CheckedTensor& tensor : report.tensors) CHECK(tensor.norm > 0);

    for (A& a : l.adapters) {  // rows of the identity: the norm is 0, and so is its gradient
      for (Index j = 0; j < a.config().rank; ++j) {
        for (Index c = 0; c < 4; ++c) a.A()(j, c) = j == c;
        for (Index o = 0; o < 6; ++o) a.B()(o, j) = j == o;
      }
    }
    for (Gradient& g : l.gradients) g = Gradient(g.config());
    lm::orthogonality_loss(be, layers, grads, options, {&value, 1}, memory.arena());
    CHECK(value == 0);
    for (const Gradient& g : l.gradients) {
      for (Index i = 0; i < g.parameters().size; ++i) CHECK(g.parameters()[i] == 0);
    }
  }
}

TEST_CASE("PEERS 3.16 and 1.13: layers without ranks are legal, alone and among others") {
  Batch<A> b({.d_in = 13, .d_out = 11, .rank = 0, .dropout = 0.5}, 5);
  auto y = b.zeros_y(), dx = b.zeros_dx();
  auto grad = lm::zeros_like(b.adapter);
  lm::Arena<> reserve = b.memory.arena();
  auto saved = b.forward(y, {.save = &reserve, .key = b.key});
  b.backward(saved, dx, grad);
  CHECK(same_bits(y, b.zeros_y()));
  std::vector<A*> one{&b.adapter};
  std::vector<Gradient*> g{&grad};
  const lm::cpu::Backend be;
  lm::AdaBudget<A> budget(one, {.total_steps = 10, .initial_budget = 5, .final_budget = 1});
  budget.measure(be, one, g);
  CHECK(budget.prune(be, one, 0));
  double value = nan;
  Memory memory(lm::orthogonality_bytes<A>(0));
  lm::orthogonality_loss(be, std::span<A* const>(one), std::span<Gradient* const>(g), {}, {&value, 1}, memory.arena());
  CHECK(value == 0);
}

TEST_CASE(
    "a step that is not finite leaves the averages; saved and restored they choose the same; other layers are "
    "refused") {
  Layers l;
  const lm::AdaBudgetOptions options{.total_steps = 10, .initial_budget = 3, .final_budget = 3};
  lm::AdaBudget<A> budget(l.layers, options), resumed(l.layers, options);
  const lm::cpu::Backend be;
  budget.measure(be, l.layers, l.grads);
  const double good = l.gradients[0].parameters()[1];
  l.gradients[0].parameters()[1] = HUGE_VAL;
  const lm::Clip skip{.finite = false}, take{};
  const double before = budget.importance(0)[1];
  budget.measure(be, l.layers, l.grads, &skip);
  CHECK(budget.importance(0)[1] == before);
  l.gradients[0].parameters()[1] = good;
  for (Index i = 0; i < 3; ++i) {
    for (Index k = 0; k < budget.importance(i).size; ++k) {
      resumed.importance(i)[k] = budget.importance(i)[k];
      resumed.uncertainty(i)[k] = budget.uncertainty(i)[k];
    }
  }
  Layers m = l;
  m.layers.clear(), m.grads.clear();
  for (A& a : m.adapters) m.layers.push_back(&a);
  for (Gradient& g : m.gradients) m.grads.push_back(&g);
  budget.measure(be, l.layers, l.grads, &take);
  resumed.measure(be, m.layers, m.grads);
  CHECK(budget.prune(be, l.layers, 0));
  CHECK(resumed.prune(be, m.layers, 0));
  for (Index j = 0; j < 5; ++j) CHECK(budget.scores()[j] == resumed.scores()[j]);
  for (std::size_t i = 0; i < 3; ++i) CHECK(same_parameters(l.adapters[i], m.adapters[i]));

  A thin({.d_in = 1024, .d_out = 1024, .rank = 1}), square({.d_in = 32, .d_out = 32, .rank = 32});
  REQUIRE(thin.parameters().size == square.parameters().size);
  std::vector<A*> made_for{&thin}, others{&square};
  lm::AdaBudget<A> of_thin(made_for, options);
  check_error(lm::ErrorCode::shape, {"prune", "layer 0", "other shapes"}, [&] { of_thin.prune(be, others, 0); });
}

TEST_CASE("a gradient of another size is refused before the averages of any layer are written") {
  Layers l;
  const lm::cpu::Backend be;
  lm::AdaBudget<A> budget(l.layers, {.total_steps = 10, .initial_budget = 3, .final_budget = 3});
  budget.measure(be, l.layers, l.grads);
  const auto values = [](auto average) { return std::vector<double>(average.data, average.data + average.size); };
  const std::vector<double> importance = values(budget.importance(0)), uncertainty = values(budget.uncertainty(0));
  l.grads[1] = l.grads[0];  // of layer 0, whose own is right
  check_error(lm::ErrorCode::shape, {"measure", "grad"}, [&] { budget.measure(be, l.layers, l.grads); });
  const auto same = [](auto average, const std::vector<double>& before) {
    return std::memcmp(average.data, before.data(), before.size() * sizeof(double)) == 0;
  };
  CHECK(same(budget.importance(0), importance));
  CHECK(same(budget.uncertainty(0), uncertainty));
  l.grads[1] = &l.gradients[1];
  budget.measure(be, l.layers, l.grads);
  CHECK_FALSE(same(budget.importance(0), importance));
}

TEST_CASE("a gradient of the same size, of another layer, is refused") {
  A up({.d_in = 16, .d_out = 64, .rank = 4}), down({.d_in = 64, .d_out = 16, .rank = 4});
  auto of_up = lm::zeros_like(up), of_down = lm::zeros_like(down);
  REQUIRE(of_up.parameters().size == of_down.parameters().size);
  const lm::cpu::Backend be;
  const std::vector<A*> layers{&up, &down};
  const std::vector<decltype(of_up)*> swapped{&of_down, &of_up};
  lm::AdaBudget<A> budget(layers, {.total_steps = 10, .initial_budget = 3, .final_budget = 3});
  check_error(lm::ErrorCode::shape, {"measure", "grad", "other shapes"}, [&] { budget.measure(be, layers, swapped); });
  double value = 0;
  Memory memory(lm::orthogonality_bytes<A>(4) + 64);
  check_error(lm::ErrorCode::shape, {"orthogonality_loss", "grad", "other shapes"}, [&] {
    lm::orthogonality_loss(be, std::span<A* const>(layers), std::span<decltype(of_up)* const>(swapped), {}, {&value, 1},
                           memory.arena());
  });
}

TEST_CASE("merge is W + s B diag(λ) A; undo is bitwise") {
  Batch<A> b(config, 9);
  lm::Matrix<float> weights = random_matrix<float>(11, 13, b.random);
  const auto before = weights;
  lm::Matrix<double> y = b.zeros_y();
  b.forward(y);
  const auto base = base_output(grid(b.x), grid(weights));
  const auto merged = lm::merge(b.be, b.adapter, weights);
  check_close(y, reference::plus(base_output(grid(b.x), grid(weights)), -1, base), 1e-5);
  merged.undo(weights);
  CHECK(same_bits(weights, before));
}

TEST_CASE("three lanes change no bit of scores, λ or loss; a step allocates nothing; wrong options are refused") {
  Layers l, m;
  lm::ThreadPool pool(3);
  const lm::cpu::Backend be;
  const auto run = [](const auto& backend, Layers& on, double& value, Index& allocated) {
    lm::AdaBudget<A> budget(on.layers, {.total_steps = 10, .initial_budget = 3, .final_budget = 2});
    Memory memory(lm::orthogonality_bytes<A>(3));
    const Index before = allocations();
    lm::orthogonality_loss(backend, std::span<A* const>(on.layers), std::span<Gradient* const>(on.grads), {},
                           {&value, 1}, memory.arena());
    budget.measure(backend, on.layers, on.grads);
    budget.prune(backend, on.layers, 4);
    allocated = allocations() - before;
  };
  double one = 0, three = 0;
  Index a = -1, b = -1;
  run(be, l, one, a);
  run(lm::cpu::Backend{pool.executor()}, m, three, b);
  CHECK(a + b == 0);
  CHECK(one == three);
  CHECK(one > 0);
  for (std::size_t i = 0; i < 3; ++i) {
    CHECK(same_parameters(l.adapters[i], m.adapters[i]));
    CHECK(same_parameters(l.gradients[i], m.gradients[i]));
  }
  using Code = lm::ErrorCode;
  const auto refused = [&](std::initializer_list<std::string> parts, const lm::AdaBudgetOptions& o) {
    check_error(Code::value, parts, [&] { lm::AdaBudget<A>(l.layers, o); });
  };
  refused({"AdaBudget", "total_steps", "9", "10"}, {.total_steps = 9, .initial_steps = 4, .final_steps = 6});
  refused({"AdaBudget", "interval", "0"}, {.interval = 0});
  refused({"AdaBudget", "final_budget", "5", "4"}, {.initial_budget = 4, .final_budget = 5});
  refused({"AdaBudget", "initial_budget"}, {.initial_budget = nan});
  refused({"AdaBudget", "beta1"}, {.beta1 = 1});
  lm::AdaBudget<A> budget(l.layers, {});
  check_error(Code::shape, {"prune", "layers", "2", "3"},
              [&] { budget.prune(be, std::span<A* const>(l.layers).first(2), 0); });
}

}  // namespace
}  // namespace loramix_test
