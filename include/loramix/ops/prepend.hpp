/// Rows that stand before each sequence of a ragged batch: prompt tuning.
///
/// Computes:    y = for every sequence b: prompt [v, d], then its rows of x; sequence b of y begins at offsets[b] + b·v
///                                                                                                            (forward)
///              dprompt (+)= Σ_b dy[the first v rows of b], b ascending; dx (+)= the other rows             (backward)
/// Source:      MATH.md section 4, prompt tuning; Lester et al. 2021.
/// Reads:       prompt [v, d], x [T, d], sequences: offsets [n + 1] from 0 to T (Groups::by_segment); dy [T + n·v, d].
/// Writes:      y [T + n·v, d].
/// Adds to:     dprompt [v, d], dx [T, d]; or assigns with Into::set. Empty: not wanted.
/// Errors:      shape, stride, null, alias; offsets on the host. On the device rows that bad offsets leave without a
///              source are 0.
/// Cost:        one pass; a binary search per row.
/// Determinism: rows are copied; dprompt sums sequences in order.
/// Example:     tests/adapter/prompt.cpp
#pragma once
#include <loramix/gate/form.hpp>
#include <loramix/ops/rows.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

namespace detail {

/// The offsets are there, and on the host they ascend from 0 to T.
template <Space S>
void check_sequences(const char* op, const Groups<S>& sequences, Index tokens) {
  if (sequences.offsets == nullptr || sequences.ids != nullptr) {
    fail(check::detail::about(ErrorCode::null, op, "sequences") << " are missing: give Groups::by_segment(offsets, n)");
  }
  check::at_least(op, "sequences", sequences.segments, 0);
  if constexpr (S == Space::host) {
    check::same(op, "sequences", "first offset", sequences.offsets[0], "the first token", 0);
    check::same(op, "sequences", "last offset", sequences.offsets[sequences.segments], "the number of tokens", tokens);
    for (Index i = 0; i < sequences.segments; ++i) {
      check::at_least(op, "an offset of sequences", sequences.offsets[i + 1], sequences.offsets[i]);
    }
  }
}

/// T + n·v, refused where it overflows.
inline Index prepended_rows(const char* op, Index tokens, Index sequences, Index prompt_rows) {
  const Index added = check::detail::product(sequences, prompt_rows);
  Index rows;
  if (added < 0 || __builtin_add_overflow(tokens, added, &rows)) {
    fail(check::detail::about(ErrorCode::overflow, op, "y") << " of " << sequences << " sequences overflows");
  }
  return rows;
}

/// Row body over the rows of y.
template <class W, class X, Space S>
struct PrependRow {
  MatrixView<const W, S> prompt;
  MatrixView<const X, S> x;
  Groups<S> sequences;
  MatrixView<X, S> y;
  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index row) const {
    const Index v = prompt.rows;
    Index low = 0, high = sequences.segments;  // the last sequence that begins at or before this row
    while (high - low > 1) {
      const Index middle = low + (high - low) / 2;
      (sequences.offsets[middle] + middle * v <= row ? low : high) = middle;
    }
    const Index inside = row - sequences.offsets[low] - low * v, t = row - (low + 1) * v;
    const bool copied = t >= 0 && t < x.rows && inside >= v;
    X* const to = y.row(row);
    if (inside >= 0 && inside < v) {
      team.each(y.cols, [to, from = prompt.row(inside)](Index c) { to[c] = narrow<X>(from[c]); });
    } else if (copied) {
      team.each(y.cols, [to, from = x.row(t)](Index c) { to[c] = from[c]; });
    } else {
      team.each(y.cols, [to](Index c) { to[c] = narrow<X>(0.0f); });
    }
  }
};

/// Row body over the rows of dx.
template <class X, class Acc, Space S>
struct PrependInputGradient {
  MatrixView<const X, S> dy;
  Groups<S> sequences;
  MatrixView<X, S> dx;
  Index prompt_rows;
  Into into;
  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index t) const {
    const Index b = sequences.segment_of(t), row = t + (b + 1) * prompt_rows;
    if (b < 0 || row >= dy.rows)
      put_row(team, dx, t, into, [](Index) { return Acc(0); });
    else
      put_row(team, dx, t, into, [from = dy.row(row)](Index c) { return widen<Acc>(from[c]); });
  }
};

/// Row body over the rows of the prompt.
template <class X, class Acc, class G, Space S>
struct PrependPromptGradient {
  MatrixView<const X, S> dy;
  Groups<S> sequences;
  MatrixView<G, S> dprompt;
  Into into;
  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index i) const {
    team.each(dprompt.cols, [&](Index c) {
      Acc sum = Acc(0);
      for (Index b = 0; b < sequences.segments; ++b) {
        const Index row = sequences.offsets[b] + b * dprompt.rows + i;
        if (row >= 0 && row < dy.rows) sum += widen<Acc>(dy(row, c));
      }
      G& cell = dprompt(i, c);
      cell = narrow<G>(into == Into::add ? widen<Acc>(cell) + sum : sum);
    });
  }
};

}  // namespace detail

/// Forward.
template <class Backend, class W, class X, Space S>
void prepend_rows(const Backend& be, MatrixView<const W, S> prompt, MatrixView<const X, S> x, Groups<S> sequences,
                  MatrixView<X, S> y) {
  const char* const op = "prepend_rows";
  check::view(op, "x", x);
  check::shape(op, "prompt", prompt, "its rows", prompt.rows, "the columns of x", x.cols);
  detail::check_sequences(op, sequences, x.rows);
  check::shape(op, "y", y, "the tokens with a prompt per sequence",
               detail::prepended_rows(op, x.rows, sequences.segments, prompt.rows), "the columns of x", x.cols);
  check::disjoint(op, "y", y, "x", x);
  check::disjoint(op, "y", y, "prompt", prompt);
  for_rows<S>(be, y.rows, detail::PrependRow<W, X, S>{prompt, x, sequences, y});
}

/// Backward. `prompt_rows` is v, also where dprompt is not wanted.
template <class Acc, class Backend, class X, class G, Space S>
void prepend_rows_backward(const Backend& be, MatrixView<const X, S> dy, Groups<S> sequences, Index prompt_rows,
                           MatrixView<G, S> dprompt, Into parameters, MatrixView<X, S> dx, Into input) {
  const char* const op = "prepend_rows_backward";
  check::view(op, "dy", dy);
  check::at_least(op, "prompt_rows", prompt_rows, 0);
  const Index tokens = dy.rows - detail::prepended_rows(op, 0, sequences.segments, prompt_rows);
  detail::check_sequences(op, sequences, tokens);
  check::view(op, "dprompt", dprompt);
  check::view(op, "dx", dx);
  if (dprompt.data != nullptr) {
    check::shape(op, "dprompt", dprompt, "the rows of the prompt", prompt_rows, "the columns of dy", dy.cols);
    check::disjoint(op, "dprompt", dprompt, "dy", dy);
    check::disjoint(op, "dprompt", dprompt, "dx", dx);
  }
  if (dx.data != nullptr) {
    check::shape(op, "dx", dx, "the tokens without prompts", tokens, "the columns of dy", dy.cols);
    check::disjoint(op, "dx", dx, "dy", dy);
  }
  if (dprompt.data != nullptr) {
    for_rows<S>(be, prompt_rows, detail::PrependPromptGradient<X, Acc, G, S>{dy, sequences, dprompt, parameters});
  }
  if (dx.data != nullptr) {
    for_rows<S>(be, tokens, detail::PrependInputGradient<X, Acc, S>{dy, sequences, dx, prompt_rows, input});
  }
}

}  // namespace LORAMIX_ABI
}  // namespace loramix
