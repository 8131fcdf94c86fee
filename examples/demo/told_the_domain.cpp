// Methods that are told the domain: as a task, or as a label that MoA's routers learn to guess.
#include <loramix/adapter/hydra_lora.hpp>

#include "moa_stages.hpp"

namespace demo {

namespace {

void add_moa(Group& group) {
  const std::string told = "MoA, 6 of 3, told", routed = "MoA, 6 of 3, routed";
  const MoaRecipe recipe{{.total_rank = 18, .experts = domains}};
  group.methods.push_back(moa({{{told}, Deciding::label},
                               {{routed}, Deciding::vote},
                               {{"the last layer decides", routed}, Deciding::last},
                               {{"the first layer decides", routed}, Deciding::first},
                               {{"every layer for itself", routed}, Deciding::every_layer}},
                              recipe));
  group.methods.push_back(
      moa({{{"fresh experts", told}, Deciding::label}, {{"fresh experts", routed}, Deciding::vote}}, recipe, true));

  MoaRecipe unlabelled = changed(recipe, [](lm::MoaConfig& config) { config.straight_through = true; });
  unlabelled.labels = false;
  group.methods.push_back(moa({{{"no labels", routed}, Deciding::vote}}, unlabelled));

  MoaRecipe classifier = recipe;  // the first layer's router reads the image: the LoRAs stay as they are
  classifier.groups = {{"A", {.frozen = true}}, {"B", {.frozen = true}}};
  group.methods.push_back(moa({{{"LoRAs alone, and a classifier", routed}, Deciding::first}}, classifier));
}

void add_more(Group& group) {
  const Recipe<lm::More<float>> recipe{{.total_rank = more_rank},
                                       [](lm::MoreConfig& config) { config.tasks = domains; }};
  const auto with_law = [](lm::RankLaw law) { return [law](lm::MoreConfig& config) { config.rule.law = law; }; };
  const auto through = [](lm::StraightThrough what) {
    return [what](lm::MoreConfig& config) { config.rule.straight_through = what; };
  };
  const auto choice = [](lm::RankChoice how) { return [how](lm::MoreConfig& config) { config.rule.choice = how; }; };
  group.add(more_name, recipe);
  group.ablation("no law", recipe, with_law(lm::RankLaw::none));
  group.ablation("the code's law, (j/r)²", recipe, with_law(lm::RankLaw::code_squared));
  group.ablation("the law for gradients", recipe, with_law(lm::RankLaw::lr_linear));
  group.ablation("no task embedding", recipe, [](lm::MoreConfig& config) { config.task_embedding = false; });
  auto plain = recipe;
  plain.losses.contrastive = 0;
  group.ablation("no contrastive loss", plain);
  group.ablation("no straight-through", recipe, through(lm::StraightThrough::none));
  group.ablation("straight through the logit", recipe, through(lm::StraightThrough::raw_logit));
  group.ablation("ranks at random", recipe, choice(lm::RankChoice::random));
  group.ablation("subsets of ranks", recipe, choice(lm::RankChoice::subset));
  group.ablation("dropout 0.1", recipe, [](lm::MoreConfig& config) { config.dropout = 0.1; });
}

}  // namespace

Group told_the_domain() {
  Group group{"methods that are told the domain"};
  group.add("LoRA + a bias per domain", Recipe<BiasedLora<float>>{{.total_rank = 24}});

  group.add("MOELoRA, 4 of 5", Recipe<lm::MoeLora<float>>{{.total_rank = 20, .experts = 4},
                                                          [](lm::MoeLoraConfig& config) { config.tasks = domains; }});
  const lm::Shape hydra{.total_rank = 36, .experts = 4};
  group.add(
      "HydraLoRA by task, 4 of 9",
      Recipe<lm::MoeLora<float>>{hydra, [hydra](lm::MoeLoraConfig& config) {
                                   const lm::Shape shape{config.d_in, config.d_out, hydra.total_rank, hydra.experts};
                                   config = lm::hydra_by_task(lm::MixtureConfig::of(shape), domains);
                                 }});
  group.add("TeamLoRA by task, 4 of 5",
            Recipe<lm::TeamLora<float>>{{.total_rank = 20, .experts = 4}, [](lm::TeamLoraConfig& config) {
                                          config.hidden = 7;
                                          config.reads = lm::Reads::task;
                                          config.tasks = domains;
                                        }});
  add_moa(group);
  add_more(group);
  return group;
}

}  // namespace demo
