/// LoRAMoE: a dense softmax mixture of LoRA experts.
///
/// Computes:    ΔY = s Σ_e g_e (X̂ A_eᵀ) B_eᵀ, g = softmax(x W_gᵀ) [T, E]; s = α/r of one expert.
/// Source:      LoRAMoE, Dou et al. 2024 (arXiv 2312.09979). Its localised balance loss is in ops/losses.hpp.
/// Parameters:  adapter/mixture.hpp; the router starts U(−1/√d_in, 1/√d_in).
/// Errors:      adapter/mixture.hpp
/// Cost:        LoRA of rank E·r plus E router rows.
/// Determinism: adapter/forward.hpp
/// Merge:       none: the gate depends on the token.
/// Example:     examples/demo
#pragma once
#include <loramix/adapter/mixture.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// What makes a mixture LoRAMoE.
struct LoraMoeMethod : SoftmaxMethod<false> {
  static constexpr const char* kind = "lora_moe";
};

/// lm::LoraMoe<float> moe({.d_in = …, .d_out = …, .experts = 8, .rank = 4});
template <class P = float, Space S = Space::host, class T = typename precision_t<P>::weight>
using LoraMoe = Mixture<LoraMoeMethod, P, S, T>;

}  // namespace LORAMIX_ABI
}  // namespace loramix
