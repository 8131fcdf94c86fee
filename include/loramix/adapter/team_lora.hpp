/// TeamLoRA: one general A, split among expert B's that compete.
///
/// Computes:    ΔY = s Σ_e ω_e (X̂ A_eᵀ) B_eᵀ with A [E·r_B, d_in] in E segments and ω = M softmax(S(x))
///              (router/competition.hpp); s = α/r_B.
/// Source:      TeamLoRA, arXiv 2408.09856 (abstract, figure, notes: no code was released). Ours: S = linear(d_in, 64)
///              + SiLU + linear(64, E); M starts with 1 on its diagonal and U(0, 1/E) elsewhere.
/// Parameters:  lora_A.weight [E·r_B, d_in], lora_B.weight [d_out, E·r_B], shapley.0.weight [hidden or E, d_in],
///              shapley.0.bias [1, hidden], shapley.2.weight [E, hidden], shapley.2.bias [1, E], interaction.weight
///              [E, E].
/// Errors:      sizes below 0, no expert, dropout outside [0, 1).
/// Cost:        LoRA of rank E·r_B plus the rows of S.
/// Determinism: adapter/forward.hpp
/// Merge:       none: the gate depends on the token.
/// Example:     examples/train
#pragma once
#include <loramix/adapter/mixture.hpp>
#include <loramix/router/competition.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// `rank` is of one expert; hidden = 0 makes S linear.
struct TeamLoraConfig {
  Index d_in = 0;
  Index d_out = 0;
  Index experts = 4;
  Index rank = 8;
  double alpha = 16;
  double dropout = 0;
  Index hidden = 64;
  Competition competition = Competition::learned;

  static TeamLoraConfig of(const Shape& shape) {
    const MixtureConfig c = MixtureConfig::of(shape);
    return {c.d_in, c.d_out, c.experts, c.rank, c.alpha};
  }
  template <class Self, class F>
  static void fields(Self& self, F&& f) {
    MixtureConfig::fields(self, f);
    f("hidden", self.hidden);
    f("competition", self.competition);
  }
};

/// Owns A, B, S and M.
template <class P = float, Space S = Space::host, class T = typename precision_t<P>::weight>
class TeamLora {
 public:
  using Config = TeamLoraConfig;
  using precision = precision_t<P>;
  using element = T;
  template <class U, Space V = S>
  using rebind = TeamLora<P, V, U>;
  static constexpr Space space = S;
  static constexpr const char* kind = "team_lora";

  explicit TeamLora(const Config& config)
      : config_(detail::checked_mixture("TeamLora", config)),
        parameters_({detail::size_of(ranks(), config.d_in), detail::size_of(config.d_out, ranks()),
                     detail::size_of(side_rows(), config.d_in), config.hidden,
                     detail::size_of(config.experts, config.hidden), config.experts,
                     detail::size_of(config.experts, config.experts)}) {}

  const Config& config() const { return config_; }
  VectorView<T, S> parameters() { return parameters_.flat(); }
  VectorView<const T, S> parameters() const { return parameters_.flat(); }
  Index ranks() const { return config_.experts * config_.rank; }
  double scale() const { return config_.rank == 0 ? 0 : config_.alpha / static_cast<double>(config_.rank); }
  double dropout() const { return config_.dropout; }

  auto A() { return parameters_.matrix(0, ranks(), config_.d_in); }
  auto A() const { return parameters_.matrix(0, ranks(), config_.d_in); }
  auto B() { return parameters_.rank_major(1, config_.d_out, ranks()); }
  auto B() const { return parameters_.rank_major(1, config_.d_out, ranks()); }
  auto gate() { return gate_of<T>(*this); }
  auto gate() const { return gate_of<const T>(*this); }

  Cost cost(Index tokens) const {
    return product_cost<precision>(tokens, config_.d_in, config_.d_out, ranks(), ranks(), side_rows());
  }
  template <class Self, class F>
  static void visit(Self& self, F&& f) {
    const auto gate = self.gate();
    f("lora_A.weight", self.A(), group::A);
    f("lora_B.weight", self.B(), group::B);
    f("shapley.0.weight", gate.S1, group::router);
    f("shapley.0.bias", gate.b1, group::bias);
    f("shapley.2.weight", gate.S2, group::router);
    f("shapley.2.bias", gate.b2, group::bias);
    f("interaction.weight", gate.M, group::interaction);
  }
  template <class Fill>
  void start(Fill& fill) {
    const auto gate = this->gate();
    const double bound = 1 / std::sqrt(static_cast<double>(config_.d_in));
    fill.uniform("lora_A.weight", A(), bound);
    fill.zero(B());
    fill.uniform("shapley.0.weight", gate.S1, bound);
    if (config_.hidden != 0)
      fill.uniform("shapley.2.weight", gate.S2, 1 / std::sqrt(static_cast<double>(config_.hidden)));
    fill.zero(gate.b1);
    fill.zero(gate.b2);
    fill.uniform("interaction.weight", gate.M, 0, 1 / static_cast<double>(config_.experts));
    for (Index e = 0; e < config_.experts; ++e) gate.M(e, e) = narrow<T>(1.0);
  }

 private:
  Index side_rows() const { return config_.hidden != 0 ? config_.hidden : config_.experts; }
  template <class W, class Self>
  static CompetitionGate<W, typename precision::score, S> gate_of(Self& self) {
    const Config& c = self.config_;
    auto& p = self.parameters_;
    return {p.matrix(2, self.side_rows(), c.d_in),
            p.matrix(3, 1, c.hidden),
            c.hidden != 0 ? p.matrix(4, c.experts, c.hidden) : MatrixView<W, S>{},
            p.matrix(5, 1, c.experts),
            p.matrix(6, c.experts, c.experts),
            c.competition};
  }

  Config config_;
  Parameters<T, S, 7> parameters_;
};

}  // namespace LORAMIX_ABI
}  // namespace loramix
