/// MoRE: one LoRA whose leading ranks are nested experts; every task chooses how many it uses.
///
/// Computes:    ΔY = s · law · m · X̂ A[:r_τ]ᵀ B[:, :r_τ]ᵀ, r_τ = argmax softmax(W_g e_τ + b_g) + 1
///              (router/rank_selector.hpp);
///              s = α/r_max. The law lr_linear multiplies the gradients of A[j] and B[:, j] by j/r_max, j from 1.
/// Source:      MoRE (arXiv 2505.22694), equations 3 to 7: e ~ N(0, 0.01²). Without task_embedding (ablation) a task
///              has a
///              free row of r_max logits.
/// Parameters:  lora_A.weight [r_max, d_in], lora_B.weight [d_out, r_max], task_embedding.weight [tasks, d_in or
///              r_max],
///              gate.weight [r_max, d_in], gate.bias [1, r_max].
/// Errors:      sizes below 0, no task, no rank, dropout outside [0, 1); a batch without tasks.
/// Cost:        LoRA of rank r_max, and 2·tasks·r_max·d_in flop for the selector.
/// Determinism: adapter/forward.hpp
/// Merge:       exact for one task: merge(be, adapter, W, {.task = τ}) (adapter/merge.hpp).
/// Example:     tests/adapter/more.cpp
#pragma once
#include <loramix/adapter/by_task.hpp>
#include <loramix/router/rank_selector.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// `rank` is r_max.
struct MoreConfig {
  Index d_in = 0;
  Index d_out = 0;
  Index tasks = 1;
  Index rank = 8;
  double alpha = 32;
  double dropout = 0;
  RankRule rule{};
  bool task_embedding = true;

  static MoreConfig of(const Shape& shape) {
    const Index rank = shape.total_rank;
    return {.d_in = shape.d_in, .d_out = shape.d_out, .rank = rank, .alpha = 2.0 * static_cast<double>(rank)};
  }
  template <class Self, class F>
  static void fields(Self& self, F&& f) {
    detail::task_fields(self, f);
    RankRule::fields(self.rule, f);
    f("task_embedding", self.task_embedding);
  }
};

/// Owns A, B, the tasks' embeddings and the selector.
template <class P = float, Space S = Space::host, class T = typename precision_t<P>::weight>
class More {
 public:
  using Config = MoreConfig;
  using precision = precision_t<P>;
  using element = T;
  template <class U, Space V = S>
  using rebind = More<P, V, U>;
  static constexpr Space space = S;
  static constexpr const char* kind = "more";

  explicit More(const Config& config)
      : config_(detail::checked_by_task("More", config, 1)),
        parameters_({detail::size_of(config.rank, config.d_in), detail::size_of(config.d_out, config.rank),
                     detail::size_of(config.tasks, width()), detail::size_of(selector_rows(), config.d_in),
                     selector_rows()}) {}

  const Config& config() const { return config_; }
  VectorView<T, S> parameters() { return parameters_.flat(); }
  VectorView<const T, S> parameters() const { return parameters_.flat(); }
  double scale() const { return config_.alpha / static_cast<double>(config_.rank); }
  double dropout() const { return config_.dropout; }
  /// What gradients of A[j] and B[:, j] are multiplied by.
  RankRatio gradient_ratio() const { return {config_.rank, config_.rule.law == RankLaw::lr_linear}; }

  auto A() { return parameters_.matrix(0, config_.rank, config_.d_in); }
  auto A() const { return parameters_.matrix(0, config_.rank, config_.d_in); }
  auto B() { return parameters_.rank_major(1, config_.d_out, config_.rank); }
  auto B() const { return parameters_.rank_major(1, config_.d_out, config_.rank); }
  auto gate() { return gate_of<T>(*this); }
  auto gate() const { return gate_of<const T>(*this); }

  /// r_τ, as the next forward will choose it.
  Index chosen_rank(Index task) const { return gate().chosen_rank(task); }
  /// Where all ranks are chosen.
  Cost cost(Index tokens) const {
    Cost cost = product_cost<precision>(tokens, config_.d_in, config_.d_out, config_.rank, config_.rank, 0);
    cost.parameters += config_.tasks * width() + selector_rows() * (config_.d_in + 1);
    return cost;
  }
  template <class Self, class F>
  static void visit(Self& self, F&& f) {
    const auto scorer = self.gate().scorer;
    f("lora_A.weight", self.A(), group::A);
    f("lora_B.weight", self.B(), group::B);
    f("task_embedding.weight", scorer.embedding, group::embedding);
    f("gate.weight", scorer.projection, group::router);
    f("gate.bias", scorer.bias, group::bias);
  }
  template <class Fill>
  void start(Fill& fill) {
    const auto scorer = gate().scorer;
    const double bound = 1 / std::sqrt(static_cast<double>(config_.d_in));
    fill.uniform("lora_A.weight", A(), bound);
    fill.zero(B());
    fill.normal("task_embedding.weight", scorer.embedding, 0.01 * 0.01);
    fill.uniform("gate.weight", scorer.projection, bound);
    fill.zero(scorer.bias);
  }

 private:
  Index width() const { return config_.task_embedding ? config_.d_in : config_.rank; }
  Index selector_rows() const { return config_.task_embedding ? config_.rank : 0; }
  template <class W, class Self>
  static RankSelectorGate<W, typename precision::score, S> gate_of(Self& self) {
    const Config& c = self.config_;
    auto& p = self.parameters_;
    if (!c.task_embedding) return {{p.matrix(2, c.tasks, c.rank), {}, {}}, c.rule};
    return {{p.matrix(2, c.tasks, c.d_in), p.matrix(3, c.rank, c.d_in), p.matrix(4, 1, c.rank)}, c.rule};
  }

  Config config_;
  Parameters<T, S, 5> parameters_;
};

}  // namespace LORAMIX_ABI
}  // namespace loramix
