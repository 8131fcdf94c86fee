// Adapters gated by the task: a batch whose tokens know their tasks, and the same product as literal loops.
#pragma once
#include "adapter/kinds.hpp"
#include "reference/tasks.hpp"

#include <loramix/adapter/moe_lora.hpp>
#include <loramix/adapter/more.hpp>
#include <loramix/train/gradient_check.hpp>

namespace loramix_test {

/// Tasks of nine tokens, mixed, with two tokens of none.
inline const std::vector<std::int32_t> mixed{0, 2, -1, 1, 2, 0, 1, -1, 2};
inline lm::Groups<> groups_of(const std::vector<std::int32_t>& ids, Index tasks) {
  return lm::Groups<>::by_id(ids.data(), tasks);
}

template <class View>
reference::Values values_of(View v) {
  reference::Values all;
  for (Index i = 0; i < v.rows; ++i) {
    for (Index j = 0; j < v.cols; ++j) all.push_back(lm::widen<double>(v(i, j)));
  }
  return all;
}

/// What b computes, from the values that it holds now; `dropout`: with the masks of b.key.
template <class A>
reference::TaskProduct literal(const Batch<A>& b, const std::vector<std::int32_t>& tasks, bool dropout) {
  const auto scorer = b.adapter.gate().scorer;
  const int d_in = static_cast<int>(b.adapter.A().cols), T = static_cast<int>(b.tokens);
  reference::TaskProduct p{T,
                           d_in,
                           static_cast<int>(b.adapter.B().rows),
                           static_cast<int>(b.adapter.B().cols),
                           static_cast<int>(b.adapter.A().rows),
                           static_cast<int>(scorer.tasks()),
                           static_cast<int>(scorer.columns()),
                           static_cast<int>(scorer.embedding.cols),
                           b.adapter.scale(),
                           values_of(b.x.view()),
                           values_of(b.adapter.A()),
                           values_of(b.adapter.B()),
                           values_of(scorer.embedding),
                           values_of(scorer.projection),
                           values_of(scorer.bias),
                           {},
                           {tasks.begin(), tasks.end()}};
  for (int t = 0; t < T; ++t) {
    for (int c = 0; c < d_in; ++c) {
      const bool kept = !dropout || reference::keep(b.key.seed, b.key.site, b.key.step,
                                                    b.key.first_token + static_cast<std::uint64_t>(t), c, 32768);
      p.keep.push_back(!kept ? 0.0 : dropout ? 2.0 : 1.0);
    }
  }
  return p;
}

/// Gradients of Σ dy∘ΔY by backward, against differences of a literal surrogate of ΔY (called anew for every value).
template <class A, class Surrogate>
lm::GradientReport check_against(Batch<A>& b, const std::vector<std::int32_t>& tasks, const Surrogate& surrogate,
                                 lm::Keep keep = lm::Keep::z) {
  const auto& config = b.adapter.config();
  auto grad = lm::zeros_like(b.adapter);
  auto dx = b.zeros_dx(), y = b.zeros_y();
  lm::Arena<> reserve = b.memory.arena();
  auto saved = b.forward(y, {.save = &reserve, .key = b.key, .keep = keep, .tasks = groups_of(tasks, config.tasks)});
  b.backward(saved, dx, grad);
  std::vector<lm::GradientClaim> claims{
      {"x", {b.x.data(), b.tokens * config.d_in}, {dx.data(), b.tokens * config.d_in}}};
  A::visit(b.adapter, [&](const char* name, auto view, lm::ParameterGroup) {
    claims.push_back({name, {view.data, view.rows * view.cols}, {}});
  });
  std::size_t next = 1;
  A::visit(grad, [&](const char*, auto view, lm::ParameterGroup) {
    claims[next++].gradient = {view.data, view.rows * view.cols};
  });
  return lm::gradient_check(claims, [&] {
    const reference::Values now = surrogate();
    double loss = 0;
    for (Index i = 0; i < b.tokens * config.d_out; ++i) loss += b.dy.data()[i] * now[static_cast<std::size_t>(i)];
    return loss;
  });
}

/// The largest |y − want|, and a check that something was wanted.
template <class T>
double distance(const lm::Matrix<T>& y, const reference::Values& want) {
  double most = 0, largest = 0;
  REQUIRE(static_cast<std::size_t>(y.rows() * y.cols()) == want.size());
  for (std::size_t i = 0; i < want.size(); ++i) {
    const double error = std::abs(lm::widen<double>(y.data()[i]) - want[i]);
    if (!(error <= most)) most = error;
    largest = std::max(largest, std::abs(want[i]));
  }
  CHECK(largest > 0.01);
  return most;
}

/// x Wᵀ in double.
inline reference::Values base(const lm::Matrix<double>& x, const lm::Matrix<double>& weights) {
  reference::Values y;
  for (Index t = 0; t < x.rows(); ++t) {
    for (Index o = 0; o < weights.rows(); ++o) {
      double sum = 0;
      for (Index c = 0; c < x.cols(); ++c) sum += x(t, c) * weights(o, c);
      y.push_back(sum);
    }
  }
  return y;
}

/// Merged for each task: what its tokens get is what base and adapter give them; undone bitwise.
template <class A>
void check_merged_by_task(Batch<A>& b) {
  const Index tasks = b.adapter.config().tasks, out = b.adapter.config().d_out;
  lm::Matrix<double> weights = random_matrix<double>(out, b.adapter.config().d_in, b.random);
  const lm::Matrix<double> before = weights;
  for (Index task = 0; task < tasks; ++task) {
    const std::vector<std::int32_t> all(static_cast<std::size_t>(b.tokens), static_cast<std::int32_t>(task));
    auto y = b.zeros_y();
    const reference::Values unmerged = base(b.x, before);
    for (std::size_t i = 0; i < unmerged.size(); ++i) y.data()[i] = unmerged[i];
    b.forward(y, {.tasks = groups_of(all, tasks)});
    const auto merged = lm::merge(b.be, b.adapter, weights, {.task = task});
    CHECK_FALSE(same_bits(weights, before));
    CHECK(distance(y, base(b.x, weights)) <= 1e-12);
    CHECK(merged.report.max_rounding >= 0);
    merged.undo(weights);
    CHECK(same_bits(weights, before));
  }
  for (const Index task : {Index{-1}, tasks}) {
    check_error(lm::ErrorCode::value, {"merge", "task", std::to_string(task), std::to_string(tasks)},
                [&] { lm::merge(b.be, b.adapter, weights, {.task = task}); });
  }
  CHECK(same_bits(weights, before));
}

}  // namespace loramix_test
