/// HydraLoRA: one shared A, an expert per head B, a dense softmax router.
///
/// Computes:    ΔY = s Σ_e g_e (X̂ Aᵀ) B_eᵀ, g = softmax(x W_gᵀ) [T, E]; s = α/r, r the rows of A. U = X̂ Aᵀ is made
///              once.
/// Source:      HydraLoRA, Tian et al. 2024 (arXiv 2404.19245). The authors' code recomputes A, with a new dropout
///              mask, for every expert.
/// Parameters:  adapter/mixture.hpp; the router starts U(−1/√d_in, 1/√d_in).
/// Errors:      adapter/mixture.hpp
/// Cost:        a shrink of r rows, an expand of E·r ranks, E router rows.
/// Determinism: adapter/forward.hpp
/// Merge:       none: the gate depends on the token. hydra_by_task() is gated by the task, and merges task by task.
/// Example:     examples/demo
#pragma once
#include <loramix/adapter/mixture.hpp>
#include <loramix/adapter/moe_lora.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// What makes a mixture HydraLoRA.
struct HydraLoraMethod : SoftmaxMethod<true> {
  static constexpr const char* kind = "hydra_lora";
};

/// lm::HydraLora<float> hydra({.d_in = …, .d_out = …, .experts = 8, .rank = 4});
template <class P = float, Space S = Space::host, class T = typename precision_t<P>::weight>
using HydraLora = Mixture<HydraLoraMethod, P, S, T>;

/// HydraLoRA gated by a task's embedding: lm::MoeLora<float> hydra(lm::hydra_by_task({.d_in = …}, tasks)). One A of
/// `rank` rows, s = α/rank as in HydraLoRA; MOELoRA's are of all experts together.
inline MoeLoraConfig hydra_by_task(const MixtureConfig& hydra, Index tasks, Index embedding = 64) {
  return {.d_in = hydra.d_in,
          .d_out = hydra.d_out,
          .tasks = tasks,
          .experts = hydra.experts,
          .rank = detail::size_of(hydra.experts, hydra.rank),
          .alpha = hydra.alpha * static_cast<double>(hydra.experts),
          .dropout = hydra.dropout,
          .embedding = embedding,
          .shared_A = true};
}

}  // namespace LORAMIX_ABI
}  // namespace loramix
