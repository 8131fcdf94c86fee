/// The storage that token-routed mixtures of LoRA experts share: A, B and a router. A method is a few facts about it.
///
/// Computes:    ΔY = s Σ_e g_e(x) (X̂ A_eᵀ) B_eᵀ, or with one A of r rows for all experts; s = α/r of one expert (MATH.md
///              sections 1 and 4). A Method says
///                kind, shared_A, Config (with experts, rank, alpha, dropout, router_rows())
///                gate<W, Score, S>(config, router)     a computed gate
///                start_router(fill, config, router)
/// Parameters:  lora_A.weight [E·r or r, d_in], lora_B.weight [d_out, E·r], moe_gate.weight [router rows, d_in].
/// Errors:      sizes below 0, no expert, dropout outside [0, 1); what the gate's check() refuses.
/// Cost:        LoRA of rank E·r (one shrink of r rows where A is shared) plus the router's rows.
/// Determinism: adapter/forward.hpp
/// Example:     tests/adapter
#pragma once
#include <loramix/adapter/lora.hpp>
#include <loramix/gate/softmax.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// Sizes and scale of a mixture; `rank` is of one expert.
struct MixtureConfig {
  Index d_in = 0;
  Index d_out = 0;
  Index experts = 8;
  Index rank = 8;
  double alpha = 16;
  double dropout = 0;

  static MixtureConfig of(const Shape& shape) {
    const Index rank = shape.total_rank / shape.experts;
    return {.d_in = shape.d_in,
            .d_out = shape.d_out,
            .experts = shape.experts,
            .rank = rank,
            .alpha = 2.0 * static_cast<double>(rank)};
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
  Index router_rows() const { return experts; }
};

/// What dense mixtures with a softmax router and no bias have in common.
template <bool SharedA>
struct SoftmaxMethod {
  using Config = MixtureConfig;
  static constexpr bool shared_A = SharedA;
  template <class W, class Score, Space S>
  static SoftmaxGate<W, Score, S> gate(const Config&, MatrixView<const W, S> router) {
    return {router};
  }
  template <class Fill, class Router>
  static void start_router(Fill& fill, const Config& config, Router router) {
    fill.uniform("moe_gate.weight", router, 1 / std::sqrt(static_cast<double>(config.d_in)));
  }
};

/// Owns A, B and the router.
template <class Method, class P = float, Space S = Space::host, class T = typename precision_t<P>::weight>
class Mixture {
 public:
  using Config = typename Method::Config;
  using precision = precision_t<P>;
  using element = T;
  template <class U, Space V = S>
  using rebind = Mixture<Method, P, V, U>;
  static constexpr Space space = S;
  static constexpr const char* kind = Method::kind;

  explicit Mixture(const Config& config)
      : config_(detail::checked_mixture(kind, config)),
        parameters_({detail::size_of(rows_of_A(), config.d_in), detail::size_of(config.d_out, ranks()),
                     detail::size_of(config.router_rows(), config.d_in)}) {}

  const Config& config() const { return config_; }
  VectorView<T, S> parameters() { return parameters_.flat(); }
  VectorView<const T, S> parameters() const { return parameters_.flat(); }
  Index ranks() const { return detail::size_of(config_.experts, config_.rank); }
  double scale() const { return config_.rank == 0 ? 0 : config_.alpha / static_cast<double>(config_.rank); }
  double dropout() const { return config_.dropout; }

  auto A() { return parameters_.matrix(0, rows_of_A(), config_.d_in); }
  auto A() const { return parameters_.matrix(0, rows_of_A(), config_.d_in); }
  auto B() { return parameters_.rank_major(1, config_.d_out, ranks()); }
  auto B() const { return parameters_.rank_major(1, config_.d_out, ranks()); }
  auto side() { return parameters_.matrix(2, config_.router_rows(), config_.d_in); }
  auto side() const { return parameters_.matrix(2, config_.router_rows(), config_.d_in); }
  auto gate() const { return Method::template gate<T, typename precision::score, S>(config_, side()); }

  Cost cost(Index tokens) const {
    return product_cost<precision>(tokens, config_.d_in, config_.d_out, rows_of_A(), ranks(), config_.router_rows());
  }
  template <class Self, class F>
  static void visit(Self& self, F&& f) {
    f("lora_A.weight", self.A(), group::A);
    f("lora_B.weight", self.B(), group::B);
    f("moe_gate.weight", self.side(), group::router);
  }
  template <class Fill>
  void start(Fill& fill) {
    fill.uniform("lora_A.weight", A(), 1 / std::sqrt(static_cast<double>(config_.d_in)));
    fill.zero(B());
    Method::start_router(fill, config_, side());
  }

 private:
  Index rows_of_A() const { return Method::shared_A ? config_.rank : ranks(); }

  Config config_;
  Parameters<T, S, 3> parameters_;
};

}  // namespace LORAMIX_ABI
}  // namespace loramix
