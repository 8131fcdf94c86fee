/// MoA: one LoRA per domain, trained alone, and a router that picks one of them for a whole sequence.
///
/// Computes:    ΔY of a token of sequence b = s (X̂ A_cᵀ) B_cᵀ, c its label, else its argmax (router/domain.hpp);
///              s = α/r of one expert. The routing loss: cross-entropy of the sequences' logits with the labels.
/// Source:      Mixture-of-LoRAs, Feng et al. 2024 (arXiv 2403.03432); ours: mean pooling, ties, starting values.
/// Parameters:  lora_A.weight [E·r, d_in], lora_B.weight [d_out, E·r], moe_gate.weight [E, d_in],
///              moe_gate.bias [1, E]. `places` ≥ E are allocated: domains added within them change no shape,
///              so no bit (adapter/domains.hpp). One router serves all matrices of a block: the others have
///              router = false and get its decisions as labels.
/// Errors:      sizes below 0, no expert, dropout outside [0, 1); what router/domain.hpp refuses; LoRAs that
///              differ in shape, rank or scale.
/// Cost:        LoRA of rank r plus the router's rows; of rank places·r on the composed path.
/// Determinism: adapter/forward.hpp; a sequence depends on its own rows only.
/// Merge:       per domain: merge_domain (adapter/domains.hpp).
/// Example:     tests/adapter/moa.cpp
#pragma once
#include <loramix/adapter/mixture.hpp>
#include <loramix/router/domain.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// `rank` is of one expert; `places` 0 means as many as experts.
struct MoaConfig {
  Index d_in = 0;
  Index d_out = 0;
  Index experts = 4;
  Index rank = 8;
  double alpha = 16;
  double dropout = 0;
  Index places = 0;
  Pooling pooling = Pooling::mean;
  bool router = true;             // false: another matrix of the block decides
  bool straight_through = false;  // ablation: without labels, with the multiplier's gradient

  static MoaConfig of(const Shape& shape) {
    const MixtureConfig c = MixtureConfig::of(shape);
    return {c.d_in, c.d_out, c.experts, c.rank, c.alpha};
  }
  template <class Self, class F>
  static void fields(Self& self, F&& f) {
    MixtureConfig::fields(self, f);
    f("places", self.places);
    f("pooling", self.pooling);
    f("router", self.router);
    f("straight_through", self.straight_through);
  }
  Index room() const { return places > experts ? places : experts; }
  Index router_rows() const { return router ? room() : 0; }
};

/// What makes a mixture MoA.
struct MoaMethod {
  using Config = MoaConfig;
  static constexpr const char* kind = "moa";
  static constexpr bool shared_A = false;
  static constexpr Index chosen(const Config&) { return 1; }

  static std::array<RouterParameter, 2> router(const Config& c) {
    const Index rows = c.router ? c.experts : 0, room = c.router_rows();
    return {{{"moe_gate.weight", rows, c.d_in, group::router, detail::size_of(room, c.d_in)},
             {"moe_gate.bias", 1, rows, group::bias, room}}};
  }
  template <class W, class Score, Space S, class Views>
  static DomainGate<W, Score, S> gate(const Config& c, const Views& views) {
    const Index rows = c.router_rows();
    return DomainGate<W, Score, S>{
        {views[0].data, rows, c.d_in}, {views[1].data, 1, rows}, c.experts, c.room(), c.pooling, c.straight_through};
  }
  template <class Fill, class Views>
  static void start_router(Fill& fill, const Config& config, const Views& views) {
    fill.uniform("moe_gate.weight", views[0], 1 / std::sqrt(static_cast<double>(config.d_in)));
    fill.zero(views[1]);
  }
};

/// lm::Moa<float>::from(loras, {.seed = 7}): stage 2, experts that were trained alone.
template <class P = float, Space S = Space::host, class T = typename precision_t<P>::weight>
using Moa = Mixture<MoaMethod, P, S, T>;

}  // namespace LORAMIX_ABI
}  // namespace loramix
