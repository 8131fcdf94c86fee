/// The request decides: an expert per token or segment that comes with the call, experts of mixed ranks and scales.
///
/// Computes:    gate s_e on the ranks of expert e = the task of the token; −1: nothing. Ids are the groups of the call's tasks.
/// Source:      MATH.md section 4 (serving).
/// Reads:       ids [slots], a slot's own number or −1 where it is empty; rank_offsets [slots + 1]; rank_scale [ranks].
/// Errors:      a call without tasks; on the host an id whose slot is empty (on the device it contributes nothing).
/// Cost:        none: the form is views.
/// Determinism: a token depends on its own id only.
/// Example:     tests/adapter/serving.cpp
#pragma once
#include <loramix/gate/computed.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// One expert per token, named by the call's tasks. W is const in an adapter and mutable in its gradient.
template <class W, class Score, Space S = Space::host>
struct RequestGate {
  static constexpr GateFacts facts{Sparsity::segments, Slots::ids | Slots::rank_scale, false};
  static constexpr Space space = S;
  static constexpr bool told = true;  // by the call, before U is computed
  struct State {};

  VectorView<const std::int32_t, S> ids;  // [slots] a slot's own number, −1 = empty
  const Index* rank_offsets;              // [slots + 1]
  VectorView<const Score, S> rank_scale;  // [Σr]

  MatrixView<W, S> side() const { return {}; }
  State carve(Arena<S>&, Index, bool) const { return {}; }
  void check(const char* op, const GateCall<S>& call) const {
    const Groups<S>& tasks = call.batch.tasks;
    if (call.tokens != 0 && tasks.per_token()) {
      fail(check::detail::about(ErrorCode::value, op, "tasks")
           << " are missing: give an adapter id per token or segment");
    }
    if constexpr (S == Space::host) {
      const Index n = tasks.ids != nullptr ? call.tokens : tasks.of_segment != nullptr ? tasks.segments : Index{0};
      for (Index i = 0; i < n; ++i) {
        const Index id = tasks.ids != nullptr ? tasks.ids[i] : tasks.of_segment[i];
        if (id < 0 || id >= ids.size || ids[id] >= 0) continue;  // other ids: check_form
        fail(check::detail::about(ErrorCode::value, op, "tasks")
             << " name adapter " << id << " for " << (tasks.ids != nullptr ? "token " : "segment ") << i
             << ", but its slot is empty");
      }
    }
  }
  GateForm<Score, S> form(const State&, const GateCall<S>& call, Index ranks) const {
    GateForm<Score, S> f = OneExpert<Score, S>{ids, call.batch.tasks, ids.size, rank_offsets}.form(call.tokens, ranks);
    f.rank_scale = rank_scale;
    return f;
  }
  GateGradient<Score, S> gradient(const State&) const { return {}; }
  template <class Backend>
  void forward(const Backend&, MatrixView<Score, S>, const State&, const GateCall<S>&, Arena<S>) const {}
  template <class Backend, class GradientGate>
  void backward(const Backend&, MatrixView<Score, S>, const State&, const State&, MatrixView<Score, S>,
                const GateCall<S>&, const GradientGate&, Into, Arena<S>) const {}
};

}  // namespace LORAMIX_ABI
}  // namespace loramix
