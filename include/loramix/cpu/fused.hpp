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
#include <algorithm>

#include <loramix/core/precision.hpp>
#include <loramix/cpu/contract.hpp>
#include <loramix/cpu/dots_and_sums.hpp>
#include <loramix/cpu/gate_rows.hpp>
#include <loramix/cpu/grouped.hpp>
#include <loramix/cpu/rows.hpp>
#include <loramix/cpu/spread.hpp>
#include <loramix/cpu/token_sum.hpp>
#include <loramix/ops/expand.hpp>
#include <loramix/ops/shrink.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace cpu {
namespace detail {

/// Whether there are kernels for these scalars.
template <class X, class W, class Acc, class Score, class G = float>
inline constexpr bool has_kernels =
    is_stored<X>&& is_stored<W>&& is_stored<G>&& std::is_same_v<Acc, float>&& std::is_same_v<Score, float>;

/// One block of floats per lane.
inline MatrixView<float> carve_lanes(Arena<>& arena, Index lanes, Index floats) {
  check::at_least("executor", "lanes()", lanes, 1);
  return arena.matrix<float>(lanes, round_up(floats, 16));
}

/// f(t) for every row.
template <class E, class F>
void over_rows(const Backend<E>& be, Index rows, const F& f) {
  const Crew crew(be, rows, 0);
  const Cut cut(rows, crew.lanes(), 128, 1);
  crew.run(cut.jobs, [&](Index i, Index) {
    for (Index t = cut.begin(i); t < cut.begin(i) + cut.count(i); ++t) f(t);
  });
}
template <class E>
void set_zero(const Backend<E>& be, MatrixView<float> out) {
  over_rows(be, out.rows, [&](Index t) { std::fill_n(out.row(t), out.cols, 0.f); });
}

/// A contraction with the weights w [R, d], and in the same pass with others.
template <class W, Major M>
struct Contraction {
  MatrixView<const W, Space::host, M> w;
  MatrixView<const W, Space::host, M> second{};  // [n, d] or empty; only where w is packed

  /// Whether it is a matter of dot products.
  bool by_dots(const Tuning& tuning, Index tokens) const {
    return M == Major::row && (class_of(tuning, tokens) != TokenClass::many || w.rows <= width / 2);
  }
  /// Floats of a lane; `direct`: x is read where it lies.
  template <class E>
  Index scratch(const Backend<E>& be, Index tokens, bool direct) const {
    const Index dots = M == Major::row ? DotContraction<float, W>::scratch(be.tuning, w.cols) : 0;
    if (w.rows == 0 || by_dots(be.tuning, tokens)) return dots;
    const Index ranks = Stacked<W, M>{w, second}.ranks();
    return larger(dots, PanelContraction<float, W, M>::scratch(be.tuning, tokens, ranks, w.cols, direct));
  }

  /// out [T, R] = scale · x̂ Wᵀ.
  template <class E, class X>
  void run(const Backend<E>& be, const Input<X>& x, float scale, MatrixView<float> out, MatrixView<float> lanes,
           MatrixView<float> second_out = {}) const {
    const Index tokens = x.rows.rows;
    if (tokens == 0 || w.rows == 0) return;
    if (w.cols == 0) {
      set_zero(be, second_out);
      return set_zero(be, out);
    }
    if constexpr (M == Major::row) {
      if (by_dots(be.tuning, tokens))
        return run_dots(be, DotContraction<X, W>{x, w, DotContraction<X, W>::sweep_of(be.tuning, tokens), scale, out},
                        lanes);
    }
    using Panels = PanelContraction<X, W, M>;
    const Stacked<W, M> both{w, second};
    const Panels contraction{x, both, Panels::sweep_of(be.tuning, both.ranks(), w.cols), scale, out, second_out};
    const Crew crew(be, tokens, both.ranks() * w.cols * Index{sizeof(W)});
    const typename Panels::Jobs jobs(tokens, both.ranks(), crew.lanes());
    crew.run(jobs.count(), [&](Index job, Index lane) { contraction.run(jobs, job, lanes.row(lane)); });
  }

 private:
  template <class E, class X>
  void run_dots(const Backend<E>& be, const DotContraction<X, W>& dots, MatrixView<float> lanes) const {
    const Index tokens = dots.out.rows, groups = blocks_of(w.rows, dots.tile_ranks);
    const Crew crew(be, tokens, w.rows * w.cols * Index{sizeof(W)});
    // Ranks first; tokens too where ranks do not keep all lanes busy.
    const Cut cut(tokens, blocks_of(crew.lanes(), groups), dots.most, dots.tile_tokens);
    crew.run(groups * cut.jobs, [&](Index i, Index lane) {
      const Index r = i % groups * dots.tile_ranks, chunk = i / groups;
      dots.run(cut.begin(chunk), cut.count(chunk), r, smaller(dots.tile_ranks, w.rows - r), lanes.row(lane));
    });
  }
};

/// Runs a Spread over all of y.
template <class E, class Y, class W, Major M>
void run_spread(const Backend<E>& be, const Spread<Y, W, M>& spread, MatrixView<float> scratch) {
  const Index tokens = spread.y.rows, columns = spread.y.cols;
  if (tokens == 0 || columns == 0) return;
  const Crew crew(be, tokens, spread.ranks() * columns * Index{sizeof(W)});
  if constexpr (M == Major::row) {
    if (class_of(be.tuning, tokens) != TokenClass::many) {
      const Cut cut(columns, crew.lanes(), columns, spread.panel);
      const bool in_streams = spread.in_streams();
      crew.run(cut.jobs, [&](Index i, Index lane) {
        if (in_streams) return spread.run_streams(cut.begin(i), cut.count(i), scratch.row(lane));
        spread.run_natural(cut.begin(i), cut.count(i), scratch.row(lane));
      });
      return;
    }
  }
  // Every job copies its weights: no more jobs than keep all lanes busy, and no shorter rows than a sweep's.
  const Index sweep = packed_sweep_of(be.tuning, spread.ranks(), columns), lanes = crew.lanes();
  const Cut blocks(columns, blocks_of(columns, sweep) >= lanes ? lanes : 1, sweep, spread.panel);
  const Cut chunks(tokens, blocks_of(lanes, blocks.jobs), tokens, spread.rows);
  crew.run(blocks.jobs * chunks.jobs, [&](Index i, Index lane) {
    const Index block = i % blocks.jobs, chunk = i / blocks.jobs;
    spread.run_packed(chunks.begin(chunk), chunks.count(chunk), blocks.begin(block), blocks.count(block),
                      scratch.row(lane));
  });
}

/// Runs a TokenSum over all of its output.
template <class E, class X, class G, Major M>
void run_token_sum(const Backend<E>& be, const TokenSum<X, G, M>& sum, MatrixView<float> scratch) {
  if (sum.out.data == nullptr || sum.out.empty()) return;
  const Crew crew(be, sum.left.rows, 2 * sum.ranks() * sum.out.cols * Index{sizeof(G)});  // read and written
  const Cut columns(sum.out.cols, crew.lanes(), sum.sweep(), SumPanel::step),
      ranks(sum.ranks(), 1, sum.ranks_of_job, sum.rows);
  crew.run(columns.jobs * ranks.jobs, [&](Index i, Index lane) {
    const Index c = i % columns.jobs, r = i / columns.jobs;
    sum.run(ranks.begin(r), ranks.count(r), columns.begin(c), columns.count(c), scratch.row(lane));
  });
}

/// out [T, R] = scale · x Wᵀ, and the sums over tokens if they are wanted: in one pass where pieces keep all lanes busy.
template <class E, class W, class G>
void run_dots_and_sums(const Backend<E>& be, const DotsAndSums<W, G>& both, MatrixView<float> out,
                       MatrixView<float> scratch) {
  const Index tokens = both.tokens(), pieces = both.pieces.jobs, turns = blocks_of(pieces, be.lanes());
  const bool summed = both.sum.out.data != nullptr;
  if (summed && 10 * turns * be.lanes() <= 11 * pieces) {
    be.run(pieces, [&](Index piece, Index lane) { both.run(piece, scratch.row(lane)); });
  } else {
    const Cut chunks(tokens, be.lanes(), larger(1, tokens), RegisterTile::dot_rows);
    be.run(pieces * chunks.jobs, [&](Index i, Index lane) {
      const Index chunk = i / pieces;
      both.run_dots(i % pieces, chunks.begin(chunk), chunks.count(chunk), scratch.row(lane));
    });
    run_token_sum(be, both.sum, scratch);
  }
  over_rows(be, tokens, [&](Index t) { both.add_up(t, out.row(t)); });
}

/// ũ = U ∘ g for all tokens, or U itself where the gate is open.
inline bool is_open(const GateForm<float>& gate, Index columns_of_u) {
  return columns_of_u == gate.ranks && gate.ids.data == nullptr && gate.prefix.data == nullptr &&
         gate.subset.data == nullptr && gate.weights.data == nullptr && gate.values.data == nullptr &&
         gate.multiplier.data == nullptr && gate.rank_scale.data == nullptr;
}
/// `grouped`: closed experts' ranks are not read. `idle`, where it is given: which tokens the gate gives no expert.
template <class E>
MatrixView<const float> gated_ranks(const Backend<E>& be, MatrixView<const float> u, const GateForm<float>& gate,
                                    bool grouped, MatrixView<float> gated, std::uint8_t* idle = nullptr) {
  if (is_open(gate, u.cols)) return u;
  over_rows(be, u.rows, [&](Index t) {
    apply_gate_row(gate, t, u.row(t), u.cols, gated.row(t), grouped && gate.ids.cols != 0);
    if (idle != nullptr) idle[t] = nothing_open(gate, t) ? 1 : 0;
  });
  return gated;
}

/// Whether the open ranks are computed group by group: a matter of shapes. The form is one of U's ranks (not of a shared A).
inline bool is_grouped(const Tuning& tuning, const GateForm<float>& gate, Index columns_of_u) {
  if (!selects(gate) || columns_of_u != gate.ranks || tuning.grouping == Grouping::dense) return false;
  if (tuning.grouping == Grouping::grouped) return true;
  return grouping_pays(gate.ids.cols, gate.experts, gate.ranks);
}

/// out [T, R] = scale · x̂ Wᵀ where the selection is open, 0 elsewhere.
template <class E, class X, class W, Major M>
void run_grouped(const Backend<E>& be, const GroupedContraction<X, W, M>& job, MatrixView<float> lanes) {
  const Selection& s = *job.selection;
  if (job.w.cols == 0) return set_zero(be, job.out);
  const Crew crew(be, s.tokens(), smaller(s.most_open(), job.w.rows) * job.w.cols * Index{sizeof(W)});
  if (job.by_dots(be.tuning, s)) {
    set_zero(be, job.out);
    crew.run(s.chunks() * s.groups(),
             [&](Index i, Index lane) { job.run_dots(i / s.groups(), i % s.groups(), lanes.row(lane)); });
    return;
  }
  // Chunks of pairs are long, and few: every lane takes its part of each.
  const Index parts = s.in_pairs() ? crew.lanes() : 1;
  const Cut cut(s.chunks(), s.in_pairs() ? 1 : crew.lanes(), job.most_chunks(s), 1);
  crew.run(cut.jobs * parts, [&](Index i, Index lane) {
    const Index chunks = i / parts;
    job.run_sweeps(cut.begin(chunks), cut.count(chunks), i % parts, parts, lanes.row(lane));
  });
}
template <class E, class Y, class W, Major M>
void run_grouped(const Backend<E>& be, const GroupedSpread<Y, W, M>& spread, MatrixView<float> lanes) {
  const Selection& s = *spread.selection;
  const Index columns = spread.all.y.cols, ranks = spread.all.ranks();
  const bool natural = spread.natural(be.tuning, s);
  const Index sweep = spread.sweep_of(be.tuning, s, ranks, columns);
  const Crew crew(be, s.tokens(),
                  smaller(s.most_open() + spread.all.second.w.rows, ranks) * columns * Index{sizeof(W)});
  const Index lanes_used = crew.lanes();
  const Cut blocks(columns, natural ? lanes_used : 1, sweep, column_panel);
  const Cut chunks(s.chunks(), lanes_used == 1 ? 1 : blocks_of(4 * lanes_used, blocks.jobs), s.chunks(), 1);
  crew.run(blocks.jobs * chunks.jobs, [&](Index i, Index lane) {
    const Index block = i % blocks.jobs, chunk = i / blocks.jobs;
    spread.run(be.tuning, chunks.begin(chunk), chunks.count(chunk), blocks.begin(block), blocks.count(block),
               lanes.row(lane));
  });
}
template <class E, class X, class G, Major M>
void run_grouped(const Backend<E>& be, const GroupedTokenSum<X, G, M>& sum, MatrixView<float> lanes) {
  if (sum.out.data == nullptr || sum.out.empty()) return;
  const Selection& s = *sum.selection;
  const Index groups = sum.groups_of_job(s), group_jobs = blocks_of(s.groups(), groups);
  const Crew crew(be, s.tokens(), 2 * sum.out.rows * sum.out.cols * Index{sizeof(G)});
  const Cut columns(sum.out.cols, blocks_of(crew.lanes(), group_jobs), sum.sweep, SumPanel::step);
  crew.run(columns.jobs * group_jobs, [&](Index i, Index lane) {
    const Index c = i % columns.jobs, g = i / columns.jobs * groups;
    sum.run(g, smaller(groups, s.groups() - g), columns.begin(c), columns.count(c), lanes.row(lane));
  });
}

// ---- shrink -------------------------------------------------------------------------------------------------------

template <class X, class W>
struct FusedShrink {
  Contraction<W, Major::row> ranks, side;
  bool grouped;
  bool together;  // A and the side rows meet the same x, on packed weights
  Selection selection;
  MatrixView<float> lanes;

  using Grouped = GroupedContraction<X, W, Major::row>;
  /// Whether A alone has ranks that are dot products, summed in another order than in a panel: U does not depend on side rows.
  static bool ends_in_dots(Index ranks) {
    return std::is_same_v<X, float> && ranks % width != 0 && ranks % width <= width / 2;
  }

  template <class E, class Op>
  FusedShrink(Arena<>& arena, const Backend<E>& be, const Op& op)
      : ranks{op.A},
        side{op.side},
        grouped(op.select.tokens != 0 && is_grouped(be.tuning, op.select, op.A.rows)),
        together(!grouped && !op.dropout.on() && op.A.rows != 0 && op.side.rows != 0 &&
                 !ranks.by_dots(be.tuning, op.x.rows) && !ends_in_dots(op.A.rows)) {
    const Input<X> dropped{op.x, op.dropout}, plain{op.x};
    // Of both together and of each: what a query is told of dropout is not what a call will have, and fewer ranks may take more.
    Index floats = larger(ranks.scratch(be, op.x.rows, dropped.direct()), side.scratch(be, op.x.rows, plain.direct()));
    floats = larger(floats, Contraction<W, Major::row>{op.A, op.side}.scratch(be, op.x.rows, dropped.direct()));
    if (together) ranks.second = op.side;
    if (grouped) {
      selection = Selection(arena, op.select, Grouped::listing(be.tuning, op.select));
      floats = larger(floats, Grouped::scratch(be.tuning, selection, op.A.cols, dropped.direct()));
    }
    lanes = carve_lanes(arena, be.lanes(), floats);
  }

  template <class E, class Op>
  void run(const Backend<E>& be, const Op& op) const {
    const Input<X> dropped{op.x, op.dropout};
    if (grouped && op.x.rows != 0) {
      selection.build(be);
      const Index sweep = Grouped::sweep_of(be.tuning, selection, op.A.cols, dropped.direct());
      run_grouped(be, Grouped{dropped, op.A, &selection, sweep, 1.f, op.u}, lanes);
    } else {
      ranks.run(be, dropped, 1.f, op.u, lanes, together ? op.h : MatrixView<float>{});
    }
    if (!together) side.run(be, Input<X>{op.x}, 1.f, op.h, lanes);
  }
};

template <class X, class W, class G>
struct FusedShrinkBackward {
  using Sum = TokenSum<X, G, Major::row>;
  using GroupedSum = GroupedTokenSum<X, G, Major::row>;
  using Back = Spread<X, W, Major::row>;
  using GroupedBack = GroupedSpread<X, W, Major::row>;
  bool grouped;
  bool together;                 // dA and dside are sums over the same x
  Selection selection, of_rows;  // for sums over tokens; for dX, where that is listed otherwise
  bool apart = false;            // whether it is
  MatrixView<float> lanes;

  template <class E, class Op>
  FusedShrinkBackward(Arena<>& arena, const Backend<E>& be, const Op& op)
      : grouped(op.select.tokens != 0 && is_grouped(be.tuning, op.select, op.A.rows)),
        together(!grouped && !op.dropout.on() && op.A.rows != 0 && op.dA.data != nullptr && op.dside.data != nullptr) {
    const Index ranks = op.A.rows + op.side.rows, sweep = packed_sweep_of(be.tuning, ranks, op.A.cols);
    Index floats = Back::scratch(ranks, sweep);
    // With dropout and without: what a query is told of it is not what a call will have, and either may take more.
    for (const bool direct : {false, std::is_same_v<X, float>}) {
      for (const Index n : {ranks, op.A.rows, op.side.rows})
        floats = larger(floats, Sum::scratch(be.tuning, n, op.A.cols, direct));
    }
    if (grouped) {
      const Selection::By by_sums = GroupedSum::listing(op.select), by = listing(be.tuning, op.select);
      selection = Selection(arena, op.select, by_sums);
      apart = by != by_sums;
      if (apart) of_rows = Selection(arena, op.select, by);
      floats = larger(floats, GroupedSum::scratch(selection));
      floats = larger(floats, GroupedBack::scratch(be.tuning, rows(), ranks, op.A.cols));
    }
    lanes = carve_lanes(arena, be.lanes(), floats);
  }

  /// What dX goes through.
  const Selection& rows() const { return apart ? of_rows : selection; }

  template <class E, class Op>
  void run(const Backend<E>& be, const Op& op) const {
    const Input<X> dropped{op.x, op.dropout};
    const Back back{{op.du, op.A}, {op.dh, op.side}, op.dropout, 1.f, op.input, op.dx};
    if (grouped) selection.build(be);
    if (together) {
      run_token_sum(be, Sum{op.du, dropped, 1.f, op.parameters, op.dA, be.tuning, op.dh, op.dside}, lanes);
    } else {
      if (grouped)
        run_grouped(be, GroupedSum{op.du, dropped, 1.f, op.parameters, op.dA, &selection}, lanes);
      else
        run_token_sum(be, Sum{op.du, dropped, 1.f, op.parameters, op.dA, be.tuning}, lanes);
      run_token_sum(be, Sum{op.dh, {op.x}, 1.f, op.parameters, op.dside, be.tuning}, lanes);
    }
    if (op.dx.data == nullptr || op.dx.empty()) return;
    if (!grouped) return run_spread(be, back, lanes);
    if (apart) of_rows.build(be);
    run_grouped(be, GroupedBack{back, &rows()}, lanes);
  }
};

// ---- expand -------------------------------------------------------------------------------------------------------

/// The order of Bᵀ [R, d_out].
constexpr Major transposed(Major m) { return m == Major::row ? Major::column : Major::row; }

/// Room to note the tokens without an expert; their rows of y are not touched where the op adds.
template <class Op>
std::uint8_t* carve_idle(Arena<>& arena, const Op& op) {
  return op.gate.ids.cols == 0 || op.into == Into::set ? nullptr : arena.take<std::uint8_t>(op.u.rows);
}

template <class W, class Y, Major M>
struct FusedExpand {
  using Out = Spread<Y, W, transposed(M)>;
  using GroupedOut = GroupedSpread<Y, W, transposed(M)>;
  bool grouped;
  MatrixView<float> gated;  // [T, R]
  std::uint8_t* idle;       // [T] or null
  Selection selection;
  MatrixView<float> lanes;

  template <class E, class Op>
  FusedExpand(Arena<>& arena, const Backend<E>& be, const Op& op)
      : grouped(is_grouped(be.tuning, op.gate, op.u.cols)),
        gated(arena.matrix<float>(op.u.rows, op.B.cols)),
        idle(carve_idle(arena, op)) {
    const Index sweep = packed_sweep_of(be.tuning, op.B.cols, op.B.rows);
    Index floats = Out::scratch(op.B.cols, sweep);
    if (grouped) {
      selection = Selection(arena, op.gate, listing(be.tuning, op.gate));
      floats = GroupedOut::scratch(be.tuning, selection, op.B.cols, op.B.rows);
    }
    lanes = carve_lanes(arena, be.lanes(), floats);
  }

  template <class E, class Op>
  void run(const Backend<E>& be, const Op& op) const {
    if (op.y.empty()) return;
    const auto left = gated_ranks(be, op.u, op.gate, grouped, gated, idle);
    const Out out{{left, op.B.transposed()}, {}, {}, op.scale, op.into, op.y, idle};
    if (!grouped) return run_spread(be, out, lanes);
    selection.build(be);
    run_grouped(be, GroupedOut{out, &selection}, lanes);
  }
};

template <class W, class Y, class G, Major M>
struct FusedExpandBackward {
  using Sum = TokenSum<Y, G, transposed(M)>;
  using GroupedSum = GroupedTokenSum<Y, G, transposed(M)>;
  using Grouped = GroupedContraction<Y, W, transposed(M)>;
  using Together = DotsAndSums<W, G>;
  static constexpr bool together = std::is_same_v<Y, float> && transposed(M) == Major::row;
  Contraction<W, transposed(M)> ranks;
  bool grouped;
  MatrixView<float> gated;  // [T, R] ũ
  MatrixView<float> dut;    // [T, R] dŨ
  loramix::detail::GateContributions<float, Space::host> by_token;
  Selection selection, of_rows;  // for sums over tokens; for dŨ, where that is listed otherwise
  bool apart = false;            // whether it is
  Cut pieces{0, 1, 1, 1};        // of few ranks' columns, of whose rows dŨ and dB are made together
  MatrixView<float> parts;       // [pieces · T, woven_rows(R)] of dŨ
  MatrixView<float> lanes;

  template <class E, class Op>
  FusedExpandBackward(Arena<>& arena, const Backend<E>& be, const Op& op)
      : ranks{op.B.transposed()},
        grouped(is_grouped(be.tuning, op.gate, op.u.cols)),
        gated(arena.matrix<float>(op.u.rows, op.B.cols)),
        dut(arena.matrix<float>(op.u.rows, op.B.cols)),
        by_token(loramix::detail::carve_contributions<float>(arena, op.gate, op.dgate)) {
    constexpr bool direct = std::is_same_v<Y, float>;
    Index floats = larger(ranks.scratch(be, op.u.rows, direct), Sum::scratch(be.tuning, op.B.cols, op.B.rows, direct));
    if (grouped) {
      const Selection::By by_sums = GroupedSum::listing(op.gate), by = Grouped::listing(be.tuning, op.gate);
      selection = Selection(arena, op.gate, by_sums);
      apart = by != by_sums;
      if (apart) of_rows = Selection(arena, op.gate, by);
      floats = larger(floats,
                      larger(Grouped::scratch(be.tuning, rows(), op.dy.cols, direct), GroupedSum::scratch(selection)));
    } else if (together && ranks.by_dots(be.tuning, op.u.rows) && class_of(be.tuning, op.u.rows) == TokenClass::many) {
      pieces = Together::pieces_of(be.tuning, op.B.cols, op.B.rows);
      parts = arena.matrix<float>(elements(pieces.jobs, op.u.rows), woven_rows(op.B.cols));
      floats = larger(floats, Together::scratch(be.tuning, op.B.cols, pieces));
    }
    lanes = carve_lanes(arena, be.lanes(), floats);
  }

  /// What the contraction goes through.
  const Selection& rows() const { return apart ? of_rows : selection; }

  template <class E, class Op>
  void run(const Backend<E>& be, const Op& op) const {
    const Input<Y> dy{op.dy};
    if constexpr (together) {
      if (pieces.jobs != 0 && op.u.rows != 0) {
        MatrixView<const float> left;
        if (op.dB.data != nullptr) left = gated_ranks(be, op.u, op.gate, false, gated);
        Op contracted = op;
        contracted.dB = {};
        return run(be, contracted, [&](MatrixView<float> out) {
          const Sum sum{left, dy, op.scale, op.parameters, op.dB.transposed(), be.tuning};
          run_dots_and_sums(be, Together{op.B.transposed(), sum, pieces, parts}, out, lanes);
        });
      }
    }
    run(be, op, [&](MatrixView<float> out) {
      if (!grouped) return ranks.run(be, dy, op.scale, out, lanes);
      if (apart) of_rows.build(be);
      const Index sweep = Grouped::sweep_of(be.tuning, rows(), op.dy.cols, dy.direct());
      run_grouped(be, Grouped{dy, op.B.transposed(), &rows(), sweep, op.scale, out}, lanes);
    });
  }
  /// contract(out): out [T, R] = s dY B, the open ranks at least.
  template <class E, class Op, class Contract>
  void run(const Backend<E>& be, const Op& op, const Contract& contract) const {
    const Input<Y> dy{op.dy};
    const bool open = is_open(op.gate, op.u.cols) && op.dgate.values.data == nullptr;
    if (grouped) selection.build(be);
    if (op.u.rows != 0) contract(open ? op.du : dut);
    if (!open) {
      over_rows(be, op.u.rows, [&](Index t) {
        gate_row_backward(op.gate, t, op.u.row(t), op.u.cols, dut.row(t),
                          {op.du.row(t), by_token, op.dgate.values, op.gate_values});
      });
      loramix::detail::sum_contributions(be, op.gate, by_token, op.dgate, op.parameters, op.gate_values);
    }
    if (op.dB.data == nullptr || op.dB.empty()) return;
    const auto left = gated_ranks(be, op.u, op.gate, grouped, gated);
    if (grouped)
      run_grouped(be, GroupedSum{left, dy, op.scale, op.parameters, op.dB.transposed(), &selection}, lanes);
    else
      run_token_sum(be, Sum{left, dy, op.scale, op.parameters, op.dB.transposed(), be.tuning}, lanes);
  }
};

}  // namespace detail
}  // namespace cpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
