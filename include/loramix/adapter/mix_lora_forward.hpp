/// Forward and backward of a MixLoRA block in three stages, between the engine's own products.
///
///     auto saved = lm::route(be, mix, x, reserve, work, {.key = key, .down_site = lm::site("layers.0.mlp.down_proj")});
///     // engine: u = W1 x, v = W3 x
///     lm::mix(be, mix, saved, u, v, hbar, work);                       // h̄ = Σ g_e h_e, which the engine owns
///     // engine: y = W2 h̄
///     lm::finish(be, mix, saved, y, work);                             // y += s Σ g_e B2_e A2_e ĥ_e
///
///     lm::finish_backward(be, mix, saved, dy, grad, work);
///     // engine: dh̄ = dy W2
///     lm::mix_backward(be, mix, saved, u, v, dhbar, du, dv, grad, work);
///     // engine: dx = du W1 + dv W3
///     lm::route_backward(be, mix, saved, x, dx, grad, work);           // dx += ours
///
/// Computes:    adapter/mix_lora.hpp with one base product W2 h̄; one pass over x for both projections and the router.
/// Source:      MATH.md section 4; DESIGN.md section 1.
/// Reads:       parameters, x [T, d_in], u, v [T, d_hidden]; backward also dy [T, d_out], dh̄ [T, d_hidden].
/// Writes:      h̄ [T, d_hidden]; backward: du, dv [T, d_hidden]; all assigned.
/// Adds to:     y [T, d_out]; backward: dx [T, d_in] (or empty) and the gradient's parameters (or lm::frozen);
///              Into::set assigns. Losses add to saved.scores before route_backward.
/// Errors:      shape, stride, null, alias, overflow, small workspace or reserve: before any write. Stages out of order;
///              another adapter's saved; dropout without a site of its own for the down projection; backward of a call
///              without draws though the adapter has dropout (say .dropout_off); in debug builds changed weights.
/// Cost:        adapter.cost(T); workspace_bytes and reserve_bytes; no allocation. The reserve holds what the stages hand
///              each other, 6·E·r accumulation values per token and the router's: inference takes one too, and resets it.
/// Determinism: ADR 0005.
/// Example:     tests/adapter/mix_lora.cpp
#pragma once
#include <loramix/adapter/forward.hpp>
#include <loramix/adapter/mix_lora.hpp>
#include <loramix/adapter/pack.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

template <class A>
inline constexpr bool is_mix_lora = false;
template <class P, Space S, class T>
inline constexpr bool is_mix_lora<MixLora<P, S, T>> = true;

/// A MixLora of any precision, space and element.
template <class A>
concept MixLoraAdapter = is_mix_lora<A>;

/// What a block's first stage may be told.
template <Space S>
struct MixLoraOptions {
  Key key = no_draws;           // draws of this call; its site is that of x, shared by gate_proj and up_proj
  std::uint64_t down_site = 0;  // the down projection's, shared by the experts
  bool dropout_off = false;     // training without draws though the adapter has dropout, on purpose
  Groups<S> sequences{};
  VectorView<const std::uint8_t, S> valid{};    // [T]
  VectorView<const float, S> selection_bias{};  // [E]
};

/// The stages of a block, in the order in which they run.
enum class MixLoraStage { none, routed, mixed, finished, down_done, middle_done };

/// What the stages hand each other: views into the reserve, trivially copyable.
template <MixLoraAdapter A>
struct MixLoraSaved {
  using P = typename A::precision;
  using Acc = typename P::accumulation;
  using Score = typename P::score;
  using State = typename decltype(std::declval<const A&>().gate())::State;
  detail::Origin origin;
  Dropout dropout, down_dropout;
  MatrixView<Acc, A::space> z, dz;    // [T, 2·E·r] gate_proj's ranks, then up_proj's
  MatrixView<Acc, A::space> z2, dz2;  // [T, E·r] gated
  MatrixView<Score, A::space> h, dh;  // [T, n] the router's logits and their gradient
  State state{}, dstate{};
  GateCall<A::space> call;
  Scores<Score, A::space> scores;  // what losses and telemetry take
  bool dropout_off = false;
  MixLoraStage stage = MixLoraStage::none;
};

namespace detail {

/// The ops of a block.
template <MixLoraAdapter A>
struct MixLoraOps {
  static constexpr Space space = A::space;
  using P = typename A::precision;
  using X = typename P::activation;
  using Acc = typename P::accumulation;
  using Score = typename P::score;
  using W = typename A::element;
  using G = typename P::gradient;
  using Saved = MixLoraSaved<A>;
  using ShrinkOp = Shrink<X, W, Acc, Score, space>;
  using ShrinkBackwardOp = ShrinkBackward<X, W, Acc, Score, G, space>;
  using MixOp = MixExperts<X, W, Acc, Score, space, Major::column>;
  using MixBackwardOp = MixExpertsBackward<X, W, Acc, Score, G, space, Major::column>;
  using ExpandOp = Expand<Acc, W, X, Score, space, Major::column>;
  using ExpandBackwardOp = ExpandBackward<Acc, W, X, Score, G, space, Major::column>;
  template <class T>
  using View = MatrixView<T, space>;

  static Saved carve(Arena<space>& arena, const A& a, Index tokens) {
    const auto ranks = [&](Index n) { return arena.template matrix<Acc>(tokens, n); };
    Saved saved;
    saved.origin.stamp = carve_stamp(arena);
    saved.z = ranks(2 * a.ranks());
    saved.dz = ranks(2 * a.ranks());
    saved.z2 = ranks(a.ranks());
    saved.dz2 = ranks(a.ranks());
    saved.h = arena.template matrix<Score>(tokens, a.side().rows);
    saved.dh = arena.template matrix<Score>(tokens, a.side().rows);
    saved.state = a.gate().carve(arena, tokens, true);
    saved.dstate = a.gate().carve(arena, tokens, false);
    return saved;
  }
  static GateForm<Score, space> gate(const A& a, const Saved& s) {
    auto form = a.gate().form(s.state, s.call, a.ranks());
    form.computed = true;
    return form;
  }
  static ShrinkOp shrink(const A& a, const Saved& s, View<const X> x) {
    return {a.A13(), a.side(), x, s.dropout, s.z, s.h};
  }
  static MixOp mix(const A& a, const Saved& s, View<const X> u, View<const X> v, View<X> hbar) {
    const Index R = a.ranks();
    return {s.z.col_range(0, R), s.z.col_range(R, R), u,    v,   a.B1(), a.B3(), a.A2(), gate(a, s),
            Acc(a.scale()),      s.down_dropout,      hbar, s.z2};
  }
  static MixBackwardOp mix_backward(const A& a, const Saved& s, View<const X> u, View<const X> v, View<const X> dhbar,
                                    View<X> du, View<X> dv, Into into) {
    const Index R = a.ranks();
    MixBackwardOp op{s.z.col_range(0, R),
                     s.z.col_range(R, R),
                     u,
                     v,
                     a.B1(),
                     a.B3(),
                     a.A2(),
                     gate(a, s),
                     Acc(a.scale()),
                     s.down_dropout,
                     dhbar,
                     s.dz2,
                     du,
                     dv,
                     s.dz.col_range(0, R),
                     s.dz.col_range(R, R)};
    op.dweights = s.dstate.weights;
    op.parameters = into;
    return op;
  }
  static ExpandOp expand(const A& a, const Saved& s, View<X> y, Into into) {
    return {s.z2, OpenGate<Score, space>{}.form(s.z2.rows, a.ranks()), a.B2(), Acc(a.scale()), y, into};
  }
  static ExpandBackwardOp expand_backward(const A& a, const Saved& s, View<const X> dy, Into into) {
    return {s.z2, OpenGate<Score, space>{}.form(s.z2.rows, a.ranks()), a.B2(), Acc(a.scale()), dy, s.dz2, {}, {}, into};
  }
  static ShrinkBackwardOp shrink_backward(const A& a, const Saved& s, View<const X> x, View<X> dx,
                                          BackwardOptions options) {
    return {a.A13(), a.side(), x, s.dropout, s.dz, s.dh, {}, {}, dx, options.parameters, options.input};
  }

  /// The router's side rows as a shrink of their own, on the jittered copy `x`.
  static ShrinkOp split_router(ShrinkOp& all, View<const X> x) {
    const ShrinkOp router{all.A.row_range(0, 0), all.side, x, {}, all.u.col_range(0, 0), all.h};
    all.side = {};
    all.h = {};
    return router;
  }
  static ShrinkBackwardOp split_router(ShrinkBackwardOp& all, View<const X> x, View<X> dx) {
    const ShrinkBackwardOp router{
        all.A.row_range(0, 0), all.side, x, {}, all.du.col_range(0, 0), all.dh, {}, all.dside, dx,
        all.parameters,        Into::set};
    all.side = {};
    all.dh = {};
    all.dside = {};
    return router;
  }
};

/// A stage's first check: this adapter's saved, right after stage `before`.
template <MixLoraAdapter A>
void check_stage(const char* op, const A& adapter, const MixLoraSaved<A>& saved, MixLoraStage before) {
  if (saved.stage != before) {
    constexpr const char* names[] = {"nothing", "route", "mix", "finish", "finish_backward", "mix_backward"};
    fail(check::detail::about(ErrorCode::state, op, "saved")
         << " must come from " << names[static_cast<int>(before)] << ", but the last stage that ran is "
         << names[static_cast<int>(saved.stage)]);
  }
  check_origin(op, adapter, saved.origin);
}
/// A stage's op, in memory apart from what the stages keep.
template <class Backend, class Op, MixLoraAdapter A>
void execute_stage(const Backend& be, const Op& op, const MixLoraSaved<A>& saved, Arena<A::space> work) {
  op.check();
  check::disjoint(Op::name, "work", work.next(scratch_bytes(be, op)), "saved", saved.z);
  execute(be, op, work);
}
/// A stage's last act: copies from before it are stale.
template <MixLoraAdapter A>
void pass_stage(MixLoraSaved<A>& saved, MixLoraStage now) {
  saved.stage = now;
  if (saved.origin.stamp.cell != nullptr) saved.origin.stamp.set();
}

}  // namespace detail

/// Bytes of workspace that any stage with at most `tokens` tokens takes; what serves a backward serves its forward.
template <class Backend, MixLoraAdapter A>
Index workspace_bytes(const Backend& be, const A& adapter, Index tokens, Pass pass = Pass::forward) {
  using Ops = detail::MixLoraOps<A>;
  using Memory = Arena<A::space>;
  using X = typename Ops::X;
  check::at_least("workspace_bytes", "tokens", tokens, 0);
  Memory counter = Memory::counting();
  auto saved = Ops::carve(counter, adapter, tokens);
  saved.call.tokens = tokens;
  saved.dropout.p16 = saved.down_dropout.p16 = 1;  // the larger of two sizes
  const auto& c = adapter.config();
  const auto of = [tokens](Index width) { return MatrixView<X, A::space>{nullptr, tokens, width}; };
  const auto in = of(c.d_in), hidden = of(c.d_hidden), out = of(c.d_out);
  const auto first_stage = [&](Index copies, Index stage) {  // counted by an arena, which refuses sums that overflow
    Memory memory = Memory::counting();
    for (Index i = 0; i < copies && adapter.gate().jitter() > 0; ++i) memory.template matrix<X>(tokens, c.d_in);
    memory.template take<std::byte>(detail::largest({stage, detail::gate_scratch(be, adapter.gate(), tokens)}));
    return memory.used();
  };
  const Index forward =
      Memory::with_alignment(detail::largest({first_stage(1, scratch_bytes(be, Ops::shrink(adapter, saved, in))),
                                              scratch_bytes(be, Ops::mix(adapter, saved, hidden, hidden, hidden)),
                                              scratch_bytes(be, Ops::expand(adapter, saved, out, Into::add))}));
  if (pass == Pass::forward) return forward;
  const Index backward = Memory::with_alignment(detail::largest(
      {first_stage(2, scratch_bytes(be, Ops::shrink_backward(adapter, saved, in, in, {}))),
       scratch_bytes(be, Ops::mix_backward(adapter, saved, hidden, hidden, hidden, hidden, hidden, Into::add)),
       scratch_bytes(be, Ops::expand_backward(adapter, saved, out, Into::add))}));
  return forward > backward ? forward : backward;
}

/// Bytes of reserve that a block with at most `tokens` tokens takes, in inference too. Nothing is made a second time.
template <MixLoraAdapter A>
Index reserve_bytes(const A& adapter, Index tokens, Keep = Keep::z) {
  check::at_least("reserve_bytes", "tokens", tokens, 0);
  return detail::bytes_for<A::space>(
      [&](Arena<A::space>& arena) { detail::MixLoraOps<A>::carve(arena, adapter, tokens); });
}

/// Stage 1: Z of gate_proj and up_proj, and which experts every token goes to.
template <class Backend, MixLoraAdapter A>
MixLoraSaved<A> route(const Backend& be, const A& adapter,
                      MatrixView<const typename A::precision::activation, A::space> x, Arena<A::space>& reserve,
                      Arena<A::space> work, const MixLoraOptions<A::space>& options = {}) {
  using Ops = detail::MixLoraOps<A>;
  const char* const op = "route";
  check::view(op, "x", x);
  check::same(op, "x", "columns", x.cols, "d_in", adapter.config().d_in);
  detail::check_optional(op, "valid", options.valid, "the number of tokens", x.rows);
  const Dropout dropout = make_dropout(op, adapter.dropout(), options.key);
  if (dropout.on() && (options.down_site == 0 || options.down_site == options.key.site)) {
    fail(check::detail::about(ErrorCode::value, op, "down_site")
         << " must be given, and be another site than the key's: the down projection has a mask of its own");
  }
  const auto gate = adapter.gate();
  GateCall<A::space> call{x.rows, {options.sequences, {}, {}, options.valid}, options.key};
  call.selection_bias = options.selection_bias;
  gate.check(op, call);
  const Index kept = detail::without_alignment<A>(reserve_bytes(adapter, x.rows));
  const Index work_bytes = detail::without_alignment<A>(workspace_bytes(be, adapter, x.rows));
  reserve.require(op, "reserve", kept);
  work.require(op, "work", work_bytes);
  check::disjoint(op, "reserve", reserve.next(kept), "work", work.next(work_bytes));
  check::disjoint(op, "reserve", reserve.next(kept), "x", x);
  check::disjoint(op, "work", work.next(work_bytes), "x", x);

  Arena<A::space> taken = reserve;
  auto saved = Ops::carve(taken, adapter, x.rows);
  saved.call = call;
  saved.dropout = dropout;
  Key down = options.key;
  down.site = options.down_site;
  saved.down_dropout = make_dropout(op, adapter.dropout(), down);
  saved.dropout_off = options.dropout_off;
  auto shrink = Ops::shrink(adapter, saved, x);
  shrink.check();

  if (options.key.on && gate.jitter() > 0) {  // the router's input alone: the experts see x
    const auto jittered = work.template matrix<typename Ops::X>(x.rows, x.cols);
    detail::jitter_rows<Ops>(be, gate.jitter(), options.key, x, jittered, Into::set);
    detail::run_checked(be, Ops::split_router(shrink, jittered), work);
  }
  detail::run_checked(be, shrink, work);
  detail::run_gate(be, gate, saved.h, saved.state, call, work);
  for_rows<A::space>(be, x.rows, detail::CopyRow<typename Ops::Score, A::space>{{}, saved.dh});
  saved.scores = gate.scores(saved.state, saved.h, saved.dh);
  saved.scores.valid = options.valid;
  detail::mark_live(adapter, x.rows, saved.origin);
  saved.stage = MixLoraStage::routed;
  reserve = taken;
  return saved;
}

/// Stage 2: h̄ of the engine's u = W1 x and v = W3 x.
template <class Backend, MixLoraAdapter A>
void mix(const Backend& be, const A& adapter, MixLoraSaved<A>& saved,
         MatrixView<const typename A::precision::activation, A::space> u,
         MatrixView<const typename A::precision::activation, A::space> v,
         MatrixView<typename A::precision::activation, A::space> hbar, Arena<A::space> work) {
  detail::check_stage("mix", adapter, saved, MixLoraStage::routed);
  detail::execute_stage(be, detail::MixLoraOps<A>::mix(adapter, saved, u, v, hbar), saved, work);
  detail::pass_stage(saved, MixLoraStage::mixed);
}

/// Stage 3: y, which may hold the engine's W2 h̄, += s Z2 B2ᵀ.
template <class Backend, MixLoraAdapter A>
void finish(const Backend& be, const A& adapter, MixLoraSaved<A>& saved,
            MatrixView<typename A::precision::activation, A::space> y, Arena<A::space> work, Into into = Into::add) {
  detail::check_stage("finish", adapter, saved, MixLoraStage::mixed);
  detail::execute_stage(be, detail::MixLoraOps<A>::expand(adapter, saved, y, into), saved, work);
  detail::pass_stage(saved, MixLoraStage::finished);
}

/// A pack's three stages. What they hand each other is of the widened adapter: auto saved = lm::route(be, packed, …).
template <MixLoraAdapter A>
Index reserve_bytes(const Packed<A>& packed, Index tokens) {
  return reserve_bytes(packed.values(), tokens);
}
template <class Backend, MixLoraAdapter A>
auto route(const Backend& be, const Packed<A>& packed, MatrixView<const typename A::precision::activation, A::space> x,
           Arena<A::space>& reserve, Arena<A::space> work, const MixLoraOptions<A::space>& options = {}) {
  return route(be, packed.values(), x, reserve, work, options);
}
template <class Backend, MixLoraAdapter A>
void mix(const Backend& be, const Packed<A>& packed, MixLoraSaved<typename Packed<A>::Values>& saved,
         MatrixView<const typename A::precision::activation, A::space> u,
         MatrixView<const typename A::precision::activation, A::space> v,
         MatrixView<typename A::precision::activation, A::space> hbar, Arena<A::space> work) {
  mix(be, packed.values(), saved, u, v, hbar, work);
}
template <class Backend, MixLoraAdapter A>
void finish(const Backend& be, const Packed<A>& packed, MixLoraSaved<typename Packed<A>::Values>& saved,
            MatrixView<typename A::precision::activation, A::space> y, Arena<A::space> work, Into into = Into::add) {
  finish(be, packed.values(), saved, y, work, into);
}

/// Backward of stage 3.
template <class Backend, MixLoraAdapter A, class Gradient>
void finish_backward(const Backend& be, const A& adapter, MixLoraSaved<A>& saved,
                     MatrixView<const typename A::precision::activation, A::space> dy, Gradient& grad,
                     Arena<A::space> work, Into into = Into::add) {
  detail::check_stage("finish_backward", adapter, saved, MixLoraStage::finished);
  if (adapter.dropout() > 0 && !saved.call.key.on && !saved.dropout_off) {
    fail(check::detail::about(ErrorCode::value, "finish_backward", "key")
         << " is missing: the adapter has dropout and route drew none; give .key, or say .dropout_off = true");
  }
  auto op = detail::MixLoraOps<A>::expand_backward(adapter, saved, dy, into);
  if constexpr (detail::check_gradient_type<A, Gradient>()) op.dB = grad.B2();
  detail::execute_stage(be, op, saved, work);
  detail::pass_stage(saved, MixLoraStage::down_done);
}

/// Backward of stage 2, with the engine's dh̄ = dy W2; the engine adds du W1 + dv W3 to dx.
template <class Backend, MixLoraAdapter A, class Gradient>
void mix_backward(const Backend& be, const A& adapter, MixLoraSaved<A>& saved,
                  MatrixView<const typename A::precision::activation, A::space> u,
                  MatrixView<const typename A::precision::activation, A::space> v,
                  MatrixView<const typename A::precision::activation, A::space> dhbar,
                  MatrixView<typename A::precision::activation, A::space> du,
                  MatrixView<typename A::precision::activation, A::space> dv, Gradient& grad, Arena<A::space> work,
                  Into into = Into::add) {
  detail::check_stage("mix_backward", adapter, saved, MixLoraStage::down_done);
  auto op = detail::MixLoraOps<A>::mix_backward(adapter, saved, u, v, dhbar, du, dv, into);
  if constexpr (detail::check_gradient_type<A, Gradient>()) {
    op.dB1 = grad.B1();
    op.dB3 = grad.B3();
    op.dA2 = grad.A2();
  }
  detail::execute_stage(be, op, saved, work);
  detail::pass_stage(saved, MixLoraStage::middle_done);
}

/// Backward of stage 1: dx gets what the adapters and the router read.
template <class Backend, MixLoraAdapter A, class Gradient>
void route_backward(const Backend& be, const A& adapter, MixLoraSaved<A>& saved,
                    MatrixView<const typename A::precision::activation, A::space> x,
                    MatrixView<typename A::precision::activation, A::space> dx, Gradient& grad, Arena<A::space> work,
                    BackwardOptions options = {}) {
  using Ops = detail::MixLoraOps<A>;
  const char* const op = "route_backward";
  detail::check_stage(op, adapter, saved, MixLoraStage::middle_done);
  check::view(op, "x", x);
  check::same(op, "x", "rows", x.rows, "the number of tokens of saved", saved.origin.tokens);
  auto shrink = Ops::shrink_backward(adapter, saved, x, dx, options);
  if constexpr (detail::check_gradient_type<A, Gradient>()) {
    shrink.dA = grad.A13();
    shrink.dside = grad.side();
  }
  shrink.check();
  const Index bytes = detail::without_alignment<A>(workspace_bytes(be, adapter, x.rows, Pass::backward));
  work.require(op, "work", bytes);
  check::disjoint(op, "work", work.next(bytes), "saved", saved.z);

  const auto gate = adapter.gate();
  detail::run_gate_backward(be, gate, saved.h, saved.state, saved.dstate, saved.dh, saved.call, frozen,
                            options.parameters, work);
  if (saved.call.key.on && gate.jitter() > 0) {
    using X = typename Ops::X;
    const auto jittered = work.template matrix<X>(x.rows, x.cols);
    const auto into_router = dx.data == nullptr ? dx : work.template matrix<X>(x.rows, x.cols);
    const auto router = Ops::split_router(shrink, jittered, into_router);
    detail::jitter_rows<Ops>(be, gate.jitter(), saved.call.key, x, jittered, Into::set);
    detail::run_checked(be, shrink, work);
    detail::run_checked(be, router, work);
    const MatrixView<const X, A::space> of_router = into_router;
    if (dx.data != nullptr) detail::jitter_rows<Ops>(be, gate.jitter(), saved.call.key, of_router, dx, Into::add);
  } else {
    detail::run_checked(be, shrink, work);
  }
  detail::spend(saved.origin);
  saved.stage = MixLoraStage::none;
}

}  // namespace LORAMIX_ABI
}  // namespace loramix
