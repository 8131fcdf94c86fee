/// MOELoRA: a mixture of small LoRA experts, weighted by the task.
///
/// Computes:    ΔY = s Σ_e g_{τ,e} (X̂ A_eᵀ) B_eᵀ, g_τ = softmax(W_g e_τ) (router/task.hpp); every expert has r/E of
///              the total rank r, s = α/r. `shared_A`: all experts read one A of r/E rows, HydraLoRA gated by the task
///              (hydra_by_task in adapter/hydra_lora.hpp makes its configuration).
/// Source:      MOELoRA, Liu et al. 2023 (arXiv 2310.18339): A ~ N(0, 0.01²), embeddings N(0, 1) of 64 values. With
///              shared_A, which is ours, A starts as HydraLoRA's.
/// Parameters:  lora_A.weight [r or r/E, d_in], lora_B.weight [d_out, r], task_embedding.weight [tasks, dim],
///              moe_gate.weight [E, dim].
/// Errors:      sizes below 0, no task, no expert, a rank that E does not divide, dropout outside [0, 1); a batch
///              without tasks.
/// Cost:        LoRA of rank r, and a few operations per task.
/// Determinism: adapter/forward.hpp
/// Merge:       exact for one task: merge(be, adapter, W, {.task = τ}) (adapter/merge.hpp).
/// Example:     tests/adapter/moe_lora.cpp
#pragma once
#include <loramix/adapter/by_task.hpp>
#include <loramix/router/task.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// `rank` is the total, divided among the experts.
struct MoeLoraConfig {
  Index d_in = 0;
  Index d_out = 0;
  Index tasks = 1;
  Index experts = 8;
  Index rank = 16;
  double alpha = 32;
  double dropout = 0;
  Index embedding = 64;
  bool shared_A = false;

  static MoeLoraConfig of(const Shape& shape) {
    const Index rank = shape.total_rank / shape.experts * shape.experts;
    return {.d_in = shape.d_in,
            .d_out = shape.d_out,
            .experts = shape.experts,
            .rank = rank,
            .alpha = 2.0 * static_cast<double>(rank)};
  }
  template <class Self, class F>
  static void fields(Self& self, F&& f) {
    detail::task_fields(self, f);
    f("experts", self.experts);
    f("embedding", self.embedding);
    f("shared_A", self.shared_A);
  }
  Index rows_of_A() const { return shared_A ? rank / experts : rank; }
};

/// Owns A, B, the tasks' embeddings and W_g.
template <class P = float, Space S = Space::host, class T = typename precision_t<P>::weight>
class MoeLora {
 public:
  using Config = MoeLoraConfig;
  using precision = precision_t<P>;
  using element = T;
  template <class U, Space V = S>
  using rebind = MoeLora<P, V, U>;
  static constexpr Space space = S;
  static constexpr const char* kind = "moe_lora";

  explicit MoeLora(const Config& config)
      : config_(detail::checked_by_task("MoeLora", config, 0)),
        parameters_({detail::size_of(config.rows_of_A(), config.d_in), detail::size_of(config.d_out, config.rank),
                     detail::size_of(config.tasks, config.embedding),
                     detail::size_of(config.experts, config.embedding)}) {}

  const Config& config() const { return config_; }
  VectorView<T, S> parameters() { return parameters_.flat(); }
  VectorView<const T, S> parameters() const { return parameters_.flat(); }
  double scale() const { return config_.rank == 0 ? 0 : config_.alpha / static_cast<double>(config_.rank); }
  double dropout() const { return config_.dropout; }

  auto A() { return parameters_.matrix(0, config_.rows_of_A(), config_.d_in); }
  auto A() const { return parameters_.matrix(0, config_.rows_of_A(), config_.d_in); }
  auto B() { return parameters_.rank_major(1, config_.d_out, config_.rank); }
  auto B() const { return parameters_.rank_major(1, config_.d_out, config_.rank); }
  auto gate() { return gate_of<T>(*this); }
  auto gate() const { return gate_of<const T>(*this); }

  Cost cost(Index tokens) const {
    Cost cost = product_cost<precision>(tokens, config_.d_in, config_.d_out, config_.rows_of_A(), config_.rank, 0);
    cost.parameters += (config_.tasks + config_.experts) * config_.embedding;
    return cost;
  }
  template <class Self, class F>
  static void visit(Self& self, F&& f) {
    const auto scorer = self.gate().scorer;
    f("lora_A.weight", self.A(), group::A);
    f("lora_B.weight", self.B(), group::B);
    f("task_embedding.weight", scorer.embedding, group::embedding);
    f("moe_gate.weight", scorer.projection, group::router);
  }
  /// Files hold the A and B of every expert apart.
  Index tensors(ParameterGroup role) const {
    const bool split = role.is(group::B) || (role.is(group::A) && !config_.shared_A);
    return split ? config_.experts : 0;
  }
  template <class Fill>
  void start(Fill& fill) {
    const auto scorer = gate().scorer;
    if (config_.shared_A)
      fill.uniform("lora_A.weight", A(), 1 / std::sqrt(static_cast<double>(config_.d_in)));
    else
      fill.normal("lora_A.weight", A(), 0.01 * 0.01);
    fill.zero(B());
    fill.normal("task_embedding.weight", scorer.embedding, 1);
    fill.uniform("moe_gate.weight", scorer.projection, 1 / std::sqrt(static_cast<double>(config_.embedding)));
  }

 private:
  template <class W, class Self>
  static TaskSoftmaxGate<W, typename precision::score, S> gate_of(Self& self) {
    const Config& c = self.config_;
    return {{self.parameters_.matrix(2, c.tasks, c.embedding), self.parameters_.matrix(3, c.experts, c.embedding), {}}};
  }

  Config config_;
  Parameters<T, S, 4> parameters_;
};

}  // namespace LORAMIX_ABI
}  // namespace loramix
