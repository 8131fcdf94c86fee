/// Forward, backward and merge of IA3 on the tensor that it scales.
///
/// Computes:    y (+)= (l − 1) ∘ x;  dl = Σ_t dy ∘ x,  dx (+)= (l − 1) ∘ dy. x is the engine's X Wᵀ before its bias, or
///              with feed_forward the layer's input. In place, forward(be, ia3, y, y, …) turns y into l ∘ y, and
///              backward with dx = dy turns dy into l ∘ dy, the gradient that the engine's own backward goes on with.
/// Source:      MATH.md section 4.
/// Reads:       l [1, n], x [T, n], dy [T, n].
/// Adds to:     y [T, n], dx [T, n], the gradient; Into::set assigns.
/// Errors:      as in adapter/forward.hpp, before any write. Keep::recompute when y is x: x is gone then.
/// Cost:        one pass; reserve T·n accumulation values with Keep::z, workspace twice as many in backward.
/// Determinism: elements are alone; dl sums tokens in ColumnSum's order.
/// Example:     tests/adapter/ia3.cpp
#pragma once
#include <loramix/adapter/forward.hpp>
#include <loramix/adapter/ia3.hpp>
#include <loramix/adapter/merge_rows.hpp>
#include <loramix/ops/output_scale.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

template <class A>
inline constexpr bool is_ia3 = false;
template <class P, Space S, class T>
inline constexpr bool is_ia3<Ia3<P, S, T>> = true;

/// An Ia3 of any precision, space and element.
template <class A>
concept Ia3Adapter = is_ia3<A>;

/// What forward leaves for backward.
template <Ia3Adapter A>
struct Ia3Saved {
  detail::Origin origin;
  MatrixView<typename A::precision::accumulation, A::space> x;  // [T, n]; empty with Keep::recompute
};

namespace detail {
template <Ia3Adapter A>
Ia3Saved<A> carve_saved(Arena<A::space>& reserve, const A& a, Index tokens, Keep keep) {
  Ia3Saved<A> saved;
  saved.origin.stamp = carve_stamp(reserve);
  if (keep == Keep::z) {
    saved.x = reserve.template matrix<typename A::precision::accumulation>(tokens, a.config().width());
  }
  return saved;
}
}  // namespace detail

/// Bytes of reserve of a saving forward with at most `tokens` tokens.
template <Ia3Adapter A>
Index reserve_bytes(const A& adapter, Index tokens, Keep keep = Keep::z) {
  return detail::bytes_for<A::space>(
      [&](Arena<A::space>& arena) { detail::carve_saved(arena, adapter, tokens, keep); });
}

/// Bytes of workspace of any call with at most `tokens` tokens.
template <class Backend, Ia3Adapter A>
Index workspace_bytes(const Backend&, const A& adapter, Index tokens, Pass pass = Pass::forward) {
  using Acc = typename A::precision::accumulation;
  check::at_least("workspace_bytes", "tokens", tokens, 0);
  const Index bytes = output_scale_backward_bytes<Acc, A::space>(tokens, adapter.config().width());
  return Arena<A::space>::with_alignment(pass == Pass::backward ? 2 * bytes : 0);
}

/// y (+)= (l − 1) ∘ x. Returns what backward needs where `options.save` is given.
template <class Backend, Ia3Adapter A>
Ia3Saved<A> forward(const Backend& be, const A& adapter,
                    MatrixView<const typename A::precision::activation, A::space> x,
                    MatrixView<typename A::precision::activation, A::space> y, Arena<A::space> work,
                    ForwardOptions<A::space> options = {}) {
  using X = typename A::precision::activation;
  using Acc = typename A::precision::accumulation;
  detail::begin_forward(be, adapter, x, work, options);
  const bool save = options.save != nullptr;
  if (save && options.keep == Keep::recompute && x.data == y.data && !y.empty()) {
    fail(check::detail::about(ErrorCode::value, "forward", "keep")
         << " is recompute, but y is x: nothing is left of x");
  }
  Arena<A::space> reserve = save ? *options.save : Arena<A::space>{};
  Ia3Saved<A> saved;
  if (save) saved = detail::carve_saved(reserve, adapter, x.rows, options.keep);
  output_scale(be, OutputScale<X, typename A::element, Acc, X, A::space>{
                       {adapter.l().data, adapter.config().width()}, x, {}, y, saved.x, true, options.into});
  if (!save) return {};
  *options.save = reserve;
  detail::mark_live(adapter, x.rows, saved.origin);
  return saved;
}

/// All gradients of one forward, once. x is read with Keep::recompute only.
template <class Backend, Ia3Adapter A, class Gradient>
void backward(const Backend& be, const A& adapter, Ia3Saved<A>& saved,
              MatrixView<const typename A::precision::activation, A::space> x,
              MatrixView<const typename A::precision::activation, A::space> dy,
              MatrixView<typename A::precision::activation, A::space> dx, Gradient& grad, Arena<A::space> work,
              BackwardOptions options = {}) {
  using X = typename A::precision::activation;
  using Acc = typename A::precision::accumulation;
  constexpr bool trained = detail::check_gradient_type<A, Gradient>();
  detail::begin_backward(be, adapter, saved, x, work);
  const Index n = adapter.config().width();
  check::shape("backward", "x", x, "the number of tokens", saved.origin.tokens, "the size of l", n);
  check::shape("backward", "dy", dy, "the number of tokens", saved.origin.tokens, "the size of l", n);
  check::view("backward", "dx", dx);
  if (dx.data != nullptr) {
    check::shape("backward", "dx", dx, "the number of tokens", saved.origin.tokens, "the size of l", n);
  }
  const bool recompute = saved.x.data == nullptr;
  const auto kept = recompute ? work.template matrix<Acc>(x.rows, x.cols) : saved.x;
  OutputScaleBackward<typename A::element, Acc, X, X, A::space> op{{adapter.l().data, n}, kept, dy, dx,
                                                                   options.input,         true};
  MatrixView<typename A::precision::gradient, A::space> dl;
  if constexpr (trained) {
    detail::check_gradient_of("backward", adapter, grad);
    dl = grad.l();
  }
  op.check();
  if (recompute) {
    for_rows<A::space>(be, x.rows, detail::WidenRow<X, Acc, A::space>{x, kept});
  }
  output_scale_backward(be, op, dl, options.parameters, work);
  detail::spend(saved.origin);
}

/// W ← diag(l) W, or W diag(l) with feed_forward, in double, rounded once.
template <class Backend, Ia3Adapter A, class T>
  requires(A::space == Space::host)
Merged<T> merge(const Backend& be, const A& adapter, MatrixView<T> weights) {
  const auto& config = adapter.config();
  check::shape("merge", "weights", weights, "d_out of the adapter", config.d_out, "d_in of the adapter", config.d_in);
  check::disjoint("merge", "weights", weights, "l", adapter.l());
  detail::check_finite("merge", "l", adapter.l());
  Merged<T> merged(weights, {});
  detail::merge_rows(be, weights, merged.report, [&](Index o, double* row) {
    for (Index c = 0; c < config.d_in; ++c) row[c] *= widen<double>(adapter.l()(0, config.feed_forward ? c : o));
  });
  return merged;
}

}  // namespace LORAMIX_ABI
}  // namespace loramix
