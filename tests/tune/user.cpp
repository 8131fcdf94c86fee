// A program that uses what ./dev tune wrote.
#include <type_traits>

#include <loramix/core/thread_pool.hpp>
#include <loramix/cpu/cpu.hpp>

#include "machine_tuning.hpp"

namespace lm = loramix;

static_assert(std::is_same_v<decltype(machine_tuning), const lm::cpu::Tuning>);
static_assert(machine_tuning.path == lm::cpu::Path::automatic && machine_tuning.order == lm::cpu::Order::by_class,
              "which values are computed is the user's choice, not the machine's");
static_assert(machine_tuning.sweep >= 256 && machine_tuning.weights >= 32 * 1024);
static_assert(machine_tuning.tokens_per_sum >= 24 && machine_tuning.serial_bytes > 0);

int main() {
  lm::ThreadPool pool(2);
  // [use]
  lm::cpu::Backend be{pool.executor(), machine_tuning};
  // [/use]
  return be.tuning.sweep == machine_tuning.sweep ? 0 : 1;
}
