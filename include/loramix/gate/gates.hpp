/// The gates that are given: small structs of views, each of which lowers to the normal form (gate/form.hpp) and states
/// its facts. Gates that are computed from the token by a router have side rows: gate/softmax.hpp is the first.
///
///   OpenGate            every rank open                                     LoRA
///   TokenExperts        weights [T, E]                                      dense mixtures
///   GroupExperts        weights [groups, E]                                 task gates
///   TopKExperts         ids [T, k], weights [T, k]                          sparse mixtures
///   OneExpert           id per token, segment or domain; −1 = none          MoA, serving
///   RankValues          values [T, R]                                       anything else
///   RankScale           values [R]                                          AdaLoRA's λ, MoRE's law
///   RankPrefix          how many leading ranks, per group                   MoRE
///   RankSubset          0/1 [groups, R]                                     MoRE's ablation
///   Multiplier          values [groups]                                     straight-through
///   GateProduct<G…>     several of these at once
///
/// Computes:    form(T, R), the gate's slots (MATH.md section 1). Nothing is copied.
/// Reads:       the views it was given, when a kernel runs.
/// Errors:      shapes and ids are checked by the op that takes the form.
/// Cost:        none.
/// Determinism: nothing is drawn.
/// Example:     tests/gate
#pragma once
#include <concepts>
#include <type_traits>

#include <loramix/gate/form.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// What a kernel can make of a gate's zeros.
enum class Sparsity { dense, k_blocks, segments };

/// The slots of the normal form, as bits.
struct Slots {
  enum : unsigned {
    none = 0,
    ids = 1,
    id_weights = 2,
    prefix = 4,
    subset = 8,
    weights = 16,
    values = 32,
    multiplier = 64,
    rank_scale = 128
  };
};

/// What is known of a gate at compile time.
struct GateFacts {
  Sparsity sparsity;
  unsigned slots;
  bool token_invariant;  // one value for all tokens: folds into ΔW
};

/// A gate states its facts and lowers to a form (directly, or from its State where it is computed).
template <class G>
concept Gate = std::copy_constructible<G> && requires {
  { G::facts } -> std::convertible_to<GateFacts>;
};

/// A gate that is given: it lowers by itself.
template <class G>
concept GivenGate = Gate<G> && requires(const G& gate, Index n) {
  { gate.form(n, n).ranks } -> std::convertible_to<Index>;
};

template <class Score = float, Space S = Space::host>
struct OpenGate {
  static constexpr GateFacts facts{Sparsity::dense, Slots::none, true};
  constexpr GateForm<Score, S> form(Index tokens, Index ranks) const {
    return GateForm<Score, S>{.tokens = tokens, .ranks = ranks};
  }
};

template <class Score = float, Space S = Space::host>
struct GroupExperts {
  static constexpr GateFacts facts{Sparsity::dense, Slots::weights, false};
  MatrixView<const Score, S> weights;  // [groups, E]
  Groups<S> groups{};
  constexpr GateForm<Score, S> form(Index tokens, Index ranks) const {
    return GateForm<Score, S>{
        .tokens = tokens, .ranks = ranks, .experts = weights.cols, .weights = weights, .weight_groups = groups};
  }
};

template <class Score = float, Space S = Space::host>
struct TokenExperts {
  static constexpr GateFacts facts{Sparsity::dense, Slots::weights, false};
  MatrixView<const Score, S> weights;  // [T, E]
  constexpr GateForm<Score, S> form(Index tokens, Index ranks) const {
    return GroupExperts<Score, S>{weights}.form(tokens, ranks);
  }
};

template <class Score = float, Space S = Space::host>
struct TopKExperts {
  static constexpr GateFacts facts{Sparsity::k_blocks, Slots::ids | Slots::id_weights, false};
  MatrixView<const std::int32_t, S> ids;  // [T, k], −1 = none
  MatrixView<const Score, S> weights;     // [T, k], or empty: 1
  Index experts = 1;
  constexpr GateForm<Score, S> form(Index tokens, Index ranks) const {
    return GateForm<Score, S>{.tokens = tokens, .ranks = ranks, .experts = experts, .ids = ids, .id_weights = weights};
  }
};

template <class Score = float, Space S = Space::host>
struct OneExpert {
  static constexpr GateFacts facts{Sparsity::segments, Slots::ids, false};
  VectorView<const std::int32_t, S> ids;  // [groups], −1 = none
  Groups<S> groups{};                     // default: an id per token
  Index experts = 1;
  const Index* rank_offsets = nullptr;  // [E+1] for mixed ranks
  constexpr GateForm<Score, S> form(Index tokens, Index ranks) const {
    return GateForm<Score, S>{.tokens = tokens,
                              .ranks = ranks,
                              .experts = experts,
                              .rank_offsets = rank_offsets,
                              .ids = {ids.data, ids.size, 1, 1},
                              .id_groups = groups};
  }
};

template <class Score = float, Space S = Space::host>
struct RankValues {
  static constexpr GateFacts facts{Sparsity::dense, Slots::values, false};
  MatrixView<const Score, S> values;  // [T, R]
  constexpr GateForm<Score, S> form(Index tokens, Index ranks) const {
    return GateForm<Score, S>{.tokens = tokens, .ranks = ranks, .values = values};
  }
};

template <class Score = float, Space S = Space::host>
struct RankScale {
  static constexpr GateFacts facts{Sparsity::dense, Slots::rank_scale, true};
  VectorView<const Score, S> scale;  // [R]
  constexpr GateForm<Score, S> form(Index tokens, Index ranks) const {
    return GateForm<Score, S>{.tokens = tokens, .ranks = ranks, .rank_scale = scale};
  }
};

template <class Score = float, Space S = Space::host>
struct RankPrefix {
  static constexpr GateFacts facts{Sparsity::segments, Slots::prefix, false};
  VectorView<const std::int32_t, S> counts;  // [groups]
  Groups<S> groups{};
  constexpr GateForm<Score, S> form(Index tokens, Index ranks) const {
    return GateForm<Score, S>{.tokens = tokens, .ranks = ranks, .prefix = counts, .prefix_groups = groups};
  }
};

template <class Score = float, Space S = Space::host>
struct RankSubset {
  static constexpr GateFacts facts{Sparsity::dense, Slots::subset, false};
  MatrixView<const std::uint8_t, S> open;  // [groups, R], 0 = closed
  Groups<S> groups{};
  constexpr GateForm<Score, S> form(Index tokens, Index ranks) const {
    return GateForm<Score, S>{.tokens = tokens, .ranks = ranks, .subset = open, .subset_groups = groups};
  }
};

template <class Score = float, Space S = Space::host>
struct Multiplier {
  static constexpr GateFacts facts{Sparsity::dense, Slots::multiplier, false};
  VectorView<const Score, S> values;  // [groups]
  Groups<S> groups{};
  constexpr GateForm<Score, S> form(Index tokens, Index ranks) const {
    return GateForm<Score, S>{.tokens = tokens, .ranks = ranks, .multiplier = values, .multiplier_groups = groups};
  }
};

namespace detail {

/// Moves the slots that `bits` names from one form into another.
template <class Score, Space S>
constexpr void merge_slots(GateForm<Score, S>& into, const GateForm<Score, S>& from, unsigned bits) {
  if (bits & (Slots::ids | Slots::weights)) {
    into.experts = from.experts;
    into.rank_offsets = from.rank_offsets != nullptr ? from.rank_offsets : into.rank_offsets;
  }
  if (bits & Slots::ids) into.ids = from.ids, into.id_groups = from.id_groups;
  if (bits & Slots::id_weights) into.id_weights = from.id_weights;
  if (bits & Slots::prefix) into.prefix = from.prefix, into.prefix_groups = from.prefix_groups;
  if (bits & Slots::subset) into.subset = from.subset, into.subset_groups = from.subset_groups;
  if (bits & Slots::weights) into.weights = from.weights, into.weight_groups = from.weight_groups;
  if (bits & Slots::values) into.values = from.values;
  if (bits & Slots::multiplier) into.multiplier = from.multiplier, into.multiplier_groups = from.multiplier_groups;
  if (bits & Slots::rank_scale) into.rank_scale = from.rank_scale;
}

// Variadic functions and not initializer lists: nvcc cannot expand a pack into a braced list at class scope.
template <class... Bits>
constexpr bool slots_are_distinct(Bits... slots) {
  unsigned seen = 0;
  bool distinct = true;
  ((distinct = distinct && (seen & slots) == 0, seen |= slots), ...);
  return distinct;
}

template <class... Sparsities>
constexpr Sparsity sparsest(Sparsities... all) {
  Sparsity best = Sparsity::dense;
  ((best = all == Sparsity::segments || best == Sparsity::dense ? all : best), ...);
  return best;
}

}  // namespace detail

/// g = Π g_i. Each factor fills slots of its own.
template <class First, class... Rest>
struct GateProduct {
  static_assert(GivenGate<First> && (GivenGate<Rest> && ...),
                "loramix: a factor of this GateProduct is not a gate: it needs static constexpr GateFacts facts and "
                "form(tokens, ranks) that returns a GateForm");
  static_assert(
      detail::slots_are_distinct(First::facts.slots, Rest::facts.slots...),
      "loramix: two factors of this GateProduct fill the same slot of the normal form; multiply them into one");
  static constexpr GateFacts facts{detail::sparsest(First::facts.sparsity, Rest::facts.sparsity...),
                                   (First::facts.slots | ... | Rest::facts.slots),
                                   (First::facts.token_invariant && ... && Rest::facts.token_invariant)};
  constexpr explicit GateProduct(First first, Rest... rest) : first_(first), rest_(rest...) {}

  constexpr auto form(Index tokens, Index ranks) const {
    auto f = first_.form(tokens, ranks);
    if constexpr (sizeof...(Rest) != 0) {
      const auto others = rest_.form(tokens, ranks);
      check_experts(f, others);
      detail::merge_slots(f, others, decltype(rest_)::facts.slots);
    }
    return f;
  }

 private:
  struct Nothing {};
  template <class... Gs>
  struct RestOf {
    using type = GateProduct<Gs...>;
  };
  template <class F>
  static constexpr void check_experts(const F& a, const F& b) {
    constexpr unsigned by_expert = Slots::ids | Slots::weights;
    if constexpr ((First::facts.slots & by_expert) != 0 && ((Rest::facts.slots | ... | 0u) & by_expert) != 0) {
      check::same("GateProduct", "a factor", "experts", b.experts, "the other factor's number", a.experts);
    }
  }

  First first_;
  [[no_unique_address]]
  typename std::conditional_t<sizeof...(Rest) == 0, std::type_identity<Nothing>, RestOf<Rest...>>::type rest_;
};

}  // namespace LORAMIX_ABI
}  // namespace loramix
