// Methods that need another network, each beside LoRA on that network.
#include "methods.hpp"

namespace demo {

Group gated_blocks() {
  Group group{"on a network of gated blocks"};
  group.methods.push_back(frozen<Gated>("gated: frozen base"));
  group.add<Gated>("gated: LoRA, r = 24", Recipe<lm::Lora<float>>{{.total_rank = 24}});

  Recipe<lm::MixLora<float>> blocks{{.total_rank = 20, .experts = 4}};
  group.add<Gated>("gated: MixLoRA, 2 of 4", blocks);
  group.ablation<Gated>("dropout 0.1", blocks, [](lm::MixLoraConfig& config) { config.dropout = 0.1; });
  blocks.losses.mixtral = 0;
  group.ablation<Gated>("no balance loss", blocks);
  return group;
}

Group image_rows_as_tokens() {
  Group group{"on a network that reads an image's rows as tokens"};
  group.methods.push_back(frozen<Reader>("tokens: frozen base"));
  group.add<Reader>("tokens: LoRA, r = 4", Recipe<lm::Lora<float>>{{.total_rank = 4}});
  group.add<Reader>("tokens: 8 prompts", Recipe<lm::Prompt<float>>{{.total_rank = 8}});
  return group;
}

}  // namespace demo
