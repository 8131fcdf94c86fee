// What a method does around the optimiser's steps; most do nothing.
#pragma once
#include <loramix/adapter/ada_lora.hpp>
#include <loramix/train/ada_budget.hpp>

#include "linears.hpp"

namespace demo {

template <class Adapter>
struct Regime {
  Regime(std::vector<Adapter>&, std::vector<lm::gradient_t<Adapter>>&, Index) {}
  void before_step() {}
  void after_step(Index) {}
};

/// AdaLoRA keeps its factors orthogonal and prunes a third of its ranks.
template <>
class Regime<lm::AdaLora<float>> {
 public:
  using Adapter = lm::AdaLora<float>;
  using Gradient = lm::gradient_t<Adapter>;

  Regime(std::vector<Adapter>& adapters, std::vector<Gradient>& gradients, Index steps)
      : layers_(addresses(adapters)),
        gradients_(addresses(gradients)),
        memory_(static_cast<std::size_t>(lm::orthogonality_bytes<Adapter>(most_ranks(adapters)))),
        budget_(layers_, options(adapters, steps)) {}

  void before_step() {
    float value;
    lm::orthogonality_loss<lm::cpu::Backend<>, Adapter>(be_, layers_, gradients_, {}, {&value, 1},
                                                        lm::Arena<>{memory_});
    budget_.measure(be_, layers_, gradients_);
  }
  void after_step(Index step) { budget_.prune(be_, layers_, step); }

 private:
  template <class T>
  static std::vector<T*> addresses(std::vector<T>& all) {
    std::vector<T*> pointers;
    for (T& one : all) pointers.push_back(&one);
    return pointers;
  }
  static Index most_ranks(const std::vector<Adapter>& adapters) {
    Index most = 0;
    for (const Adapter& adapter : adapters) most = std::max(most, adapter.config().rank);
    return most;
  }
  static lm::AdaBudgetOptions options(const std::vector<Adapter>& adapters, Index steps) {
    Index ranks = 0;
    for (const Adapter& adapter : adapters) ranks += adapter.config().rank;
    return {.total_steps = steps,
            .initial_steps = steps / 10,
            .final_steps = steps / 3,
            .interval = 10,
            .initial_budget = static_cast<double>(ranks),
            .final_budget = static_cast<double>(ranks * 2 / 3)};
  }

  std::vector<Adapter*> layers_;
  std::vector<Gradient*> gradients_;
  std::vector<std::byte> memory_;
  lm::AdaBudget<Adapter> budget_;
  lm::cpu::Backend<> be_;
};

}  // namespace demo
