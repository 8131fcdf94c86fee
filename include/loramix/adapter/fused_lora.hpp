/// LoRA on a fused projection (qkv, gate_up): row slices of B, with one shared A or an A per slice.
///
/// Computes:    ΔY[:, slice i] = s X̂ A_iᵀ B_iᵀ; with shared_A all slices read one U (MATH.md section 4, "fused qkv").
///              Columns of y outside the slices are left alone, with Into::set too.
/// Parameters:  slice{i}.lora_A.weight [r, d_in] (or one lora_A.weight), slice{i}.lora_B.weight [width_i, r].
/// Errors:      sizes below 0, dropout outside [0, 1), slices outside d_out or overlapping, more than eight.
/// Cost:        2·T·(R_a·d_in + r·Σ width_i) flop forward; R_a = r (shared) or r times the slices.
/// Determinism: adapter/fused_forward.hpp
/// Merge:       exact, slice by slice.
/// Example:     examples/engine
#pragma once
#include <loramix/adapter/lora.hpp>
#include <loramix/core/slices.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// Sizes, slices and scale; `rank` is of one slice.
struct FusedLoraConfig {
  Index d_in = 0;
  Index d_out = 0;
  Slices slices{};
  Index rank = 8;  // of one slice
  double alpha = 16;
  double dropout = 0;
  bool rank_stabilised = false;
  bool shared_A = false;

  static FusedLoraConfig of(const Shape& shape) {  // three equal slices, as in qkv
    const Index width = shape.d_out / 3, rank = shape.total_rank / 3;
    return {.d_in = shape.d_in,
            .d_out = shape.d_out,
            .slices = {{0, width}, {width, width}, {2 * width, shape.d_out - 2 * width}},
            .rank = rank,
            .alpha = 2.0 * rank};
  }
  template <class Self, class F>
  static void fields(Self& self, F&& f) {
    LoraConfig::fields(self, f);
    Slices::fields(self.slices, f);
    f("shared_A", self.shared_A);
  }
  LoraConfig one() const { return {d_in, d_out, rank, alpha, dropout, rank_stabilised}; }
  Index rows_of_A() const { return shared_A ? rank : check::detail::product(rank, slices.size()); }
};

namespace detail {
inline const FusedLoraConfig& checked(const char* op, const FusedLoraConfig& config) {
  checked(op, config.one());
  config.slices.check(op, config.d_out);
  return config;
}
}  // namespace detail

/// Owns A [r or n·r, d_in] and one B [width, r] per slice.
template <class P = float, Space S = Space::host, class T = typename precision_t<P>::weight>
class FusedLora {
 public:
  using Config = FusedLoraConfig;
  using precision = precision_t<P>;
  using element = T;
  template <class U, Space V = S>
  using rebind = FusedLora<P, V, U>;
  static constexpr Space space = S;
  static constexpr const char* kind = "fused_lora";

  explicit FusedLora(const Config& config)
      : config_(detail::checked("FusedLora", config)), parameters_(sizes(config)) {}

  const Config& config() const { return config_; }
  VectorView<T, S> parameters() { return parameters_.flat(); }
  VectorView<const T, S> parameters() const { return parameters_.flat(); }
  double scale() const { return config_.one().scale(); }
  double dropout() const { return config_.dropout; }

  /// All rows of A: r, or r per slice.
  auto A() { return parameters_.matrix(0, config_.rows_of_A(), config_.d_in); }
  auto A() const { return parameters_.matrix(0, config_.rows_of_A(), config_.d_in); }
  auto B(Index i) { return parameters_.rank_major(1 + int(i), config_.slices[i].width, config_.rank); }
  auto B(Index i) const { return parameters_.rank_major(1 + int(i), config_.slices[i].width, config_.rank); }
  /// Columns of U that slice i reads.
  Index first_rank(Index i) const { return config_.shared_A ? 0 : i * config_.rank; }

  Cost cost(Index tokens) const {
    Index width = 0;
    for (const Slice& slice : config_.slices) width += slice.width;
    return product_cost<precision>(tokens, config_.d_in, width, config_.rows_of_A(), config_.rank, 0);
  }
  template <class Self, class F>
  static void visit(Self& self, F&& f) {
    if (self.config_.shared_A) f("lora_A.weight", self.A(), group::A);
    const Index slices = self.config_.slices.size(), rank = self.config_.rank;
    for (Index i = 0; i < slices && !self.config_.shared_A; ++i) {
      f(slice_names[i].A, self.A().row_range(i * rank, rank), group::A);
    }
    for (Index i = 0; i < slices; ++i) f(slice_names[i].B, self.B(i), group::B);
  }
  template <class Fill>
  void start(Fill& fill) {
    fill.uniform("lora_A.weight", A(), 1 / std::sqrt(static_cast<double>(config_.d_in)));
    for (Index i = 0; i < config_.slices.size(); ++i) fill.zero(B(i));
  }

 private:
  static Parameters<T, S, 1 + Slices::capacity> sizes(const Config& config) {
    Index sizes[1 + Slices::capacity] = {detail::size_of(config.rows_of_A(), config.d_in)};
    for (Index i = 0; i < config.slices.size(); ++i) {
      sizes[1 + i] = detail::size_of(config.slices[i].width, config.rank);
    }
    return Parameters<T, S, 1 + Slices::capacity>(sizes);
  }

  Config config_;
  Parameters<T, S, 1 + Slices::capacity> parameters_;
};

}  // namespace LORAMIX_ABI
}  // namespace loramix
