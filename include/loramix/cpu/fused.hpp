/// The gated product on the CPU, fused: one pass over x and one over y per direction, in register tiles.
///
/// Computes:    shrink, expand and their backward (ops/shrink.hpp, ops/expand.hpp) for activations and weights in float,
///              bfloat16 or half, summed in float.
/// Reads:       what the ops read.
/// Writes:      what the ops write.
/// Errors:      the ops'.
/// Cost:        scratch: packed weights, the gated U, and per lane the block that its registers work on.
/// Determinism: cpu/tuning.hpp.
/// Example:     ops/shrink.hpp
#pragma once
#include <loramix/core/precision.hpp>
#include <loramix/cpu/contract.hpp>
#include <loramix/cpu/gate_rows.hpp>
#include <loramix/cpu/rows.hpp>
#include <loramix/cpu/spread.hpp>
#include <loramix/cpu/token_sum.hpp>
#include <loramix/ops/expand.hpp>
#include <loramix/ops/shrink.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace cpu {
namespace detail {

template <class T>
inline constexpr bool is_stored = std::is_same_v<T, float> || is_16bit<T>;

/// Whether there are kernels for these scalars.
template <class X, class W, class Acc, class Score, class G = float>
inline constexpr bool has_kernels =
    is_stored<X>&& is_stored<W>&& is_stored<G>&& std::is_same_v<Acc, float>&& std::is_same_v<Score, float>;

/// One block of floats per lane.
inline MatrixView<float> carve_lanes(Arena<>& arena, Index lanes, Index floats) {
  return arena.matrix<float>(lanes, round_up(floats, 16));
}

/// The weights of a contraction, ready for it.
template <class W, Major M>
struct Contraction {
  MatrixView<const W, Space::host, M> w;  // [R, d]
  PanelLayout layout;
  float* panels = nullptr;  // none: the weights are read as they lie
  Index lane = 0;           // floats

  /// `converted`: x is not read where it lies.
  Contraction(Arena<>& arena, const Tuning& tuning, MatrixView<const W, Space::host, M> weights, Index tokens,
              bool converted)
      : w(weights), layout{w.rows, w.cols, round_up(tuning.sweep, width)} {
    const bool many = class_of(tuning, tokens) == TokenClass::many;
    if (w.rows == 0) return;
    if (M == Major::row) lane = DotContraction<float, W>::scratch(w.rows, w.cols, layout.sweep);
    if (M == Major::row && (!many || w.rows <= width / 2)) return;
    panels = arena.take<float>(layout.size());
    lane = larger(lane, PanelContraction<float>::scratch(layout, !converted));
    packed_ = true;
  }

  /// out [T, R] = scale · x̂ Wᵀ.
  template <class E, class X>
  void run(const Backend<E>& be, const Input<X>& x, float scale, MatrixView<float> out, MatrixView<float> scratch) const {
    const Index tokens = x.rows.rows;
    if (tokens == 0 || w.rows == 0) return;
    if (packed_) {
      pack(be, w, layout, panels);
      const PanelContraction<X> job{x, layout, panels, scale, out};
      const Cut cut(tokens, be.lanes(), job.most, job.group);
      be.run(cut.jobs,
             [&](Index i, Index lane_id) { job.run(cut.begin(i), cut.count(i, tokens), scratch.row(lane_id)); });
      return;
    }
    if constexpr (M == Major::row) {
      const DotContraction<X, W> job{x, w, layout.sweep, scale, out};
      const bool wake = tokens > few_tokens || w.rows * w.cols * Index{sizeof(W)} > be.tuning.serial_bytes;
      const Index groups = blocks_of(w.rows, job.columns);
      // Ranks first; tokens too where ranks do not keep all lanes busy.
      const Index lanes = wake ? be.lanes() : 1;
      const Cut cut(tokens, groups >= lanes ? 1 : blocks_of(lanes, groups), job.most, job.rows);
      be.run(wake ? groups * cut.jobs : 1, [&](Index i, Index lane_id) {
        for (Index g = wake ? i % groups : 0; g < (wake ? i % groups + 1 : groups); ++g) {
          const Index r = g * job.columns, chunk = wake ? i / groups : 0;
          job.run(cut.begin(chunk), cut.count(chunk, tokens), r, smaller(job.columns, w.rows - r), scratch.row(lane_id));
        }
      });
    }
  }

 private:
  bool packed_ = false;
};

/// Runs a Spread over all of y.
template <class E, class Y, class W, Major M>
void run_spread(const Backend<E>& be, const Spread<Y, W, M>& spread, MatrixView<float> scratch) {
  const Index tokens = spread.y.rows, columns = spread.y.cols;
  if (tokens == 0 || columns == 0) return;
  if constexpr (M == Major::row) {
    if (class_of(be.tuning, tokens) != TokenClass::many) {
      const bool wake = tokens > few_tokens || spread.ranks() * columns * Index{sizeof(W)} > be.tuning.serial_bytes;
      const Cut cut(columns, wake ? be.lanes() : 1, columns, spread.panel);
      be.run(cut.jobs, [&](Index i, Index lane) {
        spread.run_natural(cut.begin(i), cut.count(i, columns), scratch.row(lane));
      });
      return;
    }
  }
  const Index sweep = spread.sweep_of(be.tuning, spread.ranks());
  const Index blocks = blocks_of(columns, sweep), lanes = be.lanes();
  // Every job copies its weights: few jobs, but enough of them for all lanes.
  const Cut cut(tokens, lanes == 1 ? 1 : blocks_of(4 * lanes, blocks), tokens, spread.rows);
  be.run(blocks * cut.jobs, [&](Index i, Index lane) {
    const Index c = i % blocks * sweep, chunk = i / blocks;
    spread.run_packed(cut.begin(chunk), cut.count(chunk, tokens), c, smaller(sweep, columns - c), scratch.row(lane));
  });
}
template <class Y, class W, Major M>
Index spread_scratch(const Tuning& tuning, Index ranks) {
  return Spread<Y, W, M>::scratch(ranks, Spread<Y, W, M>::sweep_of(tuning, ranks));
}

/// Runs a TokenSum over all of its output.
template <class E, class X, class G, Major M>
void run_token_sum(const Backend<E>& be, const TokenSum<X, G, M>& sum, MatrixView<float> scratch) {
  if (sum.out.data == nullptr || sum.out.empty()) return;
  const Cut columns(sum.out.cols, be.lanes(), sum.sweep, 1), ranks(sum.out.rows, 1, sum.ranks_of_job, sum.rows);
  // Jobs begin at multiples of whole panels, and of 8 columns.
  const Index wide = smaller(sum.sweep, round_up(columns.size, 24 * width));
  const Index blocks = blocks_of(sum.out.cols, wide);
  be.run(blocks * ranks.jobs, [&](Index i, Index lane) {
    const Index c = i % blocks * wide, r = i / blocks;
    sum.run(ranks.begin(r), ranks.count(r, sum.out.rows), c, smaller(wide, sum.out.cols - c), scratch.row(lane));
  });
}

/// ũ = U ∘ g for all tokens, or U itself where the gate is open.
inline bool is_open(const GateForm<float>& gate, Index columns_of_u) {
  return columns_of_u == gate.ranks && gate.ids.data == nullptr && gate.prefix.data == nullptr &&
         gate.subset.data == nullptr && gate.weights.data == nullptr && gate.values.data == nullptr &&
         gate.multiplier.data == nullptr && gate.rank_scale.data == nullptr;
}
template <class E, class F>
void over_rows(const Backend<E>& be, Index rows, const F& f) {
  const Cut cut(rows, be.lanes(), 128, 1);
  be.run(cut.jobs, [&](Index i, Index) {
    for (Index t = cut.begin(i); t < cut.begin(i) + cut.count(i, rows); ++t) f(t);
  });
}
template <class E>
MatrixView<const float> gated_ranks(const Backend<E>& be, MatrixView<const float> u, const GateForm<float>& gate,
                                    MatrixView<float> gated) {
  if (is_open(gate, u.cols)) return u;
  over_rows(be, u.rows, [&](Index t) { apply_gate_row(gate, t, u.row(t), u.cols, gated.row(t)); });
  return gated;
}

// ---- shrink -------------------------------------------------------------------------------------------------------

template <class X, class W>
struct FusedShrink {
  Contraction<W, Major::row> ranks, side;
  MatrixView<float> lanes;

  template <class E, class Op>
  FusedShrink(Arena<>& arena, const Backend<E>& be, const Op& op)
      : ranks(arena, be.tuning, op.A, op.x.rows, !std::is_same_v<X, float> || op.dropout.on()),
        side(arena, be.tuning, op.side, op.x.rows, !std::is_same_v<X, float>),
        lanes(carve_lanes(arena, be.lanes(), larger(ranks.lane, side.lane))) {}

  template <class E, class Op>
  void run(const Backend<E>& be, const Op& op) const {
    ranks.run(be, Input<X>{op.x, op.dropout}, 1.f, op.u, lanes);
    side.run(be, Input<X>{op.x}, 1.f, op.h, lanes);
  }
};

template <class X, class W, class G>
struct FusedShrinkBackward {
  using Sum = TokenSum<X, G, Major::row>;
  MatrixView<float> lanes;

  template <class E, class Op>
  FusedShrinkBackward(Arena<>& arena, const Backend<E>& be, const Op& op) {
    const bool direct = std::is_same_v<X, float> && !op.dropout.on();
    const Index ranks = larger(op.A.rows, op.side.rows);
    lanes = carve_lanes(arena, be.lanes(), larger(Sum::scratch(ranks, be.tuning.tokens_per_sum, direct),
                                                  spread_scratch<X, W, Major::row>(be.tuning, op.A.rows + op.side.rows)));
  }

  template <class E, class Op>
  void run(const Backend<E>& be, const Op& op) const {
    const Index step = be.tuning.tokens_per_sum;
    run_token_sum(be, Sum{op.du, {op.x, op.dropout}, 1.f, op.parameters, op.dA, step}, lanes);
    run_token_sum(be, Sum{op.dh, {op.x}, 1.f, op.parameters, op.dside, step}, lanes);
    if (op.dx.data == nullptr) return;
    run_spread(be, Spread<X, W, Major::row>{{op.du, op.A}, {op.dh, op.side}, op.dropout, 1.f, op.input, op.dx}, lanes);
  }
};

// ---- expand -------------------------------------------------------------------------------------------------------

/// The order of Bᵀ [R, d_out].
constexpr Major transposed(Major m) { return m == Major::row ? Major::column : Major::row; }

template <class W, class Y, Major M>
struct FusedExpand {
  MatrixView<float> gated;  // [T, R]
  MatrixView<float> lanes;

  template <class E, class Op>
  FusedExpand(Arena<>& arena, const Backend<E>& be, const Op& op)
      : gated(arena.matrix<float>(op.u.rows, op.B.cols)),
        lanes(carve_lanes(arena, be.lanes(), spread_scratch<Y, W, transposed(M)>(be.tuning, op.B.cols))) {}

  template <class E, class Op>
  void run(const Backend<E>& be, const Op& op) const {
    const auto left = gated_ranks(be, op.u, op.gate, gated);
    run_spread(be, Spread<Y, W, transposed(M)>{{left, op.B.transposed()}, {}, {}, op.scale, op.into, op.y}, lanes);
  }
};

template <class W, class Y, class G, Major M>
struct FusedExpandBackward {
  using Sum = TokenSum<Y, G, transposed(M)>;
  Contraction<W, transposed(M)> ranks;
  MatrixView<float> gated;  // [T, R] ũ
  MatrixView<float> dut;    // [T, R] dŨ
  loramix::detail::GateContributions<float, Space::host> by_token;
  MatrixView<float> lanes;

  template <class E, class Op>
  FusedExpandBackward(Arena<>& arena, const Backend<E>& be, const Op& op)
      : ranks(arena, be.tuning, op.B.transposed(), op.u.rows, !std::is_same_v<Y, float>),
        gated(arena.matrix<float>(op.u.rows, op.B.cols)),
        dut(arena.matrix<float>(op.u.rows, op.B.cols)),
        by_token(loramix::detail::carve_contributions<float>(arena, op.gate, op.dgate)),
        lanes(carve_lanes(arena, be.lanes(),
                          larger(ranks.lane, Sum::scratch(op.B.cols, be.tuning.tokens_per_sum, std::is_same_v<Y, float>)))) {}

  template <class E, class Op>
  void run(const Backend<E>& be, const Op& op) const {
    const Input<Y> dy{op.dy};
    const bool open = is_open(op.gate, op.u.cols) && op.dgate.values.data == nullptr;
    ranks.run(be, dy, op.scale, open ? op.du : dut, lanes);
    if (!open) {
      over_rows(be, op.u.rows, [&](Index t) {
        gate_row_backward(op.gate, t, op.u.row(t), op.u.cols, dut.row(t),
                          {op.du.row(t), by_token, op.dgate.values, op.gate_values});
      });
      loramix::detail::sum_contributions(be, op.gate, by_token, op.dgate, op.parameters, op.gate_values);
    }
    if (op.dB.data == nullptr) return;
    const auto left = gated_ranks(be, op.u, op.gate, gated);
    run_token_sum(be, Sum{left, dy, op.scale, op.parameters, op.dB.transposed(), be.tuning.tokens_per_sum}, lanes);
  }
};

}  // namespace detail
}  // namespace cpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
