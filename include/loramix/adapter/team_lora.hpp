/// TeamLoRA: one general A, split among expert B's that compete.
///
/// Computes:    ΔY = s Σ_e ω_e (X̂ A_eᵀ) B_eᵀ with A [E·r_B, d_in] in E segments and ω = M softmax(S(v))
///              (router/competition.hpp); s = α/r_B. v is the token, or what .reads says: the mean or last valid row
///              of its sequence, the embedding of its task.
/// Source:      TeamLoRA, arXiv 2408.09856 (abstract, figure, notes: no code was released). Ours: S = linear(d_in, 64)
///              + SiLU + linear(64, E); M starts with 1 on its diagonal and U(0, 1/E) elsewhere; v that is no token.
/// Parameters:  lora_A.weight [E·r_B, d_in], lora_B.weight [d_out, E·r_B], shapley.0.weight [hidden or E, d_in or dim],
///              shapley.0.bias [1, hidden], shapley.2.weight [E, hidden], shapley.2.bias [1, E], interaction.weight
///              [E, E], task_embedding.weight [tasks, dim].
/// Errors:      adapter/mixture.hpp; hidden below 0; S that reads tasks without any, or embeddings of no values; what
///              router/competition.hpp refuses in a batch.
/// Cost:        LoRA of rank E·r_B plus the rows of S.
/// Determinism: adapter/forward.hpp; with .reads = sequence a token depends on its sequence.
/// Merge:       none where S reads tokens or sequences; exact for one task: merge(be, adapter, W, {.task = τ}).
/// Example:     examples/train
#pragma once
#include <loramix/adapter/mixture.hpp>
#include <loramix/router/competition.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// `rank` is of one expert; hidden = 0 makes S linear. `pooling` is of sequences; `tasks` and `embedding` of tasks.
struct TeamLoraConfig {
  Index d_in = 0;
  Index d_out = 0;
  Index experts = 4;
  Index rank = 8;
  double alpha = 16;
  double dropout = 0;
  Index hidden = 64;
  Competition competition = Competition::learned;
  Reads reads = Reads::token;
  Pooling pooling = Pooling::mean;
  Index tasks = 0;
  Index embedding = 64;

  static TeamLoraConfig of(const Shape& shape) {
    const MixtureConfig c = MixtureConfig::of(shape);
    return {c.d_in, c.d_out, c.experts, c.rank, c.alpha};
  }
  template <class Self, class F>
  static void fields(Self& self, F&& f) {
    MixtureConfig::fields(self, f);
    f("hidden", self.hidden);
    f("competition", self.competition);
    f("reads", self.reads);
    f("pooling", self.pooling);
    f("tasks", self.tasks);
    f("embedding", self.embedding);
  }
  Index rows_of_S() const { return hidden != 0 ? hidden : experts; }
  Index columns_of_S() const { return reads == Reads::task ? embedding : d_in; }
  Index router_rows() const { return reads == Reads::task ? 0 : rows_of_S(); }
};

/// What makes a mixture TeamLoRA.
struct TeamLoraMethod {
  using Config = TeamLoraConfig;
  static constexpr const char* kind = "team_lora";
  static constexpr bool shared_A = false;

  static void check(const Config& c) {
    check::at_least(kind, "hidden", c.hidden, 0);
    if (c.reads != Reads::task) return;
    check::at_least(kind, "tasks", c.tasks, 1);
    check::at_least(kind, "embedding", c.embedding, 1);
  }
  static std::array<RouterParameter, 6> router(const Config& c) {
    return {{{"shapley.0.weight", c.rows_of_S(), c.columns_of_S()},
             {"shapley.0.bias", 1, c.hidden, group::bias},
             {"shapley.2.weight", c.experts, c.hidden},
             {"shapley.2.bias", 1, c.experts, group::bias},
             {"interaction.weight", c.experts, c.experts, group::interaction},
             {"task_embedding.weight", c.reads == Reads::task ? c.tasks : 0, c.embedding, group::embedding}}};
  }
  template <class W, class Score, Space S, class Views>
  static CompetitionGate<W, Score, S> gate(const Config& c, const Views& v) {
    return CompetitionGate<W, Score, S>{
        v[0], v[1], c.hidden != 0 ? v[2] : MatrixView<W, S>{}, v[3], v[4], c.competition, c.reads, c.pooling, v[5]};
  }
  template <class Fill, class Views>
  static void start_router(Fill& fill, const Config& c, const Views& v) {
    const auto bound = [](Index width) { return 1 / std::sqrt(static_cast<double>(width)); };
    fill.uniform("shapley.0.weight", v[0], bound(c.columns_of_S()));
    if (c.hidden != 0) fill.uniform("shapley.2.weight", v[2], bound(c.hidden));
    fill.zero(v[1]);
    fill.zero(v[3]);
    fill.uniform("interaction.weight", v[4], 0, 1 / static_cast<double>(c.experts));
    for (Index e = 0; e < c.experts; ++e) fill.constant(v[4].block(e, 1, e, 1), 1);
    fill.normal("task_embedding.weight", v[5], 1);
  }
};

/// lm::TeamLora<float> team({.d_in = …, .d_out = …, .experts = 4, .rank = 8});
template <class P = float, Space S = Space::host, class T = typename precision_t<P>::weight>
using TeamLora = Mixture<TeamLoraMethod, P, S, T>;

}  // namespace LORAMIX_ABI
}  // namespace loramix
