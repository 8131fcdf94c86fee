// One forward and backward of a mixture, described so that a .cu and a .cpp can both run it: what crosses between them
// names no type of the library, whose ABI namespaces differ.
#pragma once

#include <cstdint>
#include <vector>

#include <loramix/adapter/forward.hpp>
#include <loramix/adapter/hydra_lora.hpp>
#include <loramix/adapter/lora_moe.hpp>
#include <loramix/adapter/mola.hpp>
#include <loramix/adapter/team_lora.hpp>

namespace loramix_test {

struct MixtureStep {
  static constexpr std::int64_t tokens = 40, d_in = 20, d_out = 12, sequences = 6, tasks = 3;
  static constexpr std::uint64_t seed = 7, site = 3, number = 2, first_token = 50;
  std::vector<float> parameters, x, dy;  // as the adapter's flat buffer, [T, d_in], [T, d_out]
  std::vector<std::uint8_t> valid;       // [T]
  std::vector<std::int64_t> offsets{0, 7, 7, 20, 21, 33, 40};
  std::vector<std::int32_t> task_of{0, 2, 1, -1, 2, 1};  // [sequences]
};

struct MixtureResults {
  std::vector<float> y, dx, gradient, p;
  std::vector<std::int32_t> ids;  // of routers that choose
};

enum class MixtureCase {
  lora_moe,
  hydra_lora,
  team_lora,
  team_lora_alone,
  team_lora_by_mean,
  team_lora_by_last,
  team_lora_by_task,
  top_2,
  sigmoid,
  arrival,
  top_p,
  drawn,
  priority
};

/// f.template operator()<Adapter>(config) of a case.
template <class F>
auto with_mixture(MixtureCase which, const F& f) {
  namespace lm = loramix;
  using S = MixtureStep;
  const lm::MixtureConfig plain{
      .d_in = S::d_in, .d_out = S::d_out, .experts = 5, .rank = 3, .alpha = 3, .dropout = 0.5};
  const auto team = [&](lm::Index hidden, lm::Competition form, lm::Reads reads = lm::Reads::token,
                        lm::Pooling pooling = lm::Pooling::mean) {
    return f.template operator()<lm::TeamLora<float>>(
        {S::d_in, S::d_out, 5, 3, 3, 0.5, hidden, form, reads, pooling, S::tasks, 9});
  };
  const auto mola = [&](const lm::TopKRule& rule) {
    return f.template operator()<lm::Mola<float>>({S::d_in, S::d_out, 5, 3, 3, 0.5, rule});
  };
  switch (which) {
    case MixtureCase::lora_moe:
      return f.template operator()<lm::LoraMoe<float>>(plain);
    case MixtureCase::hydra_lora:
      return f.template operator()<lm::HydraLora<float>>(plain);
    case MixtureCase::team_lora:
      return team(6, lm::Competition::learned);
    case MixtureCase::team_lora_alone:
      return team(0, lm::Competition::identity);
    case MixtureCase::team_lora_by_mean:
      return team(6, lm::Competition::learned, lm::Reads::sequence);
    case MixtureCase::team_lora_by_last:
      return team(0, lm::Competition::learned, lm::Reads::sequence, lm::Pooling::last);
    case MixtureCase::team_lora_by_task:
      return team(6, lm::Competition::learned, lm::Reads::task);
    case MixtureCase::top_2:
      return mola({});
    case MixtureCase::sigmoid:
      return mola({.k = 3, .scoring = lm::Scoring::sigmoid, .route_scale = 2});
    case MixtureCase::arrival:
      return mola({.k = 2, .capacity = 0.7});
    case MixtureCase::top_p:
      return mola({.k = 5, .top_p = 0.83});
    case MixtureCase::drawn:
      return mola({.k = 2, .noise = true, .jitter = 0.2});
    default:
      break;
  }
  return mola({.k = 2, .renormalise = false, .capacity = 0.7, .order = lm::CapacityOrder::priority});
}

/// On the CPU backend.
MixtureResults mixture_on_host(MixtureCase which, const MixtureStep& step);

}  // namespace loramix_test
