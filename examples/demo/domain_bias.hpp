// A control, not a published method: LoRA and a bias per domain. An adapter of our own is this and its site (sites.hpp).
#pragma once
#include <loramix/adapter/lora.hpp>

#include "digits.hpp"

namespace demo {

/// Sizes as LoRA's; there are `domains` biases.
struct BiasedLoraConfig : lm::LoraConfig {
  static BiasedLoraConfig of(const lm::Shape& shape) {  // the biases are part of the budget
    const Index both = shape.d_in + shape.d_out, left = shape.total_rank * both - domains * shape.d_out;
    const Index rank = left > 0 ? left / both : 0;
    return {lm::LoraConfig::of({shape.d_in, shape.d_out, rank})};
  }
};

/// Owns A [r, d_in], B [d_out, r] and the biases [domains, d_out], 0 at start.
template <class P = float, lm::Space S = lm::Space::host, class T = typename lm::precision_t<P>::weight>
class BiasedLora {
 public:
  using Config = BiasedLoraConfig;
  using precision = lm::precision_t<P>;
  using element = T;
  template <class U, lm::Space V = S>
  using rebind = BiasedLora<P, V, U>;
  static constexpr lm::Space space = S;
  static constexpr const char* kind = "biased_lora";

  explicit BiasedLora(const Config& c)
      : config_(c), parameters_({c.rank * c.d_in, c.d_out * c.rank, domains * c.d_out}) {}

  const Config& config() const { return config_; }
  lm::VectorView<T, S> parameters() { return parameters_.flat(); }
  lm::VectorView<const T, S> parameters() const { return parameters_.flat(); }
  auto A() { return parameters_.matrix(0, config_.rank, config_.d_in); }
  auto A() const { return parameters_.matrix(0, config_.rank, config_.d_in); }
  auto B() { return parameters_.rank_major(1, config_.d_out, config_.rank); }
  auto B() const { return parameters_.rank_major(1, config_.d_out, config_.rank); }
  auto bias() { return parameters_.matrix(2, domains, config_.d_out); }
  auto bias() const { return parameters_.matrix(2, domains, config_.d_out); }
  lm::OpenGate<typename precision::score, S> gate() const { return {}; }
  double scale() const { return config_.scale(); }
  double dropout() const { return config_.dropout; }
  lm::Cost cost(Index tokens) const {
    auto cost = lm::product_cost<precision>(tokens, config_.d_in, config_.d_out, config_.rank, config_.rank, 0);
    cost.parameters += domains * config_.d_out;
    return cost;
  }
  template <class Self, class F>
  static void visit(Self& self, F&& f) {
    f("lora_A.weight", self.A(), lm::group::A);
    f("lora_B.weight", self.B(), lm::group::B);
    f("domain_bias", self.bias(), lm::group::bias);
  }
  template <class Fill>
  void start(Fill& fill) {
    fill.uniform("lora_A.weight", A(), 1 / std::sqrt(static_cast<double>(config_.d_in)));
    fill.zero(B());
    fill.zero(bias());
  }

 private:
  Config config_;
  lm::Parameters<T, S, 3> parameters_;
};

}  // namespace demo
