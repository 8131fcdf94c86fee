// The CPU's side of tests/gpu/mixlora.cu.
#include "gpu/mixlora_step.hpp"

#include <algorithm>

#include <loramix/cpu/cpu.hpp>

namespace lm = loramix;

loramix_test::MixLoraResults loramix_test::mix_lora_on_host(const MixLoraStep& step) {
  using S = MixLoraStep;
  const lm::cpu::Backend be;
  lm::MixLora<float> mix(S::config(step.k, step.capacity));
  std::copy_n(step.parameters.begin(), mix.parameters().size, mix.parameters().data);
  auto grad = lm::zeros_like(mix);
  const auto zeros = [](std::int64_t n) { return std::vector<float>(static_cast<std::size_t>(n)); };
  MixLoraResults r{zeros(S::tokens * S::d_out),
                   zeros(S::tokens * S::d_hidden),
                   zeros(S::tokens * S::d_in),
                   zeros(S::tokens * S::d_hidden),
                   zeros(S::tokens * S::d_hidden),
                   {},
                   {}};
  const lm::Index bytes =
      std::max(lm::workspace_bytes(be, mix, S::tokens), lm::workspace_bytes(be, mix, S::tokens, lm::Pass::backward));
  std::vector<std::byte> work(static_cast<std::size_t>(bytes)),
      kept(static_cast<std::size_t>(lm::reserve_bytes(mix, S::tokens)));
  lm::Arena<> reserve{kept};
  const MixLoraViews<lm::Space::host> at{
      {step.x.data(), S::tokens, S::d_in},         {step.u.data(), S::tokens, S::d_hidden},
      {step.v.data(), S::tokens, S::d_hidden},     {step.dy.data(), S::tokens, S::d_out},
      {step.dhbar.data(), S::tokens, S::d_hidden}, {r.y.data(), S::tokens, S::d_out},
      {r.hbar.data(), S::tokens, S::d_hidden},     {r.dx.data(), S::tokens, S::d_in},
      {r.du.data(), S::tokens, S::d_hidden},       {r.dv.data(), S::tokens, S::d_hidden}};
  const auto ids = run_mix_lora(be, mix, grad, at, reserve, lm::Arena<>{work});
  r.ids.assign(ids.data, ids.data + ids.rows * ids.cols);
  r.gradient.assign(grad.parameters().data, grad.parameters().data + grad.parameters().size);
  return r;
}
