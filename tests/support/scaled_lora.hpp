// An adapter whose gate is a parameter: one value λ per rank (AdaLoRA's A∘λ without its budget). What it adds to LoRA
// is the gate over its own parameters and gate_gradient(), where backward puts their gradient.
#pragma once
#include <cmath>

#include <loramix/adapter/forward.hpp>
#include <loramix/adapter/lora.hpp>

namespace loramix_test {

template <class P = float, loramix::Space S = loramix::Space::host, class T = typename loramix::precision_t<P>::weight>
class ScaledLora {
 public:
  using Config = loramix::LoraConfig;
  using precision = loramix::precision_t<P>;
  using element = T;
  template <class U, loramix::Space V = S>
  using rebind = ScaledLora<P, V, U>;
  static constexpr loramix::Space space = S;
  static constexpr const char* kind = "scaled_lora";

  explicit ScaledLora(const Config& config)
      : config_(config), parameters_({config.rank * config.d_in, config.d_out * config.rank, config.rank}) {}

  const Config& config() const { return config_; }
  auto parameters() { return parameters_.flat(); }
  auto parameters() const { return parameters_.flat(); }
  auto A() { return parameters_.matrix(0, config_.rank, config_.d_in); }
  auto A() const { return parameters_.matrix(0, config_.rank, config_.d_in); }
  auto B() { return parameters_.template matrix<loramix::Major::column>(1, config_.d_out, config_.rank); }
  auto B() const { return parameters_.template matrix<loramix::Major::column>(1, config_.d_out, config_.rank); }
  auto lambda() { return parameters_.matrix(2, 1, config_.rank); }
  auto lambda() const { return parameters_.matrix(2, 1, config_.rank); }

  loramix::RankScale<T, S> gate() const { return {{lambda().data, config_.rank}}; }
  loramix::GateGradient<T, S> gate_gradient() { return {.rank_scale = {lambda().data, config_.rank}}; }
  double scale() const { return config_.scale(); }
  double dropout() const { return config_.dropout; }
  loramix::Cost cost(loramix::Index tokens) const {
    auto cost = loramix::product_cost<precision>(tokens, config_.d_in, config_.d_out, config_.rank, config_.rank, 0);
    cost.parameters += config_.rank;
    return cost;
  }

  template <class Self, class F>
  static void visit(Self& self, F&& f) {
    f("lora_A.weight", self.A(), loramix::group::A);
    f("lora_B.weight", self.B(), loramix::group::B);
    f("lambda", self.lambda(), loramix::group::scale);
  }
  template <class Fill>
  void start(Fill& fill) {
    fill.normal("lora_A.weight", A(), 0.02 * 0.02);
    fill.normal("lora_B.weight", B(), 0.02 * 0.02);
    fill.zero(lambda());
  }

 private:
  Config config_;
  loramix::Parameters<T, S, 3> parameters_;
};

}  // namespace loramix_test
