/// MixLoRA: a gated feed-forward block as a sparse mixture; the experts share the frozen W1, W3 and W2.
///
/// Computes:    h_e = silu(W1 x + s B1_e A1_e x̂) ∘ (W3 x + s B3_e A3_e x̂),
///              y = W2 (Σ_e g_e h_e) + s Σ_e g_e B2_e A2_e ĥ_e, g the renormalised top-k of the token; s = α/r of
///              one expert. The engine computes W1 x, W3 x and one W2 product (adapter/mix_lora_forward.hpp).
/// Source:      MixLoRA, Li et al. 2024 (arXiv 2404.15159); MATH.md section 4. Loss: the `mixtral` form, coefficient
///              0.001. Attention gets plain LoRA. Top-1 with capacity (`mixlora-switch`) and top-p (`mixlora-dynamic`)
///              are rules of router/top_k.hpp.
/// Parameters:  gate_proj, up_proj: lora_A.weight [E·r, d_in], lora_B.weight [d_hidden, E·r]; down_proj.lora_A.weight
///              [E·r, d_hidden], down_proj.lora_B.weight [d_out, E·r]; moe_gate.weight [E, d_in], N(0, 0.02²). The
///              public format has one tensor per expert: rows e·r… of A, columns e·r… of B.
/// Errors:      sizes below 0, no expert, dropout outside [0, 1); k outside [1, experts].
/// Cost:        three LoRAs of rank k·r (of E·r where x is read) plus the router's rows.
/// Determinism: adapter/mix_lora_forward.hpp
/// Merge:       none: the gate depends on the token.
/// Example:     tests/adapter/mix_lora.cpp
#pragma once
#include <loramix/adapter/mixture.hpp>
#include <loramix/ops/mixlora.hpp>
#include <loramix/router/top_k.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// Sizes, scale and how the router chooses; `rank` is of one expert.
struct MixLoraConfig {
  Index d_in = 0;
  Index d_hidden = 0;
  Index d_out = 0;
  Index experts = 8;
  Index rank = 8;
  double alpha = 16;
  double dropout = 0;
  TopKRule rule{};

  /// A block whose input and output are d_in wide; total_rank is that of each of its three projections.
  static MixLoraConfig of(const Shape& shape) {
    const Index rank = shape.total_rank / shape.experts;
    MixLoraConfig config{shape.d_in, shape.d_out, shape.d_in, shape.experts, rank, 2.0 * static_cast<double>(rank)};
    if (config.experts < config.rule.k) config.rule.k = config.experts;
    return config;
  }
  template <class Self, class F>
  static void fields(Self& self, F&& f) {
    MixtureConfig::fields(self, f);
    f("d_hidden", self.d_hidden);
    TopKRule::fields(self.rule, f);
  }
  Index router_rows() const { return rule.noise ? 2 * experts : experts; }
};

/// Owns three A's, three B's and the router. Not a ProductAdapter: a block is three stages.
template <class P = float, Space S = Space::host, class T = typename precision_t<P>::weight>
class MixLora {
 public:
  using Config = MixLoraConfig;
  using precision = precision_t<P>;
  using element = T;
  template <class U, Space V = S>
  using rebind = MixLora<P, V, U>;
  static constexpr Space space = S;
  static constexpr const char* kind = "mixlora";

  explicit MixLora(const Config& config)
      : config_((check::at_least(kind, "d_hidden", config.d_hidden, 0), detail::checked_mixture(kind, config))),
        parameters_({detail::size_of(2, detail::size_of(ranks(), config.d_in)),
                     detail::size_of(config.d_hidden, ranks()), detail::size_of(config.d_hidden, ranks()),
                     detail::size_of(ranks(), config.d_hidden), detail::size_of(config.d_out, ranks()),
                     detail::size_of(config.router_rows(), config.d_in)}) {}

  const Config& config() const { return config_; }
  VectorView<T, S> parameters() { return parameters_.flat(); }
  VectorView<const T, S> parameters() const { return parameters_.flat(); }
  Index ranks() const { return detail::size_of(config_.experts, config_.rank); }
  double scale() const { return config_.rank == 0 ? 0 : config_.alpha / static_cast<double>(config_.rank); }
  double dropout() const { return config_.dropout; }

  /// [2·E·r, d_in]: gate_proj's rows, then up_proj's.
  auto A13() { return parameters_.matrix(0, 2 * ranks(), config_.d_in); }
  auto A13() const { return parameters_.matrix(0, 2 * ranks(), config_.d_in); }
  auto B1() { return parameters_.rank_major(1, config_.d_hidden, ranks()); }
  auto B1() const { return parameters_.rank_major(1, config_.d_hidden, ranks()); }
  auto B3() { return parameters_.rank_major(2, config_.d_hidden, ranks()); }
  auto B3() const { return parameters_.rank_major(2, config_.d_hidden, ranks()); }
  auto A2() { return parameters_.matrix(3, ranks(), config_.d_hidden); }
  auto A2() const { return parameters_.matrix(3, ranks(), config_.d_hidden); }
  auto B2() { return parameters_.rank_major(4, config_.d_out, ranks()); }
  auto B2() const { return parameters_.rank_major(4, config_.d_out, ranks()); }
  auto side() { return parameters_.matrix(5, config_.router_rows(), config_.d_in); }
  auto side() const { return parameters_.matrix(5, config_.router_rows(), config_.d_in); }
  auto gate() const { return TopKGate<T, typename precision::score, S>{side(), config_.rule}; }

  /// Of the adapter's part: the two base products before and the one after are the engine's.
  Cost cost(Index tokens) const {
    const Index R = ranks(), chosen = config_.rule.k * config_.rank;
    const Cost in = product_cost<precision>(tokens, config_.d_in, 0, 2 * R, 2 * R, config_.router_rows());
    const Cost mix = mix_experts_cost<precision>(tokens, config_.d_hidden, R, chosen);
    return detail::sum_of({in, mix, product_cost<precision>(tokens, 0, config_.d_out, R, R, 0, chosen)});
  }
  template <class Self, class F>
  static void visit(Self& self, F&& f) {
    const Index R = self.ranks();
    f("gate_proj.lora_A.weight", self.A13().row_range(0, R), group::A);
    f("up_proj.lora_A.weight", self.A13().row_range(R, R), group::A);
    f("gate_proj.lora_B.weight", self.B1(), group::B);
    f("up_proj.lora_B.weight", self.B3(), group::B);
    f("down_proj.lora_A.weight", self.A2(), group::A);
    f("down_proj.lora_B.weight", self.B2(), group::B);
    f("moe_gate.weight", self.side(), group::router);
  }
  /// Files hold the A and B of every expert apart.
  Index tensors(ParameterGroup role) const { return role.is(group::A) || role.is(group::B) ? config_.experts : 0; }
  template <class Fill>
  void start(Fill& fill) {
    visit(*this, [&](const char* name, auto view, ParameterGroup role) {
      if (role.is(group::A)) fill.uniform(name, view, 1 / std::sqrt(static_cast<double>(view.cols)));
      if (role.is(group::B)) fill.zero(view);
    });
    fill.normal("moe_gate.weight", side().row_range(0, config_.experts), 0.02 * 0.02);
    fill.zero(side().row_range(config_.experts, side().rows - config_.experts));
  }

 private:
  Config config_;
  Parameters<T, S, 6> parameters_;
};

}  // namespace LORAMIX_ABI
}  // namespace loramix
