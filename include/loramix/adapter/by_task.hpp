/// What configurations of adapters gated by the task share: their common fields and checks.
///
/// Computes:    nothing.
/// Parameters:  a Config with d_in, d_out, tasks, rank, alpha, dropout; experts that divide the rank where it has any.
/// Errors:      sizes below 0, no task, a rank below the least, no expert, a rank that they do not divide, dropout outside
///              [0, 1).
/// Cost:        none.
/// Determinism: none needed.
/// Example:     tests/adapter/moe_lora.cpp
#pragma once
#include <loramix/adapter/lora.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace detail {

template <class Self, class F>
void task_fields(Self& self, F&& f) {
  f("d_in", self.d_in);
  f("d_out", self.d_out);
  f("tasks", self.tasks);
  f("rank", self.rank);
  f("alpha", self.alpha);
  f("dropout", self.dropout);
}

template <class Config>
const Config& checked_by_task(const char* op, const Config& config, Index least_rank) {
  checked(op, LoraConfig{config.d_in, config.d_out, config.rank, config.alpha, config.dropout});
  check::at_least(op, "rank", config.rank, least_rank);
  check::at_least(op, "tasks", config.tasks, 1);
  if constexpr (requires { config.experts; }) {
    check::at_least(op, "experts", config.experts, 1);
    if (config.rank % config.experts != 0) {
      fail(check::detail::about(ErrorCode::value, op, "rank")
           << " is " << config.rank << " in total, which " << config.experts << " experts do not divide");
    }
  }
  return config;
}

}  // namespace detail
}  // namespace LORAMIX_ABI
}  // namespace loramix
