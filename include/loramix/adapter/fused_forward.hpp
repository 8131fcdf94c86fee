/// Forward, backward and merge of LoRA on a fused projection: one shrink, one expand per slice.
///
/// Computes:    y[:, slice i] (+)= s U_i B_iᵀ with U = X̂ Aᵀ, and all gradients (MATH.md section 1): the halves of the
///              product are public ops, so a fused projection is their composition.
/// Reads:       parameters, x [T, d_in]; backward also what forward saved and dy [T, d_out].
/// Adds to:     y's slices, dx, the gradient; Into::set assigns.
/// Errors:      as in adapter/forward.hpp, all before the first write.
/// Cost:        adapter.cost(T); no allocation.
/// Determinism: ADR 0005.
/// Example:     examples/engine
#pragma once
#include <loramix/adapter/forward.hpp>
#include <loramix/adapter/fused_lora.hpp>
#include <loramix/adapter/merge.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

template <class A>
inline constexpr bool is_fused = false;
template <class P, Space S, class T>
inline constexpr bool is_fused<FusedLora<P, S, T>> = true;

/// A FusedLora of any precision, space and element.
template <class A>
concept FusedAdapter = is_fused<A>;

/// What forward leaves for backward.
template <FusedAdapter A>
using FusedSaved = detail::SavedRanks<A>;

namespace detail {

template <FusedAdapter A>
struct FusedOps {
  using P = typename A::precision;
  using X = typename P::activation;
  using Acc = typename P::accumulation;
  using Score = typename P::score;
  using W = typename A::element;
  using G = typename P::gradient;
  using ShrinkOp = Shrink<X, W, Acc, Score, A::space>;
  using ShrinkBackwardOp = ShrinkBackward<X, W, Acc, Score, G, A::space>;
  using ExpandOp = Expand<Acc, W, X, Score, A::space, Major::column>;
  using ExpandBackwardOp = ExpandBackward<Acc, W, X, Score, G, A::space, Major::column>;

  static ExpandOp expand(const A& a, Index i, MatrixView<Acc, A::space> u, MatrixView<X, A::space> y, Into into) {
    const Index rank = a.config().rank;
    return {u.block(0, u.rows, a.first_rank(i), rank),
            OpenGate<Score, A::space>{}.form(u.rows, rank),
            a.B(i),
            Acc(a.scale()),
            slice_of(a, i, y),
            into};
  }
  static ExpandBackwardOp expand_backward(const A& a, Index i, MatrixView<Acc, A::space> u,
                                          MatrixView<const X, A::space> dy, MatrixView<Acc, A::space> du, Into into) {
    const Index rank = a.config().rank;
    return {u.block(0, u.rows, a.first_rank(i), rank),
            OpenGate<Score, A::space>{}.form(u.rows, rank),
            a.B(i),
            Acc(a.scale()),
            slice_of(a, i, dy),
            du,
            {},
            {},
            into};
  }
  template <class V>
  static MatrixView<V, A::space> slice_of(const A& a, Index i, MatrixView<V, A::space> y) {
    return y.col_range(a.config().slices[i].begin, a.config().slices[i].width);
  }
};

}  // namespace detail

/// Bytes of reserve of a saving forward with at most `tokens` tokens.
template <FusedAdapter A>
Index reserve_bytes(const A& adapter, Index tokens, Keep keep = Keep::z) {
  return detail::bytes_for<A::space>(
      [&](Arena<A::space>& arena) { detail::carve_ranks(arena, adapter, tokens, keep); });
}

/// Bytes of workspace of any call with at most `tokens` tokens.
template <class Backend, FusedAdapter A>
Index workspace_bytes(const Backend& be, const A& adapter, Index tokens, Pass pass = Pass::forward) {
  using Ops = detail::FusedOps<A>;
  check::at_least("workspace_bytes", "tokens", tokens, 0);
  Arena<A::space> counter = Arena<A::space>::counting();
  const MatrixView<const typename Ops::X, A::space> x{nullptr, tokens, adapter.config().d_in};
  const MatrixView<typename Ops::X, A::space> y{nullptr, tokens, adapter.config().d_out};
  const auto u = counter.template matrix<typename Ops::Acc>(tokens, adapter.A().rows);
  const Dropout dropped{.p16 = 1};  // the larger size: a query does not depend on the call's draws
  Index stage = scratch_bytes(be, typename Ops::ShrinkOp{adapter.A(), {}, x, dropped, u, {}});
  const auto larger = [&stage](Index bytes) { stage = bytes > stage ? bytes : stage; };
  const Index slices = adapter.config().slices.size();
  for (Index i = 0; i < slices; ++i) larger(scratch_bytes(be, Ops::expand(adapter, i, u, y, Into::add)));
  if (pass == Pass::backward) {
    const auto du = counter.template matrix<typename Ops::Acc>(tokens, adapter.A().rows);
    const auto part = counter.template matrix<typename Ops::Acc>(tokens, adapter.config().rank);
    for (Index i = 0; i < slices; ++i) {
      larger(scratch_bytes(be, Ops::expand_backward(adapter, i, u, y, part, Into::add)));
    }
    larger(scratch_bytes(be, typename Ops::ShrinkBackwardOp{adapter.A(), {}, x, dropped, du, {}, {}, {}, {}}));
  }
  return detail::sum_with_alignment<Arena<A::space>>(counter.used(), stage);
}

/// y[:, slice i] (+)= s U_i B_iᵀ. Returns what backward needs where `options.save` is given.
template <class Backend, FusedAdapter A>
FusedSaved<A> forward(const Backend& be, const A& adapter,
                      MatrixView<const typename A::precision::activation, A::space> x,
                      MatrixView<typename A::precision::activation, A::space> y, Arena<A::space> work,
                      ForwardOptions<A::space> options = {}) {
  using Ops = detail::FusedOps<A>;
  const Index tokens = x.rows;
  const Dropout dropout = detail::begin_forward(be, adapter, x, y, work, options);

  const bool save = options.save != nullptr;
  Arena<A::space> reserve = save ? *options.save : Arena<A::space>{};
  FusedSaved<A> saved;
  if (save) saved = detail::carve_ranks(reserve, adapter, tokens, options.keep);
  const bool kept = save && options.keep == Keep::z;
  const auto u = kept ? saved.u : work.template matrix<typename Ops::Acc>(tokens, adapter.A().rows);
  const typename Ops::ShrinkOp shrink{adapter.A(), {}, x, dropout, u, {}};
  shrink.check();
  for (Index i = 0; i < adapter.config().slices.size(); ++i) {
    Ops::expand(adapter, i, u, y, options.into).check();
  }

  detail::run_checked(be, shrink, work);
  for (Index i = 0; i < adapter.config().slices.size(); ++i) {
    detail::run_checked(be, Ops::expand(adapter, i, u, y, options.into), work);
  }
  if (!save) return {};
  *options.save = reserve;
  saved.dropout = dropout;
  detail::mark_live(adapter, tokens, saved.origin);
  return saved;
}

/// All gradients of one forward, once.
template <class Backend, FusedAdapter A, class Gradient>
void backward(const Backend& be, const A& adapter, FusedSaved<A>& saved,
              MatrixView<const typename A::precision::activation, A::space> x,
              MatrixView<const typename A::precision::activation, A::space> dy,
              MatrixView<typename A::precision::activation, A::space> dx, Gradient& grad, Arena<A::space> work,
              BackwardOptions options = {}) {
  using Ops = detail::FusedOps<A>;
  using Acc = typename Ops::Acc;
  constexpr bool trained = detail::check_gradient_type<A, Gradient>();
  const Index tokens = x.rows, rank = adapter.config().rank, slices = adapter.config().slices.size();
  detail::begin_backward(be, adapter, saved, x, dy, dx, work);

  const bool recompute = saved.u.data == nullptr;
  const auto u = recompute ? work.template matrix<Acc>(tokens, adapter.A().rows) : saved.u;
  const auto du = work.template matrix<Acc>(tokens, adapter.A().rows);
  const auto part = work.template matrix<Acc>(tokens, rank);
  const auto slice_backward = [&](Index i) {
    auto op = Ops::expand_backward(adapter, i, u, dy, part, options.parameters);
    if constexpr (trained) op.dB = grad.B(i);
    return op;
  };
  typename Ops::ShrinkBackwardOp shrink{adapter.A(), {}, x,  saved.dropout,      du,           {},
                                        {},          {}, dx, options.parameters, options.input};
  if constexpr (trained) {
    detail::check_gradient_of("backward", adapter, grad);
    shrink.dA = grad.A();
  }
  shrink.check();
  for (Index i = 0; i < slices; ++i) slice_backward(i).check();

  if (recompute) detail::run_checked(be, typename Ops::ShrinkOp{adapter.A(), {}, x, saved.dropout, u, {}}, work);
  if (slices == 0) for_rows<A::space>(be, tokens, detail::CopyRow<Acc, A::space>{{}, du});  // nobody else writes dU
  for (Index i = 0; i < slices; ++i) {
    detail::run_checked(be, slice_backward(i), work);
    // Slices that share U add into one dU, in order.
    const bool first = !adapter.config().shared_A || i == 0;
    using Store = detail::StoreRow<Acc, Acc, A::space>;
    for_rows<A::space>(be, tokens,
                       Store{part, du.block(0, tokens, adapter.first_rank(i), rank), first ? Into::set : Into::add});
  }
  detail::run_checked(be, shrink, work);
  detail::spend(saved.origin);
}

/// Folds every slice into its rows of W.
template <class Backend, FusedAdapter A, class T>
  requires(A::space == Space::host)
Merged<T> merge(const Backend& be, const A& adapter, MatrixView<T> weights) {
  const auto& config = adapter.config();
  check::shape("merge", "weights", weights, "d_out of the adapter", config.d_out, "d_in of the adapter", config.d_in);
  check::disjoint("merge", "weights", weights, "A", adapter.A());
  detail::check_finite("merge", "A", adapter.A());
  for (Index i = 0; i < config.slices.size(); ++i) {
    check::disjoint("merge", "weights", weights, "B", adapter.B(i));
    detail::check_finite("merge", "B", adapter.B(i));
  }
  Merged<T> merged(weights, {});
  for (Index i = 0; i < config.slices.size(); ++i) {
    const Slice slice = config.slices[i];
    const VectorView<const double> open;
    detail::merge_product(be, adapter.A().row_range(adapter.first_rank(i), config.rank), adapter.B(i), open,
                          adapter.scale(), weights.row_range(slice.begin, slice.width), merged.report);
  }
  detail::finish(merged.report, weights.rows * weights.cols);
  return merged;
}

}  // namespace LORAMIX_ABI
}  // namespace loramix
