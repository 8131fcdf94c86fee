/// The gated product on the CPU: which of its two paths an op takes.
///
/// Computes:    shrink, expand and their backward: fused (cpu/fused.hpp) where there are kernels for the scalars and the
///              tuning lets them, composed (cpu/composed.hpp) for everything else.
/// Reads:       what the ops read.
/// Writes:      what the ops write.
/// Errors:      the ops'.
/// Cost:        the path's; path_of says which it is.
/// Determinism: the path depends on scalars and tuning only.
/// Example:     examples/engine
#pragma once
#include <loramix/cpu/composed.hpp>
#include <loramix/cpu/fused.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace cpu {
namespace detail {

/// The fused form of an op, or void.
template <class Op>
struct FusedForm {
  using type = void;
};
template <class X, class W, class Acc, class Score>
struct FusedForm<Shrink<X, W, Acc, Score, Space::host>> {
  using type = std::conditional_t<has_kernels<X, W, Acc, Score>, FusedShrink<X, W>, void>;
};
template <class X, class W, class Acc, class Score, class G>
struct FusedForm<ShrinkBackward<X, W, Acc, Score, G, Space::host>> {
  using type = std::conditional_t<has_kernels<X, W, Acc, Score, G>, FusedShrinkBackward<X, W, G>, void>;
};
template <class Acc, class W, class Y, class Score, Major M>
struct FusedForm<Expand<Acc, W, Y, Score, Space::host, M>> {
  using type = std::conditional_t<has_kernels<Y, W, Acc, Score>, FusedExpand<W, Y, M>, void>;
};
template <class Acc, class W, class Y, class Score, class G, Major M>
struct FusedForm<ExpandBackward<Acc, W, Y, Score, G, Space::host, M>> {
  using type = std::conditional_t<has_kernels<Y, W, Acc, Score, G>, FusedExpandBackward<W, Y, G, M>, void>;
};

template <class E, class Op>
Index product_scratch(const Backend<E>& be, const Op& op) {
  using Fused = typename FusedForm<Op>::type;
  if constexpr (!std::is_void_v<Fused>) {
    if (be.tuning.path != Path::composed) {
      return carved_bytes<Space::host>([&](Arena<>& arena) { Fused(arena, be, op); });
    }
  }
  return composed_scratch(be, op);
}
template <class E, class Op>
void run_product(const Backend<E>& be, const Op& op, Arena<> work) {
  using Fused = typename FusedForm<Op>::type;
  if constexpr (!std::is_void_v<Fused>) {
    if (be.tuning.path != Path::composed) return Fused(work, be, op).run(be, op);
  }
  composed(be, op, work);
}

inline PathFacts composed_facts(const char* why) {
  return {"cpu composed (Eigen product, gate, Eigen product)", why, tile_rows};
}
/// How many ranks a fused call computes, and why.
inline PathFacts fused_facts(const Tuning& tuning, const GateForm<float>& gate, Index columns_of_u) {
  constexpr const char *all = "cpu fused, all ranks", *open = "cpu fused, open ranks only";
  if (!selects(gate)) return {all, "the gate closes none for being not chosen", 0};
  if (columns_of_u != gate.ranks) return {all, "experts share one A: each of its ranks is needed", 0};
  if (tuning.grouping != Grouping::automatic)
    return {tuning.grouping == Grouping::grouped ? open : all, "Tuning::grouping says so", 0};
  if (gate.ids.cols == 0) {
    return grouping_pays(0, gate.experts, gate.ranks)
               ? PathFacts{open, "prefixes are taken to end half-way, and skipping what is behind them costs less", 0}
               : PathFacts{all, "there are at most 16 ranks: skipping those behind a prefix costs more", 0};
  }
  if (grouping_pays(gate.ids.cols, gate.experts, gate.ranks))
    return {open, "at most half of 16 or more are open, and skipping the others costs less", 0};
  return {all, "more than half are open, or there are fewer than 16: skipping the others costs more", 0};
}

}  // namespace detail

/// What explain() prints: of a product of some scalars, gate and size; without one, of all that are made of products.
template <class E, class Acc, class W, class Y, class Score, Major M>
PathFacts path_of(const Backend<E>& be, const Expand<Acc, W, Y, Score, Space::host, M>& op) {
  using namespace detail;
  if constexpr (!has_kernels<Y, W, Acc, Score>) {
    return composed_facts("there are fused kernels for float, bfloat16 and half, summed in float");
  } else {
    if (be.tuning.path == Path::composed) return composed_facts("Tuning::path says so");
    PathFacts facts = fused_facts(be.tuning, op.gate, op.u.cols);
    const bool many = class_of(be.tuning, op.u.rows) == TokenClass::many;
    const bool listed = is_grouped(be.tuning, op.gate, op.u.cols) && many_experts(op.gate);
    const bool lie = transposed(M) == Major::row && (!many || listed);
    facts.kernels = lie ? "weights as they lie" : "register tiles, weights packed for a sweep of columns";
    facts.tile_tokens = many ? Index{Spread<Y, W, transposed(M)>::rows} : op.u.rows;
    return facts;
  }
}
template <class E>
PathFacts path_of(const Backend<E>& be) {
  if (be.tuning.path == Path::composed) return detail::composed_facts("Tuning::path says so");
  return {"cpu fused", "float, bfloat16 and half summed in float; other scalars are composed",
          detail::Spread<float, float, Major::row>::rows, "register tiles"};
}

template <class E, class Score>
bool wants_selection_impl(const Backend<E>& be, const GateForm<Score>& form, Index columns) {
  if constexpr (std::is_same_v<Score, float>) {
    return be.tuning.path != Path::composed && detail::is_grouped(be.tuning, form, columns);
  } else {
    return false;
  }
}

template <class E, class X, class W, class Acc, class Score>
Index scratch_impl(const Backend<E>& be, const Shrink<X, W, Acc, Score, Space::host>& op) {
  return detail::product_scratch(be, op);
}
template <class E, class X, class W, class Acc, class Score>
void execute_impl(const Backend<E>& be, const Shrink<X, W, Acc, Score, Space::host>& op, Arena<> work) {
  detail::run_product(be, op, work);
}
template <class E, class X, class W, class Acc, class Score, class G>
Index scratch_impl(const Backend<E>& be, const ShrinkBackward<X, W, Acc, Score, G, Space::host>& op) {
  return detail::product_scratch(be, op);
}
template <class E, class X, class W, class Acc, class Score, class G>
void execute_impl(const Backend<E>& be, const ShrinkBackward<X, W, Acc, Score, G, Space::host>& op, Arena<> work) {
  detail::run_product(be, op, work);
}
template <class E, class Acc, class W, class Y, class Score, Major M>
Index scratch_impl(const Backend<E>& be, const Expand<Acc, W, Y, Score, Space::host, M>& op) {
  return detail::product_scratch(be, op);
}
template <class E, class Acc, class W, class Y, class Score, Major M>
void execute_impl(const Backend<E>& be, const Expand<Acc, W, Y, Score, Space::host, M>& op, Arena<> work) {
  detail::run_product(be, op, work);
}
template <class E, class Acc, class W, class Y, class Score, class G, Major M>
Index scratch_impl(const Backend<E>& be, const ExpandBackward<Acc, W, Y, Score, G, Space::host, M>& op) {
  return detail::product_scratch(be, op);
}
template <class E, class Acc, class W, class Y, class Score, class G, Major M>
void execute_impl(const Backend<E>& be, const ExpandBackward<Acc, W, Y, Score, G, Space::host, M>& op, Arena<> work) {
  detail::run_product(be, op, work);
}

}  // namespace cpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
