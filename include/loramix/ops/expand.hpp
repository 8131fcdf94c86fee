/// Out of rank space: the gate and the last stage of the gated product, and their backward.
///
/// Computes:    Y (+)= s (U ∘ g) Bᵀ                                                                       (forward)
///              dŨ = s dY B,  dB (+)= s dYᵀ (U ∘ g),  dU = dŨ ∘ g,
///              dg_i (+)= dŨ ∘ U ∘ Π_{j≠i} g_j, summed over the ranks and tokens that one value covers   (backward)
/// Source:      MATH.md section 1. R = R_a · E where the experts share one A of R_a rows (HydraLoRA): rank j reads column
///              j mod R_a of U, and dU sums over the experts; U is computed once, never repeated.
/// Reads:       U [T, R_a], B [d_out, R] in either order, the gate's slots; backward also dY [T, d_out].
/// Writes:      dU [T, R_a], assigned.
/// Adds to:     Y [T, d_out]: one rounding per element per call; dB [d_out, R], the gate's gradient; or assigns with
///              Into::set, which never reads the destination.
/// Errors:      shape, stride, null, alias, overflow, gate ids and groups (host), small workspace. On the device a bad
///              id contributes nothing and sets StatusFlags.
/// Cost:        2·T·R·d_out flop forward, 4·T·R·d_out backward; scratch T·R accumulation values (twice that backward).
/// Determinism: a row of Y and dU depends on its own row only; dB and group gradients sum tokens in a fixed order.
/// Example:     examples/engine
#pragma once
#include <loramix/ops/gate_rows.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// Forward.
template <class Acc, class W, class Y, class Score, Space S, Major M>
struct Expand {
  static constexpr const char* name = "expand";
  static constexpr Space space = S;
  MatrixView<const Acc, S> u;  // [T, R_a]
  GateForm<Score, S> gate;
  MatrixView<const W, S, M> B;  // [d_out, R]
  Acc scale;
  MatrixView<Y, S> y;  // [T, d_out]
  Into into = Into::add;

  void check() const {
    check::view(name, "u", u);
    check::view(name, "B", B);
    check::shape(name, "y", y, "the number of tokens", u.rows, "d_out of B", B.rows);
    check_form(name, gate, u.rows, B.cols);
    detail::check_shared(name, u.cols, B.cols, gate.experts, gate.rank_offsets != nullptr);
    check::disjoint(name, "y", y, "u", u);
    check::disjoint(name, "y", y, "B", B);
    detail::check_gate_disjoint(name, "y", y, gate);
  }
};

/// Backward.
template <class Acc, class W, class Y, class Score, class G, Space S, Major M>
struct ExpandBackward {
  static constexpr const char* name = "expand_backward";
  static constexpr Space space = S;
  MatrixView<const Acc, S> u;  // [T, R_a]
  GateForm<Score, S> gate;
  MatrixView<const W, S, M> B;  // [d_out, R]
  Acc scale = Acc(1);
  MatrixView<const Y, S> dy;       // [T, d_out]
  MatrixView<Acc, S> du;           // [T, R_a]
  MatrixView<G, S, M> dB{};        // [d_out, R] or empty
  GateGradient<Score, S> dgate{};  // views or empty
  Into parameters = Into::add;     // dB and rank_scale
  Into gate_values = Into::add;    // the other slots

  void check() const {
    check::view(name, "u", u);
    check::view(name, "B", B);
    check::shape(name, "dy", dy, "the number of tokens", u.rows, "d_out of B", B.rows);
    check::shape(name, "du", du, "the number of tokens", u.rows, "the columns of u", u.cols);
    check_form(name, gate, u.rows, B.cols);
    detail::check_shared(name, u.cols, B.cols, gate.experts, gate.rank_offsets != nullptr);
    check_gradient(name, gate, dgate);
    check::view(name, "dB", dB);
    if (dB.data != nullptr) check::shape(name, "dB", dB, "d_out of B", B.rows, "the ranks of B", B.cols);
    const auto written = [this](const char* what, auto view) {
      check::disjoint(name, what, view, "dy", dy);
      check::disjoint(name, what, view, "u", u);
      check::disjoint(name, what, view, "B", B);
      detail::check_gate_disjoint(name, what, view, gate);
    };
    written("du", du);
    written("dB", dB);
    check::disjoint(name, "dB", dB, "du", du);
    const auto gradient = [&](const char* what, auto view, int place) {
      written(what, view);
      check::disjoint(name, what, view, "du", du);
      check::disjoint(name, what, view, "dB", dB);
      const auto other = [&](const char* other_name, auto other_view, int other_place) {
        if (place < other_place) check::disjoint(name, what, view, other_name, other_view);
      };
      other("gate gradient id_weights", dgate.id_weights, 1);
      other("gate gradient values", dgate.values, 2);
      other("gate gradient multiplier", detail::as_row(dgate.multiplier), 3);
      other("gate gradient rank_scale", detail::as_row(dgate.rank_scale), 4);
    };
    gradient("gate gradient weights", dgate.weights, 0);
    gradient("gate gradient id_weights", dgate.id_weights, 1);
    gradient("gate gradient values", dgate.values, 2);
    gradient("gate gradient multiplier", detail::as_row(dgate.multiplier), 3);
    gradient("gate gradient rank_scale", detail::as_row(dgate.rank_scale), 4);
  }
};

/// The op y (+)= scale u Bᵀ for u [T, R], B [d_out, R], y [T, d_out], its types taken from the views: every rank open.
template <class Acc, class W, class Y, Space S, Major M>
auto make_expand(MatrixView<Acc, S> u, MatrixView<W, S, M> B, double scale, MatrixView<Y, S> y, Into into = Into::add) {
  using Sum = std::remove_const_t<Acc>;
  GateForm<Sum, S> open;
  open.tokens = u.rows;
  open.ranks = B.cols;
  return Expand<Sum, std::remove_const_t<W>, Y, Sum, S, M>{u, open, B, static_cast<Sum>(scale), y, into};
}

}  // namespace LORAMIX_ABI
}  // namespace loramix
