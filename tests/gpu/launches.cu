// How many launches a forward and a backward take, cut so that blocks share sums: the product's, and nothing for the row stage.
#include <loramix/adapter/forward.hpp>
#include <loramix/adapter/hydra_lora.hpp>
#include <loramix/adapter/lora.hpp>
#include <loramix/adapter/lora_moe.hpp>
#include <loramix/adapter/mola.hpp>
#include <loramix/adapter/team_lora.hpp>

#include "gpu/forbidden_calls.hpp"
#include "gpu/harness.cuh"

namespace lm = loramix;
using namespace loramix_test;
using lm::Index;

namespace {

constexpr lm::Space device = lm::Space::device;

struct Launches {
  int forward, inference, backward;
  bool operator==(const Launches&) const = default;
};

template <class A>
Launches launches_of(GpuHarness& gpu, const typename A::Config& config) {
  using Adapter = typename A::template rebind<typename A::element, device>;
  using X = typename A::precision::activation;
  constexpr Index tokens = 300;
  const lm::gpu::Backend be = gpu.backend();
  const Adapter adapter(config);
  auto gradient = lm::zeros_like(adapter);
  lm::Buffer<X, device> x(tokens * config.d_in), dx(x.size()), y(tokens * config.d_out), dy(y.size());
  const auto work = gpu.arena(lm::workspace_bytes(be, adapter, tokens, lm::Pass::backward));
  auto reserve = gpu.arena(lm::reserve_bytes(adapter, tokens));
  const lm::MatrixView<X, device> x_view(x.data(), tokens, config.d_in), dx_view(dx.data(), tokens, config.d_in);
  const lm::MatrixView<X, device> y_view(y.data(), tokens, config.d_out), dy_view(dy.data(), tokens, config.d_out);

  const int start = launches();
  auto saved = lm::forward(be, adapter, x_view, y_view, work, {.save = &reserve, .key = {.seed = 1}});
  const int forward = launches();
  lm::backward(be, adapter, saved, x_view, dy_view, dx_view, gradient, work);
  const int backward = launches();
  lm::forward(be, adapter, x_view, y_view, work);
  gpu.wait();
  return {forward - start, launches() - backward, backward - forward};
}

}  // namespace

TEST_CASE("two launches forward, four backward, whatever the gate computes from its token") {
  GpuHarness gpu;
  gpu.tuning.block_bytes = 1;  // cut as fine as can be
  const lm::MixtureConfig mixture{.d_in = 200, .d_out = 300, .experts = 4, .rank = 5, .alpha = 5, .dropout = 0.1};
  const Launches few{2, 2, 4};
  CHECK(launches_of<lm::Lora<lm::bfloat16>>(gpu, {.d_in = 200, .d_out = 300, .rank = 12, .dropout = 0.1}) == few);
  CHECK(launches_of<lm::LoraMoe<lm::bfloat16>>(gpu, mixture) == few);
  CHECK(launches_of<lm::HydraLora<float>>(gpu, {.d_in = 200, .d_out = 300, .experts = 4, .rank = 5}) == few);
  CHECK(launches_of<lm::Mola<lm::bfloat16>>(gpu, {.d_in = 200, .d_out = 300, .experts = 4, .rank = 5}) == few);
  // M and b₂ are parameters beside the side rows: their sums over tokens come on top.
  CHECK(launches_of<lm::TeamLora<float>>(gpu, {.d_in = 200, .d_out = 300, .experts = 4, .rank = 5, .hidden = 0}) ==
        Launches{2, 2, 6});
  CHECK(gpu.release());
}
