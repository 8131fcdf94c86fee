/// The dispatch plan of a batch as one launch of one block: a stable counting sort of choices by expert.
///
/// Computes:    ops/plan.hpp, for up to plan_choices choices of up to plan_experts experts; larger ones take its four launches, or
///              gpu/plan_cub.cuh.
/// Reads / Writes: as ops/plan.hpp.
/// Errors:      launches that CUDA refuses (ErrorCode::device); bad ids and groups go nowhere.
/// Cost:        ids once, order and inverse twice; 33 counters of shared memory per expert. A block takes 1024 choices at a time: at
///              plan_choices as long as the launches that it replaces.
/// Determinism: integers: the plan that every device makes.
/// Example:     tests/gpu/plan.cu
#pragma once
#include <loramix/gpu/launch.cuh>
#include <loramix/gpu/team.cuh>
#include <loramix/ops/plan.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace gpu {

inline constexpr Index plan_choices = 16384;
inline constexpr Index plan_experts = 256;

namespace detail {

inline constexpr int plan_warps = 32;
using PlanPass = loramix::detail::PlanPass<Space::device>;

/// Counts of every expert become the places of their first choices, and the plan's offsets; by one warp.
__device__ inline void scan_experts(int lane, int experts, int* place, Index* offsets) {
  int before = 0;
  for (int first = 0; first < experts; first += warp_width) {
    const int e = first + lane, count = e < experts ? place[e] : 0;
    int sum = count;  // of this lane and those below
    for (int distance = 1; distance < warp_width; distance *= 2) {
      const int below = __shfl_up_sync(whole_warp, sum, static_cast<unsigned>(distance));
      if (lane >= distance) sum += below;
    }
    if (e < experts) offsets[e] = place[e] = before + sum - count;
    before += __shfl_sync(whole_warp, sum, warp_width - 1);
  }
  if (lane == 0) offsets[experts] = before;
}

template <int warps>
__global__ void __launch_bounds__(warps* warp_width) plan_kernel(const __grid_constant__ PlanPass pass) {
  extern __shared__ int counters[];
  const int experts = static_cast<int>(pass.experts()), choices = static_cast<int>(pass.plan.order.size);
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x), lane = thread % warp_width;
  int* const place = counters;                                       // [E]: where an expert's next choice goes
  int* const mine = counters + experts * (1 + thread / warp_width);  // [E]: of this warp's 32 choices
  for (int e = thread; e < experts; e += threads) place[e] = 0;
  __syncthreads();
  for (int i = thread; i < choices; i += threads) {
    const int e = static_cast<int>(pass.expert(i));
    pass.plan.inverse[i] = e;
    pass.plan.order[i] = -1;
    if (e >= 0) atomicAdd(place + e, 1);
  }
  __syncthreads();
  if (thread < warp_width) scan_experts(lane, experts, place, pass.plan.offsets.data);
  for (int begin = 0; begin < choices; begin += threads) {
    const int i = begin + thread, e = i < choices ? pass.plan.inverse[i] : -1;
    for (int other = lane; other < experts; other += warp_width) mine[other] = 0;
    __syncwarp();
    const unsigned same = __match_any_sync(whole_warp, e);
    const int before = __popc(same & ((1u << lane) - 1));
    if (e >= 0 && before == 0) mine[e] = __popc(same);
    __syncthreads();
    for (int other = thread; other < experts; other += threads) {
      int at = place[other];
      for (int w = 1; w <= warps; ++w) {
        const int count = counters[w * experts + other];
        counters[w * experts + other] = at;
        at += count;
      }
      place[other] = at;
    }
    __syncthreads();
    if (e >= 0) {
      const int at = mine[e] + before;
      pass.plan.order[at] = i;
      pass.plan.inverse[i] = at;
    }
    __syncwarp();  // the warp has read its counters
  }
}

/// Called by make_plan; false: not that large.
inline bool plan_impl(const Backend& be, const PlanPass& pass) {
  if (pass.experts() > plan_experts || pass.plan.order.size > plan_choices) return false;
  const Index shared = pass.experts() * (1 + plan_warps) * Index{sizeof(int)};
  launch(be, "plan_kernel", &plan_kernel<plan_warps>, dim3(1), plan_warps * warp_width, shared, pass);
  return true;
}

}  // namespace detail

inline bool plan_impl(const Backend& be, const loramix::detail::PlanPass<Space::device>& pass) {
  return detail::plan_impl(be, pass);
}

}  // namespace gpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
