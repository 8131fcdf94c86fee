// Adapters gated by the task or the sequence against golden values: tests/golden/README.md.
#include <loramix/adapter/moe_lora.hpp>
#include <loramix/adapter/more.hpp>

#include "golden/adapter.hpp"
#include "golden/data/moe_lora.hpp"
#include "golden/data/more.hpp"

namespace loramix_test {
namespace {

TEST_CASE("golden: MOELoRA, with experts' own A and with one") {
  const golden::Table table(golden::moe_lora);
  const std::vector<std::int32_t> tasks = table["tasks"].as<std::int32_t>();
  lm::MoeLoraConfig config{
      .d_in = 7, .d_out = 6, .tasks = 4, .experts = 3, .rank = 6, .alpha = 3, .dropout = 0.5, .embedding = 5};
  lm::ForwardOptions<lm::Space::host> options;
  options.tasks = lm::Groups<>::by_id(tasks.data(), 4);
  golden::check_adapter<lm::MoeLora<double>>(table, config, {.variant = "own", .options = options});
  config.shared_A = true;
  golden::check_adapter<lm::MoeLora<double>>(table, config, {.variant = "shared", .options = options});
}

TEST_CASE("golden: MoRE, its laws and what reaches the selector") {
  const golden::Table table(golden::more);
  const std::vector<std::int32_t> tasks = table["tasks"].as<std::int32_t>();
  lm::ForwardOptions<lm::Space::host> options;
  options.tasks = lm::Groups<>::by_id(tasks.data(), 3);
  const auto check = [&](const char* variant, const lm::RankRule& rule) {
    const lm::MoreConfig config{.d_in = 7, .d_out = 6, .tasks = 3, .rank = 4, .alpha = 3, .dropout = 0.5, .rule = rule};
    golden::check_adapter<lm::More<double>>(table, config, {.variant = variant, .options = options});
  };
  check("paper_linear", {});
  check("code_squared", {.law = lm::RankLaw::code_squared});
  check("lr_linear", {.law = lm::RankLaw::lr_linear});
  check("none", {.law = lm::RankLaw::none});
  check("raw_logit", {.straight_through = lm::StraightThrough::raw_logit});
  check("constant", {.straight_through = lm::StraightThrough::none});
}

}  // namespace
}  // namespace loramix_test
