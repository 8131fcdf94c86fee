/// Parameter groups: what an optimiser does differently for parameters of one role (LoRA+, no decay, frozen).
///
/// Computes:    from an adapter's visit() and the caller's rules, the ranges of its flat parameter buffer that are
///              updated alike. Neighbours with equal rules are one range; the gaps between parameters are 0 and stay 0.
///              LoRA+ (Hayou et al. 2024) is {"B", {.lr_ratio = 16}}.
/// Parameters:  rules: group name (core/adapter.hpp, namespace group) and GroupOptions. A group without a rule has
///              ratio 1 and the optimiser's weight decay if its parameters decay (biases, embeddings, λ, γ, M do not).
/// Errors:      a rule for a group that the adapter lacks (the message names those it has), two rules for one group, a
///              ratio or decay that is negative or not finite, a parameter outside the flat buffer or strided.
/// Cost:        once, in the optimiser's constructor, which allocates; a step only reads the result.
/// Determinism: none needed: a step treats every element alone.
/// Example:     tests/train/adamw.cpp
#pragma once
#include <cstdio>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

#include <loramix/core/adapter.hpp>
#include <loramix/core/draws.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// What differs for one group.
struct GroupOptions {
  double lr_ratio = 1;  // learning rate = lr_ratio · lr
  std::optional<double> weight_decay =
      {};               // instead of the optimiser's, also for parameters that do not decay by default
  bool frozen = false;  // neither the weights nor their moments change
};

/// A group's name and what differs for it.
struct GroupRule {
  const char* name;
  GroupOptions options = {};
};

namespace detail {

/// Elements of the optimisers' row: a row is a chunk of the flat buffer.
inline constexpr Index flat_chunk = 256;
constexpr Index flat_rows(Index size) { return (size + flat_chunk - 1) / flat_chunk; }

/// The type an optimiser computes and keeps its state in.
template <class W>
using master_t = accumulation_t<W>;

inline void check_number(const char* op, const char* argument, double value, double below = 1.7976931348623157e308) {
  if (value >= 0 && value < below) return;
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  Error error = check::detail::about(ErrorCode::value, op, argument);
  fail(error << " is " << text << (below <= 1 ? ", must be in [0, 1)" : ", must be finite and at least 0"));
}

template <class T, Space S>
MatrixView<T, S> as_matrix(VectorView<T, S> v) {
  return {v.data, 1, v.size};
}

/// `v` has `size` elements and shares none with the weights.
template <class T, class W, Space S>
void check_beside(const char* op, const char* argument, VectorView<T, S> v, VectorView<W, S> weights) {
  check::view(op, argument, v);
  check::same(op, argument, "size", v.size, "the number of weights", weights.size);
  check::disjoint(op, "weights", as_matrix(weights), argument, as_matrix(v));
}

/// A 16-bit weight's master copy; where the weight is no longer its rounding, somebody else has written the weight, and
/// that counts (also the first time: masters begin as 0).
template <class M, class W>
LORAMIX_HD inline M master_of(M master, W weight) {
  return narrow<W>(master) == weight ? master : widen<M>(weight);
}

/// Zero for numbers too small to be normal. Moments of weights without gradient (closed experts, dead units) decay into
/// them, where they are worth nothing and a step takes three times as long.
template <class M>
LORAMIX_HD constexpr M flushed(M v) {
  constexpr M smallest = static_cast<M>(std::is_same_v<M, float> ? 0x1p-126 : 0x1p-1022);
  return v < smallest && v > -smallest ? M(0) : v;
}

/// Elements [begin, begin + size) of the flat buffer [n], updated alike.
struct FlatRange {
  Index begin = 0;
  Index size = 0;
  double lr_ratio = 1;
  double weight_decay = 0;
  bool frozen = false;
};

inline const GroupRule* find_rule(const std::vector<GroupRule>& rules, const char* name) {
  for (const GroupRule& rule : rules) {
    if (std::strcmp(rule.name, name) == 0) return &rule;
  }
  return nullptr;
}

template <class A>
void check_rules(const char* op, const A& adapter, const std::vector<GroupRule>& rules) {
  std::vector<const char*> known;
  A::visit(adapter, [&known](const char*, auto, ParameterGroup group) {
    for (const char* name : known) {
      if (std::strcmp(name, group.name) == 0) return;
    }
    known.push_back(group.name);
  });
  for (const GroupRule& rule : rules) {
    bool found = false;
    for (const char* name : known) found = found || std::strcmp(name, rule.name) == 0;
    if (!found) {
      Error error = check::detail::about(ErrorCode::value, op, "groups");
      error << " names \"" << rule.name << "\", but the groups of this adapter are";
      for (std::size_t i = 0; i < known.size(); ++i) error << (i == 0 ? " \"" : ", \"") << known[i] << "\"";
      fail(error);
    }
    if (find_rule(rules, rule.name) != &rule) {
      fail(check::detail::about(ErrorCode::value, op, "groups") << " names \"" << rule.name << "\" twice");
    }
    check_number(op, "lr_ratio", rule.options.lr_ratio);
    if (rule.options.weight_decay) check_number(op, "weight_decay", *rule.options.weight_decay);
  }
}

/// The ranges of `adapter`'s flat buffer under `rules`, ascending.
template <class A>
std::vector<FlatRange> flat_ranges(const char* op, const A& adapter, const std::vector<GroupRule>& rules,
                                   double weight_decay) {
  check_rules(op, adapter, rules);
  check_number(op, "weight_decay", weight_decay);
  const auto flat = adapter.parameters();
  std::vector<FlatRange> ranges;
  A::visit(adapter, [&](const char* name, auto view, ParameterGroup group) {
    if (view.empty()) return;
    const Index size = view.rows * view.cols, begin = view.data - flat.data;
    const bool dense = check::detail::strided(view).count == 1;
    if (!dense || begin < 0 || begin + size > flat.size ||
        (!ranges.empty() && begin < ranges.back().begin + ranges.back().size)) {
      fail(check::detail::about(ErrorCode::stride, op, name)
           << " must be a contiguous part of parameters(), visited in the order of the buffer");
    }
    FlatRange range{begin, size, 1, group.decay ? weight_decay : 0, false};
    if (const GroupRule* rule = find_rule(rules, group.name)) {
      range.lr_ratio = rule->options.lr_ratio;
      range.weight_decay = rule->options.weight_decay.value_or(range.weight_decay);
      range.frozen = rule->options.frozen;
    }
    FlatRange* const last = ranges.empty() ? nullptr : &ranges.back();
    if (last != nullptr && last->lr_ratio == range.lr_ratio && last->weight_decay == range.weight_decay &&
        last->frozen == range.frozen) {
      last->size = range.begin + range.size - last->begin;
    } else {
      ranges.push_back(range);
    }
  });
  return ranges;
}

/// The flat buffers that a step is given are those of the adapter the optimiser was made for.
template <class A, class G>
void check_step(const char* op, const A& adapter, const G& gradient, Index size, std::uint64_t layout) {
  check::same(op, "adapter", "size", adapter.parameters().size, "the size of the one this optimiser was made for",
              size);
  check::same(op, "gradient", "size", gradient.parameters().size, "the size of the adapter's parameters", size);
  if (layout_of(adapter) != layout || layout_of(gradient) != layout) {
    fail(check::detail::about(ErrorCode::shape, op, layout_of(adapter) != layout ? "adapter" : "gradient")
         << " has parameters of other shapes than the adapter this optimiser was made for");
  }
}

}  // namespace detail
}  // namespace LORAMIX_ABI
}  // namespace loramix
