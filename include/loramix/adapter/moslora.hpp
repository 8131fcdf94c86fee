/// MoSLoRA: a mixer between the two low-rank factors.
///
/// Computes:    ΔY = s X̂ Aᵀ S Bᵀ = s X̂ Aᵀ B′ᵀ with B′ = B Sᵀ; s = α/r. Weights are mixed, not tokens: O(r²·d_out).
/// Source:      Wu et al. 2024 (arXiv 2406.11909); MATH.md section 1. A checkpoint's lora_AB.weight is Sᵀ.
/// Parameters:  lora_A.weight [r, d_in], lora_B.weight [d_out, r], mixer [r, r] = S: Kaiming U(−1/√r, 1/√r), or
///              orthogonal, or the identity (then it starts as LoRA).
/// Errors:      sizes below 0, dropout outside [0, 1). r = 0 is legal.
/// Cost:        LoRA and 2·r²·d_out flop per call, three times that r² part backward.
/// Determinism: adapter/reparam_forward.hpp
/// Merge:       exact: W + s B Sᵀ A.
/// Example:     tests/adapter/moslora.cpp
#pragma once
#include <loramix/adapter/lora.hpp>
#include <loramix/ops/reparam.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// How S begins.
enum class Mixer : std::uint8_t { kaiming, orthogonal, identity };
/// The largest number that a file may give for one.
constexpr Mixer last_of(Mixer) { return Mixer::identity; }

/// Sizes and scale.
struct MosLoraConfig {
  Index d_in = 0;
  Index d_out = 0;
  Index rank = 8;
  double alpha = 16;
  double dropout = 0;
  bool rank_stabilised = false;
  Mixer mixer = Mixer::kaiming;

  static MosLoraConfig of(const Shape& shape) {  // the largest rank whose S fits too
    Index rank = shape.total_rank;
    while (rank > 0 && rank * (shape.d_in + shape.d_out + rank) > shape.total_rank * (shape.d_in + shape.d_out)) --rank;
    return {.d_in = shape.d_in, .d_out = shape.d_out, .rank = rank, .alpha = 2.0 * static_cast<double>(rank)};
  }
  template <class Self, class F>
  static void fields(Self& self, F&& f) {
    LoraConfig::fields(self, f);
    f("mixer", self.mixer);
  }
  LoraConfig lora() const { return {d_in, d_out, rank, alpha, dropout, rank_stabilised}; }
};

/// Owns A [r, d_in], B [d_out, r] and S [r, r].
template <class P = float, Space S = Space::host, class T = typename precision_t<P>::weight>
class MosLora {
 public:
  using Config = MosLoraConfig;
  using precision = precision_t<P>;
  using element = T;
  template <class U, Space V = S>
  using rebind = MosLora<P, V, U>;
  static constexpr Space space = S;
  static constexpr bool makes_up = true;
  static constexpr const char* kind = "moslora";

  explicit MosLora(const Config& c)
      : config_((detail::checked("MosLora", c.lora()), c)),
        parameters_(
            {detail::size_of(c.rank, c.d_in), detail::size_of(c.d_out, c.rank), detail::size_of(c.rank, c.rank)}) {}

  const Config& config() const { return config_; }
  VectorView<T, S> parameters() { return parameters_.flat(); }
  VectorView<const T, S> parameters() const { return parameters_.flat(); }
  auto A() { return parameters_.matrix(0, config_.rank, config_.d_in); }
  auto A() const { return parameters_.matrix(0, config_.rank, config_.d_in); }
  auto B() { return parameters_.rank_major(1, config_.d_out, config_.rank); }
  auto B() const { return parameters_.rank_major(1, config_.d_out, config_.rank); }
  auto mixer() { return parameters_.matrix(2, config_.rank, config_.rank); }
  auto mixer() const { return parameters_.matrix(2, config_.rank, config_.rank); }
  double scale() const { return config_.lora().scale(); }
  double dropout() const { return config_.dropout; }

  /// B′ = B Sᵀ.
  template <class Backend, class Acc>
  void up(const Backend& be, MatrixView<Acc, S, Major::column> out) const {
    reparam<S>(be, MixRanks<T, T, Acc, Acc, S, Major::row>{B(), mixer(), out});
  }
  /// dB (+)= dB′ S, dS (+)= (dB′)ᵀ B; `this` is the gradient.
  template <class Backend, class A_, class Acc>
  void add_up(const Backend& be, const A_& adapter, MatrixView<Acc, S, Major::column> d, Into into) {
    using W = typename A_::element;
    reparam<S>(be, MixRanks<Acc, W, Acc, T, S, Major::column>{d, adapter.mixer().transposed(), B(), into});
    reparam<S>(be, RankProducts<Acc, W, Acc, T, S>{d, adapter.B(), mixer(), into});
  }
  Cost cost(Index tokens) const {
    Cost cost = product_cost<precision>(tokens, config_.d_in, config_.d_out, config_.rank, config_.rank, 0);
    const double mix = 2.0 * static_cast<double>(config_.rank * config_.rank) * static_cast<double>(config_.d_out);
    cost.forward_flop += mix;
    cost.backward_flop += 3 * mix;
    cost.parameters += config_.rank * config_.rank;
    return cost;
  }
  template <class Self, class F>
  static void visit(Self& self, F&& f) {
    f("lora_A.weight", self.A(), group::A);
    f("lora_B.weight", self.B(), group::B);
    f("mixer", self.mixer(), ParameterGroup{"mixer"});
  }
  template <class Fill>
  void start(Fill& fill) {
    fill.uniform("lora_A.weight", A(), 1 / std::sqrt(static_cast<double>(config_.d_in)));
    fill.zero(B());
    if (config_.mixer == Mixer::kaiming)
      fill.uniform("mixer", mixer(), 1 / std::sqrt(static_cast<double>(config_.rank)));
    if (config_.mixer == Mixer::identity) set_identity(mixer());
    if (config_.mixer == Mixer::orthogonal) fill.normal("mixer", mixer(), 1), detail::orthonormalise(mixer());
  }

 private:
  static void set_identity(MatrixView<T, S> v) {
    for (Index i = 0; i < v.rows * v.cols; ++i) v.data[i] = narrow<T>(i % (v.cols + 1) == 0 ? 1.0 : 0.0);
  }
  Config config_;
  Parameters<T, S, 3> parameters_;
};

}  // namespace LORAMIX_ABI
}  // namespace loramix
