// The plan by CUB's sort is the plan by counting, bit for bit; both as graphs.
#include <loramix/gpu/plan_cub.cuh>

#include <random>

#include "gpu/captured.cuh"
#include "support/seed.hpp"

namespace lm = loramix;
using namespace loramix_test;
using lm::Index;

namespace {

constexpr lm::Space device = lm::Space::device;

struct Plan {
  std::vector<Index> offsets;
  std::vector<std::int32_t> order, inverse;
  bool operator==(const Plan&) const = default;
};

/// What `make(ids, plan)` makes of ids [tokens, k].
template <class F>
Plan plan_of(GpuHarness& gpu, const std::vector<std::int32_t>& ids, Index k, Index experts, const F& make) {
  Plan p{std::vector<Index>(static_cast<std::size_t>(experts + 1), -7), std::vector<std::int32_t>(ids.size(), -7),
         std::vector<std::int32_t>(ids.size(), -7)};
  const Index choices = static_cast<Index>(ids.size());
  const lm::DispatchPlan<device> plan{
      {gpu.upload(p.offsets), experts + 1}, {gpu.upload(p.order), choices}, {gpu.upload(p.inverse), choices}};
  const lm::MatrixView<const std::int32_t, device> view{gpu.upload(ids), choices / k, k};
  const Graph graph(gpu.stream(), [&] { make(view, plan); });
  graph.launch(gpu.stream());
  gpu.download(plan.offsets.data, p.offsets);
  gpu.download(plan.order.data, p.order);
  gpu.download(plan.inverse.data, p.inverse);
  return p;
}

}  // namespace

TEST_CASE("sorted by CUB or counted, the plan is the same") {
  GpuHarness gpu;
  std::mt19937_64 random(seed(412));
  for (const Index tokens : {0, 1, 333, 9000}) {
    for (const Index experts : {1, 7, 300}) {
      CAPTURE(tokens);
      CAPTURE(experts);
      std::vector<std::int32_t> ids(static_cast<std::size_t>(2 * tokens));
      for (std::int32_t& id : ids) {  // −1 … E, a bad one
        id = static_cast<std::int32_t>(random() % static_cast<std::uint64_t>(experts + 2)) - 1;
      }
      const auto count_work = gpu.arena(lm::plan_scratch_bytes<device>(2 * tokens, experts) + 64);
      const auto sort_work = gpu.arena(lm::gpu::plan_cub_bytes(2 * tokens, experts) + 64);
      const Plan counted = plan_of(gpu, ids, 2, experts, [&](auto view, auto plan) {
        lm::make_plan<device>(gpu.backend(), view, {}, tokens, experts, plan, count_work);
      });
      const Plan sorted = plan_of(gpu, ids, 2, experts, [&](auto view, auto plan) {
        lm::gpu::make_plan_by_sort(gpu.backend(), view, {}, tokens, experts, plan, sort_work);
      });
      CHECK(sorted == counted);
      CHECK((tokens < 300 || counted.offsets.back() > tokens / 2));
    }
  }
  CHECK(gpu.release());
}
