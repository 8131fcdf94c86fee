/// Forward, backward and merge of DoRA beside a frozen weight.
///
/// Computes:    y (+)= ΔY of adapter/dora.hpp, and its gradients with n constant: dm = Σ_t dY ∘ (X Wᵀ + s X̂AᵀBᵀ) / n;
///              dA, dB and dX of (m/n) ∘ dY through the low-rank part, and dX of (m/n − 1) ∘ dY through W.
/// Source:      MATH.md section 4. With `in_y` the engine's own X Wᵀ (before its bias) stands in y: y ← (m/n) ∘ (y +
///              …), no second product with W. Where backward is then given `passed`, it gets (m/n) ∘ dY, the gradient
///              of X Wᵀ for the engine's own backward, and dX holds the low-rank part alone; otherwise the engine adds
///              dY W as always.
/// Reads:       parameters, W [d_out, d_in], squares [d_out], x [T, d_in], backward also dy [T, d_out].
/// Adds to:     y [T, d_out], dx [T, d_in], the gradient; Into::set assigns. Writes passed [T, d_out].
/// Errors:      as in adapter/forward.hpp, before any write; in_y with Into::set, or with drop_base while dropout is
///              on.
/// Cost:        adapter.cost(T), dora_norms (a pack, prepack(be, dora, base), holds m/n); 2·T·d_in·d_out flop each way
///              where W is multiplied here.
/// Determinism: ADR 0005. With B = 0 and m = ‖W‖ by row (start_magnitude) ΔY is 0 bit for bit.
/// Example:     tests/adapter/dora.cpp
#pragma once
#include <loramix/adapter/dora.hpp>
#include <loramix/adapter/forward.hpp>
#include <loramix/adapter/merge_rows.hpp>
#include <loramix/adapter/pack.hpp>
#include <loramix/ops/output_scale.hpp>
#include <loramix/ops/row_norm.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

template <class A>
inline constexpr bool is_dora = false;
template <class P, Space S, class T>
inline constexpr bool is_dora<Dora<P, S, T>> = true;

/// A Dora of any precision, space and element.
template <class A>
concept DoraAdapter = is_dora<A>;

/// The frozen layer, in the activations' type.
template <DoraAdapter A>
struct DoraBase {
  using X = typename A::precision::activation;
  MatrixView<const X, A::space> weights;                                      // [d_out, d_in]
  VectorView<const typename A::precision::accumulation, A::space> squares{};  // [d_out] of row_squares()
  bool in_y = false;                                                          // y holds X Wᵀ
  MatrixView<X, A::space> passed{};                                           // [T, d_out] backward, with in_y
};

/// What forward leaves for backward.
template <DoraAdapter A>
struct DoraSaved {
  using Acc = typename A::precision::accumulation;
  detail::Origin origin;
  Dropout dropout;
  VectorView<Acc, A::space> ratio;    // [d_out] m/n
  VectorView<Acc, A::space> inverse;  // [d_out] 1/n, 0 where n is
  MatrixView<Acc, A::space> u;        // [T, r]; empty with Keep::recompute, and so is sum
  MatrixView<Acc, A::space> sum;      // [T, d_out] X Wᵀ + s X̂AᵀBᵀ
  bool in_y = false;
};

namespace detail {

/// Row body: m/n and 1/n; `inverse` holds n before.
template <class T, class Acc, Space S>
struct DoraRatio {
  MatrixView<const T, S> magnitude;  // [1, d_out]
  VectorView<Acc, S> ratio, inverse;
  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index i) const {
    team.once([&] {
      const Acc n = inverse[i];
      inverse[i] = n == Acc(0) ? Acc(0) : Acc(1) / n;
      ratio[i] = n == Acc(0) ? Acc(0) : widen<Acc>(magnitude(0, i)) / n;
    });
  }
};
/// Row body: m = √squares.
template <class T, class Acc, Space S>
struct DoraStart {
  VectorView<const Acc, S> squares;
  MatrixView<T, S> magnitude;
  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index i) const {
    using std::sqrt;
    team.once([&] { magnitude(0, i) = narrow<T>(sqrt(squares[i])); });
  }
};

/// The ops that DoRA is made of.
template <DoraAdapter A>
struct DoraOps {
  using P = typename A::precision;
  using X = typename P::activation;
  using Acc = typename P::accumulation;
  using W = typename A::element;
  using G = typename P::gradient;
  static constexpr Space space = A::space;
  using View = MatrixView<const X, space>;
  using Sum = MatrixView<Acc, space>;
  using ShrinkOp = Shrink<X, W, Acc, Acc, space>;
  using BaseOp = Shrink<X, X, Acc, Acc, space>;
  using ExpandOp = Expand<Acc, W, Acc, Acc, space, Major::column>;
  using ShrinkBackwardOp = ShrinkBackward<X, W, Acc, Acc, G, space>;
  using BaseBackwardOp = ShrinkBackward<X, X, Acc, Acc, G, space>;
  using ExpandBackwardOp = ExpandBackward<Acc, W, Acc, Acc, G, space, Major::column>;
  using NormsOp = DoraNorms<X, W, Acc, space>;
  template <class In>
  using ScaleOp = OutputScale<In, Acc, Acc, X, space>;
  template <class Passed>
  using ScaleBackwardOp = OutputScaleBackward<Acc, Acc, X, Passed, space>;

  static OpenGate<Acc, space> gate() { return {}; }
  static Dropout base_dropout(const A& a, Dropout dropout) { return a.config().drop_base ? dropout : Dropout{}; }
  static View sized(Index rows, Index cols) { return {nullptr, rows, cols}; }
  static NormsOp norms(const A& a, const DoraBase<A>& base, VectorView<Acc, space> out) {
    return {base.weights, base.squares, a.A(), a.B(), Acc(a.scale()), out};
  }
  static ExpandOp expand(const A& a, MatrixView<const Acc, space> u, Sum low) {
    return {u, gate().form(u.rows, a.config().rank), a.B(), Acc(a.scale()), low, Into::set};
  }
  static void check_base(const char* op, const A& a, const DoraBase<A>& base) {
    check::shape(op, "W", base.weights, "d_out of the adapter", a.config().d_out, "d_in of the adapter",
                 a.config().d_in);
    check::view(op, "squares", base.squares);
    check::same(op, "squares", "size", base.squares.size, "d_out of the adapter", a.config().d_out);
  }
};

template <DoraAdapter A>
DoraSaved<A> carve_saved(Arena<A::space>& arena, const A& a, Index tokens, bool with_u, bool training) {
  using Acc = typename A::precision::accumulation;
  DoraSaved<A> saved;
  if (training) saved.origin.stamp = carve_stamp(arena);
  saved.ratio = arena.template vector<Acc>(a.config().d_out);
  saved.inverse = arena.template vector<Acc>(a.config().d_out);
  if (with_u) saved.u = arena.template matrix<Acc>(tokens, a.config().rank);
  if (with_u) saved.sum = arena.template matrix<Acc>(tokens, a.config().d_out);
  return saved;
}

/// m/n and 1/n by row.
template <class Backend, DoraAdapter A>
void dora_ratios(const Backend& be, const A& a, const DoraBase<A>& base,
                 VectorView<typename A::precision::accumulation, A::space> ratio,
                 VectorView<typename A::precision::accumulation, A::space> inverse, Arena<A::space> work) {
  using Ops = DoraOps<A>;
  dora_norms(be, Ops::norms(a, base, inverse), work);
  for_rows<A::space>(be, ratio.size,
                     DoraRatio<typename Ops::W, typename Ops::Acc, A::space>{a.magnitude(), ratio, inverse});
}

/// What is left when m/n is there: checked first, then run.
template <DoraAdapter A>
struct DoraProduct {
  using Ops = DoraOps<A>;
  using X = typename Ops::X;
  using Acc = typename Ops::Acc;
  static constexpr Space space = A::space;
  MatrixView<const X, space> x;
  MatrixView<X, space> y;
  VectorView<const Acc, space> ratio;
  MatrixView<Acc, space> sum, product, low;  // [T, d_out], sum may be empty
  bool in_y;
  Into into;
  typename Ops::BaseOp through_base;
  typename Ops::ShrinkOp shrink;
  typename Ops::ExpandOp expand;

  DoraProduct(const A& a, const DoraBase<A>& base, MatrixView<const X, space> x_, MatrixView<X, space> y_,
              VectorView<const Acc, space> ratio_, MatrixView<Acc, space> u, MatrixView<Acc, space> sum_,
              const Dropout& dropout, Into into_, Arena<space>& work)
      : x(x_),
        y(y_),
        ratio(ratio_),
        sum(sum_),
        product(work.template matrix<Acc>(x_.rows, a.config().d_out)),
        low(work.template matrix<Acc>(x_.rows, a.config().d_out)),
        in_y(base.in_y),
        into(into_),
        through_base{base.weights, {}, x, Ops::base_dropout(a, dropout), product, {}},
        shrink{a.A(), {}, x, dropout, u, {}},
        expand(Ops::expand(a, u, low)) {
    Ops::check_base("forward", a, base);
    check::disjoint("forward", "y", y, "W", base.weights);
    if (base.in_y && (into == Into::set || through_base.dropout.on())) {
      fail(check::detail::about(ErrorCode::value, "forward", "in_y")
           << " says that y holds X Wᵀ: that needs Into::add, and no drop_base while dropout is on");
    }
    shrink.check();
    expand.check();
  }
  template <class Backend>
  void run(const Backend& be, Arena<space> work) const {
    run_checked(be, shrink, work);
    run_checked(be, expand, work);
    if (in_y) {
      output_scale(be, typename Ops::template ScaleOp<X>{ratio, y, low, y, sum});
    } else {
      execute(be, through_base, work);
      output_scale(be, typename Ops::template ScaleOp<Acc>{ratio, product, low, y, sum, true, into});
    }
  }
};

/// A pack's m/n.
template <DoraAdapter A>
struct Prepared<A> {
  using Acc = typename A::precision::accumulation;
  template <class Backend, class Values>
  Prepared(const Backend& be, const Values& values, const DoraBase<A>& base) : ratio(values.config().d_out) {
    using Memory = Arena<A::space>;
    const DoraBase<Values> frozen{base.weights, base.squares};
    DoraOps<Values>::check_base("prepack", values, frozen);
    DoraOps<Values>::norms(values, frozen, ratio.view()).check();
    Buffer<Acc, A::space> inverse(values.config().d_out);
    const Index bytes = dora_norms_bytes(be, DoraOps<Values>::norms(values, frozen, ratio.view()));
    Buffer<std::byte, A::space> scratch(Memory::with_alignment(bytes));
    dora_ratios(be, values, frozen, ratio.view(), inverse.view(), Memory{scratch.data(), scratch.size()});
  }
  Buffer<Acc, A::space> ratio;
};

}  // namespace detail

/// m = ‖W‖ by row: where DoRA begins.
template <class Backend, DoraAdapter A>
void start_magnitude(const Backend& be, A& adapter, const DoraBase<A>& base) {
  detail::DoraOps<A>::check_base("start_magnitude", adapter, base);
  using Body = detail::DoraStart<typename A::element, typename A::precision::accumulation, A::space>;
  for_rows<A::space>(be, adapter.config().d_out, Body{base.squares, adapter.magnitude()});
}

/// Bytes of reserve of a saving forward with at most `tokens` tokens.
template <DoraAdapter A>
Index reserve_bytes(const A& adapter, Index tokens, Keep keep = Keep::z) {
  return detail::bytes_for<A::space>(
      [&](Arena<A::space>& arena) { detail::carve_saved(arena, adapter, tokens, keep == Keep::z, true); });
}

/// Bytes of workspace of any call with at most `tokens` tokens, with or without in_y; what serves a backward serves its
/// forward.
template <class Backend, DoraAdapter A>
Index workspace_bytes(const Backend& be, const A& adapter, Index tokens, Pass pass = Pass::forward) {
  using Ops = detail::DoraOps<A>;
  using Acc = typename Ops::Acc;
  check::at_least("workspace_bytes", "tokens", tokens, 0);
  const Index d_in = adapter.config().d_in, d_out = adapter.config().d_out, rank = adapter.config().rank;
  const auto x = Ops::sized(tokens, d_in), w = Ops::sized(d_out, d_in);
  Arena<A::space> counter = Arena<A::space>::counting();
  if (pass == Pass::forward) {
    detail::carve_saved(counter, adapter, tokens, true, false);
  } else {
    counter.template matrix<Acc>(tokens, rank);   // u, recomputed
    counter.template matrix<Acc>(tokens, d_out);  // sum, recomputed
    counter.template matrix<Acc>(tokens, rank);   // du
  }
  counter.template matrix<Acc>(tokens, d_out);  // the base product, or a scaled dy
  counter.template matrix<Acc>(tokens, d_out);  // the low-rank part
  const Dropout dropped{.p16 = 1};              // the larger size
  const MatrixView<Acc, A::space> u{nullptr, tokens, rank}, y{nullptr, tokens, d_out};
  Index stage = detail::largest({scratch_bytes(be, typename Ops::ShrinkOp{adapter.A(), {}, x, dropped, {}, {}}),
                                 scratch_bytes(be, typename Ops::BaseOp{w, {}, x, dropped, {}, {}}),
                                 scratch_bytes(be, Ops::expand(adapter, u, y)),
                                 dora_norms_bytes(be, Ops::norms(adapter, {w}, {}))});
  if (pass == Pass::backward) {
    const auto open = Ops::gate().form(tokens, rank);
    stage = detail::largest({stage, scratch_bytes(be, typename Ops::ExpandBackwardOp{u, open, adapter.B(), {}, y, u}),
                             scratch_bytes(be, typename Ops::ShrinkBackwardOp{adapter.A(), {}, x, dropped, u, {}}),
                             scratch_bytes(be, typename Ops::BaseBackwardOp{w, {}, x, dropped, y, {}}),
                             output_scale_backward_bytes<Acc, A::space>(tokens, d_out)});
  }
  const Index here = Arena<A::space>::with_alignment(counter.used() + stage);
  return pass == Pass::forward ? here : detail::largest({here, workspace_bytes(be, adapter, tokens, Pass::forward)});
}

/// y (+)= ΔY, or y ← (m/n) ∘ (y + s X̂AᵀBᵀ) with base.in_y. Returns what backward needs where `options.save` is given.
template <class Backend, DoraAdapter A>
DoraSaved<A> forward(const Backend& be, const A& adapter, const DoraBase<A>& base,
                     MatrixView<const typename A::precision::activation, A::space> x,
                     MatrixView<typename A::precision::activation, A::space> y, Arena<A::space> work,
                     ForwardOptions<A::space> options = {}) {
  using Ops = detail::DoraOps<A>;
  using Acc = typename Ops::Acc;
  const Index tokens = x.rows;
  const Dropout dropout = detail::begin_forward(be, adapter, x, y, work, options);
  const bool save = options.save != nullptr, keep = save && options.keep == Keep::z;
  Arena<A::space> reserve = save ? *options.save : Arena<A::space>{};
  DoraSaved<A> saved = detail::carve_saved(save ? reserve : work, adapter, tokens, keep, save);
  const auto u = keep ? saved.u : work.template matrix<Acc>(tokens, adapter.config().rank);
  const detail::DoraProduct<A> product(adapter, base, x, y, saved.ratio, u, saved.sum, dropout, options.into, work);
  Ops::norms(adapter, base, saved.inverse).check();

  detail::dora_ratios(be, adapter, base, saved.ratio, saved.inverse, work);
  product.run(be, work);
  if (!save) return {};
  *options.save = reserve;
  saved.dropout = dropout;
  saved.in_y = base.in_y;
  detail::mark_live(adapter, tokens, saved.origin);
  return saved;
}

/// The pack of `adapter` on the frozen layer `base`; it holds m/n.
template <class Backend, DoraAdapter A>
Packed<A> prepack(const Backend& be, const A& adapter, const DoraBase<A>& base, Pass pass = Pass::forward) {
  detail::check_pass(pass);
  return Packed<A>(be, adapter, base);
}

/// Inference on a pack; `base` is the layer for which it was made.
template <class Backend, DoraAdapter A>
void forward(const Backend& be, const Packed<A>& packed, const DoraBase<A>& base,
             MatrixView<const typename A::precision::activation, A::space> x,
             MatrixView<typename A::precision::activation, A::space> y, Arena<A::space> work,
             const ForwardOptions<A::space>& options = {}) {
  using Values = typename Packed<A>::Values;
  using Acc = typename A::precision::accumulation;
  detail::check_inference(options);
  const Values& values = packed.values();
  const Dropout dropout = detail::begin_forward(be, values, x, y, work, options);
  const auto u = work.template matrix<Acc>(x.rows, values.config().rank);
  const detail::DoraProduct<Values> product(values, {base.weights, base.squares, base.in_y}, x, y,
                                            packed.prepared().ratio.view(), u, {}, dropout, options.into, work);
  product.run(be, work);
}

/// All gradients of one forward, once.
template <class Backend, DoraAdapter A, class Gradient>
void backward(const Backend& be, const A& adapter, const DoraBase<A>& base, DoraSaved<A>& saved,
              MatrixView<const typename A::precision::activation, A::space> x,
              MatrixView<const typename A::precision::activation, A::space> dy,
              MatrixView<typename A::precision::activation, A::space> dx, Gradient& grad, Arena<A::space> work,
              BackwardOptions options = {}) {
  using Ops = detail::DoraOps<A>;
  using Acc = typename Ops::Acc;
  using X = typename Ops::X;
  const char* const op = "backward";
  constexpr bool trained = detail::check_gradient_type<A, Gradient>();
  const Index tokens = x.rows, d_out = adapter.config().d_out, rank = adapter.config().rank;
  detail::begin_backward(be, adapter, saved, x, dy, dx, work);
  Ops::check_base(op, adapter, base);
  check::view(op, "passed", base.passed);
  if (base.passed.data != nullptr) {
    if (!saved.in_y) {
      fail(check::detail::about(ErrorCode::value, op, "passed")
           << " is for a forward with in_y: here dX has all of it");
    }
    check::shape(op, "passed", base.passed, "the number of tokens", tokens, "d_out of the adapter", d_out);
    check::disjoint(op, "passed", base.passed, "dy", dy);
    check::disjoint(op, "passed", base.passed, "x", x);
    check::disjoint(op, "passed", base.passed, "dx", dx);
  }
  const bool recompute = saved.u.data == nullptr && saved.sum.data == nullptr;
  const auto u = recompute ? work.template matrix<Acc>(tokens, rank) : saved.u;
  const auto sum = recompute ? work.template matrix<Acc>(tokens, d_out) : saved.sum;
  const auto du = work.template matrix<Acc>(tokens, rank);
  const auto scaled = work.template matrix<Acc>(tokens, d_out);
  const Dropout base_dropout = Ops::base_dropout(adapter, saved.dropout);
  typename Ops::ExpandBackwardOp expand{
      u, Ops::gate().form(tokens, rank), adapter.B(), Acc(adapter.scale()), scaled, du, {}, {}, options.parameters};
  typename Ops::ShrinkBackwardOp shrink{adapter.A(), {}, x,  saved.dropout,      du,           {},
                                        {},          {}, dx, options.parameters, options.input};
  const typename Ops::BaseBackwardOp through_base{base.weights, {}, x,  base_dropout,       scaled,   {},
                                                  {},           {}, dx, options.parameters, Into::add};
  MatrixView<typename Ops::G, A::space> dm;
  if constexpr (trained) {
    detail::check_gradient_of(op, adapter, grad);
    expand.dB = grad.B();
    shrink.dA = grad.A();
    dm = grad.magnitude();
    check::disjoint(op, "grad m", dm, "dy", dy);
  }
  expand.check();
  shrink.check();
  through_base.check();
  check::disjoint(op, "dx", dx, "dy", dy);

  if (recompute) {
    const auto low = work.template matrix<Acc>(tokens, d_out);
    execute(be, typename Ops::ShrinkOp{adapter.A(), {}, x, saved.dropout, u, {}}, work);
    execute(be, typename Ops::BaseOp{base.weights, {}, x, base_dropout, sum, {}}, work);
    execute(be, Ops::expand(adapter, u, low), work);
    for_rows<A::space>(be, tokens, detail::StoreRow<Acc, Acc, A::space>{low, sum, Into::add});
  }
  using ToScaled = typename Ops::template ScaleBackwardOp<Acc>;
  output_scale_backward(be, ToScaled{saved.ratio, sum, dy, scaled, Into::set, false, saved.inverse}, dm,
                        options.parameters, work);
  if (base.passed.data != nullptr) {
    for_rows<A::space>(be, tokens, detail::StoreRow<Acc, X, A::space>{scaled, base.passed, Into::set});
  }
  detail::run_checked(be, expand, work);
  detail::run_checked(be, shrink, work);
  if (dx.data != nullptr && base.passed.data == nullptr) {
    for_rows<A::space>(be, tokens, ToScaled{saved.ratio, {}, dy, scaled, Into::set, true});
    detail::run_checked(be, through_base, work);
  }
  detail::spend(saved.origin);
}

/// W ← (m/n) ∘ (W + s B A) in double, rounded once; n = 0, which is what forward takes for it (ops/row_norm.hpp), gives 0.
template <class Backend, DoraAdapter A, class T>
  requires(A::space == Space::host)
Merged<T> merge(const Backend& be, const A& adapter, MatrixView<T> weights) {
  using Acc = typename A::precision::accumulation;
  const char* const op = "merge";
  check::shape(op, "weights", weights, "d_out of the adapter", adapter.config().d_out, "d_in of the adapter",
               adapter.config().d_in);
  const auto safe = [&](const char* name, auto view) {
    check::disjoint(op, "weights", weights, name, view);
    detail::check_finite(op, name, view);
  };
  safe("A", adapter.A());
  safe("B", adapter.B());
  safe("m", adapter.magnitude());
  Merged<T> merged(weights, {});
  detail::merge_rows(be, weights, merged.report, [&](Index o, double* row) {
    double squares = 0, of_base = 0, of_change = 0;
    for (Index c = 0; c < weights.cols; ++c) {
      double sum = 0;
      for (Index j = 0; j < adapter.A().rows; ++j) {
        sum += widen<double>(adapter.B()(o, j)) * widen<double>(adapter.A()(j, c));
      }
      const double change = adapter.scale() * sum;
      of_base += row[c] * row[c];
      of_change += change * change;
      row[c] += change;
      squares += row[c] * row[c];
    }
    const double n =
        std::sqrt(detail::without_rounding(squares, of_base, of_change, adapter.A().rows, detail::rounding_of<Acc>()));
    const double ratio = n == 0 ? 0 : widen<double>(adapter.magnitude()(0, o)) / n;
    for (Index c = 0; c < weights.cols; ++c) row[c] *= ratio;
  });
  return merged;
}

}  // namespace LORAMIX_ABI
}  // namespace loramix
