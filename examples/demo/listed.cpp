// Adapters of examples/adapters/list.hpp without a row of their own: a new line there is a row here, at the budget.
#include <loramix/bench/layer.hpp>

#include <adapters/list.hpp>

#include "methods.hpp"

namespace demo {

namespace {

template <class A, class... Others>
constexpr bool one_of = (std::is_same_v<A, Others> || ...);

template <class A>
constexpr bool has_a_row =
    one_of<A, lm::Lora<float>, lm::Dora<float>, lm::LoraMoe<float>, lm::MoeLora<float>, lm::HydraLora<float>,
           lm::TeamLora<float>, lm::MixLora<float>, lm::Mola<float>, lm::Moa<float>, lm::More<float>,
           lm::AdaLora<float>, lm::MosLora<float>, lm::MultiLora<float>, lm::Ia3<float>, lm::Prompt<float>>;
/// No layer here is several projections in one, and what serves many LoRAs trains none.
template <class A>
constexpr bool has_no_place = one_of<A, lm::FusedLora<float>, lm::Served<float>>;

/// The largest rank at which it has no more parameters than LoRA of rank 24.
template <class A>
Recipe<A> at_budget() {
  const Mlp network;
  const Index budget = Adapted<lm::Lora<float>, Mlp>(network, {{.total_rank = 24}}, 0).trainable();
  for (Index rank = 24;; --rank) {
    Recipe<A> recipe{{.total_rank = rank, .experts = 4}};
    recipe.adjust = [rank](typename A::Config& config) {
      config = lm::bench::configured<A>({config.d_in, config.d_out, rank, 4}, domains);
    };
    if (rank <= 1 || Adapted<A, Mlp>(network, recipe, 0).trainable() <= budget) return recipe;
  }
}

}  // namespace

Group listed() {
  Group group{"others in examples/adapters/list.hpp"};
  adapters::for_each(adapters::All<float>{}, [&group]<class A>() {
    if constexpr (!has_a_row<A> && !has_no_place<A>) group.add(A::kind, at_budget<A>());
  });
  return group;
}

}  // namespace demo
