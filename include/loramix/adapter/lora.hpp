/// LoRA and rsLoRA.
///
/// Computes:    ΔY = s X̂ Aᵀ Bᵀ,  s = α/r, or α/√r rank-stabilised (Hu et al. 2021, eq. 3; Kalajdzievski 2023).
///              Starts with A ~ U(−1/√d_in, 1/√d_in), B = 0.
/// Parameters:  lora_A.weight [r, d_in], lora_B.weight [d_out, r] (stored rank-major).
/// Errors:      sizes below 0, dropout outside [0, 1). r = 0 is legal and adds nothing.
/// Cost:        2·T·r·(d_in + d_out) flop forward, twice that backward. LoRA+ is a group's learning-rate ratio
///              (train/adamw.hpp).
/// Determinism: adapter/forward.hpp
/// Merge:       exact: W + s B A (adapter/merge.hpp).
/// Example:     examples/train
#pragma once
#include <cmath>

#include <loramix/core/adapter.hpp>
#include <loramix/core/draws.hpp>
#include <loramix/gate/gates.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// Sizes and scale; designated initialisers name them.
struct LoraConfig {
  Index d_in = 0;
  Index d_out = 0;
  Index rank = 8;
  double alpha = 16;
  double dropout = 0;
  bool rank_stabilised = false;

  static LoraConfig of(const Shape& shape) {
    return {.d_in = shape.d_in, .d_out = shape.d_out, .rank = shape.total_rank, .alpha = 2.0 * shape.total_rank};
  }
  template <class Self, class F>
  static void fields(Self& self, F&& f) {
    f("d_in", self.d_in);
    f("d_out", self.d_out);
    f("rank", self.rank);
    f("alpha", self.alpha);
    f("dropout", self.dropout);
    f("rank_stabilised", self.rank_stabilised);
  }
  double scale() const {
    if (rank == 0) return 0;
    return alpha / (rank_stabilised ? std::sqrt(static_cast<double>(rank)) : static_cast<double>(rank));
  }
};

namespace detail {
inline const LoraConfig& checked(const char* op, const LoraConfig& config) {
  check::at_least(op, "d_in", config.d_in, 0);
  check::at_least(op, "d_out", config.d_out, 0);
  check::at_least(op, "rank", config.rank, 0);
  dropout_p16(op, config.dropout);
  if (!is_finite(config.alpha)) fail(check::detail::about(ErrorCode::value, op, "alpha") << " is not finite");
  return config;
}
/// The same for a mixture: `experts` of `rank` each.
template <class Config>
const Config& checked_mixture(const char* op, const Config& config) {
  checked(op, LoraConfig{config.d_in, config.d_out, config.rank, config.alpha, config.dropout});
  check::at_least(op, "experts", config.experts, 1);
  return config;
}
/// a · b for parameter sizes; −1 (refused by Parameters) where it overflows.
inline Index size_of(Index a, Index b) { return check::detail::product(a, b); }
}  // namespace detail

/// Owns A [r, d_in] and B [d_out, r].
template <class P = float, Space S = Space::host, class T = typename precision_t<P>::weight>
class Lora {
 public:
  using Config = LoraConfig;
  using precision = precision_t<P>;
  using element = T;
  template <class U, Space V = S>
  using rebind = Lora<P, V, U>;
  static constexpr Space space = S;
  static constexpr const char* kind = "lora";

  explicit Lora(const Config& config)
      : config_(detail::checked("Lora", config)),
        parameters_({detail::size_of(config.rank, config.d_in), detail::size_of(config.d_out, config.rank)}) {}

  const Config& config() const { return config_; }
  VectorView<T, S> parameters() { return parameters_.flat(); }
  VectorView<const T, S> parameters() const { return parameters_.flat(); }

  MatrixView<T, S> A() { return parameters_.matrix(0, config_.rank, config_.d_in); }
  MatrixView<const T, S> A() const { return parameters_.matrix(0, config_.rank, config_.d_in); }
  MatrixView<T, S, Major::column> B() { return parameters_.rank_major(1, config_.d_out, config_.rank); }
  MatrixView<const T, S, Major::column> B() const { return parameters_.rank_major(1, config_.d_out, config_.rank); }
  OpenGate<typename precision::score, S> gate() const { return {}; }
  double scale() const { return config_.scale(); }
  double dropout() const { return config_.dropout; }
  Cost cost(Index tokens) const {
    return product_cost<precision>(tokens, config_.d_in, config_.d_out, config_.rank, config_.rank, 0);
  }

  template <class Self, class F>
  static void visit(Self& self, F&& f) {
    f("lora_A.weight", self.A(), group::A);
    f("lora_B.weight", self.B(), group::B);
  }
  template <class Fill>
  void start(Fill& fill) {
    fill.uniform("lora_A.weight", A(), 1 / std::sqrt(static_cast<double>(config_.d_in)));
    fill.zero(B());
  }

 private:
  Config config_;
  Parameters<T, S, 2> parameters_;
};

}  // namespace LORAMIX_ABI
}  // namespace loramix
