/// MultiLoRA: several LoRAs side by side, each with a learned factor per output.
///
/// Computes:    ΔY = Σ_i γ_i ∘ (s X̂ A_iᵀ B_iᵀ) = s X̂ Aᵀ B′ᵀ with B′_i = diag(γ_i) B_i; s = α/r, r of one LoRA.
/// Source:      MultiLoRA, arXiv 2311.11501; MATH.md sections 1 and 4.
/// Parameters:  lora_A.weight [n·r, d_in], lora_B.weight [d_out, n·r], gamma [n, d_out]. A, B Kaiming, γ = 0 at start.
/// Errors:      sizes below 0, no LoRA, dropout outside [0, 1).
/// Cost:        LoRA of rank n·r and n·r·d_out flop per call.
/// Determinism: adapter/reparam_forward.hpp
/// Merge:       exact: W + s Σ diag(γ_i) B_i A_i.
/// Example:     tests/adapter/multi_lora.cpp
#pragma once
#include <loramix/adapter/lora.hpp>
#include <loramix/ops/reparam.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// Sizes and scale; `rank` is of one LoRA.
struct MultiLoraConfig {
  Index d_in = 0;
  Index d_out = 0;
  Index experts = 3;
  Index rank = 8;
  double alpha = 16;
  double dropout = 0;

  static MultiLoraConfig of(const Shape& shape) {  // γ is part of the budget
    const Index n = shape.experts < 1 ? 1 : shape.experts, both = shape.d_in + shape.d_out;
    const Index left = shape.total_rank * both - n * shape.d_out;
    const Index rank = left <= 0 || both == 0 ? 0 : left / (n * both);
    return {shape.d_in, shape.d_out, n, rank, 2.0 * static_cast<double>(rank)};
  }
  template <class Self, class F>
  static void fields(Self& self, F&& f) {
    f("d_in", self.d_in);
    f("d_out", self.d_out);
    f("experts", self.experts);
    f("rank", self.rank);
    f("alpha", self.alpha);
    f("dropout", self.dropout);
  }
};

/// Owns A [n·r, d_in], B [d_out, n·r] and γ [n, d_out].
template <class P = float, Space S = Space::host, class T = typename precision_t<P>::weight>
class MultiLora {
 public:
  using Config = MultiLoraConfig;
  using precision = precision_t<P>;
  using element = T;
  template <class U, Space V = S>
  using rebind = MultiLora<P, V, U>;
  static constexpr Space space = S;
  static constexpr bool makes_up = true;
  static constexpr const char* kind = "multi_lora";

  explicit MultiLora(const Config& c)
      : config_(detail::checked_mixture("MultiLora", c)),
        parameters_({detail::size_of(ranks(), c.d_in), detail::size_of(c.d_out, ranks()),
                     detail::size_of(c.experts, c.d_out)}) {}

  const Config& config() const { return config_; }
  VectorView<T, S> parameters() { return parameters_.flat(); }
  VectorView<const T, S> parameters() const { return parameters_.flat(); }
  Index ranks() const { return detail::size_of(config_.experts, config_.rank); }
  auto A() { return parameters_.matrix(0, ranks(), config_.d_in); }
  auto A() const { return parameters_.matrix(0, ranks(), config_.d_in); }
  auto B() { return parameters_.rank_major(1, config_.d_out, ranks()); }
  auto B() const { return parameters_.rank_major(1, config_.d_out, ranks()); }
  auto gamma() { return parameters_.matrix(2, config_.experts, config_.d_out); }
  auto gamma() const { return parameters_.matrix(2, config_.experts, config_.d_out); }
  double scale() const { return config_.rank == 0 ? 0 : config_.alpha / static_cast<double>(config_.rank); }
  double dropout() const { return config_.dropout; }

  /// B′_i = diag(γ_i) B_i.
  template <class Backend, class Acc>
  void up(const Backend& be, MatrixView<Acc, S, Major::column> out) const {
    reparam<S>(be, ScaleOutputs<T, T, Acc, Acc, S>{B(), gamma(), out});
  }
  /// dB_i (+)= diag(γ_i) dB′_i, dγ (+)= Σ dB′ ∘ B over the ranks of i; `this` is the gradient.
  template <class Backend, class A_, class Acc>
  void add_up(const Backend& be, const A_& adapter, MatrixView<Acc, S, Major::column> d, Into into) {
    using W = typename A_::element;
    reparam<S>(be, ScaleOutputs<Acc, W, Acc, T, S>{d, adapter.gamma(), B(), into});
    reparam<S>(be, OutputProducts<Acc, W, Acc, T, S>{d, adapter.B(), gamma(), into});
  }
  Cost cost(Index tokens) const {
    Cost cost = product_cost<precision>(tokens, config_.d_in, config_.d_out, ranks(), ranks(), 0);
    cost.parameters += config_.experts * config_.d_out;
    return cost;
  }
  template <class Self, class F>
  static void visit(Self& self, F&& f) {
    f("lora_A.weight", self.A(), group::A);
    f("lora_B.weight", self.B(), group::B);
    f("gamma", self.gamma(), group::scale);
  }
  /// Files hold the A and B of every expert apart.
  Index tensors(ParameterGroup role) const { return role.is(group::A) || role.is(group::B) ? config_.experts : 0; }
  template <class Fill>
  void start(Fill& fill) {
    fill.uniform("lora_A.weight", A(), 1 / std::sqrt(static_cast<double>(config_.d_in)));
    if (config_.rank != 0) fill.uniform("lora_B.weight", B(), 1 / std::sqrt(static_cast<double>(config_.rank)));
    fill.zero(gamma());
  }

 private:
  Config config_;
  Parameters<T, S, 3> parameters_;
};

}  // namespace LORAMIX_ABI
}  // namespace loramix
