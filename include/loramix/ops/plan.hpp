/// The dispatch plan: which (token, slot) goes to which expert, sorted by expert.
///
/// Computes:    choice i = t·k + slot. order lists the choices expert by expert, inside an expert in their own order (a
///              stable counting sort); expert e has order[offsets[e]] … order[offsets[e+1] − 1]; inverse[i] is the place of
///              choice i in order, −1 where it goes nowhere (id −1, a token of no group).
///              One plan serves every layer that is routed alike; with segments of experts (serving) ids are per group.
/// Reads:       ids [groups, k], groups of [T] tokens (default: a row of ids per token).
/// Writes:      offsets [E + 1], order [T·k], inverse [T·k], assigned; order beyond offsets[E] is −1.
/// Errors:      shapes, null, small workspace; on the host ids outside [−1, E) and bad groups. On the device a bad id or
///              group goes nowhere.
/// Cost:        O(T·k·E) comparisons in two passes; plan_scratch_bytes(T·k, E). On the GPU one launch up to 16384 choices of 256
///              experts (gpu/plan.cuh), four beyond; gpu/plan_cub.cuh sorts large ones.
/// Determinism: integers: one result for any threads, on every device.
/// Example:     tests/ops/plan.cpp
#pragma once
#include <loramix/gate/form.hpp>
#include <loramix/ops/rows.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// Views of the caller's memory.
template <Space S = Space::host>
struct DispatchPlan {
  VectorView<Index, S> offsets;         // [E + 1]
  VectorView<std::int32_t, S> order;    // [T·k]
  VectorView<std::int32_t, S> inverse;  // [T·k]

  static DispatchPlan carve(Arena<S>& arena, Index choices, Index experts) {
    return {arena.template vector<Index>(experts + 1), arena.template vector<std::int32_t>(choices),
            arena.template vector<std::int32_t>(choices)};
  }
};

namespace detail {

/// What its passes share. Chunks of choices are counted by themselves, so that they can be placed by themselves.
template <Space S>
struct PlanPass {
  static constexpr Index chunk = 256;
  MatrixView<const std::int32_t, S> ids;
  Groups<S> groups;
  DispatchPlan<S> plan;
  MatrixView<Index, S> counts;  // [chunks, E]: of a chunk, then in all chunks before

  LORAMIX_HD static constexpr Index chunks(Index choices) { return (choices + chunk - 1) / chunk; }
  LORAMIX_HD Index experts() const { return counts.cols; }
  LORAMIX_HD Index begin(Index c) const { return c * chunk; }
  LORAMIX_HD Index end(Index c) const {
    const Index size = plan.order.size;
    return (c + 1) * chunk < size ? (c + 1) * chunk : size;
  }
  /// The expert of choice i, or −1.
  LORAMIX_HD Index expert(Index i) const {
    const Index row = groups.of(i / ids.cols);
    if (row < 0 || row >= ids.rows) return -1;
    const Index e = ids(row, i % ids.cols);
    return e >= 0 && e < experts() ? e : Index{-1};
  }
};

/// Row body over chunks: every choice's expert, kept where its place will be, and how often each was chosen.
template <Space S>
struct PlanCount : PlanPass<S> {
  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index c) const {
    const Index begin = this->begin(c), end = this->end(c);
    team.each(end - begin, [&](Index i) {
      this->plan.inverse[begin + i] = static_cast<std::int32_t>(this->expert(begin + i));
      this->plan.order[begin + i] = -1;
    });
    team.each(this->experts(), [&](Index e) {
      Index count = 0;
      for (Index i = begin; i < end; ++i) count += this->plan.inverse[i] == e ? 1 : 0;
      this->counts(c, e) = count;
    });
  }
};

/// Row body of one row: where every expert begins, and every chunk inside it.
template <Space S>
struct PlanScan : PlanPass<S> {
  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index) const {
    const auto offsets = this->plan.offsets;
    team.each(this->experts(), [&](Index e) {
      Index before = 0;
      for (Index c = 0; c < this->counts.rows; ++c) {
        const Index here = this->counts(c, e);
        this->counts(c, e) = before;
        before += here;
      }
      offsets[e + 1] = before;
    });
    team.once([&] {
      offsets[0] = 0;
      for (Index e = 0; e < this->experts(); ++e) offsets[e + 1] += offsets[e];
    });
  }
};

/// Row body over chunks.
template <Space S>
struct PlanPlace : PlanPass<S> {
  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index c) const {
    const Index begin = this->begin(c), end = this->end(c);
    team.each(this->experts(), [&](Index e) {
      Index place = this->plan.offsets[e] + this->counts(c, e);
      for (Index i = begin; i < end; ++i) {
        if (this->plan.inverse[i] == e) this->plan.order[place++] = static_cast<std::int32_t>(i);
      }
    });
  }
};

/// Row body over chunks of order: only now does inverse cease to hold experts.
template <Space S>
struct PlanInvert : PlanPass<S> {
  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index c) const {
    const Index begin = this->begin(c);
    team.each(this->end(c) - begin, [&](Index i) {
      const std::int32_t choice = this->plan.order[begin + i];
      if (choice >= 0) this->plan.inverse[choice] = static_cast<std::int32_t>(begin + i);
    });
  }
};

}  // namespace detail

/// Bytes inside an arena (Arena::with_alignment gives those of a buffer) that a plan of `choices` = T·k takes to make.
template <Space S>
Index plan_scratch_bytes(Index choices, Index experts) {
  return carved_bytes<S>(
      [&](Arena<S>& arena) { arena.template matrix<Index>(detail::PlanPass<S>::chunks(choices), experts); });
}

namespace detail {

/// What a plan's makers refuse; returns the number of choices.
template <Space S>
Index check_plan(const char* op, MatrixView<const std::int32_t, S> ids, const Groups<S>& groups, Index tokens,
                 Index experts, const DispatchPlan<S>& plan) {
  check::at_least(op, "tokens", tokens, 0);
  check::at_least(op, "experts", experts, 1);
  check::view(op, "ids", ids);
  check_groups<float>(op, "groups", groups, tokens, ids.rows);
  check_ids(op, ids, experts);
  const Index choices = check::detail::product(tokens, ids.cols);
  if (choices < 0 || choices > INT32_MAX) {
    fail(check::detail::about(ErrorCode::overflow, op, "ids")
         << " of " << tokens << " tokens have more than 2^31 choices");
  }
  check::view(op, "offsets", plan.offsets);
  check::view(op, "order", plan.order);
  check::view(op, "inverse", plan.inverse);
  check::same(op, "offsets", "size", plan.offsets.size, "the number of experts + 1", experts + 1);
  check::same(op, "order", "size", plan.order.size, "the number of choices", choices);
  check::same(op, "inverse", "size", plan.inverse.size, "the number of choices", choices);
  return choices;
}

/// Whether the backend makes this plan in a way of its own: plan_impl(be, pass) then has.
template <class Backend, Space S>
bool planned_by(const Backend& be, const PlanPass<S>& pass) {
  if constexpr (requires { plan_impl(be, pass); })
    return plan_impl(be, pass);
  else
    return false;
}

}  // namespace detail

/// Makes the plan of `tokens` tokens.
template <Space S, class Backend>
void make_plan(const Backend& be, MatrixView<const std::int32_t, S> ids, Groups<S> groups, Index tokens, Index experts,
               DispatchPlan<S> plan, Arena<S> work) {
  const char* const op = "make_plan";
  const Index choices = detail::check_plan(op, ids, groups, tokens, experts, plan);
  work.require(op, "work", plan_scratch_bytes<S>(choices, experts));
  const Index chunks = detail::PlanPass<S>::chunks(choices);
  const detail::PlanPass<S> pass{ids, groups, plan, work.template matrix<Index>(chunks, experts)};
  if (detail::planned_by(be, pass)) return;
  for_rows<S>(be, chunks, detail::PlanCount<S>{pass});
  for_rows<S>(be, 1, detail::PlanScan<S>{pass});
  for_rows<S>(be, chunks, detail::PlanPlace<S>{pass});
  for_rows<S>(be, chunks, detail::PlanInvert<S>{pass});
}

}  // namespace LORAMIX_ABI
}  // namespace loramix
