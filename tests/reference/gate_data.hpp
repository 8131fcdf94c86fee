// Gates as plain data: which slots there are (GateSpec), drawn contents (GateData), and what they mean written out for
// every token and rank (truth). No loramix header: the library's own lowering is under test.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <random>
#include <vector>

#include "reference/product.hpp"

namespace loramix_test {

using Random = std::mt19937_64;

/// Uniform in [−1, 1], a float, so that every type of a gate holds it exactly.
inline double draw(Random& random) {
  return static_cast<float>(std::uniform_real_distribution<double>(-1.0, 1.0)(random));
}
inline Index draw_below(Random& random, Index n) {
  return static_cast<Index>(random() % static_cast<std::uint64_t>(n));
}

inline Grid<double> draw_grid(Random& random, Index rows, Index cols) {
  Grid<double> g(rows, cols);
  for (Index i = 0; i < g.size(); ++i) g[i] = draw(random);
  return g;
}

/// Whether a slot is there, and to what its rows belong.
enum class By { absent, token, id, segment };
enum class Choice { random, all_on_one, one_dead };

struct GateSpec {
  const char* name;
  By ids = By::absent;
  Index k = 1;  // 0: all experts
  bool id_weights = false;
  By weights = By::absent;
  bool values = false;
  By multiplier = By::absent;
  bool rank_scale = false;
  By prefix = By::absent;
  By subset = By::absent;
  bool mixed_ranks = false;
  bool computed = false;  // weights = softmax of side rows
  bool tied = false;      // the side rows are all the same
  Choice choice = Choice::random;

  bool by_expert() const { return ids != By::absent || weights != By::absent; }
};

inline const std::vector<GateSpec>& gate_specs() {
  static const std::vector<GateSpec> specs = {
      {.name = "open"},
      {.name = "token experts", .weights = By::token},
      {.name = "group experts by id", .weights = By::id},
      {.name = "group experts by segment", .weights = By::segment},
      {.name = "top-2", .ids = By::token, .k = 2, .id_weights = true},
      {.name = "top-2 without weights", .ids = By::token, .k = 2},
      {.name = "top-E", .ids = By::token, .k = 0, .id_weights = true},
      {.name = "top-2 of a segment", .ids = By::segment, .k = 2, .id_weights = true},
      {.name = "top-2 of a task", .ids = By::id, .k = 2, .id_weights = true},
      {.name = "one expert per token", .ids = By::token},
      {.name = "one expert per token, all the same", .ids = By::token, .choice = Choice::all_on_one},
      {.name = "top-2, an expert without tokens",
       .ids = By::token,
       .k = 2,
       .id_weights = true,
       .choice = Choice::one_dead},
      {.name = "one expert per segment", .ids = By::segment},
      {.name = "one expert per domain", .ids = By::id},
      {.name = "one expert per token, mixed ranks", .ids = By::token, .mixed_ranks = true},
      {.name = "one expert per segment, mixed ranks", .ids = By::segment, .mixed_ranks = true},
      {.name = "rank values", .values = true},
      {.name = "rank scale", .rank_scale = true},
      {.name = "prefix per token", .prefix = By::token},
      {.name = "prefix per task", .prefix = By::id},
      {.name = "subset per segment", .subset = By::segment},
      {.name = "multiplier per token", .multiplier = By::token},
      {.name = "multiplier per segment", .multiplier = By::segment},
      {.name = "prefix x scale x multiplier", .multiplier = By::id, .rank_scale = true, .prefix = By::id},
      {.name = "top-2 x rank scale", .ids = By::token, .k = 2, .id_weights = true, .rank_scale = true},
      {.name = "one expert x token experts x subset, mixed ranks",
       .ids = By::segment,
       .weights = By::token,
       .subset = By::id,
       .mixed_ranks = true},
      {.name = "every slot",
       .ids = By::token,
       .k = 2,
       .id_weights = true,
       .weights = By::id,
       .values = true,
       .multiplier = By::segment,
       .rank_scale = true,
       .prefix = By::token,
       .subset = By::segment},
      {.name = "softmax", .weights = By::token, .computed = true},
      {.name = "softmax of ties", .weights = By::token, .computed = true, .tied = true},
      {.name = "softmax x multiplier x rank scale",
       .weights = By::token,
       .multiplier = By::id,
       .rank_scale = true,
       .computed = true},
  };
  return specs;
}

struct GroupData {
  By by = By::absent;
  Index count = 0;                // rows of the slot
  std::vector<std::int32_t> ids;  // [T] for By::id
  std::vector<Index> offsets;     // [count + 1] for By::segment

  bool present() const { return by != By::absent; }
  Index of(Index t) const {
    if (by == By::token) return t;
    if (by == By::id) return ids[static_cast<std::size_t>(t)];
    for (Index g = 0; g < count; ++g) {
      if (offsets[static_cast<std::size_t>(g)] <= t && t < offsets[static_cast<std::size_t>(g) + 1]) return g;
    }
    return -1;
  }
};

inline GroupData draw_groups(Random& random, By by, Index tokens) {
  GroupData g;
  g.by = by;
  if (by == By::token) g.count = tokens;
  if (by == By::id) {  // the last group belongs to no token; some tokens to no group
    g.count = 4;
    for (Index t = 0; t < tokens; ++t) {
      g.ids.push_back(static_cast<std::int32_t>(t == 0 ? 1 : draw_below(random, 4) - 1));
    }
  }
  if (by == By::segment) {  // empty segments at the beginning, in the middle and at the end
    const Index cut = tokens - tokens / 3;
    g.count = 5;
    g.offsets = {0, 0, cut, cut, tokens, tokens};
  }
  return g;
}

enum class FactorName { id_weights, weights, values, multiplier, rank_scale };

struct GateData {
  GateSpec spec;
  Index tokens = 0, ranks = 0, experts = 1;
  std::vector<Index> rank_offsets;  // [E + 1]
  GroupData id_groups, weight_groups, multiplier_groups, prefix_groups, subset_groups;
  Grid<std::int32_t> ids, prefix;
  Grid<std::uint8_t> subset;
  Grid<double> id_weights, weights, values, multiplier, rank_scale;
};

inline Grid<std::int32_t> draw_ids(Random& random, const GateSpec& spec, Index rows, Index experts) {
  const Index k = spec.k == 0 || spec.k > experts ? experts : spec.k;
  Grid<std::int32_t> ids(rows, k, -1);
  for (Index g = 0; g < rows; ++g) {
    std::vector<std::int32_t> order;
    for (Index e = 0; e < experts; ++e) {
      if (spec.choice == Choice::one_dead && experts > 1 && e == experts / 2) continue;
      order.push_back(static_cast<std::int32_t>(e));
    }
    std::shuffle(order.begin(), order.end(), random);
    for (Index i = 0; i < k && i < static_cast<Index>(order.size()); ++i) {
      // The rows that token 0 may use keep their first choice, so that no case is closed altogether.
      const bool none = g > 1 && spec.k != 0 && spec.choice != Choice::all_on_one && draw_below(random, 4) == 0;
      ids(g, i) = none ? -1 : order[static_cast<std::size_t>(i)];
      if (spec.choice == Choice::all_on_one) ids(g, i) = static_cast<std::int32_t>(experts - 1 - i);
    }
  }
  return ids;
}

inline GateData draw_gate(Random& random, const GateSpec& spec, Index tokens, Index experts, Index rank) {
  GateData d;
  d.spec = spec;
  d.tokens = tokens;
  d.experts = spec.by_expert() ? experts : 1;
  d.ranks = experts * rank;
  for (Index e = 0; e <= d.experts; ++e) {
    const Index moved = spec.mixed_ranks && rank > 0 && e % 2 == 1 && e < d.experts ? 1 : 0;
    d.rank_offsets.push_back(e * (d.ranks / d.experts) + moved);
  }
  if (spec.ids != By::absent) {
    d.id_groups = draw_groups(random, spec.ids, tokens);
    d.ids = draw_ids(random, spec, d.id_groups.count, d.experts);
    if (spec.mixed_ranks) {  // experts without ranks exist; token 0 must not be theirs alone
      for (Index g = 0; g < d.ids.rows() && g < 2; ++g) {
        for (Index k = 1; k < d.ids.cols(); ++k) {
          if (d.ids(g, k) == 0) d.ids(g, k) = d.ids(g, 0);
        }
        d.ids(g, 0) = 0;
      }
    }
    if (spec.id_weights) d.id_weights = draw_grid(random, d.ids.rows(), d.ids.cols());
  }
  if (spec.weights != By::absent) {
    d.weight_groups = draw_groups(random, spec.weights, tokens);
    d.weights = draw_grid(random, d.weight_groups.count, d.experts);
  }
  if (spec.values) d.values = draw_grid(random, tokens, d.ranks);
  if (spec.multiplier != By::absent) {
    d.multiplier_groups = draw_groups(random, spec.multiplier, tokens);
    d.multiplier = draw_grid(random, d.multiplier_groups.count, 1);
  }
  if (spec.rank_scale) d.rank_scale = draw_grid(random, 1, d.ranks);
  if (spec.prefix != By::absent) {
    d.prefix_groups = draw_groups(random, spec.prefix, tokens);
    d.prefix = Grid<std::int32_t>(d.prefix_groups.count, 1);
    for (Index g = 0; g < d.prefix.rows(); ++g) {
      d.prefix(g, 0) = static_cast<std::int32_t>(g < 2 ? d.ranks : draw_below(random, d.ranks + 1));
    }
  }
  if (spec.subset != By::absent) {
    d.subset_groups = draw_groups(random, spec.subset, tokens);
    d.subset = Grid<std::uint8_t>(d.subset_groups.count, d.ranks, 1);
    for (Index g = 0; g < d.subset.rows(); ++g) {
      for (Index j = 0; j < d.ranks; ++j) {
        const bool closed = draw_below(random, 2) == 0 && (g > 1 || j % 3 != 0);
        d.subset(g, j) = closed ? 0 : static_cast<std::uint8_t>(1 + draw_below(random, 3));
      }
    }
  }
  return d;
}

template <class T>
struct NamedGate {
  reference::Gate<T> gate;
  std::vector<FactorName> names;  // of gate.factors
};

/// What the data mean, (t, j) by (t, j). `weights` replaces the expert weights of a computed gate.
template <class T>
NamedGate<T> truth(const GateData& d, const Grid<T>* weights = nullptr) {
  NamedGate<T> out;
  reference::Gate<T>& gate = out.gate;
  gate.open = Grid<std::uint8_t>(d.tokens, d.ranks, 1);
  const auto expert_of = [&](Index j) {
    for (Index e = 0; e < d.experts; ++e) {
      if (d.rank_offsets[static_cast<std::size_t>(e)] <= j && j < d.rank_offsets[static_cast<std::size_t>(e) + 1]) {
        return e;
      }
    }
    std::abort();
  };
  const auto place_of = [&](Index group, Index e) {
    for (Index k = 0; k < d.ids.cols(); ++k) {
      if (d.ids(group, k) == e) return k;
    }
    return Index{-1};
  };
  const auto close = [&](const auto& closed) {
    for (Index t = 0; t < d.tokens; ++t) {
      for (Index j = 0; j < d.ranks; ++j) {
        if (closed(t, j)) gate.open(t, j) = 0;
      }
    }
  };
  const auto without_group = [&](const GroupData& groups) {
    if (groups.present()) close([&](Index t, Index) { return groups.of(t) < 0; });
  };
  for (const GroupData* g :
       {&d.id_groups, &d.weight_groups, &d.multiplier_groups, &d.prefix_groups, &d.subset_groups}) {
    without_group(*g);
  }
  if (d.id_groups.present()) {
    close([&](Index t, Index j) { return d.id_groups.of(t) < 0 || place_of(d.id_groups.of(t), expert_of(j)) < 0; });
  }
  if (d.prefix_groups.present()) {
    close([&](Index t, Index j) { return d.prefix_groups.of(t) < 0 || j >= d.prefix(d.prefix_groups.of(t), 0); });
  }
  if (d.subset_groups.present()) {
    close([&](Index t, Index j) { return d.subset_groups.of(t) < 0 || d.subset(d.subset_groups.of(t), j) == 0; });
  }

  const auto add = [&](FactorName name, Grid<T> values, const auto& covers) {
    reference::Factor<T> f{std::move(values), Grid<Index>(d.tokens, d.ranks, -1)};
    for (Index t = 0; t < d.tokens; ++t) {
      for (Index j = 0; j < d.ranks; ++j) {
        if (gate.open(t, j)) f.covers(t, j) = covers(t, j);
      }
    }
    gate.factors.push_back(std::move(f));
    out.names.push_back(name);
  };
  if (!d.id_weights.empty()) {
    add(FactorName::id_weights, d.id_weights.as<T>(),
        [&](Index t, Index j) { return d.id_groups.of(t) * d.ids.cols() + place_of(d.id_groups.of(t), expert_of(j)); });
  }
  if (d.weight_groups.present()) {
    add(FactorName::weights, weights != nullptr ? *weights : d.weights.as<T>(),
        [&](Index t, Index j) { return d.weight_groups.of(t) * d.experts + expert_of(j); });
  }
  if (d.spec.values) {
    add(FactorName::values, d.values.as<T>(), [&](Index t, Index j) { return t * d.ranks + j; });
  }
  if (d.multiplier_groups.present()) {
    add(FactorName::multiplier, d.multiplier.as<T>(), [&](Index t, Index) { return d.multiplier_groups.of(t); });
  }
  if (d.spec.rank_scale) {
    add(FactorName::rank_scale, d.rank_scale.as<T>(), [](Index, Index j) { return j; });
  }
  return out;
}

}  // namespace loramix_test
