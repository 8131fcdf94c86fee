/// The dispatch plan of a large batch by CUB's radix sort. Opt-in: no other header includes this one, CUB takes seconds to compile.
///
/// Computes:    ops/plan.hpp, bit for bit: the sort is stable, choices that go nowhere sort behind the last expert.
/// Reads / Writes: as ops/plan.hpp.
/// Errors:      as make_plan; CUB's failures (ErrorCode::device).
/// Cost:        O(T·k) per 8 bits of E; plan_cub_bytes(T·k, E) of workspace, which asks CUB. No allocation, no synchronisation.
/// Determinism: integers: the plan that every device makes.
/// Example:     tests/gpu/plan_cub.cu
#pragma once
#include <cub/device/device_radix_sort.cuh>

#include <loramix/gpu/plan.cuh>
#include <loramix/gpu/rows.cuh>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace gpu {
namespace detail {

/// What the sort reads and writes, one behind the other.
struct SortedChoices {
  VectorView<std::uint32_t, Space::device> expert, sorted_expert;  // [T·k]; E: goes nowhere
  VectorView<std::int32_t, Space::device> choice, sorted_choice;   // [T·k]
  std::byte* work = nullptr;
  std::size_t work_bytes = 0;
};

inline int bits_of(Index experts) {
  int bits = 1;
  while (experts >> bits != 0) ++bits;
  return bits;
}
inline cudaError_t sort(SortedChoices& s, std::byte* work, Index experts, cudaStream_t stream) {
  return cub::DeviceRadixSort::SortPairs(work, s.work_bytes, s.expert.data, s.sorted_expert.data, s.choice.data,
                                         s.sorted_choice.data, static_cast<int>(s.expert.size), 0, bits_of(experts),
                                         stream);
}
inline SortedChoices carve_sort(DeviceArena& arena, Index choices, Index experts) {
  SortedChoices s;
  s.expert = arena.vector<std::uint32_t>(choices);
  s.sorted_expert = arena.vector<std::uint32_t>(choices);
  s.choice = arena.vector<std::int32_t>(choices);
  s.sorted_choice = arena.vector<std::int32_t>(choices);
  check_cuda("cub::DeviceRadixSort::SortPairs", sort(s, nullptr, experts, nullptr));
  s.work = arena.take<std::byte>(static_cast<Index>(s.work_bytes));
  return s;
}

/// Row body over chunks of choices: their experts, and themselves.
struct SortKeys : PlanPass {
  SortedChoices s;
  Index E;
  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index c) const {
    const Index begin = this->begin(c);
    team.each(this->end(c) - begin, [&](Index i) {
      const Index row = groups.of((begin + i) / ids.cols);
      const Index e = row < 0 || row >= ids.rows ? Index{-1} : Index{ids(row, (begin + i) % ids.cols)};
      s.expert[begin + i] = static_cast<std::uint32_t>(e < 0 || e >= E ? E : e);
      s.choice[begin + i] = static_cast<std::int32_t>(begin + i);
    });
  }
};
/// Row body over chunks of sorted choices: order, inverse, and offsets where one expert ends and another begins.
struct SortedPlan : PlanPass {
  SortedChoices s;
  Index E;
  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index c) const {
    const Index begin = this->begin(c), size = plan.order.size;
    team.each(this->end(c) - begin, [&](Index k) {
      const Index i = begin + k, e = s.sorted_expert[i], choice = s.sorted_choice[i];
      plan.order[i] = e < E ? static_cast<std::int32_t>(choice) : -1;
      plan.inverse[choice] = e < E ? static_cast<std::int32_t>(i) : -1;
      const Index before = i == 0 ? Index{-1} : Index{s.sorted_expert[i - 1]};
      for (Index first = before + 1; first <= e; ++first) plan.offsets[first] = i;
      for (Index first = e + 1; i + 1 == size && first <= E; ++first) plan.offsets[first] = size;
    });
  }
};
/// Row body of one row: a plan of nothing.
struct EmptyPlan : PlanPass {
  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index) const {
    team.each(plan.offsets.size, [&](Index e) { plan.offsets[e] = 0; });
  }
};

}  // namespace detail

/// Bytes of workspace that make_plan_by_sort takes.
inline Index plan_cub_bytes(Index choices, Index experts) {
  return carved_bytes<Space::device>([&](DeviceArena& arena) { detail::carve_sort(arena, choices, experts); });
}

/// make_plan for large batches.
inline void make_plan_by_sort(const Backend& be, MatrixView<const std::int32_t, Space::device> ids,
                              Groups<Space::device> groups, Index tokens, Index experts,
                              DispatchPlan<Space::device> plan, DeviceArena work) {
  const char* const op = "make_plan_by_sort";
  const Index choices = loramix::detail::check_plan(op, ids, groups, tokens, experts, plan);
  work.require(op, "work", plan_cub_bytes(choices, experts));
  const detail::PlanPass pass{ids, groups, plan, {}};
  if (choices == 0) return for_rows<Space::device>(be, 1, detail::EmptyPlan{pass});
  detail::SortedChoices sorted = detail::carve_sort(work, choices, experts);
  const Index chunks = detail::PlanPass::chunks(choices);
  for_rows<Space::device>(be, chunks, detail::SortKeys{pass, sorted, experts});
  check_cuda("cub::DeviceRadixSort::SortPairs", detail::sort(sorted, sorted.work, experts, be.stream));
  for_rows<Space::device>(be, chunks, detail::SortedPlan{pass, sorted, experts});
}

}  // namespace gpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
