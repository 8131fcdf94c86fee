/// Forward and backward of prompt tuning.
///
/// Computes:    y = prompt and x, sequence by sequence; dprompt (+)= Σ over sequences, dx (+)= the other rows
///              (ops/prepend.hpp).
/// Reads:       prompt [v, d], x [T, d], options.sequences: Groups::by_segment of x's rows; backward dy [T + n·v, d].
/// Writes:      y [T + n·v, d], whatever options.into says: rows move. sequence b of y begins at offsets[b] + b·v.
/// Adds to:     dx [T, d], the gradient; Into::set assigns.
/// Errors:      no sequences, shapes, alias, another adapter's or a spent Saved: before any write.
/// Cost:        one copy; no workspace, of the reserve 8 bytes.
/// Determinism: ops/prepend.hpp
/// Example:     tests/adapter/prompt.cpp
#pragma once
#include <loramix/adapter/prompt.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

template <class A>
inline constexpr bool is_prompt = false;
template <class P, Space S, class T>
inline constexpr bool is_prompt<Prompt<P, S, T>> = true;

/// A Prompt of any precision, space and element.
template <class A>
concept PromptAdapter = is_prompt<A>;

/// What forward leaves for backward: the batch's shape.
template <PromptAdapter A>
struct PromptSaved {
  detail::Origin origin;
  Groups<A::space> sequences;
};

/// Of a stamp alone (host).
template <PromptAdapter A>
Index reserve_bytes(const A&, Index, Keep = Keep::z) {
  return detail::bytes_for<A::space>([](Arena<A::space>& arena) { detail::carve_stamp(arena); });
}
/// None.
template <class Backend, PromptAdapter A>
Index workspace_bytes(const Backend&, const A&, Index tokens, Pass = Pass::forward) {
  check::at_least("workspace_bytes", "tokens", tokens, 0);
  return 0;
}

/// y = prompt and x, sequence by sequence. Returns what backward needs where `options.save` is given.
template <class Backend, PromptAdapter A>
PromptSaved<A> forward(const Backend& be, const A& adapter,
                       MatrixView<const typename A::precision::activation, A::space> x,
                       MatrixView<typename A::precision::activation, A::space> y, Arena<A::space> work,
                       ForwardOptions<A::space> options = {}) {
  detail::begin_forward(be, adapter, x, work, options);
  prepend_rows(be, adapter.rows(), x, options.sequences, y);
  if (options.save == nullptr) return {};
  PromptSaved<A> saved;
  saved.origin.stamp = detail::carve_stamp(*options.save);
  saved.sequences = options.sequences;
  detail::mark_live(adapter, x.rows, saved.origin);
  return saved;
}

/// All gradients of one forward, once. Of x only the number of rows is read.
template <class Backend, PromptAdapter A, class Gradient>
void backward(const Backend& be, const A& adapter, PromptSaved<A>& saved,
              MatrixView<const typename A::precision::activation, A::space> x,
              MatrixView<const typename A::precision::activation, A::space> dy,
              MatrixView<typename A::precision::activation, A::space> dx, Gradient& grad, Arena<A::space> work,
              BackwardOptions options = {}) {
  using Acc = typename A::precision::accumulation;
  constexpr bool trained = detail::check_gradient_type<A, Gradient>();
  detail::begin_backward(be, adapter, saved, x, work);
  check::shape("backward", "dy", dy, "the rows of y",
               adapter.output_rows(saved.origin.tokens, saved.sequences.segments), "the width of the prompt",
               adapter.config().d_in);
  MatrixView<typename A::precision::gradient, A::space> dprompt;
  if constexpr (trained) {
    detail::check_gradient_of("backward", adapter, grad);
    dprompt = grad.rows();
  }
  prepend_rows_backward<Acc>(be, dy, saved.sequences, adapter.config().rows, dprompt, options.parameters, dx,
                             options.input);
  detail::spend(saved.origin);
}

}  // namespace LORAMIX_ABI
}  // namespace loramix
