/// Forward, backward and merge of adapters whose B is made from other parameters first: B′ = up(B, …).
///
/// An adapter is one by having A(), scale(), dropout(), static constexpr bool makes_up = true and
///     up(be, out)                    writes B′ [d_out, R]
///     add_up(be, adapter, d, into)   on its gradient: d = dB′ through the chain rule
///
/// Computes:    y (+)= s X̂ Aᵀ B′ᵀ and all gradients: those of the product with B′, then add_up.
/// Source:      MATH.md section 1, "Re-parametrised weights".
/// Reads:       parameters, x [T, d_in]; backward also what forward saved and dy [T, d_out].
/// Adds to:     y [T, d_out], dx [T, d_in], the gradient; Into::set assigns.
/// Errors:      as in adapter/forward.hpp, all before the first write.
/// Cost:        adapter.cost(T); B′ is made anew in both passes, but in a pack once (adapter/pack.hpp): d_out·R values of
///              workspace, dB′ as many.
/// Determinism: ADR 0005.
/// Example:     adapter/moslora.hpp, adapter/multi_lora.hpp; tests/adapter/moslora.cpp
#pragma once
#include <loramix/adapter/forward.hpp>
#include <loramix/adapter/merge.hpp>
#include <loramix/adapter/pack.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// An adapter whose product takes B′ for B.
template <class A>
concept ReparamAdapter = Adapter<A> && !ProductAdapter<A> && requires(const A& adapter) {
  adapter.A().rows;
  { adapter.scale() } -> std::convertible_to<double>;
  { adapter.dropout() } -> std::convertible_to<double>;
  requires A::makes_up;
};

/// What forward leaves for backward.
template <ReparamAdapter A>
using ReparamSaved = detail::SavedRanks<A>;

namespace detail {

template <ReparamAdapter A>
struct ReparamOps {
  using P = typename A::precision;
  using X = typename P::activation;
  using Acc = typename P::accumulation;
  using W = typename A::element;
  using G = typename P::gradient;
  using ShrinkOp = Shrink<X, W, Acc, Acc, A::space>;
  using ShrinkBackwardOp = ShrinkBackward<X, W, Acc, Acc, G, A::space>;
  using ExpandOp = Expand<Acc, Acc, X, Acc, A::space, Major::column>;
  using ExpandBackwardOp = ExpandBackward<Acc, Acc, X, Acc, Acc, A::space, Major::column>;
  using Up = MatrixView<Acc, A::space, Major::column>;

  /// Room for B′ or its gradient.
  static Up carve(Arena<A::space>& arena, const A& a) {
    const Index d_out = a.config().d_out, ranks = a.A().rows;
    return {arena.template matrix<Acc>(ranks, d_out).data, d_out, ranks};
  }
  static GateForm<Acc, A::space> open(Index tokens, const A& a) {
    return OpenGate<Acc, A::space>{}.form(tokens, a.A().rows);
  }

  /// y (+)= s X̂ Aᵀ B′ᵀ: checked, then, B′ being made, run.
  struct Product {
    ShrinkOp shrink;
    ExpandOp expand;

    Product(const A& a, MatrixView<const Acc, A::space, Major::column> up, MatrixView<const X, A::space> x,
            MatrixView<X, A::space> y, MatrixView<Acc, A::space> u, const Dropout& dropout, Into into)
        : shrink{a.A(), {}, x, dropout, u, {}}, expand{u, open(x.rows, a), up, Acc(a.scale()), y, into} {
      shrink.check();
      expand.check();
    }
    template <class Backend>
    void run(const Backend& be, Arena<A::space> work) const {
      run_checked(be, shrink, work);
      run_checked(be, expand, work);
    }
  };
};

/// A pack's B′.
template <ReparamAdapter A>
struct Prepared<A> {
  using Acc = typename A::precision::accumulation;
  template <class Backend, class Values>
  Prepared(const Backend& be, const Values& values) : up(values.config().d_out, values.A().rows) {
    values.up(be, up.view());
  }
  Matrix<Acc, A::space, Major::column> up;
};

}  // namespace detail

/// Bytes of reserve of a saving forward with at most `tokens` tokens.
template <ReparamAdapter A>
Index reserve_bytes(const A& adapter, Index tokens, Keep keep = Keep::z) {
  return detail::bytes_for<A::space>(
      [&](Arena<A::space>& arena) { detail::carve_ranks(arena, adapter, tokens, keep); });
}

/// Bytes of workspace of any call with at most `tokens` tokens.
template <class Backend, ReparamAdapter A>
Index workspace_bytes(const Backend& be, const A& adapter, Index tokens, Pass pass = Pass::forward) {
  using Ops = detail::ReparamOps<A>;
  check::at_least("workspace_bytes", "tokens", tokens, 0);
  Arena<A::space> counter = Arena<A::space>::counting();
  const MatrixView<const typename Ops::X, A::space> x{nullptr, tokens, adapter.config().d_in};
  const MatrixView<typename Ops::X, A::space> y{nullptr, tokens, adapter.config().d_out};
  const auto u = counter.template matrix<typename Ops::Acc>(tokens, adapter.A().rows);
  const auto up = Ops::carve(counter, adapter);
  const auto open = Ops::open(tokens, adapter);
  const Dropout dropped{.p16 = 1};  // the larger size: a query does not depend on the call's draws
  Index stage = detail::largest({scratch_bytes(be, typename Ops::ShrinkOp{adapter.A(), {}, x, dropped, u, {}}),
                                 scratch_bytes(be, typename Ops::ExpandOp{u, open, up, {}, y})});
  if (pass == Pass::backward) {
    const auto du = counter.template matrix<typename Ops::Acc>(tokens, adapter.A().rows);
    Ops::carve(counter, adapter);
    stage = detail::largest({stage, scratch_bytes(be, typename Ops::ExpandBackwardOp{u, open, up, {}, y, du}),
                             scratch_bytes(be, typename Ops::ShrinkBackwardOp{adapter.A(), {}, x, dropped, du, {}})});
  }
  return Arena<A::space>::with_alignment(counter.used() + stage);
}

/// y (+)= s X̂ Aᵀ B′ᵀ. Returns what backward needs where `options.save` is given.
template <class Backend, ReparamAdapter A>
ReparamSaved<A> forward(const Backend& be, const A& adapter,
                        MatrixView<const typename A::precision::activation, A::space> x,
                        MatrixView<typename A::precision::activation, A::space> y, Arena<A::space> work,
                        ForwardOptions<A::space> options = {}) {
  using Ops = detail::ReparamOps<A>;
  const Index tokens = x.rows;
  const Dropout dropout = detail::begin_forward(be, adapter, x, y, work, options);
  const bool save = options.save != nullptr;
  Arena<A::space> reserve = save ? *options.save : Arena<A::space>{};
  ReparamSaved<A> saved;
  if (save) saved = detail::carve_ranks(reserve, adapter, tokens, options.keep);
  const bool kept = save && options.keep == Keep::z;
  const auto u = kept ? saved.u : work.template matrix<typename Ops::Acc>(tokens, adapter.A().rows);
  const auto up = Ops::carve(work, adapter);
  const typename Ops::Product product(adapter, up, x, y, u, dropout, options.into);

  adapter.up(be, up);
  product.run(be, work);
  if (!save) return {};
  *options.save = reserve;
  saved.dropout = dropout;
  detail::mark_live(adapter, tokens, saved.origin);
  return saved;
}

/// Inference on a pack, which holds B′.
template <class Backend, ReparamAdapter A>
void forward(const Backend& be, const Packed<A>& packed,
             MatrixView<const typename A::precision::activation, A::space> x,
             MatrixView<typename A::precision::activation, A::space> y, Arena<A::space> work,
             const ForwardOptions<A::space>& options = {}) {
  using Values = typename Packed<A>::Values;
  using Ops = detail::ReparamOps<Values>;
  detail::check_inference(options);
  const Values& values = packed.values();
  const Dropout dropout = detail::begin_forward(be, values, x, y, work, options);
  const auto u = work.template matrix<typename Ops::Acc>(x.rows, values.A().rows);
  const typename Ops::Product product(values, packed.prepared().up.view(), x, y, u, dropout, options.into);
  product.run(be, work);
}

/// All gradients of one forward, once.
template <class Backend, ReparamAdapter A, class Gradient>
void backward(const Backend& be, const A& adapter, ReparamSaved<A>& saved,
              MatrixView<const typename A::precision::activation, A::space> x,
              MatrixView<const typename A::precision::activation, A::space> dy,
              MatrixView<typename A::precision::activation, A::space> dx, Gradient& grad, Arena<A::space> work,
              BackwardOptions options = {}) {
  using Ops = detail::ReparamOps<A>;
  using Acc = typename Ops::Acc;
  constexpr bool trained = detail::check_gradient_type<A, Gradient>();
  const Index tokens = x.rows;
  detail::begin_backward(be, adapter, saved, x, dy, dx, work);
  const bool recompute = saved.u.data == nullptr;
  const auto u = recompute ? work.template matrix<Acc>(tokens, adapter.A().rows) : saved.u;
  const auto du = work.template matrix<Acc>(tokens, adapter.A().rows);
  const auto up = Ops::carve(work, adapter);
  typename Ops::ExpandBackwardOp expand{u,        Ops::open(tokens, adapter), up, Acc(adapter.scale()), dy, du, {}, {},
                                        Into::set};
  typename Ops::ShrinkBackwardOp shrink{adapter.A(), {}, x,  saved.dropout,      du,           {},
                                        {},          {}, dx, options.parameters, options.input};
  if constexpr (trained) {
    detail::check_gradient_of("backward", adapter, grad);
    expand.dB = Ops::carve(work, adapter);
    shrink.dA = grad.A();
  }
  expand.check();
  shrink.check();

  adapter.up(be, up);
  if (recompute) detail::run_checked(be, typename Ops::ShrinkOp{adapter.A(), {}, x, saved.dropout, u, {}}, work);
  detail::run_checked(be, expand, work);
  if constexpr (trained) grad.add_up(be, adapter, expand.dB, options.parameters);
  detail::run_checked(be, shrink, work);
  detail::spend(saved.origin);
}

/// W ← W + s B′ A, B′ and the sum in double, rounded once.
template <class Backend, ReparamAdapter A, class T>
  requires(A::space == Space::host)
Merged<T> merge(const Backend& be, const A& adapter, MatrixView<T> weights) {
  const char* const op = "merge";
  const auto down = adapter.A();
  check::shape(op, "weights", weights, "d_out of the adapter", adapter.config().d_out, "d_in of the adapter",
               down.cols);
  A::visit(adapter, [&](const char* name, auto view, ParameterGroup) {
    check::disjoint(op, "weights", weights, name, view);
    detail::check_finite(op, name, view);
  });
  Matrix<double, Space::host, Major::column> up(weights.rows, down.rows);
  Matrix<double> wide(down.rows, down.cols);
  for (Index j = 0; j < down.rows; ++j) {
    for (Index c = 0; c < down.cols; ++c) wide(j, c) = widen<double>(down(j, c));
  }
  adapter.up(be, up.view());
  Merged<T> merged(weights, {});
  const VectorView<const double> open;
  detail::merge_product(be, MatrixView<const double>(wide), MatrixView<const double, Space::host, Major::column>(up),
                        open, adapter.scale(), weights, merged.report);
  detail::finish(merged.report, weights.rows * weights.cols);
  return merged;
}

}  // namespace LORAMIX_ABI
}  // namespace loramix
