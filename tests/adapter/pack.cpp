// Packs and explain.
#include "adapter/kinds.hpp"

#include <loramix/adapter/mola.hpp>
#include <loramix/adapter/more.hpp>

namespace loramix_test {
namespace {

TEST_CASE_TEMPLATE("forward on a pack of 16-bit weights gives the same bits, in no more memory", K,
                   LoraKind<lm::bfloat16>, LoraKind<lm::half>, FusedKind<lm::bfloat16>, MixtureKind<lm::bfloat16>,
                   LoraKind<lm::Precision<float, lm::bfloat16>>) {
  using X = typename K::Adapter::precision::activation;
  for (const Index tokens : {0, 1, 70}) {
    Batch<typename K::Adapter> b(K::config(), tokens);
    const auto packed = lm::prepack(b.be, b.adapter, lm::Pass::forward);
    const Index bytes = lm::workspace_bytes(b.be, packed, tokens);
    CHECK(bytes <= lm::workspace_bytes(b.be, b.adapter, tokens));
    Memory work(bytes);
    auto y = random_matrix<X>(tokens, K::config().d_out, b.random);
    auto want = y;
    for (const lm::Into into : {lm::Into::add, lm::Into::set}) {
      b.forward(want, {.into = into});
      lm::forward(b.be, packed, b.x, y, work.arena(), {.into = into});
      CHECK(same_bits(y, want));
    }
  }
}

TEST_CASE_TEMPLATE("a pack is a copy that knows whether it is still current", K, LoraKind<lm::bfloat16>,
                   FusedKind<float>, MixtureKind<float>) {
  Batch<typename K::Adapter> b(K::config(), 9);
  const auto packed = lm::prepack(b.be, b.adapter);
  auto before = b.zeros_y(), after = b.zeros_y(), changed = b.zeros_y();
  lm::forward(b.be, packed, b.x, before, b.work.arena());
  CHECK(packed.is_current(b.adapter));
  packed.require_current(b.adapter);
  auto& weight = b.adapter.parameters()[1];
  const auto old = weight;
  weight = lm::narrow<std::remove_reference_t<decltype(weight)>>(3.0);
  CHECK_FALSE(packed.is_current(b.adapter));
  check_error(lm::ErrorCode::state, {"packed", "changed since it was packed"},
              [&] { packed.require_current(b.adapter); });
  lm::forward(b.be, packed, b.x, after, b.work.arena());
  b.forward(changed);
  CHECK(same_bits(before, after));
  CHECK_FALSE(same_bits(before, changed));
  weight = old;
  packed.require_current(b.adapter);
  const auto shared = packed;  // copies are as good
  shared.require_current(b.adapter);
  check_error(lm::ErrorCode::value, {"prepack", "pass"}, [&] { lm::prepack(b.be, b.adapter, lm::Pass::backward); });
}

TEST_CASE("explain says path, tiles, cost and memory") {
  Batch<lm::Lora<float>> b(LoraKind<float>::config(), 70);
  const lm::Explanation e = lm::explain(b.be, b.adapter, 70);
  CHECK(e.tokens == 70);
  CHECK(e.forward_workspace == lm::workspace_bytes(b.be, b.adapter, 70));
  CHECK(e.backward_workspace == lm::workspace_bytes(b.be, b.adapter, 70, lm::Pass::backward));
  CHECK(e.cost.forward_flop == b.adapter.cost(70).forward_flop);
  const Index rows_of_A = b.adapter.A().rows;
  CHECK(e.reserve_per_token - e.reserve_per_token_recomputed == rows_of_A * static_cast<Index>(sizeof(float)));
  std::FILE* file = std::tmpfile();
  REQUIRE(file != nullptr);
  lm::print(e, file);
  std::rewind(file);
  char text[1024] = {};
  CHECK(std::fread(text, 1, sizeof text - 1, file) > 100);
  std::fclose(file);
  const std::string said = text;
  for (const std::string& part : {std::string("70 tokens: cpu fused, all ranks: "), std::string(" tokens\n"),
                                  std::to_string(e.forward_workspace) + " bytes of workspace",
                                  std::to_string(e.backward_workspace) + " bytes of workspace",
                                  std::to_string(e.reserve_per_token) + " bytes kept per token"}) {
    CHECK_MESSAGE(said.find(part) != std::string::npos, part);
  }
}

TEST_CASE("explain says which path an adapter takes, and why") {
  const auto said = [](const auto& adapter, Index tokens, const lm::cpu::Tuning& tuning = {}) {
    const lm::PathFacts facts = lm::explain(lm::cpu::Backend{lm::SerialExecutor{}, tuning}, adapter, tokens).facts;
    return std::string(facts.path) + "; " + facts.why + "; " + facts.kernels;
  };
  const auto has = [](const std::string& text, const char* part) { return text.find(part) != std::string::npos; };
  const lm::Lora<float> lora({.d_in = 40, .d_out = 30, .rank = 16});
  CHECK(has(said(lora, 70), "fused, all ranks"));
  CHECK(has(said(lora, 70), "register tiles"));
  CHECK(has(said(lora, 64), "as they lie"));
  CHECK(has(said(lora, 64, {.order = lm::cpu::Order::fixed}), "register tiles"));
  CHECK(
      has(said(lora, 70, {.path = lm::cpu::Path::composed}), "composed (Eigen product, gate, Eigen product); Tuning"));
  CHECK(has(said(lm::Lora<double>({.d_in = 40, .d_out = 30, .rank = 16}), 70), "composed"));

  const lm::Mola<float> two_of_eight({.d_in = 40, .d_out = 30, .experts = 8, .rank = 2, .rule = {.k = 2}});
  CHECK(has(said(two_of_eight, 70), "open ranks only; at most half"));
  CHECK(has(said(two_of_eight, 70, {.grouping = lm::cpu::Grouping::dense}), "all ranks; Tuning::grouping"));
  const lm::Mola<float> three_of_four({.d_in = 40, .d_out = 30, .experts = 4, .rank = 4, .rule = {.k = 3}});
  CHECK(has(said(three_of_four, 70), "all ranks; more than half"));
  const lm::Mola<float> two_of_forty({.d_in = 40, .d_out = 30, .experts = 40, .rank = 2, .rule = {.k = 2}});
  CHECK(has(said(two_of_forty, 70), "as they lie"));
  CHECK(has(said(two_of_forty, 70, {.grouping = lm::cpu::Grouping::dense}), "register tiles"));
  const lm::More<float> short_prefixes({.d_in = 40, .d_out = 30, .tasks = 2, .rank = 16}),
      prefixes({.d_in = 40, .d_out = 30, .tasks = 2, .rank = 32});
  CHECK(has(said(short_prefixes, 70), "all ranks; there are at most 16 ranks"));
  CHECK(has(said(prefixes, 70), "open ranks only; prefixes"));
  CHECK(has(said(three_of_four, 70, {.grouping = lm::cpu::Grouping::grouped}), "open ranks only; Tuning::grouping"));
}

}  // namespace
}  // namespace loramix_test
