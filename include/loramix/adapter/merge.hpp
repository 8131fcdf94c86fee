/// Folding an adapter into the weights it adapts, and taking it out again to the last bit.
///
/// Computes:    W ← round(W + s B diag(g) A), summed in double, rounded once to nearest even straight from double
///              (MATH.md section 4, "Merging"). g: the gate's rank scale where it has one, or what a gate of the task
///              gives every token of one task (MOELoRA, MoRE): {.task = τ}. A may be shared by experts.
/// Reads:       A [R, d_in], B [d_out, R].
/// Writes:      W [d_out, d_in] of any storage type, in place. The token keeps the bytes there were.
/// Errors:      shape, null, alias; A, B, a rank scale or the task's gate that is not finite (ErrorCode::value; W is not
///              asked: what is not finite there stays so), a task there is not: before any write. A gate that depends on
///              the token does not compile: no exact merge exists (adapter/average_merge.hpp has an inexact one).
/// Cost:        2·R·d_in·d_out flop in double; the token holds a copy of W.
/// Determinism: every element is one sum in rank order, whatever the threads.
/// Example:     examples/demo
#pragma once
#include <cmath>

#include <loramix/core/adapter.hpp>
#include <loramix/core/arena.hpp>
#include <loramix/gate/batch.hpp>
#include <loramix/gate/gates.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// How far rounding to the storage type moved the merged weights from the exact sum.
struct MergeReport {
  double max_rounding = 0;
  double rms_rounding = 0;
};

/// What merge returns: a report, and the bytes that restore W.
template <class T>
class Merged {
 public:
  Merged(MatrixView<const T> before, MergeReport report_) : report(report_), before_(before.rows, before.cols) {
    copy(before, before_.view());
  }
  /// Restores the bytes that merge found.
  void undo(MatrixView<T> weights) const {
    check::shape("undo", "weights", weights, "the merged rows", before_.rows(), "the merged columns", before_.cols());
    copy(before_.view(), weights);
  }

  MergeReport report;

 private:
  static void copy(MatrixView<const T> from, MatrixView<T> to) {
    for (Index i = 0; i < from.rows && from.cols != 0; ++i) {
      std::memcpy(to.row(i), from.row(i), static_cast<std::size_t>(from.cols) * sizeof(T));
    }
  }
  Matrix<T> before_;
};

namespace detail {

template <class View>
void check_finite(const char* op, const char* name, View v) {
  for (Index i = 0; i < v.rows; ++i) {
    for (Index j = 0; j < v.cols; ++j) {
      if (is_finite(v(i, j))) continue;
      fail(check::detail::about(ErrorCode::value, op, name) << " is not finite at [" << i << ", " << j << "]");
    }
  }
}

/// Row `o` of W + s B diag(g) A; returns {largest, squared sum} of the rounding errors.
template <class T, class W, class Score, Major M>
MergeReport merge_row(MatrixView<const W> A, MatrixView<const W, Space::host, M> B, VectorView<const Score> g,
                      double scale, Index o, T* weights) {
  constexpr Index block = 64;
  MergeReport row;
  for (Index c = 0; c < A.cols; c += block) {
    const Index n = A.cols - c < block ? A.cols - c : block;
    double sum[block] = {};
    for (Index j = 0; j < B.cols; ++j) {
      const double b = widen<double>(B(o, j)) * (g.data == nullptr ? 1.0 : widen<double>(g[j]));
      for (Index i = 0; i < n; ++i) sum[i] += b * widen<double>(A(j % A.rows, c + i));
    }
    for (Index i = 0; i < n; ++i) {
      const double exact = widen<double>(weights[c + i]) + scale * sum[i];
      weights[c + i] = narrow<T>(exact);
      const double error = std::fabs(widen<double>(weights[c + i]) - exact);
      if (!(error <= row.max_rounding)) row.max_rounding = error;
      row.rms_rounding += error * error;
    }
  }
  return row;
}

/// One product into the rows of W; adds to `total` (squared sums, not yet the root).
template <class Backend, class T, class W, class Score, Major M>
void merge_product(const Backend& be, MatrixView<const W> A, MatrixView<const W, Space::host, M> B,
                   VectorView<const Score> g, double scale, MatrixView<T> weights, MergeReport& total) {
  Buffer<MergeReport> rows(weights.rows);
  be.run(weights.rows, [&](Index o, Index) { rows[o] = merge_row(A, B, g, scale, o, weights.row(o)); });
  for (const MergeReport& row : rows) {
    if (!(row.max_rounding <= total.max_rounding)) total.max_rounding = row.max_rounding;
    total.rms_rounding += row.rms_rounding;
  }
}

/// Refuses a gate whose rank scale is not finite; returns it.
template <class A>
auto finite_rank_scale(const char* op, const A& adapter) {
  const auto scale = adapter.gate().form(0, adapter.B().cols).rank_scale;
  for (Index j = 0; j < scale.size; ++j) {
    if (!is_finite(scale[j]))
      fail(check::detail::about(ErrorCode::value, op, "the rank scale") << " is not finite at [" << j << "]");
  }
  return scale;
}

/// The checks of every product that is merged.
template <class A, class T>
void check_merge(const char* op, const A& adapter, MatrixView<T> weights) {
  const auto down = adapter.A();
  const auto up = adapter.B();
  if (down.rows != up.cols && (down.rows == 0 || up.cols % down.rows != 0)) {
    fail(check::detail::about(ErrorCode::shape, op, "A")
         << " has " << down.rows << " rows, which do not divide the " << up.cols << " ranks of B");
  }
  check::shape(op, "weights", weights, "d_out of the adapter", up.rows, "d_in of the adapter", down.cols);
  check::disjoint(op, "weights", weights, "A", down);
  check::disjoint(op, "weights", weights, "B", up);
  check_finite(op, "A", down);
  check_finite(op, "B", up);
}

/// What `task`'s tokens are gated with, rank by rank (0: closed), by a forward of one token.
template <class Backend, class A>
Buffer<double> gate_of_task(const Backend& be, const A& adapter, Index task) {
  using Acc = typename A::precision::accumulation;
  using Score = typename A::precision::score;
  const auto gate = adapter.gate();
  const std::int32_t id = static_cast<std::int32_t>(task);
  const GateCall<> call{1, {.tasks = Groups<>::by_id(&id, gate.tasks())}};
  Buffer<std::byte> memory(
      Arena<>::with_alignment(carved_bytes<Space::host>([&](Arena<>& counter) { gate.carve(counter, 1, false); })));
  Arena<> arena{memory.data(), memory.size()};
  const auto state = gate.carve(arena, 1, false);
  gate.forward(be, {}, state, call, Arena<>{});
  const auto form = gate.form(state, call, adapter.B().cols);
  const GateRow<Acc, Score, Space::host> row(form, 0);
  Buffer<double> factors(form.ranks);
  for (Index j = 0; j < form.ranks; ++j) {
    const Index e = form.expert_of(j);
    factors[j] = row.open(j, e) ? static_cast<double>(row.factor(j, e)) : 0.0;
    if (is_finite(factors[j])) continue;
    fail(check::detail::about(ErrorCode::value, "merge", "the gate of task") << " " << task << " is not finite");
  }
  return factors;
}

inline void finish(MergeReport& total, Index elements) {
  if (elements != 0) total.rms_rounding = std::sqrt(total.rms_rounding / static_cast<double>(elements));
}

}  // namespace detail

/// Folds the adapter into `weights` [d_out, d_in].
template <class Backend, ProductAdapter A, class T>
  requires(A::space == Space::host)
Merged<T> merge(const Backend& be, const A& adapter, MatrixView<T> weights) {
  using Gate = decltype(adapter.gate());
  static_assert(
      Gate::facts.token_invariant,
      "loramix: this adapter's gate depends on the token: no exact merge exists; merge_average says what one costs");
  static_assert((Gate::facts.slots & ~static_cast<unsigned>(Slots::rank_scale)) == 0,
                "loramix: merge folds a gate's rank scale; this gate fills other slots of the normal form");
  detail::check_merge("merge", adapter, weights);
  const auto rank_scale = detail::finite_rank_scale("merge", adapter);
  Merged<T> merged(weights, {});
  detail::merge_product(be, adapter.A(), adapter.B(), rank_scale, adapter.scale(), weights, merged.report);
  detail::finish(merged.report, weights.rows * weights.cols);
  return merged;
}

/// What a gate of the task is merged for.
struct MergeOptions {
  Index task = 0;
};

/// Folds in what the adapter does to tokens of one task: exact for them, and for no other.
template <class Backend, ProductAdapter A, class T>
  requires(A::space == Space::host)
Merged<T> merge(const Backend& be, const A& adapter, MatrixView<T> weights, MergeOptions options) {
  static_assert(
      requires { decltype(adapter.gate())::by_task; } || requires { decltype(adapter.gate())::can_be_by_task; },
      "loramix: merge for a task needs a gate of the task (static constexpr bool by_task)");
  detail::check_merge("merge", adapter, weights);
  const Index tasks = adapter.gate().tasks();
  if (tasks == 0) {
    fail(check::detail::about(ErrorCode::value, "merge", "task")
         << " is given, but this adapter's gate depends on the token: no exact merge exists; merge_average says what "
            "one costs");
  }
  if (options.task < 0 || options.task >= tasks) {
    fail(check::detail::about(ErrorCode::value, "merge", "task")
         << " is " << options.task << ", but there are " << tasks);
  }
  const Buffer<double> factors = detail::gate_of_task(be, adapter, options.task);
  Merged<T> merged(weights, {});
  detail::merge_product(be, adapter.A(), adapter.B(), factors.view(), adapter.scale(), weights, merged.report);
  detail::finish(merged.report, weights.rows * weights.cols);
  return merged;
}
template <class Backend, Adapter A, class T>
Merged<T> merge(const Backend& be, const A& adapter, Matrix<T>& weights, MergeOptions options) {
  return merge(be, adapter, weights.view(), options);
}

/// The same for an owning matrix.
template <class Backend, Adapter A, class T>
Merged<T> merge(const Backend& be, const A& adapter, Matrix<T>& weights) {
  return merge(be, adapter, weights.view());
}

}  // namespace LORAMIX_ABI
}  // namespace loramix
