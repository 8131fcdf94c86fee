// Two sorts that are not ours beside two that are: the dispatch plan against CUB's radix sort and Thrust's search, the router's
// top-k against CUB's segmented sort.
#include <thrust/binary_search.h>
#include <thrust/device_ptr.h>
#include <thrust/execution_policy.h>
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_segmented_radix_sort.cuh>

#include <cmath>
#include <numeric>
#include <random>

#include <loramix/ops/plan.hpp>
#include <loramix/router/top_k.hpp>

#include "gpu/harness.cuh"
#include "support/seed.hpp"

namespace lm = loramix;
using namespace loramix_test;
using lm::Index;

namespace {

constexpr lm::Space device = lm::Space::device;

/// Calls a CUB algorithm twice: for the size of its scratch, and to work in it.
template <class F>
void with_scratch(GpuHarness& gpu, const F& algorithm) {
  std::size_t bytes = 0;
  lm::gpu::check_cuda("cub, size", algorithm(nullptr, bytes));
  lm::gpu::check_cuda("cub", algorithm(gpu.upload(std::vector<std::byte>(bytes)), bytes));
}

std::vector<std::int32_t> counted(std::size_t n) {
  std::vector<std::int32_t> values(n);
  std::iota(values.begin(), values.end(), 0);
  return values;
}

}  // namespace

TEST_CASE("the plan is CUB's stable sort of the choices, and its offsets are Thrust's bounds") {
  GpuHarness gpu;
  std::mt19937_64 random(seed(420));
  for (const Index experts : {3, 40}) {
    constexpr Index tokens = 333, choices = 2 * tokens;
    std::vector<std::int32_t> ids(choices);
    for (std::int32_t& id : ids) id = static_cast<std::int32_t>(random() % static_cast<std::uint64_t>(experts + 1)) - 1;

    const lm::DispatchPlan<device> plan{
        {gpu.upload(std::vector<Index>(static_cast<std::size_t>(experts + 1))), experts + 1},
        {gpu.upload(ids), choices},
        {gpu.upload(ids), choices}};
    lm::make_plan(gpu.backend(), lm::MatrixView<const std::int32_t, device>{gpu.upload(ids), tokens, 2}, {}, tokens,
                  experts, plan, gpu.arena(lm::plan_scratch_bytes<device>(choices, experts) + 64));
    std::vector<Index> offsets(static_cast<std::size_t>(experts + 1));
    std::vector<std::int32_t> order(choices);
    gpu.download(plan.offsets.data, offsets);
    gpu.download(plan.order.data, order);

    std::vector<std::uint32_t> keys(choices);  // −1 sorts last
    for (std::size_t i = 0; i < keys.size(); ++i) keys[i] = static_cast<std::uint32_t>(ids[i]);
    const std::uint32_t* const unsorted = gpu.upload(keys);
    std::uint32_t* const sorted = gpu.upload(keys);
    const std::int32_t* const places = gpu.upload(counted(choices));
    std::int32_t* const by_expert = gpu.upload(ids);
    with_scratch(gpu, [&](void* scratch, std::size_t& bytes) {
      return cub::DeviceRadixSort::SortPairs(scratch, bytes, unsorted, sorted, places, by_expert,
                                             static_cast<int>(choices), 0, 32, gpu.stream());
    });
    std::vector<std::int32_t> want(choices);
    gpu.download(by_expert, want);
    std::vector<Index> bounds(static_cast<std::size_t>(experts + 1));
    std::vector<std::uint32_t> each(bounds.size());
    std::iota(each.begin(), each.end(), 0u);
    const auto first = thrust::device_pointer_cast(sorted), wanted = thrust::device_pointer_cast(gpu.upload(each));
    Index* const found = gpu.upload(bounds);
    thrust::lower_bound(thrust::cuda::par.on(gpu.stream()), first, first + choices, wanted, wanted + experts + 1,
                        thrust::device_pointer_cast(found));
    gpu.download(found, bounds);
    CHECK(offsets == bounds);
    CHECK(bounds.back() < choices);  // some go nowhere
    for (Index place = 0; place < bounds.back(); ++place) {
      CHECK(order[static_cast<std::size_t>(place)] == want[static_cast<std::size_t>(place)]);
    }
    CHECK(gpu.release());
  }
}

TEST_CASE(
    "the k best experts are the first of CUB's descending sort of a token's logits, ties and zeros of both signs "
    "included") {
  GpuHarness gpu;
  std::mt19937_64 random(seed(421));
  for (const Index experts : {5, 70}) {
    constexpr Index tokens = 60, k = 4;
    const Index n = tokens * experts;
    std::vector<float> logits(static_cast<std::size_t>(n));
    for (std::size_t i = 0; i < logits.size(); ++i) {  // halves: many ties; in every other token zeros are the largest
      const float l = (static_cast<float>(random() % 13) - 6) / 2;
      logits[i] = static_cast<Index>(i) / experts % 2 == 0 ? l : -std::abs(l);
      if (l == 0) logits[i] = random() % 2 == 0 ? 0.0f : -0.0f;
    }
    const lm::TopKGate<float, float, device> gate{{nullptr, experts, 1}, {.k = k}};
    lm::Arena<device> memory =
        gpu.arena(lm::carved_bytes<device>([&](auto& arena) { gate.carve(arena, tokens, false); }) + 64);
    const auto state = gate.carve(memory, tokens, false);
    gate.forward(gpu.backend(), {gpu.upload(logits), tokens, experts}, state, {.tokens = tokens}, {});
    std::vector<std::int32_t> chosen(static_cast<std::size_t>(tokens * k));
    gpu.download(state.ids.data, chosen);

    std::vector<std::int32_t> experts_of(static_cast<std::size_t>(n)), begins;
    for (std::size_t i = 0; i < experts_of.size(); ++i)
      experts_of[i] = static_cast<std::int32_t>(static_cast<Index>(i) % experts);
    for (Index t = 0; t <= tokens; ++t) begins.push_back(static_cast<std::int32_t>(t * experts));
    const float* const unsorted = gpu.upload(logits);
    float* const sorted = gpu.upload(logits);
    const std::int32_t* const from = gpu.upload(experts_of);
    std::int32_t* const best = gpu.upload(experts_of);
    const std::int32_t* const segments = gpu.upload(begins);
    with_scratch(gpu, [&](void* scratch, std::size_t& bytes) {
      return cub::DeviceSegmentedRadixSort::SortPairsDescending(scratch, bytes, unsorted, sorted, from, best,
                                                                static_cast<int>(n), static_cast<int>(tokens), segments,
                                                                segments + 1, 0, 32, gpu.stream());
    });
    gpu.download(best, experts_of);
    for (Index t = 0; t < tokens; ++t) {
      for (Index s = 0; s < k; ++s) {
        CHECK(chosen[static_cast<std::size_t>(t * k + s)] == experts_of[static_cast<std::size_t>(t * experts + s)]);
      }
    }
    CHECK(gpu.release());
  }
}
