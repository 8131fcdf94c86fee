/// The gated product on the CPU, composed: Eigen product, gate, Eigen product. Every scalar, every gate, every size.
///
/// Tokens are cut into tiles of 64 rows, the last one padded with zeros, and every product sees tiles of that one
/// height: a token's result then depends on nothing but its own row (Eigen's results for a row change with the number
/// of rows otherwise). 16-bit values are widened before Eigen sees them. Sums over tokens run tile after tile inside
/// one job, so that no number of threads changes a bit.
#pragma once
#include <cstdio>
#include <cstdlib>

#include <loramix/core/precision.hpp>
#include <loramix/cpu/gate_rows.hpp>
#include <loramix/cpu/gemm.hpp>
#include <loramix/cpu/rows.hpp>
#include <loramix/ops/expand.hpp>
#include <loramix/ops/shrink.hpp>
#include <loramix/ops/token_product.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace cpu {
namespace detail {

inline constexpr Index tile_rows = 64;     // tokens of one product
inline constexpr Index tile_cols = 256;    // columns of x or y beside them
inline constexpr Index rank_block = 64;    // ranks of one block of dA, dB
inline constexpr Index tiles_per_job = 8;  // tiles that share one widened block of weights

/// One lane's scratch: products of [tile_rows, …] and everything around them.
template <class Acc>
struct Lane {
  Acc* tile;     // [tile_rows, tile_cols] of x̂ or dy, widened
  Acc* plain;    // the same of x without dropout, for side rows
  Acc* weights;  // a block of A, side or B, widened; null where the weights are Acc already
  Acc* result;   // what a product adds to
  Acc* rows;     // [tile_rows, …] padded copies of du, dh
  Acc* packing;  // Eigen's

  struct Sizes {
    Index plain = 0, weights = 0, result = 0, rows = 0;
    Index total() const { return tile_rows * tile_cols + plain + weights + result + rows + GemmScratch<Acc>::elements; }
  };
  Lane(Acc* memory, Sizes s)
      : tile(memory),
        plain(tile + tile_rows * tile_cols),
        weights(plain + s.plain),
        result(weights + s.weights),
        rows(result + s.result),
        packing(rows + s.rows) {}
};

/// Scratch of all lanes.
template <class Acc>
struct Lanes {
  typename Lane<Acc>::Sizes sizes;
  MatrixView<Acc> memory;  // [lanes, total]
  Lanes(Arena<>& arena, Index lanes, typename Lane<Acc>::Sizes s) : sizes(round_up(s)) {
    check::at_least("executor", "lanes()", lanes, 1);
    memory = arena.matrix<Acc>(lanes, sizes.total());
  }
  Lane<Acc> operator[](Index lane) const {
    // Not an Error: jobs must not throw, and a wrong lane is somebody else's memory.
    if (lane < 0 || lane >= memory.rows) {
      std::fprintf(stderr, "loramix: executor: lane %lld, but lanes() is %lld\n", static_cast<long long>(lane),
                   static_cast<long long>(memory.rows));
      std::abort();
    }
    return {memory.row(lane), sizes};
  }

 private:
  static typename Lane<Acc>::Sizes round_up(typename Lane<Acc>::Sizes s) {
    for (Index* n : {&s.plain, &s.weights, &s.result, &s.rows}) *n = (*n + 15) / 16 * 16;
    return s;
  }
};

template <class Acc>
void fill_zero(Acc* p, Index n) {
  for (Index i = 0; i < n; ++i) p[i] = Acc(0);
}

/// Rows [t0, t0 + tile_rows) × columns [c0, c0 + n) of v as Acc with stride `ld`, zeros past the last row.
template <class Acc, class X>
void load_tile(MatrixView<const X> v, Index t0, Index c0, Index n, Acc* out, Index ld) {
  for (Index i = 0; i < tile_rows; ++i) {
    Acc* const row = out + i * ld;
    if (t0 + i < v.rows) {
      const X* const from = v.row(t0 + i) + c0;
      for (Index c = 0; c < n; ++c) row[c] = widen<Acc>(from[c]);
    } else {
      fill_zero(row, n);
    }
  }
}

/// Multiplies by keep / (1 − p̄). c0 is a multiple of 8.
template <class Acc>
void drop_tile(const Dropout& dropout, Index t0, Index rows, Index c0, Index n, Acc* tile, Index ld) {
  const Acc kept = Acc(dropout.kept_scale());
  for (Index i = 0; i < smaller(rows - t0, tile_rows); ++i) {
    Acc* const row = tile + i * ld;
    for (Index c = 0; c < n; c += 8) {
      const std::uint32_t keep = dropout.keep8(t0 + i, (c0 + c) / 8);
      for (Index b = 0; b < smaller(8, n - c); ++b) row[c + b] = (keep >> b & 1u) ? row[c + b] * kept : Acc(0);
    }
  }
}

/// A block of a weight matrix as Acc: in place where it is Acc already, else widened into scratch, same order.
template <class Acc, class W, Major M>
MatrixView<const Acc, Space::host, M> weight_block(MatrixView<const W, Space::host, M> w, Index r0, Index rows,
                                                   Index c0, Index cols, Acc* scratch) {
  if constexpr (std::is_same_v<W, Acc>) {
    return {w.empty() ? nullptr : &w(r0, c0), rows, cols, w.stride};
  } else {
    MatrixView<Acc, Space::host, M> block(scratch, rows, cols);
    const Index outer = M == Major::row ? rows : cols, inner = M == Major::row ? cols : rows;
    for (Index i = 0; i < outer; ++i) {
      for (Index j = 0; j < inner; ++j) {
        const Index row = M == Major::row ? i : j, col = M == Major::row ? j : i;
        block(row, col) = widen<Acc>(w(r0 + row, c0 + col));
      }
    }
    return block;
  }
}

template <class W, class Acc>
inline constexpr Index widened = std::is_same_v<W, Acc> ? 0 : 1;

/// result [tile_rows, rows of W] += tile · Wᵀ, in blocks of W's rows.
template <class Acc, class W>
void multiply_transposed(const Lane<Acc>& lane, const Acc* tile, MatrixView<const W> weights, Index c0, Index n,
                         Acc* result) {
  GemmScratch<Acc> packing(lane.packing);
  for (Index r = 0; r < weights.rows; r += tile_cols) {
    const Index rows = smaller(tile_cols, weights.rows - r);
    const auto block = weight_block<Acc>(weights, r, rows, c0, n, lane.weights);
    gemm<Major::row, Major::column>(tile_rows, rows, n, tile, tile_cols, block.data, block.stride, result + r,
                                    weights.rows, packing);
  }
}

/// out (+)= s · sum over the tokens of leftᵀ · tile(right), for ranks [r, r+64) × columns [c, c+256).
template <class Acc, class G, Major M, class Load>
void token_product(const Lane<Acc>& lane, MatrixView<const Acc> left, Index tokens, Index r, Index c, Acc scale,
                   MatrixView<G, Space::host, M> out, Into into, const Load& load) {
  const Index ranks = smaller(rank_block, left.cols - r), n = smaller(tile_cols, out.cols - c);
  fill_zero(lane.result, rank_block * tile_cols);
  GemmScratch<Acc> packing(lane.packing);
  for (Index t = 0; t < tokens; t += tile_rows) {
    load(t, c, n);
    gemm<Major::column, Major::row>(ranks, n, smaller(tile_rows, tokens - t), &left(t, r), left.stride, lane.tile,
                                    tile_cols, lane.result, tile_cols, packing);
  }
  for (Index i = 0; i < ranks; ++i) {
    for (Index j = 0; j < n; ++j) {
      G& cell = out(r + i, c + j);
      const Acc sum = scale * lane.result[i * tile_cols + j];
      cell = narrow<G>(into == Into::add ? widen<Acc>(cell) + sum : sum);
    }
  }
}

}  // namespace detail

// ---- shrink -------------------------------------------------------------------------------------------------------

namespace detail {
template <class E, class X, class W, class Acc, class Score>
Lanes<Acc> carve(Arena<>& arena, const Backend<E>& be, const Shrink<X, W, Acc, Score, Space::host>& op) {
  return {arena,
          be.lanes(),
          {.plain = op.side.rows != 0 && op.dropout.on() ? tile_rows * tile_cols : 0,
           .weights = widened<W, Acc> * tile_cols * tile_cols,
           .result = elements(tile_rows, op.A.rows + op.side.rows)}};
}
}  // namespace detail

/// Workspace of the composed path.
template <class E, class X, class W, class Acc, class Score>
Index composed_scratch(const Backend<E>& be, const Shrink<X, W, Acc, Score, Space::host>& op) {
  return carved_bytes<Space::host>([&](Arena<>& arena) { detail::carve(arena, be, op); });
}

template <class E, class X, class W, class Acc, class Score>
void composed(const Backend<E>& be, const Shrink<X, W, Acc, Score, Space::host>& op, Arena<> work) {
  using namespace detail;
  const Lanes<Acc> lanes = carve(work, be, op);
  const Index tokens = op.x.rows, ranks = op.A.rows, side = op.side.rows;
  be.run(blocks_of(tokens, tile_rows), [&](Index job, Index lane_id) {
    const Lane<Acc> lane = lanes[lane_id];
    const Index t = job * tile_rows;
    Acc* const u = lane.result;
    Acc* const h = u + tile_rows * ranks;
    fill_zero(u, tile_rows * (ranks + side));
    for (Index c = 0; c < op.x.cols; c += tile_cols) {
      const Index n = smaller(tile_cols, op.x.cols - c);
      Acc* const plain = op.dropout.on() ? lane.plain : lane.tile;
      if (side != 0) {
        load_tile(op.x, t, c, n, plain, tile_cols);
        multiply_transposed(lane, plain, op.side, c, n, h);
      }
      if (side == 0 || op.dropout.on()) load_tile(op.x, t, c, n, lane.tile, tile_cols);
      if (op.dropout.on()) drop_tile(op.dropout, t, tokens, c, n, lane.tile, tile_cols);
      multiply_transposed(lane, lane.tile, op.A, c, n, u);
    }
    for (Index i = 0; i < smaller(tile_rows, tokens - t); ++i) {
      for (Index j = 0; j < ranks; ++j) op.u(t + i, j) = u[i * ranks + j];
      for (Index j = 0; j < side; ++j) op.h(t + i, j) = narrow<Score>(h[i * side + j]);
    }
  });
}

namespace detail {
template <class Acc>
struct ShrinkBackwardScratch {
  Lanes<Acc> lanes;
  MatrixView<Acc> dh;  // [T, n]
};
template <class E, class X, class W, class Acc, class Score, class G>
ShrinkBackwardScratch<Acc> carve(Arena<>& arena, const Backend<E>& be,
                                 const ShrinkBackward<X, W, Acc, Score, G, Space::host>& op) {
  const Index rows = op.A.rows > op.side.rows ? op.A.rows : op.side.rows;
  Lanes<Acc> lanes(arena, be.lanes(),
                   {.weights = elements(widened<W, Acc> * tile_cols, rows),
                    .result = rank_block * tile_cols,
                    .rows = elements(tile_rows, rows)});
  return {lanes, arena.matrix<Acc>(op.side.rows != 0 ? op.x.rows : 0, op.side.rows)};
}
}  // namespace detail

/// Workspace of the composed path.
template <class E, class X, class W, class Acc, class Score, class G>
Index composed_scratch(const Backend<E>& be, const ShrinkBackward<X, W, Acc, Score, G, Space::host>& op) {
  return carved_bytes<Space::host>([&](Arena<>& arena) { detail::carve(arena, be, op); });
}

template <class E, class X, class W, class Acc, class Score, class G>
void composed(const Backend<E>& be, const ShrinkBackward<X, W, Acc, Score, G, Space::host>& op, Arena<> work) {
  using namespace detail;
  const ShrinkBackwardScratch<Acc> scratch = carve(work, be, op);
  const MatrixView<Acc> dh = scratch.dh;
  const Index tokens = op.x.rows;
  for (Index t = 0; t < dh.rows; ++t) {
    for (Index j = 0; j < dh.cols; ++j) dh(t, j) = widen<Acc>(op.dh(t, j));
  }

  const auto parameters = [&](MatrixView<const Acc> left, MatrixView<G> out, bool dropped) {
    if (out.data == nullptr) return;
    const Index columns = blocks_of(out.cols, tile_cols);
    be.run(columns * blocks_of(out.rows, rank_block), [&](Index job, Index lane_id) {
      const Lane<Acc> lane = scratch.lanes[lane_id];
      token_product(lane, left, tokens, job / columns * rank_block, job % columns * tile_cols, Acc(1), out,
                    op.parameters, [&](Index t, Index c, Index n) {
                      load_tile(op.x, t, c, n, lane.tile, tile_cols);
                      if (dropped) drop_tile(op.dropout, t, tokens, c, n, lane.tile, tile_cols);
                    });
    });
  };
  parameters(op.du, op.dA, op.dropout.on());
  parameters(MatrixView<const Acc>(dh), op.dside, false);

  if (op.dx.data == nullptr) return;
  const Index columns = blocks_of(op.x.cols, tile_cols);
  be.run(columns * blocks_of(tokens, tile_rows), [&](Index job, Index lane_id) {
    const Lane<Acc> lane = scratch.lanes[lane_id];
    const Index t = job / columns * tile_rows, c = job % columns * tile_cols, n = smaller(tile_cols, op.x.cols - c);
    GemmScratch<Acc> packing(lane.packing);
    const auto add = [&](MatrixView<const Acc> left, MatrixView<const W> weights) {
      load_tile(left, t, 0, left.cols, lane.rows, left.cols);
      const auto block = weight_block<Acc>(weights, 0, weights.rows, c, n, lane.weights);
      gemm<Major::row, Major::row>(tile_rows, n, weights.rows, lane.rows, left.cols, block.data, block.stride,
                                   lane.tile, tile_cols, packing);
    };
    fill_zero(lane.tile, tile_rows * tile_cols);
    add(op.du, op.A);
    if (op.dropout.on()) drop_tile(op.dropout, t, tokens, c, n, lane.tile, tile_cols);
    if (op.side.rows != 0) add(MatrixView<const Acc>(dh), op.side);
    for (Index i = 0; i < smaller(tile_rows, tokens - t); ++i) {
      X* const row = op.dx.row(t + i) + c;
      const Acc* const sum = lane.tile + i * tile_cols;
      for (Index j = 0; j < n; ++j) row[j] = narrow<X>(op.input == Into::add ? widen<Acc>(row[j]) + sum[j] : sum[j]);
    }
  });
}

// ---- expand -------------------------------------------------------------------------------------------------------

namespace detail {
template <class Acc>
struct ExpandScratch {
  Lanes<Acc> lanes;
  MatrixView<Acc> gated;  // [T rounded up to whole tiles, R]
};
template <class E, class Acc, class W, class Y, class Score, Major M>
ExpandScratch<Acc> carve(Arena<>& arena, const Backend<E>& be, const Expand<Acc, W, Y, Score, Space::host, M>& op) {
  Lanes<Acc> lanes(arena, be.lanes(), {.weights = elements(widened<W, Acc> * tile_cols, op.B.cols)});
  return {lanes, arena.matrix<Acc>(blocks_of(op.u.rows, tile_rows) * tile_rows, op.B.cols)};
}

/// ũ = U ∘ g for all tokens; the padding rows are zero.
template <class E, class Acc, class Score>
void apply_gate(const Backend<E>& be, MatrixView<const Acc> u, const GateForm<Score>& gate, MatrixView<Acc> gated) {
  using Body = loramix::detail::ApplyGate<Acc, Score, Space::host>;
  execute_impl(be, Rows<Body, Space::host>{u.rows, {u, gate, gated}}, Arena<>{});
  fill_zero(gated.data + u.rows * gated.stride, (gated.rows - u.rows) * gated.stride);
}
}  // namespace detail

/// Workspace of the composed path.
template <class E, class Acc, class W, class Y, class Score, Major M>
Index composed_scratch(const Backend<E>& be, const Expand<Acc, W, Y, Score, Space::host, M>& op) {
  return carved_bytes<Space::host>([&](Arena<>& arena) { detail::carve(arena, be, op); });
}

template <class E, class Acc, class W, class Y, class Score, Major M>
void composed(const Backend<E>& be, const Expand<Acc, W, Y, Score, Space::host, M>& op, Arena<> work) {
  using namespace detail;
  const ExpandScratch<Acc> scratch = carve(work, be, op);
  const MatrixView<Acc> gated = scratch.gated;
  const Index tokens = op.u.rows, ranks = op.B.cols, columns = blocks_of(op.y.cols, tile_cols);
  const Index tiles = blocks_of(tokens, tile_rows);
  apply_gate(be, op.u, op.gate, gated);
  be.run(columns * blocks_of(tiles, tiles_per_job), [&](Index job, Index lane_id) {
    const Lane<Acc> lane = scratch.lanes[lane_id];
    const Index c = job % columns * tile_cols, n = smaller(tile_cols, op.y.cols - c);
    const auto block = weight_block<Acc>(op.B, c, n, 0, ranks, lane.weights).transposed();  // [R, n]
    GemmScratch<Acc> packing(lane.packing);
    const Index first = job / columns * tiles_per_job;
    for (Index tile = first; tile < smaller(first + tiles_per_job, tiles); ++tile) {
      const Index t = tile * tile_rows;
      fill_zero(lane.tile, tile_rows * tile_cols);
      if (ranks != 0) {
        gemm<Major::row, decltype(block)::major>(tile_rows, n, ranks, gated.row(t), gated.stride, block.data,
                                                 block.stride, lane.tile, tile_cols, packing);
      }
      for (Index i = 0; i < smaller(tile_rows, tokens - t); ++i) {
        if (op.into == Into::add && nothing_open(op.gate, t + i)) continue;
        Y* const row = op.y.row(t + i) + c;
        const Acc* const sum = lane.tile + i * tile_cols;
        for (Index j = 0; j < n; ++j) {
          row[j] = narrow<Y>(op.into == Into::add ? widen<Acc>(row[j]) + op.scale * sum[j] : op.scale * sum[j]);
        }
      }
    }
  });
}

namespace detail {
template <class Acc>
struct ExpandBackwardScratch {
  Lanes<Acc> lanes;
  MatrixView<Acc> gated;  // [T rounded up, R]
  MatrixView<Acc> dut;    // [T, R]
  loramix::detail::GateContributions<Acc, Space::host> by_token;
};
template <class E, class Acc, class W, class Y, class Score, class G, Major M>
ExpandBackwardScratch<Acc> carve(Arena<>& arena, const Backend<E>& be,
                                 const ExpandBackward<Acc, W, Y, Score, G, Space::host, M>& op) {
  const Index ranks = op.B.cols, result = elements(tile_rows, ranks);
  Lanes<Acc> lanes(arena, be.lanes(),
                   {.weights = elements(widened<W, Acc> * tile_cols, ranks),
                    .result = result > rank_block * tile_cols ? result : rank_block * tile_cols});
  const Index padded = blocks_of(op.u.rows, tile_rows) * tile_rows;
  return {lanes, arena.matrix<Acc>(padded, ranks), arena.matrix<Acc>(op.u.rows, ranks),
          loramix::detail::carve_contributions<Acc>(arena, op.gate, op.dgate)};
}
}  // namespace detail

/// Workspace of the composed path.
template <class E, class Acc, class W, class Y, class Score, class G, Major M>
Index composed_scratch(const Backend<E>& be, const ExpandBackward<Acc, W, Y, Score, G, Space::host, M>& op) {
  return carved_bytes<Space::host>([&](Arena<>& arena) { detail::carve(arena, be, op); });
}

template <class E, class Acc, class W, class Y, class Score, class G, Major M>
void composed(const Backend<E>& be, const ExpandBackward<Acc, W, Y, Score, G, Space::host, M>& op, Arena<> work) {
  using namespace detail;
  const ExpandBackwardScratch<Acc> scratch = carve(work, be, op);
  const MatrixView<Acc> gated = scratch.gated, dut = scratch.dut;
  const Index tokens = op.u.rows, ranks = op.B.cols, d_out = op.dy.cols;

  be.run(blocks_of(tokens, tile_rows), [&](Index job, Index lane_id) {
    const Lane<Acc> lane = scratch.lanes[lane_id];
    const Index t = job * tile_rows;
    GemmScratch<Acc> packing(lane.packing);
    fill_zero(lane.result, tile_rows * ranks);
    for (Index c = 0; ranks != 0 && c < d_out; c += tile_cols) {
      const Index n = smaller(tile_cols, d_out - c);
      load_tile(op.dy, t, c, n, lane.tile, tile_cols);
      const auto block = weight_block<Acc>(op.B, c, n, 0, ranks, lane.weights);  // [n, R]
      gemm<Major::row, M>(tile_rows, ranks, n, lane.tile, tile_cols, block.data, block.stride, lane.result, ranks,
                          packing);
    }
    for (Index i = 0; i < smaller(tile_rows, tokens - t); ++i) {
      for (Index j = 0; j < ranks; ++j) dut(t + i, j) = op.scale * lane.result[i * ranks + j];
    }
  });

  using Body = loramix::detail::ApplyGateBackward<Acc, Score, Space::host>;
  const Body body{op.u, dut, op.gate, op.du, scratch.by_token, op.dgate.values, op.gate_values};
  execute_impl(be, Rows<Body, Space::host>{tokens, body}, Arena<>{});
  loramix::detail::sum_contributions(be, op.gate, scratch.by_token, op.dgate, op.parameters, op.gate_values);

  if (op.dB.data == nullptr) return;
  apply_gate(be, op.u, op.gate, gated);
  const Index columns = blocks_of(d_out, tile_cols);
  be.run(columns * blocks_of(ranks, rank_block), [&](Index job, Index lane_id) {
    const Lane<Acc> lane = scratch.lanes[lane_id];
    token_product(lane, MatrixView<const Acc>(gated), tokens, job / columns * rank_block, job % columns * tile_cols,
                  op.scale, op.dB.transposed(), op.parameters,
                  [&](Index t, Index c, Index n) { load_tile(op.dy, t, c, n, lane.tile, tile_cols); });
  });
}

// ---- token product ------------------------------------------------------------------------------------------------

template <class E, class Acc, class Out>
Index scratch_impl(const Backend<E>& be, const TokenProduct<Acc, Out, Space::host>&) {
  return carved_bytes<Space::host>([&](Arena<>& arena) {
    detail::Lanes<Acc>(arena, be.lanes(), {.result = detail::rank_block * detail::tile_cols});
  });
}

template <class E, class Acc, class Out>
void execute_impl(const Backend<E>& be, const TokenProduct<Acc, Out, Space::host>& op, Arena<> work) {
  using namespace detail;
  const Lanes<Acc> lanes(work, be.lanes(), {.result = rank_block * tile_cols});
  const Index columns = blocks_of(op.out.cols, tile_cols);
  be.run(columns * blocks_of(op.out.rows, rank_block), [&](Index job, Index lane_id) {
    const Lane<Acc> lane = lanes[lane_id];
    token_product(lane, op.left, op.left.rows, job / columns * rank_block, job % columns * tile_cols, Acc(1), op.out,
                  op.into, [&](Index t, Index c, Index n) { load_tile(op.right, t, c, n, lane.tile, tile_cols); });
  });
}

}  // namespace cpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
