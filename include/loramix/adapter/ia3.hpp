/// IA3: one learned factor per column of an output, or of a feed-forward block's inner activation.
///
/// Computes:    ΔY = (l − 1) ∘ X Wᵀ, without the bias; feed_forward: ((l − 1) ∘ X) Wᵀ, l before the product.
///              Forward sees whichever tensor l scales (adapter/ia3_forward.hpp).
/// Source:      Liu et al. 2022 (arXiv 2205.05638), section 3.3; MATH.md section 4.
/// Parameters:  ia3_l [1, n], n = d_out, or d_in with feed_forward; 1 at start; no weight decay.
/// Errors:      sizes below 0.
/// Cost:        2·T·n flop.
/// Determinism: every element is scaled alone.
/// Merge:       exact: diag(l) W, or W diag(l). The bias stays as it is.
/// Example:     tests/adapter/ia3.cpp
#pragma once
#include <loramix/adapter/lora.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// Sizes of the layer, and which side l is on.
struct Ia3Config {
  Index d_in = 0;
  Index d_out = 0;
  bool feed_forward = false;

  static Ia3Config of(const Shape& shape) { return {.d_in = shape.d_in, .d_out = shape.d_out}; }
  template <class Self, class F>
  static void fields(Self& self, F&& f) {
    f("d_in", self.d_in);
    f("d_out", self.d_out);
    f("feed_forward", self.feed_forward);
  }
  Index width() const { return feed_forward ? d_in : d_out; }
};

/// Owns l [1, n].
template <class P = float, Space S = Space::host, class T = typename precision_t<P>::weight>
class Ia3 {
 public:
  using Config = Ia3Config;
  using precision = precision_t<P>;
  using element = T;
  template <class U, Space V = S>
  using rebind = Ia3<P, V, U>;
  static constexpr Space space = S;
  static constexpr const char* kind = "ia3";
  static constexpr bool has_pack = false;

  explicit Ia3(const Config& c)
      : config_((detail::checked("Ia3", LoraConfig{.d_in = c.d_in, .d_out = c.d_out}), c)), parameters_({c.width()}) {}

  const Config& config() const { return config_; }
  VectorView<T, S> parameters() { return parameters_.flat(); }
  VectorView<const T, S> parameters() const { return parameters_.flat(); }
  auto l() { return parameters_.matrix(0, 1, config_.width()); }
  auto l() const { return parameters_.matrix(0, 1, config_.width()); }
  double dropout() const { return 0; }
  Cost cost(Index tokens) const {
    const double values = static_cast<double>(tokens) * static_cast<double>(config_.width());
    constexpr double x = sizeof(typename precision::activation);
    return {2 * values, 3 * values, 2 * x * values, 3 * x * values, config_.width()};
  }
  template <class Self, class F>
  static void visit(Self& self, F&& f) {
    f("ia3_l", self.l(), group::scale);
  }
  template <class Fill>
  void start(Fill& fill) {
    fill.constant(l(), 1);
  }

 private:
  Config config_;
  Parameters<T, S, 1> parameters_;
};

}  // namespace LORAMIX_ABI
}  // namespace loramix
