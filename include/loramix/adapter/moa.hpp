/// MoA: one LoRA per domain, trained alone, and a router that picks one of them for a whole sequence.
///
/// Computes:    ΔY of a token of sequence b = s (X̂ A_cᵀ) B_cᵀ, c its label, else its argmax (router/domain.hpp);
///              s = α/r of one expert. The routing loss: cross-entropy of the sequences' logits with the labels.
/// Source:      Mixture-of-LoRAs, Feng et al. 2024 (arXiv 2403.03432); ours: mean pooling, ties, starting values.
/// Parameters:  lora_A.weight [E·r, d_in], lora_B.weight [d_out, E·r], moa_router.weight [E, d_in],
///              moa_router.bias [1, E]. `places` ≥ E are allocated: domains added within them change no shape,
///              so no bit (adapter/domains.hpp). One router serves all matrices of a block: the others have
///              router = false and get its decisions as labels.
/// Errors:      sizes below 0, no expert, dropout outside [0, 1); what router/domain.hpp refuses; LoRAs that
///              differ in shape, rank or scale.
/// Cost:        LoRA of rank places·r plus the router's rows on the composed path.
/// Determinism: adapter/forward.hpp; a sequence depends on its own rows only.
/// Merge:       per domain: merge_domain (adapter/domains.hpp).
/// Example:     tests/adapter/moa.cpp
#pragma once
#include <span>

#include <loramix/adapter/experts.hpp>
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
};

/// Owns the experts and the router.
template <class P = float, Space S = Space::host, class T = typename precision_t<P>::weight>
class Moa {
 public:
  using Config = MoaConfig;
  using precision = precision_t<P>;
  using element = T;
  template <class U, Space V = S>
  using rebind = Moa<P, V, U>;
  static constexpr Space space = S;
  static constexpr const char* kind = "moa";

  explicit Moa(const Config& config)
      : config_(detail::checked_mixture("Moa", config)),
        parameters_({detail::size_of(ranks(), config.d_in), detail::size_of(config.d_out, ranks()),
                     detail::size_of(rows(), config.d_in), rows()}) {}
  /// Stage 2: experts are copies of LoRAs, whose sizes, scale and dropout `config` takes over; the router starts anew.
  static Moa from(std::span<const Lora<P, S, T>> loras, const InitialiseOptions& start, Config config = {}) {
    return detail::mixture_from<Moa>("Moa::from", loras, start, config);
  }

  const Config& config() const { return config_; }
  VectorView<T, S> parameters() { return parameters_.flat(); }
  VectorView<const T, S> parameters() const { return parameters_.flat(); }
  Index ranks() const { return detail::size_of(config_.room(), config_.rank); }
  double scale() const { return config_.rank == 0 ? 0 : config_.alpha / static_cast<double>(config_.rank); }
  double dropout() const { return config_.dropout; }

  auto A() { return parameters_.matrix(0, ranks(), config_.d_in); }
  auto A() const { return parameters_.matrix(0, ranks(), config_.d_in); }
  auto B() { return parameters_.rank_major(1, config_.d_out, ranks()); }
  auto B() const { return parameters_.rank_major(1, config_.d_out, ranks()); }
  auto gate() { return gate_of<T>(*this); }
  auto gate() const { return gate_of<const T>(*this); }

  Cost cost(Index tokens) const {
    return product_cost<precision>(tokens, config_.d_in, config_.d_out, ranks(), ranks(), rows());
  }
  template <class Self, class F>
  static void visit(Self& self, F&& f) {
    const Index R = self.used_ranks(), routed = self.used_rows();
    f("lora_A.weight", self.A().row_range(0, R), group::A);
    f("lora_B.weight", self.B().col_range(0, R), group::B);
    f("moa_router.weight", self.gate().router.row_range(0, routed), group::router);
    f("moa_router.bias", self.gate().bias.col_range(0, routed), group::bias);
  }
  template <class Fill>
  void start(Fill& fill) {
    const double bound = 1 / std::sqrt(static_cast<double>(config_.d_in));
    fill.uniform("lora_A.weight", A().row_range(0, used_ranks()), bound);
    fill.zero(B());
    fill.uniform("moa_router.weight", gate().router.row_range(0, used_rows()), bound);
    fill.zero(gate().bias);
  }

 private:
  Index used_ranks() const { return config_.experts * config_.rank; }
  Index used_rows() const { return config_.router ? config_.experts : 0; }
  Index rows() const { return config_.router ? config_.room() : 0; }
  template <class W, class Self>
  static DomainGate<W, typename precision::score, S> gate_of(Self& self) {
    const Config& c = self.config_;
    const Index rows = self.rows();
    return {self.parameters_.matrix(2, rows, c.d_in),
            self.parameters_.matrix(3, 1, rows),
            c.experts,
            c.room(),
            c.pooling,
            c.straight_through};
  }

  Config config_;
  Parameters<T, S, 4> parameters_;
};

}  // namespace LORAMIX_ABI
}  // namespace loramix
