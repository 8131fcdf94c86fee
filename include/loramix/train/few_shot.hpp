/// A new task for a trained MoRE: its embedding alone is trained, then it joins the others.
///
/// Computes:    new_task: an adapter of one task with the old A, B and selector, whose embedding is fresh ~ N(0, 0.01²), the
///              row that initialise would have drawn after those of the known tasks, or Σ a_i e_i with Σ a_i = 1;
///              only_new_task(): the rules by which an optimiser moves nothing but it; task_weight_gradient:
///              da_i += ⟨de, e_i⟩ for who trains a instead of the embedding that it makes; append_task: all old tasks and
///              the new one.
/// Source:      MATH.md section 4 (MoRE, few-shot task).
/// Parameters:  more: any MoRE on the host; a [tasks] read, da [tasks] added to.
/// Errors:      a of another size, or with a sum that is not 1 (to 1e-6). append_task: more than one new task; another d_in,
///              d_out, rank, alpha, law, choice or task_embedding. What matters in training alone (dropout, straight_through)
///              may differ; A, B and the selector are those of the old adapter and are not compared.
/// Cost:        a copy of the parameters; a fresh embedding draws those of the known tasks again.
/// Determinism: old tasks' parameters, ranks and outputs stay bit-identical.
/// Example:     tests/train/few_shot.cpp
#pragma once
#include <cmath>
#include <cstdio>
#include <span>
#include <vector>

#include <loramix/adapter/initialise.hpp>
#include <loramix/adapter/more.hpp>
#include <loramix/train/groups.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

namespace detail {

template <class T>
void copy_values(MatrixView<const T> from, MatrixView<T> to) {
  for (Index i = 0; i < to.rows; ++i) {
    for (Index j = 0; j < to.cols; ++j) to(i, j) = from(i, j);
  }
}

/// `more` for `tasks` tasks; embeddings are zero.
template <class P, class T>
More<P, Space::host, T> with_tasks(const More<P, Space::host, T>& more, Index tasks) {
  auto config = more.config();
  config.tasks = tasks;
  More<P, Space::host, T> other(config);
  copy_values<T>(more.A(), other.A());
  copy_values<T>(more.B().transposed(), other.B().transposed());
  const auto from = more.gate().scorer;
  const auto to = other.gate().scorer;
  copy_values<T>(from.projection, to.projection);
  copy_values<T>(from.bias, to.bias);
  return other;
}

}  // namespace detail

/// A fresh embedding, which is none of the known tasks' though seed and site be theirs.
template <class P, class T>
More<P, Space::host, T> new_task(const More<P, Space::host, T>& more, const InitialiseOptions& options) {
  auto one = detail::with_tasks(more, 1);
  const auto to = one.gate().scorer.embedding;
  const Index known = more.config().tasks;
  Matrix<T> drawn(known + 1, to.cols);
  Fill(options).normal("task_embedding.weight", drawn.view(), 0.01 * 0.01);
  detail::copy_values<T>(drawn.view().row_range(known, 1), to);
  return one;
}

/// An embedding between those of known tasks.
template <class P, class T>
More<P, Space::host, T> new_task(const More<P, Space::host, T>& more, std::span<const double> a) {
  check::same("new_task", "a", "size", static_cast<Index>(a.size()), "the number of tasks", more.config().tasks);
  double sum = 0;
  for (const double weight : a) sum += weight;
  if (!(std::fabs(sum - 1) <= 1e-6)) {
    char text[32];
    std::snprintf(text, sizeof text, "%g", sum);
    fail(check::detail::about(ErrorCode::value, "new_task", "a") << " sums to " << text << ", must sum to 1");
  }
  auto one = detail::with_tasks(more, 1);
  const auto from = more.gate().scorer.embedding;
  const auto to = one.gate().scorer.embedding;
  for (Index c = 0; c < to.cols; ++c) {
    double value = 0;
    for (Index i = 0; i < from.rows; ++i) value += a[static_cast<std::size_t>(i)] * widen<double>(from(i, c));
    to(0, c) = narrow<T>(value);
  }
  return one;
}

/// The gradient of the a that made the embedding whose gradient is in `gradient`. Σ a_i = 1 is the caller's to keep.
template <class P, class T, class Gradient>
void task_weight_gradient(const More<P, Space::host, T>& more, const Gradient& gradient, std::span<double> da) {
  check::same("task_weight_gradient", "da", "size", static_cast<Index>(da.size()), "the number of tasks",
              more.config().tasks);
  const auto known = more.gate().scorer.embedding;
  const auto de = gradient.gate().scorer.embedding;
  check::same("task_weight_gradient", "the gradient", "size", de.cols, "that of an embedding", known.cols);
  for (Index i = 0; i < known.rows; ++i) {
    double sum = 0;
    for (Index c = 0; c < known.cols; ++c) sum += widen<double>(de(0, c)) * widen<double>(known(i, c));
    da[static_cast<std::size_t>(i)] += sum;
  }
}

/// Everything but the embedding is frozen: AdamW(one, {…, .groups = only_new_task()}).
inline std::vector<GroupRule> only_new_task() {
  return {{"A", {.frozen = true}}, {"B", {.frozen = true}}, {"router", {.frozen = true}}, {"bias", {.frozen = true}}};
}

/// `more` with the task that `one` was trained on as its last.
template <class P, class T>
More<P, Space::host, T> append_task(const More<P, Space::host, T>& more, const More<P, Space::host, T>& one) {
  const char* const op = "append_task";
  const MoreConfig &known = more.config(), &fresh = one.config();
  check::same(op, "the new adapter", "tasks", fresh.tasks, "one task", 1);
  check::same(op, "the new adapter", "d_in", fresh.d_in, "the old one's", known.d_in);
  check::same(op, "the new adapter", "d_out", fresh.d_out, "the old one's", known.d_out);
  check::same(op, "the new adapter", "rank", fresh.rank, "the old one's", known.rank);
  const auto alike = [op](bool same, const char* field) {
    if (same) return;
    fail(check::detail::about(ErrorCode::value, op, "the new adapter")
         << " has another " << field << " than the old one");
  };
  alike(fresh.alpha == known.alpha, "alpha");
  alike(fresh.rule.law == known.rule.law, "law");
  alike(fresh.rule.choice == known.rule.choice, "choice");
  alike(fresh.task_embedding == known.task_embedding, "task_embedding");
  const Index old = known.tasks;
  auto all = detail::with_tasks(more, old + 1);
  const auto to = all.gate().scorer.embedding;
  const auto from = one.gate().scorer.embedding;
  detail::copy_values<T>(more.gate().scorer.embedding, to.row_range(0, old));
  detail::copy_values<T>(from, to.row_range(old, 1));
  return all;
}

}  // namespace LORAMIX_ABI
}  // namespace loramix
