/// Gates that a router computes: from the token, its sequence or its task.
///
/// A computed gate is a struct of parameter views with
///
///     side()                              [n, d_in] rows that the shrink stage multiplies with the undropped token in the same
///                                         pass over x: h = x sideᵀ. Empty where the gate does not read tokens.
///     State; carve(arena, tokens, training) → State    the gate's values, trivially copyable; `training`: also room for what
///                                         losses add (State::dp, dlogits)
///     form(state, call, ranks)            the normal form: views of the State
///     gradient(dstate) or (dstate, call)  where the form's gradient goes: views of a State that holds gradients
///     scores(state, h, dh) or (…, call)   a Scores: logits and probabilities for losses and telemetry; by_token false
///                                         where rows are sequences or tasks
///   and, row by row,
///     forward_row(team, t, h, state)
///     backward_row(team, t, h, state, dstate, dh)      dh: row t of the gradient of h, added to
///   or, where one row is not enough (pooling, tasks, parameters beside the side rows),
///     check(op, call)                     refuses a batch that lacks what the router needs
///     forward(be, h, state, call, work), backward(be, h, state, dstate, dh, call, gradient gate or frozen, into, work)
///     scratch(be, tokens)                 bytes of workspace that these two take
///     by_token(call) → bool; forward_rows(h, state, call), backward_rows(h, state, dstate, dh, call) → row bodies;
///     backward_rest(be, state, dstate, call, gradient gate or frozen, into, work)
///                                         optional: where by_token says so, forward is forward_rows for every token, and backward
///                                         backward_rows and then backward_rest: a GPU runs the bodies in the product's own launches
///   The adapter's gradient says where the side rows' gradient goes: side(), or its own gate().side(). A gate with parameters beside
///   them holds views that are const in an adapter and mutable in its gradient, whose gate() backward is handed.
///
/// Computes:    the choice between these two forms of a gate, for adapter/forward.hpp.
/// Parameters:  h [T, n], State and dstate as the gate carved them.
/// Errors:      the gate's check().
/// Cost:        the gate's.
/// Determinism: the gate's; rows are independent.
/// Example:     gate/softmax.hpp (rows), router/competition.hpp (whole); docs/how-to/add-a-gate.md
#pragma once
#include <concepts>
#include <type_traits>

#include <loramix/core/arena.hpp>
#include <loramix/core/precision.hpp>
#include <loramix/gate/batch.hpp>
#include <loramix/gate/gates.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// Given instead of a gradient: the parameters are frozen, only dx is wanted.
struct Frozen {};
inline constexpr Frozen frozen{};

template <class T>
inline constexpr bool is_frozen = std::is_same_v<std::remove_const_t<T>, Frozen>;

/// A router's scores, as losses and telemetry see them. Rows are tokens, sequences or tasks. A loss adds its gradient to dp or
/// dlogits (empty in inference) before backward.
template <class Score, Space S>
struct Scores {
  MatrixView<const Score, S> logits{};         // [rows, E], raw
  MatrixView<const Score, S> p{};              // [rows, E], full probabilities before any selection
  MatrixView<Score, S> dlogits{};              // [rows, E]
  MatrixView<Score, S> dp{};                   // [rows, E]
  MatrixView<const std::int32_t, S> ids{};     // [rows, k] what was chosen, −1 = none; empty: dense
  MatrixView<const Score, S> weights{};        // [rows, k] or [rows, E]: what the product was gated with
  MatrixView<const std::int32_t, S> chosen{};  // [rows, k] what was chosen before capacity dropped some
  VectorView<const std::uint8_t, S> valid{};   // [rows] 0 = does not count; empty: all do
  bool by_token = true;                        // rows are tokens: forward fills `valid` with the batch's
};

/// A gate whose values a router computes.
template <class G>
concept ComputedGate = Gate<G> && requires(const G& gate, const typename G::State& state,
                                           const GateCall<G::space>& call, Arena<G::space>& arena, Index n) {
  { gate.side().rows } -> std::convertible_to<Index>;
  { gate.carve(arena, n, true) } -> std::convertible_to<typename G::State>;
  { gate.form(state, call, n).ranks } -> std::convertible_to<Index>;
  requires requires { gate.gradient(state); } || requires {
    gate.gradient(state, call);
  };
};

}  // namespace LORAMIX_ABI
}  // namespace loramix
