#include "gpu/task_step.hpp"

#include <algorithm>
#include <cstddef>
#include <random>

#include <loramix/cpu/cpu.hpp>

#include "support/seed.hpp"

namespace loramix_test {

namespace lm = loramix;
using lm::Index;

TaskStep draw_task_step(int form) {
  std::mt19937_64 random(seed(static_cast<std::uint64_t>(40 + form)));
  const auto value = [&random] { return static_cast<float>(static_cast<double>(random() >> 11) * 0x1p-52 - 1); };
  TaskStep step{form, {}, {}, {}, {}};
  with_task_adapter<lm::Space::host>(form, [&](auto adapter) {
    using A = decltype(adapter);
    A::visit(adapter, [&](const char*, auto view, lm::ParameterGroup) {
      for (Index i = 0; i < view.rows * view.cols; ++i) view.data[i] = value();
    });
    const auto flat = adapter.parameters();
    step.parameters.assign(flat.data, flat.data + flat.size);
  });
  for (Index i = 0; i < step.tokens * step.d_in; ++i) step.x.push_back(value());
  for (Index i = 0; i < step.tokens * step.d_out; ++i) step.dy.push_back(value());
  for (Index t = 0; t < step.tokens; ++t) step.ids.push_back(static_cast<std::int32_t>((5 * t + t / 3) % 4) - 1);
  return step;
}

TaskStepResults task_step_on_host(const TaskStep& step) {
  TaskStepResults r{std::vector<float>(step.dy.size()), std::vector<float>(step.x.size()), {}};
  with_task_adapter<lm::Space::host>(step.form, [&](auto adapter) {
    std::copy(step.parameters.begin(), step.parameters.end(), adapter.parameters().data);
    const lm::cpu::Backend<> be;
    const Index T = step.tokens;
    std::vector<std::byte> work(static_cast<std::size_t>(lm::workspace_bytes(be, adapter, T, lm::Pass::backward))),
        memory(static_cast<std::size_t>(lm::reserve_bytes(adapter, T)));
    lm::Arena<> reserve{memory};
    auto gradient = lm::zeros_like(adapter);
    const lm::MatrixView<const float> x{step.x.data(), T, step.d_in}, dy{step.dy.data(), T, step.d_out};
    auto saved = lm::forward(
        be, adapter, x, lm::MatrixView<float>{r.y.data(), T, step.d_out}, lm::Arena<>{work},
        {.save = &reserve, .key = task_step_key, .tasks = lm::Groups<>::by_id(step.ids.data(), step.tasks)});
    lm::backward(be, adapter, saved, x, dy, lm::MatrixView<float>{r.dx.data(), T, step.d_in}, gradient,
                 lm::Arena<>{work});
    const auto flat = gradient.parameters();
    r.gradient.assign(flat.data, flat.data + flat.size);
  });
  return r;
}

}  // namespace loramix_test
