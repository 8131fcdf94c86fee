// An adapter of one's own: a dense mixture of LoRA experts, weighed by a softmax of the token (LoRAMoE without its
// balance loss). A config, a buffer with named views and a gate: nothing is registered anywhere. forward, backward,
// optimisers, gradient check, packs, files and counts find the rest by the Adapter and ProductAdapter concepts.
#pragma once
#include <cmath>

#include <loramix/adapter/forward.hpp>
#include <loramix/gate/softmax.hpp>

// [config]
struct MixtureConfig {
  loramix::Index d_in = 0;
  loramix::Index d_out = 0;
  loramix::Index experts = 4;
  loramix::Index rank = 8;  // of one expert
  double alpha = 16;
  double dropout = 0;
  double temperature = 1;

  // At a given budget: what the benchmark and the demo ask for.
  static MixtureConfig of(const loramix::Shape& shape) {
    const loramix::Index rank = shape.total_rank / shape.experts;
    return {.d_in = shape.d_in, .d_out = shape.d_out, .experts = shape.experts, .rank = rank, .alpha = 2.0 * rank};
  }
  // What a file remembers.
  template <class Self, class F>
  static void fields(Self& self, F&& f) {
    f("d_in", self.d_in);
    f("d_out", self.d_out);
    f("experts", self.experts);
    f("rank", self.rank);
    f("alpha", self.alpha);
    f("dropout", self.dropout);
    f("temperature", self.temperature);
  }
};
// [/config]

// [adapter]
// P: the five types; S: where its memory lies; T: what the buffer holds (weights, gradients or packed values).
template <class P = float, loramix::Space S = loramix::Space::host, class T = typename loramix::precision_t<P>::weight>
class Mixture {
 public:
  using Config = MixtureConfig;
  using precision = loramix::precision_t<P>;
  using element = T;
  template <class U, loramix::Space V = S>
  using rebind = Mixture<P, V, U>;
  static constexpr loramix::Space space = S;
  static constexpr const char* kind = "mixture";

  explicit Mixture(const Config& config)
      : config_(config), parameters_({ranks() * config.d_in, config.d_out * ranks(), config.experts * config.d_in}) {}

  const Config& config() const { return config_; }
  auto parameters() { return parameters_.flat(); }
  auto parameters() const { return parameters_.flat(); }

  // The product: A [E·r, d_in], B [d_out, E·r] rank-major, and the router's rows, which shrink reads with the token.
  auto A() { return parameters_.matrix(0, ranks(), config_.d_in); }
  auto A() const { return parameters_.matrix(0, ranks(), config_.d_in); }
  auto B() { return parameters_.template matrix<loramix::Major::column>(1, config_.d_out, ranks()); }
  auto B() const { return parameters_.template matrix<loramix::Major::column>(1, config_.d_out, ranks()); }
  auto side() { return parameters_.matrix(2, config_.experts, config_.d_in); }
  auto side() const { return parameters_.matrix(2, config_.experts, config_.d_in); }

  using Score = typename precision::score;
  loramix::SoftmaxGate<T, Score, S> gate() const { return {side(), static_cast<Score>(config_.temperature)}; }
  double scale() const { return config_.rank == 0 ? 0 : config_.alpha / static_cast<double>(config_.rank); }
  double dropout() const { return config_.dropout; }

  loramix::Cost cost(loramix::Index tokens) const {
    return loramix::product_cost<precision>(tokens, config_.d_in, config_.d_out, ranks(), ranks(), config_.experts);
  }
  // Every parameter once, in file order, with the group by which an optimiser addresses it.
  template <class Self, class F>
  static void visit(Self& self, F&& f) {
    f("lora_A.weight", self.A(), loramix::group::A);
    f("lora_B.weight", self.B(), loramix::group::B);
    f("router.weight", self.side(), loramix::group::router);
  }
  template <class Fill>
  void start(Fill& fill) {
    const double bound = 1 / std::sqrt(static_cast<double>(config_.d_in));
    fill.uniform("lora_A.weight", A(), bound);
    fill.zero(B());
    fill.uniform("router.weight", side(), bound);
  }

 private:
  loramix::Index ranks() const { return config_.experts * config_.rank; }

  Config config_;
  loramix::Parameters<T, S, 3> parameters_;
};
// [/adapter]
