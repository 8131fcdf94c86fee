// Where peers take memory that grows with experts or adapters times tokens (docs/peers.md 3.7 and 3.22).
#include <loramix/adapter/forward.hpp>
#include <loramix/adapter/lora.hpp>
#include <loramix/adapter/lora_moe.hpp>
#include <loramix/adapter/served.hpp>
#include <loramix/cpu/cpu.hpp>

#include <doctest/doctest.h>

namespace loramix_test {

namespace lm = loramix;
using lm::Index;

TEST_CASE("transformers#40016 and the gate's gradient: no tensor of tokens x d_out per expert, forward or backward") {
  const lm::cpu::Backend be;
  constexpr Index T = 4096, out = 1024, R = 64;
  const lm::Lora<float> lora({.d_in = 256, .d_out = out, .rank = R});
  const auto grown = [&](const auto& adapter, lm::Pass pass) {
    return lm::workspace_bytes(be, adapter, 2 * T, pass) - lm::workspace_bytes(be, adapter, T, pass) +
           lm::reserve_bytes(adapter, 2 * T) - lm::reserve_bytes(adapter, T);
  };
  for (const Index experts : {2, 8, 32}) {
    const lm::LoraMoe<float> moe({.d_in = 256, .d_out = out, .experts = experts, .rank = R / experts});
    for (const lm::Pass pass : {lm::Pass::forward, lm::Pass::backward}) {
      // Beside LoRA's own U and dU a mixture keeps values per token of R ranks and E experts, and none of d_out.
      const Index more = grown(moe, pass) - grown(lora, pass);
      CHECK(more <= T * (4 * R + 16 * experts) * static_cast<Index>(sizeof(float)));
      CHECK(T * (4 * R + 16 * experts) < experts * T * out);
    }
  }
}

TEST_CASE("vllm#11100: serving many adapters on the CPU copies no adapter per token (25.8 GB there)") {
  const lm::cpu::Backend be;
  constexpr Index T = 4273, d = 2560, rank = 64, slots = 8;  // their case: Qwen3-4B, rank 64
  lm::ServedConfig config{d, d, {}};
  config.slots.assign(slots, lm::ServedSlot{rank, 1, true});
  const lm::Served<lm::bfloat16> served(config);
  const Index per_token = (lm::workspace_bytes(be, served, 2 * T) - lm::workspace_bytes(be, served, T)) / T;
  CHECK(per_token <= slots * (2 * rank + 1) * static_cast<Index>(sizeof(float)));  // U, U ∘ g, a place in a list
  const double gathered = static_cast<double>(T) * rank * 2 * d * sizeof(lm::bfloat16);
  CHECK(static_cast<double>(lm::workspace_bytes(be, served, T)) < gathered / 50);
}

}  // namespace loramix_test
