// The dispatch plan and the selection bias on the device, exactly the literal ones.
#include <random>
#include <tuple>

#include <loramix/ops/plan.hpp>
#include <loramix/router/selection_bias.hpp>

#include "gpu/captured.cuh"
#include "gpu/forbidden_calls.hpp"
#include "reference/plan.hpp"
#include "support/seed.hpp"

namespace lm = loramix;
using namespace loramix_test;

namespace {

constexpr lm::Space device = lm::Space::device;

/// ids [rows, k] on the device; expert(i) is the literal expert of choice i.
template <class F>
void check_plan(const std::vector<std::int32_t>& ids, Index k, lm::Groups<device> groups, GpuHarness& gpu, Index tokens,
                Index experts, const F& expert) {
  const std::size_t choices = static_cast<std::size_t>(tokens * k);
  std::vector<Index> offsets(static_cast<std::size_t>(experts + 1), -7);
  std::vector<std::int32_t> order(choices, -7), inverse(choices, -7);
  const lm::DispatchPlan<device> plan{
      {gpu.upload(offsets), experts + 1}, {gpu.upload(order), tokens * k}, {gpu.upload(inverse), tokens * k}};
  const lm::MatrixView<const std::int32_t, device> view{gpu.upload(ids), static_cast<Index>(ids.size()) / k, k};
  const auto work = gpu.arena(lm::plan_scratch_bytes<device>(tokens * k, experts) + 64);
  const Graph graph(gpu.stream(), [&] { lm::make_plan(gpu.backend(), view, groups, tokens, experts, plan, work); });
  graph.launch(gpu.stream());
  gpu.download(plan.offsets.data, offsets);
  gpu.download(plan.order.data, order);
  gpu.download(plan.inverse.data, inverse);
  const reference::Plan want = reference::plan(tokens * k, experts, expert);
  CHECK(offsets == want.offsets);
  CHECK(order == want.order);
  CHECK(inverse == want.inverse);
  CHECK(gpu.release());
}

}  // namespace

TEST_CASE("the plan on the device is a stable sort; bad ids go nowhere") {
  GpuHarness gpu;
  std::mt19937_64 random(seed(410));
  for (const Index tokens : {1, 129, 400, 1030}) {
    for (const Index experts : {3, 40, 256}) {
      std::vector<std::int32_t> ids(static_cast<std::size_t>(2 * tokens));
      for (std::int32_t& id : ids) {
        id = static_cast<std::int32_t>(random() % static_cast<std::uint64_t>(experts + 2)) - 1;  // −1 … E
      }
      check_plan(ids, 2, {}, gpu, tokens, experts, [&](Index i) -> std::int32_t {
        const std::int32_t id = ids[static_cast<std::size_t>(i)];
        return id < experts ? id : -1;
      });
    }
  }
  const std::vector<Index> offsets{0, 3, 3, 10, 11, 20};
  const std::vector<std::int32_t> ids{2, 0, -1, 2, 1};
  check_plan(ids, 1, lm::Groups<device>::by_segment(gpu.upload(offsets), 5), gpu, 20, 3, [&](Index i) {
    std::size_t segment = 0;
    while (offsets[segment + 1] <= i) ++segment;
    return ids[segment];
  });
}

TEST_CASE("the plan is one launch where a block is enough, four beyond; both are the same") {
  GpuHarness gpu;
  std::mt19937_64 random(seed(411));
  for (const auto& [tokens, experts, want] : {std::tuple{700, 256, 1}, {700, 257, 4}, {8200, 5, 4}}) {
    CAPTURE(experts);
    std::vector<std::int32_t> ids(static_cast<std::size_t>(2 * tokens));
    for (std::int32_t& id : ids) id = static_cast<std::int32_t>(random() % 5);
    const int before = launches();
    check_plan(ids, 2, {}, gpu, tokens, experts, [&](Index i) { return ids[static_cast<std::size_t>(i)]; });
    CHECK(launches() - before == want);
  }
}

TEST_CASE("the selection bias moves on the device") {
  GpuHarness gpu;
  std::vector<std::int32_t> chosen(160);
  for (std::size_t i = 0; i < chosen.size(); ++i) chosen[i] = i % 4 == 1 ? -1 : static_cast<std::int32_t>(i * i % 3);
  std::vector<std::uint8_t> valid(80);
  for (std::size_t t = 0; t < valid.size(); ++t) valid[t] = t % 7 != 2;
  std::vector<Index> count(4);
  for (std::size_t i = 0; i < chosen.size(); ++i) {
    if (chosen[i] >= 0 && valid[i / 2] != 0) ++count[static_cast<std::size_t>(chosen[i])];
  }
  const lm::VectorView<Index, device> load(gpu.upload(std::vector<Index>(4)), 4);
  const lm::VectorView<float, device> bias(gpu.upload(std::vector<float>(4, 1)), 4);
  lm::count_load<device>(gpu.backend(), {gpu.upload(chosen), 80, 2}, {gpu.upload(valid), 80}, load);
  std::vector<Index> counted(4);
  gpu.download(load.data, counted);
  CHECK(counted == count);
  lm::update_selection_bias<device>(gpu.backend(), load, bias, 0.25);
  std::vector<float> moved(4), want;
  gpu.download(bias.data, moved);
  const Index total = count[0] + count[1] + count[2] + count[3];
  for (const Index n : count) want.push_back(4 * n == total ? 1.0f : 4 * n < total ? 1.25f : 0.75f);
  CHECK(moved == want);
  gpu.download(load.data, counted);
  CHECK(counted == std::vector<Index>(4, 0));
  CHECK(gpu.release());
}
