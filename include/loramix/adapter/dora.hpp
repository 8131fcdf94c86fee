/// DoRA: LoRA whose merged rows have learned lengths.
///
/// Computes:    ΔY = (m/n − 1) ∘ (X Wᵀ) + (m/n) ∘ (s X̂ Aᵀ Bᵀ), n = ‖W + sBA‖ by row, constant in the gradient;
///              s = α/r. drop_base (PEFT): X̂ Wᵀ in place of X Wᵀ. n = 0 gives m/n = 0.
/// Source:      Liu et al. 2024 (arXiv 2402.09353), equations 5 and 11; MATH.md section 4.
/// Parameters:  lora_A.weight [r, d_in], lora_B.weight [d_out, r], lora_magnitude_vector.weight [1, d_out] (no weight
///              decay: ours). m starts at ‖W‖ by row: start_magnitude() after initialise(), which leaves NaN there.
/// Errors:      sizes below 0, dropout outside [0, 1). r = 0 is legal: only lengths are learned.
/// Cost:        LoRA, the norms (ops/row_norm.hpp) and, unless the engine hands X Wᵀ over, a product with W
///              (adapter/dora_forward.hpp).
/// Determinism: adapter/dora_forward.hpp
/// Merge:       exact: (m/n) ∘ (W + s B A).
/// Example:     tests/adapter/dora.cpp
#pragma once
#include <limits>

#include <loramix/adapter/lora.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// Sizes and scale.
struct DoraConfig {
  Index d_in = 0;
  Index d_out = 0;
  Index rank = 8;
  double alpha = 16;
  double dropout = 0;
  bool rank_stabilised = false;
  bool drop_base = false;

  static DoraConfig of(const Shape& shape) {  // m is part of the budget
    const Index left = shape.total_rank * (shape.d_in + shape.d_out) - shape.d_out, both = shape.d_in + shape.d_out;
    const Index rank = left <= 0 || both == 0 ? 0 : left / both;
    return {.d_in = shape.d_in, .d_out = shape.d_out, .rank = rank, .alpha = 2.0 * static_cast<double>(rank)};
  }
  template <class Self, class F>
  static void fields(Self& self, F&& f) {
    LoraConfig::fields(self, f);
    f("drop_base", self.drop_base);
  }
  LoraConfig lora() const { return {d_in, d_out, rank, alpha, dropout, rank_stabilised}; }
};

/// Owns A [r, d_in], B [d_out, r] and m [1, d_out].
template <class P = float, Space S = Space::host, class T = typename precision_t<P>::weight>
class Dora {
 public:
  using Config = DoraConfig;
  using precision = precision_t<P>;
  using element = T;
  template <class U, Space V = S>
  using rebind = Dora<P, V, U>;
  static constexpr Space space = S;
  static constexpr const char* kind = "dora";

  explicit Dora(const Config& config) : config_(config), parameters_(sizes(detail::checked("Dora", config.lora()))) {}

  const Config& config() const { return config_; }
  VectorView<T, S> parameters() { return parameters_.flat(); }
  VectorView<const T, S> parameters() const { return parameters_.flat(); }
  auto A() { return parameters_.matrix(0, config_.rank, config_.d_in); }
  auto A() const { return parameters_.matrix(0, config_.rank, config_.d_in); }
  auto B() { return parameters_.rank_major(1, config_.d_out, config_.rank); }
  auto B() const { return parameters_.rank_major(1, config_.d_out, config_.rank); }
  auto magnitude() { return parameters_.matrix(2, 1, config_.d_out); }
  auto magnitude() const { return parameters_.matrix(2, 1, config_.d_out); }
  double scale() const { return config_.lora().scale(); }
  double dropout() const { return config_.dropout; }
  Cost cost(Index tokens) const {  // without the product with W
    Cost cost = product_cost<precision>(tokens, config_.d_in, config_.d_out, config_.rank, config_.rank, 0);
    cost.parameters += config_.d_out;
    return cost;
  }

  template <class Self, class F>
  static void visit(Self& self, F&& f) {
    f("lora_A.weight", self.A(), group::A);
    f("lora_B.weight", self.B(), group::B);
    f("lora_magnitude_vector.weight", self.magnitude(), group::scale);
  }
  template <class Fill>
  void start(Fill& fill) {
    fill.uniform("lora_A.weight", A(), 1 / std::sqrt(static_cast<double>(config_.d_in)));
    fill.zero(B());
    fill.constant(magnitude(), std::numeric_limits<double>::quiet_NaN());
  }

 private:
  static Parameters<T, S, 3> sizes(const LoraConfig& c) {
    return Parameters<T, S, 3>({detail::size_of(c.rank, c.d_in), detail::size_of(c.d_out, c.rank), c.d_out});
  }
  Config config_;
  Parameters<T, S, 3> parameters_;
};

}  // namespace LORAMIX_ABI
}  // namespace loramix
