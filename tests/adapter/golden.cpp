// Token-routed adapters against golden values: tests/golden/README.md.
#include <loramix/adapter/fused_forward.hpp>
#include <loramix/adapter/hydra_lora.hpp>
#include <loramix/adapter/lora_moe.hpp>
#include <loramix/adapter/mola.hpp>
#include <loramix/adapter/team_lora.hpp>

#include "golden/adapter.hpp"
#include "golden/data/fused_lora.hpp"
#include "golden/data/hydra_lora.hpp"
#include "golden/data/lora.hpp"
#include "golden/data/lora_moe.hpp"
#include "golden/data/mola.hpp"
#include "golden/data/team_lora.hpp"

namespace loramix_test {
namespace {

TEST_CASE("golden: LoRA and rsLoRA, MATH and PEFT") {
  const golden::Table table(golden::lora);
  lm::LoraConfig config{.d_in = 7, .d_out = 6, .rank = 2, .alpha = 3, .dropout = 0.5};
  for (const char* from : {"", "peft_"}) {
    config.rank_stabilised = false;
    golden::check_adapter<lm::Lora<double>>(table, config, {.variant = std::string(from) + "dropout"});
    config.rank_stabilised = true;
    golden::check_adapter<lm::Lora<double>>(table, config, {.variant = std::string(from) + "rslora"});
  }
  config.rank_stabilised = false;
  golden::check_adapter<lm::Lora<double>>(table, config, {.variant = "none", .draws = false});
}

TEST_CASE("golden: a fused projection, with an A per slice and with one") {
  const golden::Table table(golden::fused_lora);
  lm::FusedLoraConfig config{
      .d_in = 7, .d_out = 9, .slices = {{5, 3}, {0, 2}, {2, 2}}, .rank = 2, .alpha = 5, .dropout = 0.5};
  golden::check_adapter<lm::FusedLora<double>>(table, config, {.variant = "separate"});
  config.shared_A = true;
  golden::check_adapter<lm::FusedLora<double>>(table, config, {.variant = "shared"});
}

TEST_CASE("golden: LoRAMoE and HydraLoRA") {
  const lm::MixtureConfig config{.d_in = 7, .d_out = 6, .experts = 3, .rank = 2, .alpha = 3, .dropout = 0.5};
  golden::check_adapter<lm::LoraMoe<double>>(golden::Table(golden::lora_moe), config, {.variant = "a"});
  golden::check_adapter<lm::HydraLora<double>>(golden::Table(golden::hydra_lora), config, {.variant = "a"});
}

TEST_CASE("golden: MoLA and every rule of its router") {
  const golden::Table table(golden::mola);
  const std::vector<float> bias = table["bias"].as<float>();
  const std::vector<std::uint8_t> valid = table["valid"].as<std::uint8_t>();
  lm::ForwardOptions<lm::Space::host> biased, padded;
  biased.selection_bias = {bias.data(), static_cast<Index>(bias.size())};
  padded.valid = {valid.data(), static_cast<Index>(valid.size())};
  const auto check = [&](const char* variant, const lm::TopKRule& rule,
                         const lm::ForwardOptions<lm::Space::host>& options = {}) {
    const lm::MolaConfig config{
        .d_in = 7, .d_out = 6, .experts = 5, .rank = 2, .alpha = 3, .dropout = 0.5, .rule = rule};
    golden::check_adapter<lm::Mola<double>>(table, config, {.variant = variant, .options = options});
  };
  constexpr lm::Scoring sigmoid = lm::Scoring::sigmoid;
  check("renormalised", {});
  check("temperature", {.renormalise = false, .temperature = 0.7});
  check("switch", {.k = 1, .renormalise = false});
  check("sigmoid", {.scoring = sigmoid, .route_scale = 1.5});
  check("sigmoid_raw", {.k = 3, .scoring = sigmoid, .renormalise = false});
  check("top_p", {.k = 5, .top_p = 0.8});
  check("bias", {.scoring = sigmoid}, biased);
  check("noise", {.noise = true});
  check("jitter", {.jitter = 0.25});
  check("capacity", {.capacity = 0.75}, padded);
  check("priority", {.capacity = 0.75, .order = lm::CapacityOrder::priority}, padded);
}

TEST_CASE("golden: TeamLoRA and its ablations") {
  const golden::Table table(golden::team_lora);
  lm::TeamLoraConfig config{.d_in = 7, .d_out = 6, .experts = 3, .rank = 2, .alpha = 3, .dropout = 0.5, .hidden = 5};
  golden::check_adapter<lm::TeamLora<double>>(table, config, {.variant = "mlp"});
  config.hidden = 0;
  golden::check_adapter<lm::TeamLora<double>>(table, config, {.variant = "linear"});
  config.competition = lm::Competition::identity;
  golden::check_adapter<lm::TeamLora<double>>(table, config, {.variant = "identity", .inputs = "linear"});
  config.competition = lm::Competition::equal;
  golden::check_adapter<lm::TeamLora<double>>(table, config, {.variant = "equal", .inputs = "linear"});
}

}  // namespace
}  // namespace loramix_test
