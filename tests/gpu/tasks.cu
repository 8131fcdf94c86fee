// Adapters gated by the task on the device: forward and backward as a CUDA graph, against the CPU.
#include <cmath>

#include "gpu/captured.cuh"
#include "gpu/task_step.hpp"

namespace loramix_test {
namespace {

using lm::Index;
constexpr lm::Space device = lm::Space::device;

void check_near(const char* what, const std::vector<float>& got, const std::vector<float>& want) {
  REQUIRE(got.size() == want.size());
  float largest = 0, error = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    largest = std::max(largest, std::abs(want[i]));
    if (!(std::abs(got[i] - want[i]) <= error)) error = std::abs(got[i] - want[i]);
  }
  CHECK_MESSAGE(largest > 0.01f, what);
  CHECK_MESSAGE(error <= 1e-5f * (1 + largest), what << ": " << error << " of " << largest);
}

TEST_CASE("MOELoRA and MoRE on the device, captured in a graph, equal the CPU") {
  for (int form = 0; form < TaskStep::forms; ++form) {
    CAPTURE(form);
    const TaskStep step = draw_task_step(form);
    const TaskStepResults want = task_step_on_host(step);
    GpuHarness gpu;
    with_task_adapter<device>(form, [&](auto adapter) {
      auto gradient = lm::zeros_like(adapter);
      const lm::VectorView<const float> flat{step.parameters.data(), static_cast<Index>(step.parameters.size())};
      lm::gpu::copy(flat, adapter.parameters());
      lm::gpu::copy(lm::Buffer<float>(flat.size).view(), gradient.parameters());
      const auto matrix = [&](const std::vector<float>& values, Index cols) {
        return lm::MatrixView<float, device>{gpu.upload(values), step.tokens, cols};
      };
      const auto x = matrix(step.x, step.d_in), dy = matrix(step.dy, step.d_out);
      const auto y = matrix(std::vector<float>(step.dy.size()), step.d_out);
      const auto dx = matrix(std::vector<float>(step.x.size()), step.d_in);
      const auto tasks = lm::Groups<device>::by_id(gpu.upload(step.ids), step.tasks);
      const lm::gpu::Backend be = gpu.backend();
      const auto work = gpu.arena(lm::workspace_bytes(be, adapter, step.tokens, lm::Pass::backward));
      auto reserve = gpu.arena(lm::reserve_bytes(adapter, step.tokens));
      const Graph graph(gpu.stream(), [&] {
        auto saved = lm::forward(be, adapter, x, y, work, {.save = &reserve, .key = task_step_key, .tasks = tasks});
        lm::backward(be, adapter, saved, x, dy, dx, gradient, work);
      });
      graph.launch(gpu.stream());

      TaskStepResults got{std::vector<float>(want.y.size()), std::vector<float>(want.dx.size()),
                          std::vector<float>(want.gradient.size())};
      gpu.download(y.data, got.y);
      gpu.download(dx.data, got.dx);
      gpu.download(gradient.parameters().data, got.gradient);
      check_near("y", got.y, want.y);
      check_near("dx", got.dx, want.dx);
      check_near("gradient", got.gradient, want.gradient);
    });
    CHECK(gpu.release());
  }
}

TEST_CASE("a task there is not contributes nothing on the device, and says so") {
  TaskStep step = draw_task_step(2);
  step.ids[3] = 7;
  GpuHarness gpu;
  with_task_adapter<device>(step.form, [&](auto adapter) {
    const lm::VectorView<const float> flat{step.parameters.data(), static_cast<Index>(step.parameters.size())};
    lm::gpu::copy(flat, adapter.parameters());
    const lm::MatrixView<float, device> x{gpu.upload(step.x), step.tokens, step.d_in};
    std::vector<float> found(step.dy.size(), 1.0f);
    const lm::MatrixView<float, device> y{gpu.upload(found), step.tokens, step.d_out};
    const lm::gpu::Backend be = gpu.backend();
    const auto tasks = lm::Groups<device>::by_id(gpu.upload(step.ids), step.tasks);
    lm::forward(be, adapter, x, y, gpu.arena(lm::workspace_bytes(be, adapter, step.tokens)), {.tasks = tasks});
    gpu.download(y.data, found);
    for (Index o = 0; o < step.d_out; ++o) CHECK(found[static_cast<std::size_t>(3 * step.d_out + o)] == 1);
  });
  CHECK(gpu.flags().bad_group_id != 0);
  gpu.clear_flags();
}

}  // namespace
}  // namespace loramix_test
