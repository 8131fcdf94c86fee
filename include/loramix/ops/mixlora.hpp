/// The middle of a feed-forward block whose experts share its weights: what happens between up and down projection.
///
/// Computes:    t1 = u + s Z1_e B1_eᵀ,  t3 = v + s Z3_e B3_eᵀ,  h_e = silu(t1) ∘ t3,  ĥ_e = h_e ∘ keep / (1 − p̄),
///              h̄ = Σ_e g_e h_e,  Z2_e = g_e A2_e ĥ_e                                                      (forward)
///              q = A2_eᵀ dZ2_e ∘ keep / (1 − p̄),  dg_e = ⟨h_e, dh̄ + q⟩,  dh_e = g_e (dh̄ + q),
///              dt1 = dh_e ∘ t3 ∘ silu′(t1),  dt3 = dh_e ∘ silu(t1),  du = Σ_e dt1,  dv = Σ_e dt3,  dZ1_e = s dt1 B1_e,
///              dB1_e (+)= s dt1ᵀ Z1_e,  the same of 3,  dA2_e (+)= (g_e dZ2_e)ᵀ ĥ_e                       (backward)
///              Sums run over the experts that the token chose. No h_e is ever stored: backward makes it again.
/// Source:      MATH.md section 4, MixLoRA (Li et al. 2024); W2 is linear and shared, so one product with h̄ serves all
///              experts. dA2 is written as dZ2_eᵀ (g_e ĥ_e).
/// Reads:       Z1, Z3 [T, E·r], u, v [T, ff], B1, B3 [ff, E·r] in either order, A2 [E·r, ff]; a gate of chosen ids and
///              weights [T, k]; backward also dh̄ [T, ff], dZ2 [T, E·r].
/// Writes:      h̄ [T, ff], Z2 [T, E·r], assigned, Z2 of an expert that is off 0; backward: du, dv [T, ff], dZ1, dZ3
///              [T, E·r], the weights' gradient [T, k], assigned. A closed choice gets gradient 0.
/// Adds to:     dB1, dB3 [ff, E·r], dA2 [E·r, ff], or assigns with Into::set. An empty view is not wanted.
/// Errors:      shape, stride, null, alias, overflow, ids (host), a gate of another kind; small workspace. On the device a
///              bad id contributes nothing and sets StatusFlags.
/// Cost:        6·T·k·r·ff flop forward on the CPU (E for k on the GPU); backward 30 with all gradients, since both of its
///              passes make t1 and t3 again. Scratch does not grow with T on the CPU; tiles [1024, ff] on the GPU.
/// Determinism: a row of what is written depends on its own row only; dB1, dB3, dA2 sum tokens in a fixed order.
/// Example:     tests/adapter/mix_lora.cpp
#pragma once
#include <cmath>
#include <initializer_list>

#include <loramix/core/adapter.hpp>
#include <loramix/core/draws.hpp>
#include <loramix/core/team.hpp>
#include <loramix/gate/form.hpp>
#include <loramix/ops/execute.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// What the two ops cost beside a gated product: `ranks` E·r are read, `chosen` k·r are computed with.
template <class P>
constexpr Cost mix_experts_cost(Index tokens, Index width, Index ranks, Index chosen) {
  constexpr double x = sizeof(typename P::activation), w = sizeof(typename P::weight), g = sizeof(typename P::gradient);
  const double hidden = static_cast<double>(tokens) * static_cast<double>(width);
  const double flop = 6 * hidden * static_cast<double>(chosen);
  const double weights = 3 * static_cast<double>(ranks) * static_cast<double>(width);
  return {.forward_flop = flop,
          .backward_flop = 2 * flop,
          .forward_bytes = 3 * x * hidden + w * weights,
          .backward_bytes = 5 * x * hidden + (w + 2 * g) * weights,
          .parameters = 3 * ranks * width};
}

namespace detail {

/// The cost of stages that follow each other.
constexpr Cost sum_of(std::initializer_list<Cost> stages) {
  Cost sum;
  for (const Cost& cost : stages) {
    sum.forward_flop += cost.forward_flop;
    sum.backward_flop += cost.backward_flop;
    sum.forward_bytes += cost.forward_bytes;
    sum.backward_bytes += cost.backward_bytes;
    sum.parameters += cost.parameters;
  }
  return sum;
}

/// The gate of these ops: experts that a token chose, and their weights.
template <class Score, Space S>
void check_chosen(const char* op, const GateForm<Score, S>& gate, Index tokens, Index ranks) {
  check_form(op, gate, tokens, ranks);
  const bool others = gate.prefix.data != nullptr || gate.subset.data != nullptr || gate.weights.data != nullptr ||
                      gate.values.data != nullptr || gate.multiplier.data != nullptr ||
                      gate.rank_scale.data != nullptr || gate.rank_offsets != nullptr || !gate.id_groups.per_token();
  const bool chosen = gate.ids.data != nullptr && gate.id_weights.data != nullptr;
  if (others || (!chosen && tokens != 0)) {
    fail(check::detail::about(ErrorCode::value, op, "gate")
         << " must choose by ids and weights of every token, and by nothing else");
  }
}

/// What the ops read alike, and what may be compared with it.
template <class Op>
struct MixShapes {
  const Op& op;

  template <class View>
  void like_z(const char* what, View view) const {
    check::shape(Op::name, what, view, "the number of tokens", op.z1.rows, "the ranks of z1", op.z1.cols);
  }
  template <class View>
  void like_u(const char* what, View view) const {
    check::shape(Op::name, what, view, "the number of tokens", op.z1.rows, "the columns of u", op.u.cols);
  }
  template <class View>
  void like_B(const char* what, View view) const {
    check::shape(Op::name, what, view, "the columns of u", op.u.cols, "the ranks of z1", op.z1.cols);
  }
  template <class View>
  void like_A2(const char* what, View view) const {
    check::shape(Op::name, what, view, "the ranks of z1", op.z1.cols, "the columns of u", op.u.cols);
  }
  void read() const {
    check_chosen(Op::name, op.gate, op.z1.rows, op.z1.cols);
    check::view(Op::name, "z1", op.z1);
    check::view(Op::name, "u", op.u);
    check::same(Op::name, "u", "rows", op.u.rows, "the number of tokens of z1", op.z1.rows);
    like_z("z3", op.z3);
    like_u("v", op.v);
    like_B("B1", op.B1);
    like_B("B3", op.B3);
    like_A2("A2", op.A2);
  }
  /// What is written shares no memory with what is read.
  template <class View>
  void written(const char* what, View view) const {
    const auto apart = [&](const char* other, auto from) { check::disjoint(Op::name, what, view, other, from); };
    apart("z1", op.z1);
    apart("z3", op.z3);
    apart("u", op.u);
    apart("v", op.v);
    apart("B1", op.B1);
    apart("B3", op.B3);
    apart("A2", op.A2);
    apart("gate ids", op.gate.ids);
    apart("gate id_weights", op.gate.id_weights);
  }
};

/// Which hidden values of a token the down projection sees; columns from `column` on, a multiple of 8.
struct MixMask {
  Dropout dropout;
  Index token = 0, column = 0;

  LORAMIX_HD std::uint32_t keep8(Index block) const {
    return dropout.on() ? dropout.keep8(token, column / 8 + block) : 0xffu;
  }
};

/// σ(t).
template <class Acc>
LORAMIX_HD Acc mix_sigmoid(Acc t) {
  using std::exp;
  return Acc(1) / (Acc(1) + exp(-t));
}

/// One token, one expert: sum += g h; t1 becomes g ĥ.
template <Team Tm, class Acc>
LORAMIX_HD void mix_row(const Tm& team, Index n, const MixMask& mask, Acc g, Acc* t1, const Acc* t3, Acc* sum) {
  const Acc kept = Acc(mask.dropout.kept_scale());
  team.each((n + 7) / 8, [&](Index block) {
    const std::uint32_t keep = mask.keep8(block);
    for (Index b = 0, c = 8 * block; b < 8 && c < n; ++b, ++c) {
      const Acc gh = g * (t1[c] * mix_sigmoid(t1[c]) * t3[c]);
      sum[c] += gh;
      t1[c] = (keep >> b & 1u) ? gh * kept : Acc(0);
    }
  });
}

/// Its backward, which returns dg: t1 becomes dt1, t3 dt3, q (A2ᵀ dZ2 before) g ĥ; du += dt1 and dv += dt3 where wanted.
template <Team Tm, class Acc, class X>
LORAMIX_HD Acc mix_row_backward(const Tm& team, Index n, const MixMask& mask, Acc g, const X* dhbar, Acc* t1, Acc* t3,
                                Acc* q, Acc* du, Acc* dv) {
  const Acc kept = Acc(mask.dropout.kept_scale());
  return team.sum((n + 7) / 8, [&](Index block) {
    const std::uint32_t keep = mask.keep8(block);
    Acc dg = Acc(0);
    for (Index b = 0, c = 8 * block; b < 8 && c < n; ++b, ++c) {
      const bool open = keep >> b & 1u;
      const Acc sigma = mix_sigmoid(t1[c]), act = t1[c] * sigma, h = act * t3[c];
      const Acc slope = sigma * (Acc(1) + t1[c] * (Acc(1) - sigma));
      const Acc d = open ? widen<Acc>(dhbar[c]) + q[c] * kept : widen<Acc>(dhbar[c]);
      const Acc dt1 = g * d * t3[c] * slope, dt3 = g * d * act;
      dg += h * d;
      q[c] = open ? g * h * kept : Acc(0);
      t1[c] = dt1;
      t3[c] = dt3;
      if (du != nullptr) {
        du[c] += dt1;
        dv[c] += dt3;
      }
    }
    return dg;
  });
}

/// The slot in which token t chose expert e, or −1.
template <class Score, Space S>
LORAMIX_HD Index chosen_slot(const GateForm<Score, S>& gate, Index t, Index e) {
  for (Index s = 0; s < gate.ids.cols; ++s) {
    if (gate.ids(t, s) == e) return s;
  }
  return -1;
}

}  // namespace detail

/// Forward.
template <class X, class W, class Acc, class Score, Space S, Major M>
struct MixExperts {
  static constexpr const char* name = "mix_experts";
  static constexpr Space space = S;
  MatrixView<const Acc, S> z1, z3;   // [T, E·r]
  MatrixView<const X, S> u, v;       // [T, ff]
  MatrixView<const W, S, M> B1, B3;  // [ff, E·r]
  MatrixView<const W, S> A2;         // [E·r, ff]
  GateForm<Score, S> gate;           // ids, id_weights [T, k]
  Acc scale;
  Dropout dropout;          // of h: the down projection's site
  MatrixView<X, S> hbar;    // [T, ff]
  MatrixView<Acc, S> z2{};  // [T, E·r]

  void check() const {
    const detail::MixShapes<MixExperts> shapes{*this};
    shapes.read();
    shapes.like_u("hbar", hbar);
    shapes.like_z("z2", z2);
    shapes.written("hbar", hbar);
    shapes.written("z2", z2);
    check::disjoint(name, "z2", z2, "hbar", hbar);
  }
};

/// Backward.
template <class X, class W, class Acc, class Score, class G, Space S, Major M>
struct MixExpertsBackward {
  static constexpr const char* name = "mix_experts_backward";
  static constexpr Space space = S;
  MatrixView<const Acc, S> z1, z3;   // [T, E·r]
  MatrixView<const X, S> u, v;       // [T, ff]
  MatrixView<const W, S, M> B1, B3;  // [ff, E·r]
  MatrixView<const W, S> A2;         // [E·r, ff]
  GateForm<Score, S> gate;           // ids, id_weights [T, k]
  Acc scale;
  Dropout dropout;                   // of h
  MatrixView<const X, S> dhbar;      // [T, ff]
  MatrixView<const Acc, S> dz2;      // [T, E·r]
  MatrixView<X, S> du, dv;           // [T, ff]
  MatrixView<Acc, S> dz1, dz3;       // [T, E·r]
  MatrixView<Score, S> dweights{};   // [T, k] or empty
  MatrixView<G, S, M> dB1{}, dB3{};  // [ff, E·r] or empty
  MatrixView<G, S> dA2{};            // [E·r, ff] or empty
  Into parameters = Into::add;

  void check() const {
    const detail::MixShapes<MixExpertsBackward> shapes{*this};
    shapes.read();
    shapes.like_u("dhbar", dhbar);
    shapes.like_z("dz2", dz2);
    shapes.like_u("du", du);
    shapes.like_u("dv", dv);
    shapes.like_z("dz1", dz1);
    shapes.like_z("dz3", dz3);
    check::view(name, "dweights", dweights);
    check::view(name, "dB1", dB1);
    check::view(name, "dB3", dB3);
    check::view(name, "dA2", dA2);
    if (dweights.data != nullptr) {
      check::shape(name, "dweights", dweights, "the rows of ids", gate.ids.rows, "the columns of ids", gate.ids.cols);
    }
    if (dB1.data != nullptr) shapes.like_B("dB1", dB1);
    if (dB3.data != nullptr) shapes.like_B("dB3", dB3);
    if (dA2.data != nullptr) shapes.like_A2("dA2", dA2);
    written("du", du, 0);
    written("dv", dv, 1);
    written("dz1", dz1, 2);
    written("dz3", dz3, 3);
    written("dweights", dweights, 4);
    written("dB1", dB1, 5);
    written("dB3", dB3, 6);
    written("dA2", dA2, 7);
  }

 private:
  template <class View>
  void written(const char* what, View view, int place) const {
    detail::MixShapes<MixExpertsBackward>{*this}.written(what, view);
    check::disjoint(name, what, view, "dhbar", dhbar);
    check::disjoint(name, what, view, "dz2", dz2);
    const auto later = [&](const char* other, auto output, int its_place) {
      if (place < its_place) check::disjoint(name, what, view, other, output);
    };
    later("dv", dv, 1);
    later("dz1", dz1, 2);
    later("dz3", dz3, 3);
    later("dweights", dweights, 4);
    later("dB1", dB1, 5);
    later("dB3", dB3, 6);
    later("dA2", dA2, 7);
  }
};

}  // namespace LORAMIX_ABI
}  // namespace loramix
