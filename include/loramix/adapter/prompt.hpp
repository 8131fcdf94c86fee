/// Prompt tuning: learned rows before every sequence.
///
/// Computes:    y = for every sequence: prompt [v, d], then its rows of x; the gradient of the prompt is summed over
///              sequences.
/// Source:      Lester et al. 2021 (arXiv 2104.08691); MATH.md section 4. Starts as N(0, 1), an embedding's usual draw
///              (ours).
/// Parameters:  prompt_embeddings [v, d]; no weight decay.
/// Errors:      sizes below 0; a batch without sequences, shapes; before any write.
/// Cost:        one copy of x; no workspace.
/// Determinism: ops/prepend.hpp
/// Merge:       none: it is not a weight.
/// Example:     tests/adapter/prompt.cpp
#pragma once
#include <loramix/adapter/forward.hpp>
#include <loramix/adapter/lora.hpp>
#include <loramix/ops/prepend.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// d_in is the width of a token's row, rows is v.
struct PromptConfig {
  Index d_in = 0;
  Index rows = 8;

  static PromptConfig of(const Shape& shape) { return {.d_in = shape.d_in}; }
  template <class Self, class F>
  static void fields(Self& self, F&& f) {
    f("d_in", self.d_in);
    f("rows", self.rows);
  }
};

namespace detail {
inline const PromptConfig& checked_prompt(const PromptConfig& config) {
  check::at_least("Prompt", "d_in", config.d_in, 0);
  check::at_least("Prompt", "rows", config.rows, 0);
  return config;
}
}  // namespace detail

/// Owns the prompt [v, d].
template <class P = float, Space S = Space::host, class T = typename precision_t<P>::weight>
class Prompt {
 public:
  using Config = PromptConfig;
  using precision = precision_t<P>;
  using element = T;
  template <class U, Space V = S>
  using rebind = Prompt<P, V, U>;
  static constexpr Space space = S;
  static constexpr const char* kind = "prompt";
  static constexpr bool has_pack = false;

  explicit Prompt(const Config& config)
      : config_(detail::checked_prompt(config)), parameters_({detail::size_of(config.rows, config.d_in)}) {}

  const Config& config() const { return config_; }
  VectorView<T, S> parameters() { return parameters_.flat(); }
  VectorView<const T, S> parameters() const { return parameters_.flat(); }
  auto rows() { return parameters_.matrix(0, config_.rows, config_.d_in); }
  auto rows() const { return parameters_.matrix(0, config_.rows, config_.d_in); }
  double dropout() const { return 0; }
  /// Rows of y for a batch of T tokens in n sequences.
  Index output_rows(Index tokens, Index n) const { return detail::prepended_rows("Prompt", tokens, n, config_.rows); }
  Cost cost(Index tokens) const {
    const double x = sizeof(typename precision::activation) * static_cast<double>(tokens * config_.d_in);
    return {.forward_bytes = 2 * x, .backward_bytes = 3 * x, .parameters = config_.rows * config_.d_in};
  }
  template <class Self, class F>
  static void visit(Self& self, F&& f) {
    f("prompt_embeddings", self.rows(), group::embedding);
  }
  template <class Fill>
  void start(Fill& fill) {
    fill.normal("prompt_embeddings", rows(), 1);
  }

 private:
  Config config_;
  Parameters<T, S, 1> parameters_;
};

}  // namespace LORAMIX_ABI
}  // namespace loramix
