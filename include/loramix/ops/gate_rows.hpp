/// What the gate does to a row of U, and back: bodies written once for both devices, used by the expand stage.
///
/// Computes:    ũ = U ∘ g;  dU = dŨ ∘ g and dg_i = dŨ ∘ U ∘ Π_{j≠i} g_j (MATH.md section 1).
/// Reads:       U [T, R_a], dŨ [T, R], the gate's slots.
/// Writes:      ũ [T, R], dU [T, R_a], contributions of every token to values that tokens share.
/// Adds to:     the gate's gradient, or assigns with Into::set.
/// Errors:      checked by ops/expand.hpp.
/// Cost:        O(T·R·factors), and T·E or T·R scratch for gradients that are wanted.
/// Determinism: rows are independent; sums over tokens go through ColumnSum.
/// Example:     ops/expand.hpp
#pragma once
#include <loramix/gate/form.hpp>
#include <loramix/ops/column_sum.hpp>
#include <loramix/ops/rows.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

namespace detail {

inline void check_shared(const char* op, Index columns_of_u, Index ranks, Index experts, bool mixed) {
  if (columns_of_u == ranks || (!mixed && columns_of_u * experts == ranks)) return;
  fail(check::detail::about(ErrorCode::shape, op, "u")
       << " has " << columns_of_u << " columns, but B has " << ranks << " ranks for " << experts
       << " experts: u needs one column per rank, or per rank of one expert where A is shared");
}

template <class T, Space S>
MatrixView<T, S> as_row(VectorView<T, S> v) {
  return {v.data, 1, v.size};
}

template <class View, class Score, Space S>
void check_gate_disjoint(const char* op, const char* what, View view, const GateForm<Score, S>& gate) {
  check::disjoint(op, what, view, "gate weights", gate.weights);
  check::disjoint(op, what, view, "gate id_weights", gate.id_weights);
  check::disjoint(op, what, view, "gate values", gate.values);
  check::disjoint(op, what, view, "gate ids", gate.ids);
  check::disjoint(op, what, view, "gate subset", gate.subset);
  check::disjoint(op, what, view, "gate prefix", as_row(gate.prefix));
  check::disjoint(op, what, view, "gate multiplier", as_row(gate.multiplier));
  check::disjoint(op, what, view, "gate rank_scale", as_row(gate.rank_scale));
}

/// Row body: ũ[t, :] = U ∘ g.
template <class Acc, class Score, Space S>
struct ApplyGate {
  MatrixView<const Acc, S> u;  // [T, R_a]
  GateForm<Score, S> gate;
  MatrixView<Acc, S> gated;  // [T, R]

  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index t) const {
    (*this)(team, t, MatrixView<const Acc, S>{});
  }
  /// `elsewhere`: U, where it is not empty (ops/rows.hpp).
  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index t, const MatrixView<const Acc, S>& elsewhere) const {
    const MatrixView<const Acc, S> from = elsewhere.data != nullptr ? elsewhere : u;
    const GateRow<Acc, Score, S> row(gate, t);
    for (Index k = 0; k < gate.ids.cols && !gate.computed; ++k) row.expert_at(k);  // flags bad ids
    team.each(gate.ranks, [&](Index j) {
      const Index e = gate.expert_of(j);
      gated(t, j) = row.open(j, e) ? from(t, from.cols == gate.ranks ? j : j % from.cols) * row.factor(j, e) : Acc(0);
    });
  }
};

/// What one token adds to gate values that several tokens share; rows are summed by ColumnSum. Empty: not wanted.
template <class Acc, Space S>
struct GateContributions {
  MatrixView<Acc, S> id_weights;  // [T, k]
  MatrixView<Acc, S> weights;     // [T, E]
  MatrixView<Acc, S> multiplier;  // [T, 1]
  MatrixView<Acc, S> rank_scale;  // [T, R]
};

/// Row body: dU = dŨ ∘ g, and the gate's gradient, token by token.
template <class Acc, class Score, Space S>
struct ApplyGateBackward {
  MatrixView<const Acc, S> u;    // [T, R_a]
  MatrixView<const Acc, S> dut;  // [T, R]: dŨ
  GateForm<Score, S> gate;
  MatrixView<Acc, S> du;  // [T, R_a]
  GateContributions<Acc, S> by_token;
  MatrixView<Score, S> dvalues;  // [T, R] or empty
  Into into_values;

  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index t) const {
    (*this)(team, t, MatrixView<const Acc, S>{});
  }
  /// `elsewhere`: dŨ, where it is not empty (ops/rows.hpp).
  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index t, const MatrixView<const Acc, S>& elsewhere) const {
    const MatrixView<const Acc, S> from = elsewhere.data != nullptr ? elsewhere : dut;
    const GateRow<Acc, Score, S> row(gate, t);
    const Index shared = u.cols, ranks = gate.ranks;
    team.each(shared, [&](Index i) {
      Acc sum = Acc(0);
      for (Index j = i; j < ranks; j += shared) {
        const Index e = gate.expert_of(j);
        if (row.open(j, e)) sum += from(t, j) * row.factor(j, e);
      }
      du(t, i) = sum;
    });
    if (dvalues.data != nullptr) {
      team.each(ranks, [&](Index j) { store(dvalues(t, j), term<Factor::value>(from, row, t, j), into_values); });
    }
    if (by_token.rank_scale.data != nullptr) {
      team.each(ranks, [&](Index j) { by_token.rank_scale(t, j) = term<Factor::rank_scale>(from, row, t, j); });
    }
    if (by_token.multiplier.data != nullptr) {
      const Acc sum = team.sum(ranks, [&](Index j) { return term<Factor::multiplier>(from, row, t, j); });
      team.once([&] { by_token.multiplier(t, 0) = sum; });
    }
    if (by_token.weights.data != nullptr) {
      over_experts<Factor::weight>(team, from, row, t, gate.experts, by_token.weights, [](Index e) { return e; });
    }
    if (by_token.id_weights.data != nullptr) {
      over_experts<Factor::id_weight>(team, from, row, t, gate.ids.cols, by_token.id_weights,
                                      [&](Index k) { return row.expert_at(k); });
    }
  }

 private:
  /// dŨ ∘ U ∘ the other factors, at one rank; closed ranks give 0.
  template <Factor Skip>
  LORAMIX_HD Acc term(const MatrixView<const Acc, S>& from, const GateRow<Acc, Score, S>& row, Index t, Index j) const {
    const Index e = gate.expert_of(j);
    if (!row.open(j, e)) return Acc(0);
    return from(t, j) * u(t, u.cols == gate.ranks ? j : j % u.cols) * row.template factor<Skip>(j, e);
  }
  /// out(t, i) = the terms of expert_at(i), summed. Mixed ranks, and many: the team shares them, which keeps neighbours together.
  template <Factor Skip, Team Tm, class F>
  LORAMIX_HD void over_experts(const Tm& team, const MatrixView<const Acc, S>& from, const GateRow<Acc, Score, S>& row,
                               Index t, Index count, MatrixView<Acc, S> out, const F& expert_at) const {
    const auto ranks_of = [&](Index e) { return e < 0 ? Index{0} : gate.expert_begin(e + 1) - gate.expert_begin(e); };
    const auto at = [&](Index e, Index i) { return term<Skip>(from, row, t, gate.expert_begin(e) + i); };
    if (gate.rank_offsets == nullptr) {
      team.sums(
          count, gate.ranks / gate.experts,
          [&](Index k, Index i) {
            const Index e = expert_at(k);
            return e < 0 ? Acc(0) : at(e, i);
          },
          [&](Index k, Acc sum) { out(t, k) = sum; });
      return;
    }
    if (gate.ranks < 4 * gate.experts) {
      team.each(count, [&](Index k) {
        const Index e = expert_at(k);
        Acc sum = Acc(0);
        for (Index i = 0; i < ranks_of(e); ++i) sum += at(e, i);
        out(t, k) = sum;
      });
      return;
    }
    for (Index k = 0; k < count; ++k) {
      const Index e = expert_at(k);
      const Acc sum = team.sum(ranks_of(e), [&](Index i) { return at(e, i); });
      team.once([&] { out(t, k) = sum; });
    }
  }
  LORAMIX_HD static void store(Score& cell, Acc value, Into into) {
    cell = narrow<Score>(into == Into::add ? widen<Acc>(cell) + value : value);
  }
};

/// Row body: out[t, :] (+)= values[t, :].
template <class Acc, class Score, Space S>
struct StoreRow {
  MatrixView<const Acc, S> values;
  MatrixView<Score, S> out;
  Into into;
  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index t) const {
    team.each(out.cols, [&](Index c) {
      Score& cell = out(t, c);
      cell = narrow<Score>(into == Into::add ? widen<Acc>(cell) + values(t, c) : values(t, c));
    });
  }
};

/// Scratch of the gate's gradient: one carve for both backends. A gradient that is assigned token by token (`values` is
/// Into::set) is its own scratch.
template <class Acc, class Score, Space S>
GateContributions<Acc, S> carve_contributions(Arena<S>& arena, const GateForm<Score, S>& gate,
                                              const GateGradient<Score, S>& wanted, Into values = Into::add) {
  GateContributions<Acc, S> c;
  const auto room = [&](MatrixView<Score, S> out, const Groups<S>& groups, Index cols) {
    if (out.data == nullptr) return MatrixView<Acc, S>{};
    if constexpr (std::is_same_v<Acc, Score>) {
      if (values == Into::set && groups.per_token()) return out;
    }
    return arena.template matrix<Acc>(gate.tokens, cols);
  };
  c.id_weights = room(wanted.id_weights, gate.id_groups, gate.ids.cols);
  c.weights = room(wanted.weights, gate.weight_groups, gate.experts);
  c.multiplier = room({wanted.multiplier.data, wanted.multiplier.size, 1, 1}, gate.multiplier_groups, 1);
  if (wanted.rank_scale.data != nullptr) c.rank_scale = arena.template matrix<Acc>(gate.tokens, gate.ranks);
  return c;
}

/// Sums what the tokens contributed into the gradient of the slots.
template <class Backend, class Acc, class Score, Space S>
void sum_contributions(const Backend& be, const GateForm<Score, S>& gate, const GateContributions<Acc, S>& from,
                       const GateGradient<Score, S>& into, Into parameters, Into values) {
  const auto add = [&](MatrixView<const Acc, S> tokens, Groups<S> groups, MatrixView<Score, S> out, Into how) {
    if (out.data == nullptr || out.empty()) return;
    execute_impl(be, ColumnSum<Acc, Score, S>{tokens, groups, out, how}, Arena<S>{});
  };
  const auto each_own = [&](MatrixView<const Acc, S> tokens, MatrixView<Score, S> out) {
    if (out.data == nullptr || out.empty() || static_cast<const void*>(tokens.data) == out.data) return;
    execute_impl(be, Rows<StoreRow<Acc, Score, S>, S>{gate.tokens, {tokens, out, values}}, Arena<S>{});
  };
  if (gate.id_groups.per_token())
    each_own(from.id_weights, into.id_weights);
  else
    add(from.id_weights, gate.id_groups, into.id_weights, values);
  if (gate.weight_groups.per_token())
    each_own(from.weights, into.weights);
  else
    add(from.weights, gate.weight_groups, into.weights, values);
  const MatrixView<Score, S> multiplier_column{into.multiplier.data, into.multiplier.size, 1, 1};
  if (gate.multiplier_groups.per_token())
    each_own(from.multiplier, multiplier_column);
  else
    add(from.multiplier, gate.multiplier_groups, multiplier_column, values);
  add(from.rank_scale, Groups<S>{}, MatrixView<Score, S>{into.rank_scale.data, 1, into.rank_scale.size}, parameters);
}

}  // namespace detail

}  // namespace LORAMIX_ABI
}  // namespace loramix
