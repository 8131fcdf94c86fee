// The CPU's side of tests/gpu/graph.cu.
#include "gpu/lora_step.hpp"

#include <algorithm>

#include <loramix/adapter/forward.hpp>
#include <loramix/adapter/lora.hpp>
#include <loramix/cpu/cpu.hpp>

namespace lm = loramix;

loramix_test::LoraStepResults loramix_test::lora_step_on_host(const LoraStep& step) {
  const lm::cpu::Backend be;
  lm::Lora<float> lora({.d_in = step.d_in, .d_out = step.d_out, .rank = step.rank, .dropout = step.dropout});
  std::copy(step.A.begin(), step.A.end(), lora.A().data);
  std::copy(step.B.begin(), step.B.end(), lora.B().data);
  auto gradient = lm::zeros_like(lora);

  LoraStepResults results{step.y, std::vector<float>(step.x.size()), {}, {}};
  std::vector<std::byte> work(static_cast<std::size_t>(lm::workspace_bytes(be, lora, step.tokens, lm::Pass::backward))),
      kept(static_cast<std::size_t>(lm::reserve_bytes(lora, step.tokens)));
  lm::Arena reserve{kept};
  const lm::MatrixView<const float> x{step.x.data(), step.tokens, step.d_in};
  auto saved = lm::forward(be, lora, x, {results.y.data(), step.tokens, step.d_out}, lm::Arena{work},
                           {.save = &reserve, .key = {.seed = 7, .step = 2}});
  lm::backward(be, lora, saved, x, {step.dy.data(), step.tokens, step.d_out},
               {results.dx.data(), step.tokens, step.d_in}, gradient, lm::Arena{work});
  results.dA.assign(gradient.A().data, gradient.A().data + step.A.size());
  results.dB.assign(gradient.B().data, gradient.B().data + step.B.size());
  return results;
}
