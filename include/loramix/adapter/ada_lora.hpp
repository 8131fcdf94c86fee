/// AdaLoRA: a learned value per rank, pruned while training (train/ada_budget.hpp).
///
/// Computes:    ΔY = s (X̂ Aᵀ ∘ λ) Bᵀ, s = α/r with the initial r; `per_active_rank` (ours): α/(n_active + 1e-5).
/// Source:      Zhang et al. 2023 (arXiv 2303.10512), equation 3; MATH.md section 4. A pruned rank has λ = 0: a number,
///              not a closed gate, so λ keeps its gradient and the rank may return. PEFT's scale is α/(r + 1e-5): ours
///              up to that.
/// Parameters:  lora_A.weight [r, d_in], lora_B.weight [d_out, r], lora_E [1, r] = λ. λ = 0, A, B ~ N(0, 0.02²) at
///              start: with B = 0 too nothing would ever train.
/// Errors:      sizes below 0, dropout outside [0, 1), active_rank outside [−1, r]. r = 0 is legal: it adds nothing.
/// Cost:        LoRA; T·r values of workspace in backward for dλ.
/// Determinism: adapter/forward.hpp
/// Merge:       exact: W + s B diag(λ) A.
/// Example:     tests/adapter/ada_lora.cpp
#pragma once
#include <loramix/adapter/lora.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// Sizes and scale. active_rank is kept by the budget and written to files; −1: all.
struct AdaLoraConfig {
  Index d_in = 0;
  Index d_out = 0;
  Index rank = 12;
  double alpha = 16;
  double dropout = 0;
  bool per_active_rank = false;
  Index active_rank = -1;

  static AdaLoraConfig of(const Shape& shape) {  // λ is part of the budget
    const Index total = shape.total_rank * (shape.d_in + shape.d_out), rank = total / (shape.d_in + shape.d_out + 1);
    return {.d_in = shape.d_in, .d_out = shape.d_out, .rank = rank, .alpha = 2.0 * static_cast<double>(rank)};
  }
  template <class Self, class F>
  static void fields(Self& self, F&& f) {
    f("d_in", self.d_in);
    f("d_out", self.d_out);
    f("rank", self.rank);
    f("alpha", self.alpha);
    f("dropout", self.dropout);
    f("per_active_rank", self.per_active_rank);
    f("active_rank", self.active_rank);
  }
  LoraConfig lora() const { return {d_in, d_out, rank, alpha, dropout}; }
};

/// Owns A [r, d_in], B [d_out, r] and λ [1, r].
template <class P = float, Space S = Space::host, class T = typename precision_t<P>::weight>
class AdaLora {
 public:
  using Config = AdaLoraConfig;
  using precision = precision_t<P>;
  using element = T;
  template <class U, Space V = S>
  using rebind = AdaLora<P, V, U>;
  static constexpr Space space = S;
  static constexpr const char* kind = "ada_lora";
  static_assert(std::is_same_v<typename precision::weight, typename precision::score>,
                "loramix: AdaLora's λ is a gate: weights must have the score type, as in Precision<bfloat16, float>");

  explicit AdaLora(const Config& c)
      : config_((detail::checked("AdaLora", c.lora()), c)),
        parameters_({detail::size_of(c.rank, c.d_in), detail::size_of(c.d_out, c.rank), c.rank}) {
    set_active_rank(c.active_rank);
  }

  const Config& config() const { return config_; }
  VectorView<T, S> parameters() { return parameters_.flat(); }
  VectorView<const T, S> parameters() const { return parameters_.flat(); }
  auto A() { return parameters_.matrix(0, config_.rank, config_.d_in); }
  auto A() const { return parameters_.matrix(0, config_.rank, config_.d_in); }
  auto B() { return parameters_.rank_major(1, config_.d_out, config_.rank); }
  auto B() const { return parameters_.rank_major(1, config_.d_out, config_.rank); }
  auto lambda() { return parameters_.matrix(2, 1, config_.rank); }
  auto lambda() const { return parameters_.matrix(2, 1, config_.rank); }
  RankScale<typename precision::score, S> gate() const { return {{lambda().data, config_.rank}}; }
  GateGradient<T, S> gate_gradient() { return {.rank_scale = {lambda().data, config_.rank}}; }
  double dropout() const { return config_.dropout; }
  double scale() const {
    return config_.per_active_rank ? config_.alpha / (static_cast<double>(active_rank()) + 1e-5)
                                   : config_.lora().scale();
  }
  /// The ranks that the budget kept.
  Index active_rank() const { return config_.active_rank < 0 ? config_.rank : config_.active_rank; }
  void set_active_rank(Index n) {
    check::at_least("AdaLora", "active_rank", n, -1);
    check::at_least("AdaLora", "rank, beside active_rank,", config_.rank, n);
    config_.active_rank = n;
  }
  Cost cost(Index tokens) const {
    Cost cost = product_cost<precision>(tokens, config_.d_in, config_.d_out, config_.rank, config_.rank, 0);
    cost.parameters += config_.rank;
    return cost;
  }
  template <class Self, class F>
  static void visit(Self& self, F&& f) {
    f("lora_A.weight", self.A(), group::A);
    f("lora_B.weight", self.B(), group::B);
    f("lora_E", self.lambda(), group::scale);
  }
  template <class Fill>
  void start(Fill& fill) {
    fill.normal("lora_A.weight", A(), 0.02 * 0.02);
    fill.normal("lora_B.weight", B(), 0.02 * 0.02);
    fill.zero(lambda());
  }

 private:
  Config config_;
  Parameters<T, S, 3> parameters_;
};

}  // namespace LORAMIX_ABI
}  // namespace loramix
