/// Forward and backward of any adapter that is one gated product, on any backend.
///
/// Computes:    y (+)= s ((x̂ Aᵀ) ∘ g) Bᵀ, and all gradients of it (MATH.md section 1): shrink, row, expand.
/// Reads:       the adapter's parameters, x [T, d_in]; backward also what forward saved and dy [T, d_out].
/// Adds to:     y [T, d_out]; backward: dx [T, d_in] (or an empty view: not wanted) and the gradient's parameters (or
///              lm::frozen). Into::set assigns instead and never reads the destination.
/// Errors:      shape, stride, null, alias, overflow, gate contents on the host, small workspace or reserve: before any
///              write. Saving with dropout but no key; a second backward; another adapter's or batch's Saved; in debug
///              builds weights that changed since forward.
/// Cost:        adapter.cost(T); workspace_bytes and reserve_bytes; no allocation. A router with jitter reads a copy of
///              x of its own: one more pass over x forward, two more backward.
/// Determinism: ADR 0005. Saving, packing (but for AMX's tiles) and the number of threads never change a bit of y.
/// Example:     examples/engine, examples/train
#pragma once
#include <initializer_list>
#include <type_traits>
#include <utility>

#include <loramix/adapter/rank_gradients.hpp>
#include <loramix/core/adapter.hpp>
#include <loramix/gate/softmax.hpp>
#include <loramix/ops/draw_mask.hpp>
#include <loramix/ops/expand.hpp>
#include <loramix/ops/shrink.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// What backward finds again: U as it was, or it is computed a second time (no memory per token, one more shrink).
enum class Keep { z, recompute };

/// What a call of forward may be told.
template <Space S>
struct ForwardOptions {
  Arena<S>* save = nullptr;  // the reserve; null: inference
  Key key = no_draws;        // draws of this call; none: no dropout
  Keep keep = Keep::z;
  Into into = Into::add;               // y
  bool dropout_off = false;            // saving without draws though the adapter has dropout, on purpose
  MatrixView<std::uint8_t, S> mask{};  // [T, mask_bytes(d_in)] or empty: keep the dropout mask as bits until backward
  // What the batch says of its tokens, for routers and losses that ask (gate/batch.hpp).
  Groups<S> sequences{};
  Groups<S> tasks{};
  VectorView<const std::int32_t, S> labels{};   // [sequences]
  VectorView<const std::uint8_t, S> valid{};    // [T]
  VectorView<const float, S> selection_bias{};  // [E] for routers that choose (router/selection_bias.hpp)
};

/// Whether backward adds to gradients or assigns them.
struct BackwardOptions {
  Into parameters = Into::add;
  Into input = Into::add;
};

namespace detail {

/// Says, in the reserve, which forward's leavings lie there: a reserve that was used again, and a second backward, are
/// noticed whatever became of the Saved. On the host; the device's memory is not read.
struct Stamp {
  std::uint64_t* cell = nullptr;
  std::uint64_t number = 0;

  void set() {
    static std::uint64_t last = 0;
    number = __atomic_add_fetch(&last, 1, __ATOMIC_RELAXED);
    *cell = number;
  }
  bool holds() const { return cell == nullptr || *cell == number; }
};
template <Space S>
Stamp carve_stamp(Arena<S>& reserve) {
  if constexpr (S == Space::host)
    return {reserve.template take<std::uint64_t>(1), 0};
  else
    return {};
}

/// Which forward left a Saved, and whether backward has had it.
struct Origin {
  Index tokens = 0;
  const void* owner = nullptr;  // the adapter's parameters
  std::uint64_t weights = 0;    // their checksum, in debug builds
  Stamp stamp;
  bool live = false;
};

struct NoState {};

template <class G>
struct state_of {
  using type = NoState;
};
template <ComputedGate G>
struct state_of<G> {
  using type = typename G::State;
};

/// Whether it is the call that says what a gate chooses (router/request.hpp): no router is waited for.
template <class Gate>
inline constexpr bool is_told = requires {
  requires Gate::told;
};

/// The types of an adapter's product.
template <class A>
struct ProductOf {
  static constexpr Space space = A::space;
  using P = typename A::precision;
  using X = typename P::activation;
  using Acc = typename P::accumulation;
  using Score = typename P::score;
  using W = typename A::element;
  using G = typename P::gradient;
  using Gate = decltype(std::declval<const A&>().gate());
  using State = typename state_of<Gate>::type;
  static constexpr Major major = decltype(std::declval<const A&>().B())::major;
  static constexpr bool computed = ComputedGate<Gate>;
  static_assert(GivenGate<Gate> || computed,
                "loramix: this adapter's gate() returns no gate: it needs static constexpr GateFacts facts and "
                "form(tokens, ranks), or, if a router computes it, State, side(), carve(), form(state, tokens, ranks) "
                "and gradient(state)");

  using ShrinkOp = Shrink<X, W, Acc, Score, space>;
  using ShrinkBackwardOp = ShrinkBackward<X, W, Acc, Score, G, space>;
  using ExpandOp = Expand<Acc, W, X, Score, space, major>;
  using ExpandBackwardOp = ExpandBackward<Acc, W, X, Score, G, space, major>;

  /// The side rows of a shrink, taken out of it: a router that reads a jittered copy of x.
  struct Jittered {
    MatrixView<X, space> x;  // [T, d_in]
    ShrinkOp shrink;
  };
  static Jittered split_router(Arena<space>& work, ShrinkOp& all) {
    const auto x = work.template matrix<X>(all.x.rows, all.x.cols);
    const ShrinkOp router{all.A.row_range(0, 0), all.side, x, {}, all.u.col_range(0, 0), all.h};
    all.side = {};
    all.h = {};
    return {x, router};
  }
  /// The side rows alone, where the gate says which ranks are worth computing.
  static ShrinkOp router_first(ShrinkOp& all) {
    const ShrinkOp router{all.A.row_range(0, 0), all.side, all.x, {}, all.u.col_range(0, 0), all.h};
    all.side = {};
    all.h = {};
    return router;
  }
  struct JitteredBackward {
    MatrixView<X, space> x, dx;  // [T, d_in]
    ShrinkBackwardOp shrink;
  };
  static JitteredBackward split_router(Arena<space>& work, ShrinkBackwardOp& all) {
    const auto x = work.template matrix<X>(all.x.rows, all.x.cols);
    const auto dx = all.dx.data == nullptr ? all.dx : work.template matrix<X>(all.x.rows, all.x.cols);
    const ShrinkBackwardOp router{
        all.A.row_range(0, 0), all.side, x, {}, all.du.col_range(0, 0), all.dh, {}, all.dside, dx,
        all.parameters,        Into::set};
    all.side = {};
    all.dh = {};
    all.dside = {};
    return {x, dx, router};
  }

  static MatrixView<const W, space> side(const Gate& gate) {
    if constexpr (computed)
      return gate.side();
    else
      return {};
  }
  static GateForm<Score, space> form(const Gate& gate, const State& state, const GateCall<space>& call, Index ranks) {
    if constexpr (computed) {
      auto form = gate.form(state, call, ranks);
      form.computed = !is_told<Gate>;
      return form;
    } else {
      return gate.form(call.tokens, ranks);
    }
  }
};

/// Row bodies of a computed gate that is written row by row.
template <class Gate, class Score, Space S>
struct GateForward {
  Gate gate;
  MatrixView<const Score, S> h;
  typename Gate::State state;
  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index t) const {
    gate.forward_row(team, t, h.row(t), state);
  }
};
template <class Gate, class Score, Space S>
struct GateBackward {
  Gate gate;
  MatrixView<const Score, S> h;
  typename Gate::State state, dstate;
  MatrixView<Score, S> dh;
  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index t) const {
    gate.backward_row(team, t, h.row(t), state, dstate, dh.row(t));
  }
};

/// The row stage, in whichever of its two forms the gate is written.
template <class Backend, class Gate, class Score, Space S, class State>
void run_gate(const Backend& be, const Gate& gate, MatrixView<Score, S> h, const State& state, const GateCall<S>& call,
              Arena<S> work) {
  if constexpr (requires { gate.forward(be, h, state, call, work); }) {
    gate.forward(be, h, state, call, work);
  } else {
    for_rows<S>(be, call.tokens, GateForward<Gate, Score, S>{gate, h, state});
  }
}
template <class Backend, class Gate, class Score, Space S, class State, class GradientGate>
void run_gate_backward(const Backend& be, const Gate& gate, MatrixView<Score, S> h, const State& state,
                       const State& dstate, MatrixView<Score, S> dh, const GateCall<S>& call,
                       const GradientGate& gradient, Into into, Arena<S> work) {
  if constexpr (requires { gate.backward(be, h, state, dstate, dh, call, gradient, into, work); }) {
    gate.backward(be, h, state, dstate, dh, call, gradient, into, work);
  } else {
    for_rows<S>(be, call.tokens, GateBackward<Gate, Score, S>{gate, h, state, dstate, dh});
  }
}
/// Gates whose row stage is, or can be, one body per token: what a backend can run in the product's own launches.
template <class Gate>
concept HasRows = requires(const Gate& gate, const GateCall<Gate::space>& call) {
  gate.by_token(call);
}
|| requires(const Gate& gate, const typename Gate::State& state, const SerialTeam& team) {
  gate.forward_row(team, Index{0}, nullptr, state);
};
template <HasRows Gate, Space S>
bool by_token(const Gate& gate, const GateCall<S>& call) {
  if constexpr (requires { gate.by_token(call); })
    return gate.by_token(call);
  else
    return true;
}
template <HasRows Gate, class Score, Space S, class State>
auto forward_rows(const Gate& gate, MatrixView<Score, S> h, const State& state, const GateCall<S>& call) {
  if constexpr (requires { gate.forward_rows(h, state, call); })
    return gate.forward_rows(h, state, call);
  else
    return GateForward<Gate, Score, S>{gate, h, state};
}
template <HasRows Gate, class Score, Space S, class State>
auto backward_rows(const Gate& gate, MatrixView<Score, S> h, const State& state, const State& dstate,
                   MatrixView<Score, S> dh, const GateCall<S>& call) {
  if constexpr (requires { gate.backward_rows(h, state, dstate, dh, call); })
    return gate.backward_rows(h, state, dstate, dh, call);
  else
    return GateBackward<Gate, Score, S>{gate, h, state, dstate, dh};
}

/// Where the gradient of the side rows goes.
template <class Gradient>
auto side_of(Gradient& gradient) {
  if constexpr (requires { gradient.side(); })
    return gradient.side();
  else
    return gradient.gate().side();
}
/// Bytes of workspace of either.
template <class Backend, class Gate>
Index gate_scratch(const Backend& be, const Gate& gate, Index tokens) {
  if constexpr (requires { gate.scratch(be, tokens); })
    return gate.scratch(be, tokens);
  else
    return 0;
}

/// Row body: out[t, :] = in[t, :], or 0 without an input.
template <class T, Space S>
struct CopyRow {
  MatrixView<const T, S> in;
  MatrixView<T, S> out;
  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index t) const {
    team.each(out.cols, [&](Index c) { out(t, c) = in.data == nullptr ? T{} : in(t, c); });
  }
};

/// ũ where the backend makes it in shrink's launch: [T, R], or no address.
template <class T, class Backend>
MatrixView<typename T::Acc, T::space> carve_gated(const Backend& be, Arena<T::space>& work, Index tokens, Index ranks) {
  if constexpr (T::Gate::facts.slots != Slots::none) {
    if (rows_follow(be)) return work.template matrix<typename T::Acc>(tokens, ranks);
  }
  return {};
}

/// Shrink and the row stage. Where rows can follow in shrink's launch, the gate is applied there too, unless `gated` is empty:
/// `expand` then reads ũ.
template <class T, class Backend, class Saved>
void shrink_and_gate(const Backend& be, const typename T::ShrinkOp& shrink, const typename T::Gate& gate,
                     const Saved& saved, MatrixView<typename T::Acc, T::space> gated, typename T::ExpandOp& expand,
                     Arena<T::space> work) {
  using Score = typename T::Score;
  constexpr Space S = T::space;
  const Index tokens = saved.call.tokens;
  [[maybe_unused]] const auto follow = [&](const auto& rows) {
    execute_then_impl(be, shrink, work, rows);
    expand.u = gated;
    expand.gate = OpenGate<Score, S>{}.form(tokens, gated.cols);
  };
  if constexpr (requires { rows_follow_impl(be); }) {
    const auto apply = gate_rows_impl(be, expand.u, expand.gate, gated);
    if constexpr (!T::computed) {
      if (gated.data != nullptr) return follow(apply);
    } else if constexpr (HasRows<typename T::Gate>) {
      if (rows_follow(be) && by_token(gate, saved.call)) {
        const InTurn rows{forward_rows(gate, saved.h, saved.state, saved.call), CopyRow<Score, S>{{}, saved.dh}};
        if (gated.data != nullptr) return follow(InTurn{rows, apply});
        return execute_then_impl(be, shrink, work, rows);  // U comes when the gate is known
      }
    }
  }
  run_checked(be, shrink, work);
  if constexpr (T::computed) {
    run_gate(be, gate, saved.h, saved.state, saved.call, work);
    if (saved.dh.data != nullptr) for_rows<S>(be, tokens, CopyRow<Score, S>{{}, saved.dh});
  }
}

/// The backward of expand and of the row stage, in one launch where rows can follow.
template <class T, class Backend, class Saved, class State, class GradientGate>
void expand_and_gate_backward(const Backend& be, const typename T::ExpandBackwardOp& expand,
                              const typename T::Gate& gate, const Saved& saved, const State& dstate,
                              const GradientGate& gradient, Into into, Arena<T::space> work) {
  if constexpr (T::computed && HasRows<typename T::Gate> && requires { rows_follow_impl(be); }) {
    if (rows_follow(be) && by_token(gate, saved.call)) {
      execute_then_impl(be, expand, work, backward_rows(gate, saved.h, saved.state, dstate, saved.dh, saved.call));
      if constexpr (requires { gate.backward_rest(be, saved.state, dstate, saved.call, gradient, into, work); }) {
        gate.backward_rest(be, saved.state, dstate, saved.call, gradient, into, work);
      }
      return;
    }
  }
  run_checked(be, expand, work);
  if constexpr (T::computed) {
    run_gate_backward(be, gate, saved.h, saved.state, dstate, saved.dh, saved.call, gradient, into, work);
  }
}

/// Row body of jitter: out[t, :] (+)= in[t, :] ∘ U(1 − ε, 1 + ε), the same factors for the router's input and its gradient.
template <class T, class Acc, Space S>
struct JitterRow {
  std::uint64_t key, first_token;
  double epsilon;
  MatrixView<const T, S> in;
  MatrixView<T, S> out;
  Into into;
  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index t) const {
    team.each(out.cols, [&](Index c) {
      const double u = draw_uniform(key, Purpose::jitter, first_token + static_cast<std::uint64_t>(t), c);
      const Acc value = widen<Acc>(in(t, c)) * Acc(1 + epsilon * (2 * u - 1));
      out(t, c) = narrow<T>(into == Into::add ? widen<Acc>(out(t, c)) + value : value);
    });
  }
};

/// ε of a gate whose router reads a jittered x; 0 for all others.
template <class Gate>
double jitter_of(const Gate& gate) {
  if constexpr (requires { gate.jitter(); })
    return gate.jitter();
  else
    return 0;
}
template <class T, class Backend>
void jitter_rows(const Backend& be, double epsilon, const Key& key, MatrixView<const typename T::X, T::space> in,
                 MatrixView<typename T::X, T::space> out, Into into) {
  using Body = JitterRow<typename T::X, typename T::Acc, T::space>;
  for_rows<T::space>(be, in.rows, Body{philox_key(key), key.first_token, epsilon, in, out, into});
}

/// FNV-1a over the parameters' bytes: what debug builds compare.
template <class A>
std::uint64_t checksum(const A& adapter) {
  std::uint64_t hash = 0xcbf29ce484222325u;
  if constexpr (A::space == Space::host) {
    const auto flat = adapter.parameters();
    const auto* bytes = reinterpret_cast<const unsigned char*>(flat.data);
    for (Index i = 0; i < flat.size * static_cast<Index>(sizeof(*flat.data)); ++i) {
      hash = (hash ^ bytes[i]) * 0x100000001b3u;
    }
  }
  return hash;
}

}  // namespace detail

/// What forward leaves for backward: views into the reserve, trivially copyable.
template <ProductAdapter A>
struct Saved {
  using Types = detail::ProductOf<A>;
  detail::Origin origin;
  Dropout dropout;
  MatrixView<typename Types::Acc, A::space> u;     // [T, R_a]; empty with Keep::recompute
  MatrixView<typename Types::Score, A::space> h;   // [T, n] side rows: a router's logits
  MatrixView<typename Types::Score, A::space> dh;  // [T, n] their gradient from elsewhere: losses add to it
  typename Types::State state{};                   // a computed gate's values
  GateCall<A::space> call;                         // what the batch said
  Scores<typename Types::Score, A::space> scores;  // a router's: what losses and telemetry take
};

namespace detail {

/// Cuts what forward leaves from `arena`; `all` false: only what is kept whatever Keep says.
template <class A>
Saved<A> carve_saved(Arena<A::space>& arena, const A& adapter, Index tokens, bool with_u, bool with_dh) {
  using T = ProductOf<A>;
  Saved<A> saved;
  if (with_dh) saved.origin.stamp = carve_stamp(arena);
  if (with_u) saved.u = arena.template matrix<typename T::Acc>(tokens, adapter.A().rows);
  if constexpr (T::computed) {
    const auto gate = adapter.gate();
    saved.h = arena.template matrix<typename T::Score>(tokens, gate.side().rows);
    if (with_dh) saved.dh = arena.template matrix<typename T::Score>(tokens, gate.side().rows);
    saved.state = gate.carve(arena, tokens, with_dh);
  }
  return saved;
}

/// What forward leaves of an adapter whose backward needs U alone.
template <class A>
struct SavedRanks {
  Origin origin;
  Dropout dropout;
  MatrixView<typename A::precision::accumulation, A::space> u;  // [T, R_a]; empty with Keep::recompute
};
template <class A>
SavedRanks<A> carve_ranks(Arena<A::space>& reserve, const A& adapter, Index tokens, Keep keep) {
  SavedRanks<A> saved;
  saved.origin.stamp = carve_stamp(reserve);
  if (keep == Keep::z) {
    saved.u = reserve.template matrix<typename A::precision::accumulation>(tokens, adapter.A().rows);
  }
  return saved;
}

/// Bytes of an arena from which `carve` cuts.
template <Space S, class F>
Index bytes_for(const F& carve) {
  return Arena<S>::with_alignment(carved_bytes<S>(carve));
}

inline Index largest(std::initializer_list<Index> all) {
  Index most = 0;
  for (const Index bytes : all) most = bytes > most ? bytes : most;
  return most;
}

/// The size of a workspace from its parts; refused where the sum is more than any memory.
template <class Memory>
Index sum_with_alignment(Index carved, Index stages) {
  Memory total = Memory::counting();
  total.template take<std::byte>(carved);
  total.template take<std::byte>(stages);
  return Memory::with_alignment(total.used());
}

/// What a size query adds for alignment is not needed inside an arena.
template <class A>
Index without_alignment(Index bytes) {
  return bytes == 0 ? 0 : bytes - Arena<A::space>::alignment;
}

/// The form of the gate with null values of the right shapes: enough for sizes.
template <class A>
auto form_for_sizes(const A& adapter, Index tokens) {
  using T = ProductOf<A>;
  const auto gate = adapter.gate();
  typename T::State state{};
  Arena<A::space> counter = Arena<A::space>::counting();
  if constexpr (T::computed) state = gate.carve(counter, tokens, false);
  auto form = T::form(gate, state, {.tokens = tokens}, adapter.B().cols);
  form.tokens = tokens;
  return form;
}

/// Expand without memory: sizes and gate.
template <class A>
typename ProductOf<A>::ExpandOp expand_for_sizes(const A& adapter, Index tokens) {
  return {{nullptr, tokens, adapter.A().rows},
          form_for_sizes(adapter, tokens),
          adapter.B(),
          {},
          {nullptr, tokens, adapter.B().rows}};
}

template <class A, class Backend>
Index stage_bytes(const Backend& be, const A& adapter, Index tokens) {
  using T = ProductOf<A>;
  const auto gate = adapter.gate();
  const auto expand = expand_for_sizes(adapter, tokens);
  typename T::ShrinkOp shrink{adapter.A(), T::side(gate), {nullptr, tokens, adapter.A().cols}, {}, {}, {}};
  shrink.dropout.p16 = 1;  // the larger of the two sizes: a query does not depend on the call's draws
  if (wants_selection(be, expand.gate, adapter.A().rows)) shrink.select = expand.gate;
  return largest({scratch_bytes(be, shrink), scratch_bytes(be, expand), gate_scratch(be, gate, tokens)});
}

}  // namespace detail

/// Which half of a step a size is asked for.
enum class Pass { forward, backward };

/// Bytes of workspace that any call with at most `tokens` tokens takes; what serves a backward serves its forward.
template <class Backend, ProductAdapter A>
Index workspace_bytes(const Backend& be, const A& adapter, Index tokens, Pass pass = Pass::forward) {
  using T = detail::ProductOf<A>;
  using Memory = Arena<A::space>;
  check::at_least("workspace_bytes", "tokens", tokens, 0);
  const auto gate = adapter.gate();
  const Index stages = detail::stage_bytes(be, adapter, tokens);
  if (pass == Pass::forward) {
    Memory counter = Memory::counting();
    detail::carve_saved(counter, adapter, tokens, true, false);
    if (detail::jitter_of(gate) > 0) counter.template matrix<typename T::X>(tokens, adapter.A().cols);
    detail::carve_gated<T>(be, counter, tokens, adapter.B().cols);
    return detail::sum_with_alignment<Memory>(counter.used(), stages);
  }
  Memory counter = Memory::counting();
  const auto u = counter.template matrix<typename T::Acc>(tokens, adapter.A().rows);  // recomputed
  const auto du = counter.template matrix<typename T::Acc>(tokens, adapter.A().rows);
  if (detail::jitter_of(gate) > 0) {  // the router's x and its gradient
    for (int i = 0; i < 2; ++i) counter.template matrix<typename T::X>(tokens, adapter.A().cols);
  }
  const MatrixView<typename T::Score, A::space> dh{nullptr, tokens, T::side(gate).rows};
  const GateForm<typename T::Score, A::space> form = detail::form_for_sizes(adapter, tokens);
  GateGradient<typename T::Score, A::space> dgate;
  // Address 64 stands for "wanted": carving looks at nothing but that and the sizes.
  [[maybe_unused]] auto* const wanted = reinterpret_cast<typename T::Score*>(std::uintptr_t{64});
  if (T::Gate::facts.slots & Slots::weights) dgate.weights = {wanted, form.weights.rows, form.weights.cols};
  if (T::Gate::facts.slots & Slots::id_weights) dgate.id_weights = {wanted, form.ids.rows, form.ids.cols};
  if (T::Gate::facts.slots & Slots::multiplier) dgate.multiplier = {wanted, form.multiplier.size};
  if (T::Gate::facts.slots & Slots::rank_scale) dgate.rank_scale = {wanted, form.rank_scale.size};
  if constexpr (T::computed) gate.carve(counter, tokens, false);  // dstate
  detail::RankGradients<A>::carve(counter, adapter);
  const typename T::ExpandBackwardOp expand{u,  form, adapter.B(), {}, {nullptr, tokens, adapter.B().rows},
                                            du, {},   dgate};
  typename T::ShrinkBackwardOp shrink{adapter.A(), T::side(gate), {nullptr, tokens, adapter.A().cols}, {}, du, dh};
  shrink.dropout.p16 = 1;  // as in stage_bytes
  if (detail::wants_selection(be, form, adapter.A().rows)) shrink.select = form;
  const Index here = detail::sum_with_alignment<Memory>(
      counter.used(), detail::largest({stages, scratch_bytes(be, expand), scratch_bytes(be, shrink)}));
  const Index there = workspace_bytes(be, adapter, tokens, Pass::forward);
  return here > there ? here : there;
}

/// Bytes of reserve that a saving forward with at most `tokens` tokens takes; Keep says per token what it costs.
template <ProductAdapter A>
Index reserve_bytes(const A& adapter, Index tokens, Keep keep = Keep::z) {
  return detail::bytes_for<A::space>(
      [&](Arena<A::space>& arena) { detail::carve_saved(arena, adapter, tokens, keep == Keep::z, true); });
}

namespace detail {

/// d_out.
template <class A>
Index output_width(const A& adapter) {
  if constexpr (ProductAdapter<A>)
    return adapter.B().rows;
  else
    return adapter.config().d_out;
}

/// The checks that every adapter's forward begins with; returns the call's dropout.
template <class Backend, class A, class X>
Dropout begin_forward(const Backend& be, const A& adapter, X x, const Arena<A::space>& work,
                      const ForwardOptions<A::space>& options) {
  const char* const op = "forward";
  check::view(op, "x", x);
  check::view(op, "mask", options.mask);
  if (options.mask.data != nullptr) {
    if constexpr (ProductAdapter<A>) {
      check::shape(op, "mask", options.mask, "the number of tokens", x.rows, "mask_bytes of d_in", mask_bytes(x.cols));
      check::disjoint(op, "mask", options.mask, "x", x);
    } else {
      fail(check::detail::about(ErrorCode::value, op, "mask") << " is given, but this adapter keeps none");
    }
  }
  check_optional(op, "valid", options.valid, "the number of tokens", x.rows);
  const Dropout dropout = make_dropout(op, adapter.dropout(), options.key);
  const Index work_bytes = without_alignment<A>(workspace_bytes(be, adapter, x.rows));
  work.require(op, "work", work_bytes);
  check::disjoint(op, "work", work.next(work_bytes), "x", x);
  check::disjoint(op, "mask", options.mask, "work", work.next(work_bytes));
  if (options.save == nullptr) return dropout;

  if (adapter.dropout() > 0 && !options.key.on && !options.dropout_off) {
    fail(check::detail::about(ErrorCode::value, op, "key")
         << " is missing: the adapter has dropout and activations are saved for training; give .key, or say "
            ".dropout_off = true");
  }
  const Index kept = without_alignment<A>(reserve_bytes(adapter, x.rows, options.keep));
  options.save->require(op, "save", kept);
  check::disjoint(op, "save", options.save->next(kept), "work", work.next(work_bytes));
  check::disjoint(op, "save", options.save->next(kept), "x", x);
  check::disjoint(op, "mask", options.mask, "save", options.save->next(kept));
  return dropout;
}
/// The same for an adapter that adds to y [T, d_out].
template <class Backend, class A, class X, class Y>
Dropout begin_forward(const Backend& be, const A& adapter, X x, Y y, const Arena<A::space>& work,
                      const ForwardOptions<A::space>& options) {
  const char* const op = "forward";
  check::view(op, "x", x);
  check::same(op, "x", "columns", x.cols, "d_in of the adapter", adapter.A().cols);
  check::shape(op, "y", y, "the number of tokens", x.rows, "d_out of the adapter", output_width(adapter));
  check::disjoint(op, "y", y, "x", x);
  const Dropout dropout = begin_forward(be, adapter, x, work, options);
  check::disjoint(op, "mask", options.mask, "y", y);
  check::disjoint(op, "work", work.next(without_alignment<A>(workspace_bytes(be, adapter, x.rows))), "y", y);
  if (options.save != nullptr) {
    const Index kept = without_alignment<A>(reserve_bytes(adapter, x.rows, options.keep));
    check::disjoint(op, "save", options.save->next(kept), "y", y);
  }
  return dropout;
}

/// Forward has left something for backward.
template <class A>
void mark_live(const A& adapter, Index tokens, Origin& origin) {
  origin.tokens = tokens;
  origin.owner = adapter.parameters().data;
  if constexpr (debug_checks) origin.weights = checksum(adapter);
  if (origin.stamp.cell != nullptr) origin.stamp.set();
  origin.live = true;
}

/// A router's scores, where it has any; rows that are tokens get the batch's mask.
template <class Gate, class Saved>
auto scores_of(const Gate& gate, const Saved& saved) {
  decltype(saved.scores) scores;
  if constexpr (requires { gate.scores(saved.state, saved.h, saved.dh, saved.call); }) {
    scores = gate.scores(saved.state, saved.h, saved.dh, saved.call);
  } else if constexpr (requires { gate.scores(saved.state, saved.h, saved.dh); }) {
    scores = gate.scores(saved.state, saved.h, saved.dh);
  }
  if (scores.by_token && scores.logits.rows == saved.call.tokens) scores.valid = saved.call.batch.valid;
  return scores;
}

/// After backward: this Saved, and every copy of it, is spent.
inline void spend(Origin& origin) {
  if (origin.stamp.cell != nullptr) *origin.stamp.cell = 0;
  origin.live = false;
}

/// That a Saved is what this adapter's forward left, and nobody has spent it.
template <class A>
void check_origin(const char* op, const A& adapter, const Origin& origin) {
  if (!origin.live) {
    fail(check::detail::about(ErrorCode::state, op, "saved")
         << " is spent: forward saved nothing, or backward has run before");
  }
  if (origin.owner != adapter.parameters().data) {
    fail(check::detail::about(ErrorCode::state, op, "saved") << " comes from another adapter's forward");
  }
  if (!origin.stamp.holds()) {
    fail(check::detail::about(ErrorCode::state, op, "saved")
         << " is gone from the reserve: another forward has used it since, or backward has run on a copy");
  }
  if constexpr (debug_checks) {
    // 0: forward ran in a unit compiled with NDEBUG.
    if (origin.weights != 0 && origin.weights != checksum(adapter)) {
      fail(check::detail::about(ErrorCode::state, op, "the adapter") << " changed its weights since forward");
    }
  }
}
/// The same, and that it is of as many tokens.
template <class A>
void check_origin(const char* op, const A& adapter, const Origin& origin, Index tokens) {
  check_origin(op, adapter, origin);
  check::same(op, "x", "rows", tokens, "the number of tokens of saved", origin.tokens);
}

/// The workspace of a backward, as large as it must be and apart from x.
template <class Backend, class A, class X>
MatrixView<const std::byte, A::space> backward_memory(const Backend& be, const A& adapter, X x,
                                                      const Arena<A::space>& work) {
  const Index bytes = without_alignment<A>(workspace_bytes(be, adapter, x.rows, Pass::backward));
  work.require("backward", "work", bytes);
  check::disjoint("backward", "work", work.next(bytes), "x", x);
  return work.next(bytes);
}

/// The checks that every adapter's backward begins with.
template <class Backend, class A, class Saved, class X>
void begin_backward(const Backend& be, const A& adapter, const Saved& saved, X x, const Arena<A::space>& work) {
  check::view("backward", "x", x);
  check_origin("backward", adapter, saved.origin, x.rows);
  backward_memory(be, adapter, x, work);
}
/// The same for an adapter that reads dy [T, d_out] and saved its U.
template <class Backend, class A, class Saved, class X, class Y, class D>
void begin_backward(const Backend& be, const A& adapter, const Saved& saved, X x, Y dy, D dx,
                    const Arena<A::space>& work) {
  const char* const op = "backward";
  check::view(op, "x", x);
  check_origin(op, adapter, saved.origin, x.rows);
  check::same(op, "x", "columns", x.cols, "d_in of the adapter", adapter.A().cols);
  check::view(op, "dx", dx);
  check::shape(op, "dy", dy, "the number of tokens", x.rows, "d_out of the adapter", output_width(adapter));
  const auto memory = backward_memory(be, adapter, x, work);
  check::disjoint(op, "work", memory, "dy", dy);
  check::disjoint(op, "work", memory, "dx", dx);
  check::disjoint(op, "work", memory, "saved", saved.u);
  const Dropout& dropout = saved.dropout;
  if (dropout.mask == nullptr) return;
  const MatrixView<const std::uint8_t, A::space> mask{dropout.mask, x.rows, mask_bytes(x.cols), dropout.mask_stride};
  check::disjoint(op, "work", memory, "mask", mask);
  check::disjoint(op, "dx", dx, "mask", mask);
}

/// Whether parameters are trained; refuses anything but the adapter's own gradient or lm::frozen.
template <class A, class Gradient>
constexpr bool check_gradient_type() {
  constexpr bool trained = !is_frozen<Gradient>;
  static_assert(!trained || std::is_same_v<Gradient, gradient_t<A>>,
                "loramix: backward's gradient must be lm::zeros_like(adapter) or lm::frozen");
  return trained;
}

}  // namespace detail

/// y (+)= s ((x̂ Aᵀ) ∘ g) Bᵀ. Returns what backward needs where `options.save` is given.
template <class Backend, ProductAdapter A>
Saved<A> forward(const Backend& be, const A& adapter, MatrixView<const typename A::precision::activation, A::space> x,
                 MatrixView<typename A::precision::activation, A::space> y, Arena<A::space> work,
                 ForwardOptions<A::space> options = {}) {
  using T = detail::ProductOf<A>;
  const auto gate = adapter.gate();
  const Index tokens = x.rows, ranks = adapter.B().cols;
  const bool save = options.save != nullptr, keep_u = save && options.keep == Keep::z;
  Dropout dropout = detail::begin_forward(be, adapter, x, y, work, options);

  const GateCall<A::space> call{
      tokens, {options.sequences, options.tasks, options.labels, options.valid}, options.key, options.selection_bias};
  if constexpr (requires { gate.check("forward", call); }) gate.check("forward", call);

  Arena<A::space> reserve = save ? *options.save : Arena<A::space>{};
  Saved<A> saved = detail::carve_saved(save ? reserve : work, adapter, tokens, save ? keep_u : true, save);
  saved.call = call;
  const auto u = save && !keep_u ? work.template matrix<typename T::Acc>(tokens, adapter.A().rows) : saved.u;
  const double jitter = options.key.on ? detail::jitter_of(gate) : 0;
  const auto form = T::form(gate, saved.state, call, ranks);
  typename T::ShrinkOp shrink{adapter.A(), T::side(gate), x, dropout, u, saved.h};
  shrink.passing = !keep_u;  // where the gate is applied in its launch
  const bool select = detail::wants_selection(be, form, adapter.A().rows);
  if (select) shrink.select = form;
  // A gate that says which ranks are worth computing stays beside U, so that expand can read it too.
  const auto gated = select ? MatrixView<typename T::Acc, A::space>{} : detail::carve_gated<T>(be, work, tokens, ranks);
  typename T::ExpandOp expand{u, form, adapter.B(), typename T::Acc(adapter.scale()), y, options.into};
  shrink.check();
  expand.check();
  if (dropout.on() && options.mask.data != nullptr) {
    dropout = draw_mask(be, dropout, tokens, x.cols, options.mask);
    shrink.dropout = dropout;
  }

  // Ranks that the gate may close wait for the router.
  const bool wait = T::computed && !detail::is_told<typename T::Gate> && select;
  typename T::ShrinkOp ranks_of_u = shrink;
  if (jitter > 0) {
    const auto router = T::split_router(work, ranks_of_u);
    detail::jitter_rows<T>(be, jitter, options.key, x, router.x, Into::set);
    if (!wait) detail::run_checked(be, ranks_of_u, work);
    shrink = router.shrink;
  } else if (wait) {
    shrink = T::router_first(ranks_of_u);
  }
  detail::shrink_and_gate<T>(be, shrink, gate, saved, gated, expand, work);
  if (wait) detail::run_checked(be, ranks_of_u, work);
  detail::run_checked(be, expand, work);

  if (!save) return {};
  *options.save = reserve;
  saved.dropout = dropout;
  if constexpr (T::computed) saved.scores = detail::scores_of(gate, saved);
  detail::mark_live(adapter, tokens, saved.origin);
  return saved;
}

/// All gradients of one forward, once. `grad` is zeros_like(adapter), accumulated into, or lm::frozen.
template <class Backend, ProductAdapter A, class Gradient>
void backward(const Backend& be, const A& adapter, Saved<A>& saved,
              MatrixView<const typename A::precision::activation, A::space> x,
              MatrixView<const typename A::precision::activation, A::space> dy,
              MatrixView<typename A::precision::activation, A::space> dx, Gradient& grad, Arena<A::space> work,
              BackwardOptions options = {}) {
  using T = detail::ProductOf<A>;
  constexpr bool trained = detail::check_gradient_type<A, Gradient>();
  const Index tokens = x.rows, ranks = adapter.B().cols;
  detail::begin_backward(be, adapter, saved, x, dy, dx, work);

  const auto gate = adapter.gate();
  const bool recompute = saved.u.data == nullptr;
  const auto u = recompute ? work.template matrix<typename T::Acc>(tokens, adapter.A().rows) : saved.u;
  const auto du = work.template matrix<typename T::Acc>(tokens, adapter.A().rows);
  typename T::State dstate{};
  detail::RankGradients<A> by_rank;
  typename T::ExpandBackwardOp expand{u,
                                      T::form(gate, saved.state, saved.call, ranks),
                                      adapter.B(),
                                      typename T::Acc(adapter.scale()),
                                      dy,
                                      du,
                                      {},
                                      {},
                                      options.parameters};
  typename T::ShrinkBackwardOp shrink{adapter.A(),        T::side(gate), x, saved.dropout, du, saved.dh, {}, {}, dx,
                                      options.parameters, options.input};
  if constexpr (trained) {
    detail::check_gradient_of("backward", adapter, grad);
    shrink.dA = grad.A();
    expand.dB = grad.B();
    by_rank = detail::RankGradients<A>::carve(work, adapter);
    by_rank.redirect(shrink, expand);
    if constexpr (T::computed) shrink.dside = detail::side_of(grad);
    if constexpr (requires { grad.gate_gradient(); }) expand.dgate = grad.gate_gradient();
  }
  if constexpr (T::computed) {
    dstate = gate.carve(work, tokens, false);
    if constexpr (requires { gate.gradient(dstate, saved.call); })
      expand.dgate = gate.gradient(dstate, saved.call);
    else
      expand.dgate = gate.gradient(dstate);
    expand.gate_values = Into::set;
  }
  if (detail::wants_selection(be, expand.gate, adapter.A().rows)) shrink.select = expand.gate;
  expand.check();
  shrink.check();
  const double jitter = saved.call.key.on ? detail::jitter_of(gate) : 0;
  typename T::JitteredBackward router;
  if (jitter > 0) router = T::split_router(work, shrink);

  if (recompute) {
    detail::run_checked(be, typename T::ShrinkOp{adapter.A(), {}, x, saved.dropout, u, {}, shrink.select}, work);
  }
  const auto gradient = [&] {
    if constexpr (T::computed && trained)
      return grad.gate();
    else
      return frozen;
  }();
  detail::expand_and_gate_backward<T>(be, expand, gate, saved, dstate, gradient, options.parameters, work);
  detail::run_checked(be, shrink, work);
  if (jitter > 0) {
    detail::jitter_rows<T>(be, jitter, saved.call.key, x, router.x, Into::set);
    detail::run_checked(be, router.shrink, work);
    if (dx.data != nullptr) detail::jitter_rows<T>(be, jitter, saved.call.key, router.dx, dx, Into::add);
  }
  if constexpr (trained) by_rank.add_to(be, adapter, grad, options.parameters);
  detail::spend(saved.origin);
}

}  // namespace LORAMIX_ABI
}  // namespace loramix
