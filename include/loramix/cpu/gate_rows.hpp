/// The gate's two row bodies (ops/gate_rows.hpp), expert by expert: what is the same for all ranks of an expert is looked up
/// once.
///
/// Computes:    ũ = U ∘ g;  dU = dŨ ∘ g and what each token adds to the gate's gradient.
/// Reads:       U [T, R_a], dŨ [T, R], the gate's slots.
/// Writes:      ũ [T, R]; dU [T, R_a], contributions.
/// Errors:      checked by ops/expand.hpp.
/// Cost:        a few cycles per open rank.
/// Determinism: rows are independent.
/// Example:     cpu/fused.hpp
#pragma once
#include <algorithm>

#include <loramix/cpu/backend.hpp>
#include <loramix/ops/gate_rows.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace cpu {
namespace detail {

/// Consecutive ranks of one expert that are not closed (by ids or prefix; a subset is asked rank by rank).
struct OpenRun {
  Index expert, slot;  // slot: the place among the ids, 0 without ids
  Index begin, end;    // ranks
};

using FloatRow = GateRow<float, float, Space::host>;

/// f(run) for every expert that the row lets through.
template <class F>
void each_open_run(const GateForm<float>& gate, const FloatRow& row, F&& f) {
  if (!row.covered()) return;
  const Index limit = row.limit();
  const auto run = [&](Index e, Index slot) {
    const Index begin = gate.expert_begin(e), end = smaller(gate.expert_begin(e + 1), limit);
    if (begin < end) f(OpenRun{e, slot, begin, end});
  };
  if (gate.ids.data == nullptr) {
    for (Index e = 0; e < gate.experts; ++e) run(e, 0);
  } else {
    for (Index k = 0; k < gate.ids.cols; ++k) {
      const Index e = row.expert_at(k);
      if (e >= 0) run(e, k);
    }
  }
}

/// Whether the gate says "no expert" for token t: its row of y needs no write.
template <class Score>
bool nothing_open(const GateForm<Score>& gate, Index t) {
  if (gate.ids.data == nullptr) return false;
  const Index group = gate.id_groups.of(t);
  if (group < 0) return true;
  for (Index k = 0; k < gate.ids.cols; ++k) {
    if (gate.ids(group, k) >= 0) return false;
  }
  return true;
}

/// gated[t, :] = U ∘ g. U has `shared` columns: all ranks, or those of one expert. `chosen`: of the chosen experts' ranks only,
/// the others are not written.
inline void apply_gate_row(const GateForm<float>& gate, Index t, const float* u, Index shared, float* gated,
                           bool chosen) {
  const FloatRow row(gate, t);
  if (!chosen) std::fill_n(gated, gate.ranks, 0.f);
  for (Index k = 0; chosen && row.covered() && k < gate.ids.cols; ++k) {
    const Index e = row.expert_at(k);
    if (e >= 0) std::fill(gated + gate.expert_begin(e), gated + gate.expert_begin(e + 1), 0.f);
  }
  const float m = row.multiplier();
  each_open_run(gate, row, [&](const OpenRun& run) {
    const float w = row.id_weight(run.slot) * row.weight(run.expert);
    const float* const from = u + (shared == gate.ranks ? run.begin : run.begin % shared);
    float* const to = gated + run.begin;
    const Index n = run.end - run.begin;
    if (gate.values.data == nullptr) {
      for (Index j = 0; j < n; ++j) to[j] = from[j] * (w * m);
    } else {
      const float* const values = gate.values.row(t) + run.begin;
      for (Index j = 0; j < n; ++j) to[j] = from[j] * (w * values[j] * m);
    }
    if (gate.rank_scale.data != nullptr) {
      for (Index j = 0; j < n; ++j) to[j] *= gate.rank_scale[run.begin + j];
    }
    for (Index j = 0; gate.subset.data != nullptr && j < n; ++j) {
      if (!row.in_subset(run.begin + j)) to[j] = 0;
    }
  });
}

/// What a token's backward row writes.
struct GateRowGradient {
  float* du;  // [shared]
  loramix::detail::GateContributions<float, Space::host> by_token;
  MatrixView<float> dvalues;  // [T, R] or empty
  Into into_values;
};

/// dU and the token's contributions from dŨ [R] and U [shared].
inline void gate_row_backward(const GateForm<float>& gate, Index t, const float* u, Index shared, const float* dut,
                              const GateRowGradient& out) {
  const FloatRow row(gate, t);
  const auto clear = [](float* p, Index n) {
    for (Index i = 0; p != nullptr && i < n; ++i) p[i] = 0;
  };
  const auto row_of = [t](auto view) { return view.data == nullptr ? nullptr : view.row(t); };
  float* const did_weights = row_of(out.by_token.id_weights);
  float* const dweights = row_of(out.by_token.weights);
  float* const drank_scale = row_of(out.by_token.rank_scale);
  float* const dvalues = row_of(out.dvalues);
  clear(out.du, shared);
  clear(did_weights, gate.ids.cols);
  clear(dweights, gate.experts);
  clear(drank_scale, gate.ranks);
  if (out.into_values == Into::set) clear(dvalues, gate.ranks);
  const float m = row.multiplier();
  float dmultiplier = 0;
  each_open_run(gate, row, [&](const OpenRun& run) {
    const float a = row.id_weight(run.slot), b = row.weight(run.expert), w = a * b;
    const Index first = shared == gate.ranks ? run.begin : run.begin % shared;
    float sum = 0;  // Σ dŨ ∘ U ∘ the factors of single ranks
    for (Index j = run.begin; j < run.end; ++j) {
      if (!row.in_subset(j)) continue;
      const Index i = first + j - run.begin;
      const float value = gate.values.data == nullptr ? 1.f : gate.values(t, j);
      const float scale = gate.rank_scale.data == nullptr ? 1.f : gate.rank_scale[j];
      const float both = dut[j] * u[i];
      out.du[i] += dut[j] * (w * value * m * scale);
      sum += both * (value * scale);
      if (dvalues != nullptr) dvalues[j] += both * (w * m * scale);
      if (drank_scale != nullptr) drank_scale[j] = both * (w * value * m);
    }
    if (did_weights != nullptr) did_weights[run.slot] = sum * (b * m);
    if (dweights != nullptr) dweights[run.expert] = sum * (a * m);
    dmultiplier += sum * w;
  });
  if (out.by_token.multiplier.data != nullptr) out.by_token.multiplier(t, 0) = dmultiplier;
}

}  // namespace detail
}  // namespace cpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
