/// MoLA, and the router of MixLoRA's attention-free form: each token picks its k best experts.
///
/// Computes:    ΔY = s Σ_{e in top-k} g_e (X̂ A_eᵀ) B_eᵀ (router/top_k.hpp); s = α/r of one expert. The
///              number of experts may differ from layer to layer: it is a run-time value.
/// Source:      MoLA, Gao et al. 2024 (arXiv 2402.08562): top-2 of the token, renormalised.
/// Parameters:  adapter/mixture.hpp; the router starts U(−1/√d_in, 1/√d_in), its noise rows (if any) at 0.
/// Errors:      adapter/mixture.hpp; k outside [1, experts].
/// Cost:        LoRA of rank k·r plus the router's rows; the composed path, and the fused one where that pays, compute
///              all experts in rank space and select there.
/// Determinism: adapter/forward.hpp; with capacity a token depends on its batch.
/// Merge:       none: the gate depends on the token.
/// Example:     examples/demo
#pragma once
#include <loramix/adapter/mixture.hpp>
#include <loramix/router/top_k.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// Sizes, scale and how the router chooses; `rank` is of one expert.
struct MolaConfig {
  Index d_in = 0;
  Index d_out = 0;
  Index experts = 8;
  Index rank = 8;
  double alpha = 16;
  double dropout = 0;
  TopKRule rule{};

  static MolaConfig of(const Shape& shape) {
    const MixtureConfig c = MixtureConfig::of(shape);
    MolaConfig config{c.d_in, c.d_out, c.experts, c.rank, c.alpha, c.dropout};
    if (config.experts < config.rule.k) config.rule.k = config.experts;
    return config;
  }
  template <class Self, class F>
  static void fields(Self& self, F&& f) {
    MixtureConfig::fields(self, f);
    TopKRule::fields(self.rule, f);
  }
  Index router_rows() const { return rule.noise ? 2 * experts : experts; }
};

/// What makes a mixture MoLA.
struct MolaMethod {
  using Config = MolaConfig;
  static constexpr const char* kind = "mola";
  static constexpr bool shared_A = false;
  static Index chosen(const Config& c) { return c.rule.k; }

  static std::array<RouterParameter, 1> router(const Config& c) {
    return {{{"moe_gate.weight", c.router_rows(), c.d_in}}};
  }
  template <class W, class Score, Space S, class Views>
  static TopKGate<std::remove_const_t<W>, Score, S> gate(const Config& config, const Views& views) {
    return TopKGate<std::remove_const_t<W>, Score, S>{views[0], config.rule};
  }
  template <class Fill, class Views>
  static void start_router(Fill& fill, const Config& config, const Views& views) {
    const auto rows = views[0];
    fill.uniform("moe_gate.weight", rows.row_range(0, config.experts), 1 / std::sqrt(static_cast<double>(config.d_in)));
    fill.zero(rows.row_range(config.experts, rows.rows - config.experts));
  }
};

/// lm::Mola<float> mola({.d_in = …, .d_out = …, .experts = 8, .rank = 8, .rule = {.k = 2}});
template <class P = float, Space S = Space::host, class T = typename precision_t<P>::weight>
using Mola = Mixture<MolaMethod, P, S, T>;

}  // namespace LORAMIX_ABI
}  // namespace loramix
