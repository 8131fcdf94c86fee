// One forward and backward of adapters gated by the task, described so that a .cu and a .cpp can both run it.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include <loramix/adapter/forward.hpp>
#include <loramix/adapter/moe_lora.hpp>
#include <loramix/adapter/more.hpp>

namespace loramix_test {

struct TaskStep {
  static constexpr std::int64_t tokens = 37, d_in = 20, d_out = 12, tasks = 3;
  static constexpr int forms = 6;
  int form;
  std::vector<float> parameters, x, dy;
  std::vector<std::int32_t> ids;
};

struct TaskStepResults {
  std::vector<float> y, dx, gradient;
};

/// Form `form` with random values.
TaskStep draw_task_step(int form);
/// On the CPU backend.
TaskStepResults task_step_on_host(const TaskStep& step);

inline constexpr loramix::Key task_step_key{.seed = 5, .site = 7, .step = 3, .first_token = 11};

/// f(adapter in space S) for one of the forms.
template <loramix::Space S, class F>
void with_task_adapter(int form, const F& f) {
  using loramix::RankChoice, loramix::RankLaw, loramix::StraightThrough;
  using Step = TaskStep;
  if (form < 2) {
    f(loramix::MoeLora<float, S>({.d_in = Step::d_in,
                                  .d_out = Step::d_out,
                                  .tasks = Step::tasks,
                                  .experts = 3,
                                  .rank = 6,
                                  .alpha = 6,
                                  .dropout = 0.25,
                                  .embedding = 40,
                                  .shared_A = form == 1}));
    return;
  }
  const loramix::RankRule rules[] = {
      {},
      {RankLaw::code_squared, RankChoice::subset, StraightThrough::raw_logit},
      {RankLaw::lr_linear, RankChoice::random, StraightThrough::probability},
      {RankLaw::none, RankChoice::argmax, StraightThrough::probability},
  };
  f(loramix::More<float, S>({.d_in = Step::d_in,
                             .d_out = Step::d_out,
                             .tasks = Step::tasks,
                             .rank = 5,
                             .alpha = 5,
                             .dropout = 0.25,
                             .rule = rules[form - 2],
                             .task_embedding = form != 5}));
}

}  // namespace loramix_test
