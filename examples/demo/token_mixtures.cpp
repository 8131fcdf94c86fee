// Mixtures whose routers see the image.
#include <loramix/adapter/hydra_lora.hpp>

#include "methods.hpp"

namespace demo {

namespace {

void add_team_lora(Group& group) {
  const Recipe<lm::TeamLora<float>> team{{.total_rank = 20, .experts = 4},
                                         [](lm::TeamLoraConfig& config) { config.hidden = 7; }};
  const auto competition = [](lm::Competition form) {
    return [form](lm::TeamLoraConfig& config) { config.competition = form; };
  };
  group.add("TeamLoRA, 4 of 5", team);
  group.ablation("M = I", team, competition(lm::Competition::identity));
  group.ablation("φ = 1/E", team, competition(lm::Competition::equal));
  group.ablation("linear S", team, [](lm::TeamLoraConfig& config) { config.hidden = 0; });
  auto shapley = team;
  shapley.losses.shapley = 0.1;
  group.ablation("S trained to Shapley values", shapley);
  group.ablation("dropout 0.1", team, [](lm::TeamLoraConfig& config) { config.dropout = 0.1; });
}

}  // namespace

Group token_mixtures() {
  Group group{"mixtures whose routers see the image"};

  Recipe<lm::LoraMoe<float>> dense{{.total_rank = 20, .experts = 4}};
  group.add("LoRAMoE, 4 of 5", dense);
  dense.losses.localised = 0;
  group.ablation("no balance loss", dense);

  group.add("HydraLoRA, 4 of 9", Recipe<lm::HydraLora<float>>{{.total_rank = 36, .experts = 4}});

  Recipe<lm::Mola<float>> sparse{{.total_rank = 20, .experts = 4}};
  group.add("MoLA, 2 of 4", sparse);
  sparse.losses.mola = 0;
  group.ablation("no balance loss", sparse);

  add_team_lora(group);
  return group;
}

}  // namespace demo
