// One adapter for all images: LoRA, and what is trained in place of its A and B.
#include <loramix/adapter/moslora.hpp>
#include <loramix/adapter/multi_lora.hpp>

#include "methods.hpp"

namespace demo {

Group one_adapter() {
  Group group{"one adapter for all images"};
  const auto dropout = [](auto& config) { config.dropout = 0.1; };

  group.add("LoRA, r = 4", Recipe<lm::Lora<float>>{{.total_rank = 4}});
  const Recipe<lm::Lora<float>> lora{{.total_rank = 24}};
  group.add("LoRA, r = 24", lora);
  group.ablation("dropout 0.1", lora, dropout);

  const Recipe<lm::Dora<float>> dora{{.total_rank = 24}};
  const auto lengths = [&](const lm::GroupOptions& options) {
    auto recipe = dora;
    recipe.groups = {{lm::group::scale.name, options}};
    return recipe;
  };
  group.add("DoRA", dora);
  group.ablation("m learns 4 times faster", lengths({.lr_ratio = 4}));
  group.ablation("m stays", lengths({.frozen = true}));
  group.ablation("dropout 0.1", dora, dropout);
  group.ablation("dropout 0.1, of the base too", dora, [](lm::DoraConfig& config) {
    config.dropout = 0.1;
    config.drop_base = true;
  });

  const Recipe<lm::MosLora<float>> mixer{{.total_rank = 24}};
  group.add("MoSLoRA", mixer);
  group.ablation("orthogonal mixer", mixer, [](lm::MosLoraConfig& config) { config.mixer = lm::Mixer::orthogonal; });
  group.ablation("mixer = I", mixer, [](lm::MosLoraConfig& config) { config.mixer = lm::Mixer::identity; });

  group.add("MultiLoRA, 3 of 7", Recipe<lm::MultiLora<float>>{{.total_rank = 24, .experts = 3}});

  const Recipe<lm::AdaLora<float>> pruned{{.total_rank = 24}};
  group.add("AdaLoRA, 69 to 46 ranks", pruned);
  group.ablation("scale per active rank", pruned, [](lm::AdaLoraConfig& config) { config.per_active_rank = true; });

  const Recipe<lm::Ia3<float>> factors{};
  group.add("IA3, natural size", factors);
  group.ablation("before the product", factors, [](lm::Ia3Config& config) { config.feed_forward = true; });
  return group;
}

}  // namespace demo
