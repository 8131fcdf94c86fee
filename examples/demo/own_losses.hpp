// What methods add to the cross-entropy of the digits, at every place: to what forward saved, before backward, and to the
// gradients after it. Most add nothing.
#pragma once
#include <loramix/adapter/lora_moe.hpp>
#include <loramix/adapter/mix_lora_forward.hpp>
#include <loramix/adapter/moa.hpp>
#include <loramix/adapter/mola.hpp>
#include <loramix/adapter/more.hpp>
#include <loramix/adapter/shapley.hpp>
#include <loramix/adapter/team_lora.hpp>
#include <loramix/ops/losses.hpp>

#include "linears.hpp"

namespace demo {

/// Weights; a method reads its own. Those of balance losses are per place, the others of the mean over places.
struct LossWeights {
  double mola = 0.001;       // MoLA's balance
  double mixtral = 0.001;    // MixLoRA's balance
  double localised = 0.1;    // LoRAMoE's balance
  double routing = 1;        // MoA's η
  double contrastive = 0.1;  // MoRE's
  double shapley = 0;        // TeamLoRA's S trained towards Shapley values: ours
};

/// LoRAMoE's types of task: domains that move pixels, and domains that change them.
inline constexpr std::array<std::int32_t, domains> domain_types{1, 0, 1, 1, 0, 1};

/// One place in one step. A row of the batch is an image, and a sequence.
struct LossCall {
  const LossWeights& weights;
  double share;  // 1 / places
  const std::vector<int>& domain;
  lm::Arena<> work;
  lm::cpu::Backend<> be{};
};

/// Adds to saved.scores.
template <class Adapter, class Saved>
void losses_before_backward(const LossCall& call, const Adapter& adapter, Saved& saved, const Matrix& dy) {
  if constexpr (std::is_same_v<Adapter, lm::Mola<float>>) {
    lm::balance_loss(call.be, saved, {.form = lm::Balance::mola, .weight = call.weights.mola}, call.work);
  } else if constexpr (lm::MixLoraAdapter<Adapter>) {
    lm::balance_loss(call.be, saved, {.form = lm::Balance::mixtral, .weight = call.weights.mixtral}, call.work);
  } else if constexpr (std::is_same_v<Adapter, lm::LoraMoe<float>>) {
    std::vector<std::int32_t> types;
    for (const int k : call.domain) types.push_back(domain_types[k]);
    lm::localised_loss(call.be, saved,
                       {.weight = call.weights.localised, .types = {types.data(), lm::Index(types.size())}}, call.work);
  } else if constexpr (std::is_same_v<Adapter, lm::Moa<float>>) {
    if (!saved.call.batch.labels.empty()) {
      lm::routing_loss(call.be, saved, {.weight = call.weights.routing * call.share}, call.work);
    }
  } else if constexpr (std::is_same_v<Adapter, lm::TeamLora<float>>) {
    if (call.weights.shapley == 0) return;
    Matrix phi(dy.rows(), adapter.config().experts);
    const double images = static_cast<double>(dy.rows());  // dy is of their mean loss
    lm::shapley_values(call.be, adapter, saved, view(dy), -images, view(phi), call.work);
    lm::shapley_loss(call.be, saved, view(std::as_const(phi)), {.weight = call.weights.shapley * call.share},
                     call.work);
  }
}

/// Adds to dx, which may be empty, and to the gradient.
template <class Adapter>
void losses_after_backward(const LossCall& call, const Adapter& adapter, const Matrix& x, lm::MatrixView<float> dx,
                           lm::gradient_t<Adapter>& grad) {
  if constexpr (std::is_same_v<Adapter, lm::More<float>>) {
    if (!adapter.config().task_embedding) return;
    lm::contrastive_loss(call.be, view(x), adapter.gate().scorer.embedding,
                         lm::VectorView<const std::int32_t>{call.domain.data(), x.rows()}, dx,
                         grad.gate().scorer.embedding, {.weight = call.weights.contrastive * call.share}, call.work);
  }
}

/// Bytes of workspace of both.
template <class Adapter>
Index losses_bytes(const Adapter& adapter, Index tokens) {
  const lm::cpu::Backend<> be;
  if constexpr (std::is_same_v<Adapter, lm::More<float>>) {
    return lm::contrastive_workspace_bytes<float>(tokens, domains, adapter.config().d_in);
  } else if constexpr (requires { adapter.config().experts; }) {
    Index bytes = lm::loss_workspace_bytes<float>(tokens, adapter.config().experts, tokens);
    if constexpr (std::is_same_v<Adapter, lm::TeamLora<float>>) {
      bytes = std::max(bytes, lm::shapley_workspace_bytes(be, adapter, tokens));
    }
    return bytes;
  }
  return 0;
}

}  // namespace demo
