/// The middle of a feed-forward block on the CPU (ops/mixlora.hpp): tiles of 64 tokens × 256 columns; inside a tile the
/// tokens that chose an expert are gathered and padded with zeros to a multiple of 8, so that the products treat all of
/// them alike. Tiles for what belongs to a token, columns with tokens in order for what sums over them.
#pragma once
#include <loramix/cpu/composed.hpp>
#include <loramix/cpu/dropout.hpp>
#include <loramix/ops/mixlora.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace cpu {
namespace detail {

/// The tokens of one tile that chose one expert, in order.
template <class Acc>
struct ChosenTokens {
  Index count = 0;
  Index token[tile_rows] = {};
  Index slot[tile_rows] = {};
  Acc weight[tile_rows] = {};

  template <class Score>
  ChosenTokens(const GateForm<Score>& gate, Index t0, Index e) {
    for (Index t = t0; t < smaller(t0 + tile_rows, gate.tokens); ++t) {
      const Index s = loramix::detail::chosen_slot(gate, t, e);
      if (s < 0) continue;
      token[count] = t;
      slot[count] = s;
      weight[count++] = widen<Acc>(gate.id_weights(t, s));
    }
  }
  Index height() const { return (count + 7) / 8 * 8; }
  /// Their rows of v, columns [c, c + n), times `scale`; zeros below.
  template <class X>
  void gather(MatrixView<const X> v, Index c, Index n, Acc scale, Acc* out, Index ld) const {
    for (Index i = 0; i < height(); ++i) {
      for (Index j = 0; j < n; ++j) out[i * ld + j] = i < count ? scale * widen<Acc>(v(token[i], c + j)) : Acc(0);
    }
  }
};

/// One lane's scratch.
template <class Acc>
struct MixLane {
  static constexpr Index tile = tile_rows * tile_cols;
  Acc *t1, *t3, *q;   // [tile_rows, tile_cols] of the chosen tokens
  Acc *first, *then;  // [tile_rows, tile_cols] of all tokens: h̄, or du and dv
  Acc* left;          // [tile_rows, r]
  Acc* weights;       // a block of B1, B3 or A2, widened
  Acc* result;        // what products add to
  Acc* slopes;        // [E, tile_rows] dg
  Acc* packing;

  struct Sizes {
    Index left = 0, weights = 0, result = 0, slopes = 0;
    Index total() const { return 5 * tile + left + weights + result + slopes + GemmScratch<Acc>::elements; }
  };
  MixLane(Acc* memory, const Sizes& s)
      : t1(memory),
        t3(t1 + tile),
        q(t3 + tile),
        first(q + tile),
        then(first + tile),
        left(then + tile),
        weights(left + s.left),
        result(weights + s.weights),
        slopes(result + s.result),
        packing(slopes + s.slopes) {}
};

template <class Acc>
struct MixLanes {
  typename MixLane<Acc>::Sizes sizes;
  MatrixView<Acc> memory;  // [lanes, total]
  MixLane<Acc> operator[](Index lane) const { return {memory.row(lane), sizes}; }
};

/// `of_tile`: values per rank of all experts, `of_columns`: columns of sums per rank of one.
template <class W, class Acc>
MixLanes<Acc> carve_mix(Arena<>& arena, Index lanes, Index ranks, Index experts, Index of_tile, Index of_columns) {
  const auto round_up = [](Index n) {
    return (smaller(n, INT64_MAX / 8) + 15) / 16 * 16;
  };  // four of them fit in Index
  check::at_least("executor", "lanes()", lanes, 1);
  const Index rank = experts > 0 ? ranks / experts : 0;
  const Index tiles = elements(of_tile, ranks), columns = elements(of_columns, rank);
  const typename MixLane<Acc>::Sizes sizes{
      round_up(elements(tile_rows, rank)), round_up(elements(widened<W, Acc> * tile_cols, rank)),
      round_up(tiles > columns ? tiles : columns), round_up(elements(tile_rows, experts))};
  return {sizes, arena.matrix<Acc>(lanes, sizes.total())};
}

/// The kept columns [0, n) of a row's mask, as bits; nullptr: all.
inline const std::uint8_t* mix_bits(const loramix::detail::MixMask& mask, Index n, std::uint8_t* drawn) {
  if (!mask.dropout.on()) return nullptr;
  keep_bits(mask.dropout, mask.token, mask.column, n, drawn);
  return drawn;
}
inline Packet mix_kept(Packet v, const std::uint8_t* bits, Index c) {
  return bits == nullptr ? v : keep_lanes(v, bits, c);
}

/// ops/mixlora.hpp's mix_row and mix_row_backward on packets, for n ≤ tile_cols.
template <class Acc>
void mix_columns(Index n, const loramix::detail::MixMask& mask, Acc g, Acc* t1, const Acc* t3, Acc* sum) {
  if constexpr (!std::is_same_v<Acc, float>) {
    loramix::detail::mix_row(SerialTeam{}, n, mask, g, t1, t3, sum);
  } else {
    std::uint8_t drawn[keep_bytes(tile_cols)];
    const std::uint8_t* const bits = mix_bits(mask, n, drawn);
    const Packet weight = splat(g), kept = splat(static_cast<float>(mask.dropout.kept_scale()));
    over_packets(n, [&](Index c, auto lanes) {
      const Packet a = lanes.load(t1 + c), gh = mul(weight, mul(mul(a, sigmoid(a)), lanes.load(t3 + c)));
      lanes.store(sum + c, add(lanes.load(sum + c), gh));
      lanes.store(t1 + c, mix_kept(mul(gh, kept), bits, c));
    });
  }
}
template <class Acc, class X>
Acc mix_columns_backward(Index n, const loramix::detail::MixMask& mask, Acc g, const X* dhbar, Acc* t1, Acc* t3, Acc* q,
                         Acc* du, Acc* dv) {
  if constexpr (!std::is_same_v<Acc, float> || !(std::is_same_v<X, float> || is_16bit<X>)) {
    return loramix::detail::mix_row_backward(SerialTeam{}, n, mask, g, dhbar, t1, t3, q, du, dv);
  } else {
    std::uint8_t drawn[keep_bytes(tile_cols)];
    const std::uint8_t* const bits = mix_bits(mask, n, drawn);
    const Packet weight = splat(g), one = splat(1), kept = splat(static_cast<float>(mask.dropout.kept_scale()));
    Packet dg = splat(0);
    over_packets(n, [&](Index c, auto lanes) {
      const Packet a = lanes.load(t1 + c), b = lanes.load(t3 + c), sigma = sigmoid(a), act = mul(a, sigma);
      const Packet slope = mul(sigma, fma(a, sub(one, sigma), one)), h = mul(act, b);
      const Packet d = add(lanes.load(dhbar + c), mix_kept(mul(lanes.load(q + c), kept), bits, c)), gd = mul(weight, d);
      const Packet dt1 = mul(mul(gd, b), slope), dt3 = mul(gd, act);
      dg = fma(h, d, dg);
      lanes.store(q + c, mix_kept(mul(mul(weight, h), kept), bits, c));
      lanes.store(t1 + c, dt1);
      lanes.store(t3 + c, dt3);
      if (du == nullptr) return;
      lanes.store(du + c, add(lanes.load(du + c), dt1));
      lanes.store(dv + c, add(lanes.load(dv + c), dt3));
    });
    return detail::sum(dg);
  }
}

/// What one (tile, expert, block of columns) needs.
template <class Acc>
struct MixBlock {
  const MixLane<Acc>& lane;
  const ChosenTokens<Acc>& chosen;
  Index expert, rank, column, width;  // r; c, n

  /// out = v + s Z_e B_eᵀ.
  template <class X, class W, Major M>
  void activation(MatrixView<const X> v, MatrixView<const Acc> z, Acc scale, MatrixView<const W, Space::host, M> B,
                  Acc* out) const {
    chosen.gather(v, column, width, Acc(1), out, tile_cols);
    chosen.gather(z, expert * rank, rank, scale, lane.left, rank);
    const auto block = weight_block<Acc>(B, column, width, expert * rank, rank, lane.weights).transposed();
    product<Major::row, decltype(block)::major>(chosen.height(), width, rank, lane.left, rank, block.data, block.stride,
                                                out, tile_cols);
  }
  /// q = dZ2_e A2_e.
  template <class W>
  void down_gradient(MatrixView<const Acc> dz2, MatrixView<const W> A2) const {
    fill_zero(lane.q, chosen.height() * tile_cols);
    chosen.gather(dz2, expert * rank, rank, Acc(1), lane.left, rank);
    const auto block = weight_block<Acc>(A2, expert * rank, rank, column, width, lane.weights);
    product<Major::row, Major::row>(chosen.height(), width, rank, lane.left, rank, block.data, block.stride, lane.q,
                                    tile_cols);
  }
  /// result [height, r] += tile · w for w [n, r].
  template <class W, Major M>
  void into_ranks(const Acc* tile, MatrixView<const W, Space::host, M> block, Acc* result) const {
    product<Major::row, M>(chosen.height(), rank, width, tile, tile_cols, block.data, block.stride, result, rank);
  }
  /// sum [r, n] += (scale Z_e)ᵀ · tile.
  void over_tokens(MatrixView<const Acc> z, Acc scale, const Acc* tile, Acc* sum) const {
    chosen.gather(z, expert * rank, rank, scale, lane.left, rank);
    product<Major::column, Major::row>(rank, width, chosen.count, lane.left, rank, tile, tile_cols, sum, tile_cols);
  }
  /// t1, t3, then their gradients; dg_i added to slopes where that is given, dt1 and dt3 to the lane's sums.
  template <class Op>
  void backward(const Op& op, Index t0, Acc* slopes) const {
    activation(op.u, op.z1, op.scale, op.B1, lane.t1);
    activation(op.v, op.z3, op.scale, op.B3, lane.t3);
    down_gradient(op.dz2, op.A2);
    for (Index i = 0; i < chosen.count; ++i) {
      const Index at = i * tile_cols, row = (chosen.token[i] - t0) * tile_cols;
      const Acc dg = mix_columns_backward(width, loramix::detail::MixMask{op.dropout, chosen.token[i], column},
                                          chosen.weight[i], op.dhbar.row(chosen.token[i]) + column, lane.t1 + at,
                                          lane.t3 + at, lane.q + at, slopes == nullptr ? nullptr : lane.first + row,
                                          slopes == nullptr ? nullptr : lane.then + row);
      if (slopes != nullptr) slopes[i] += dg;
    }
  }

 private:
  template <Major OrderA, Major OrderB>
  void product(Index m, Index n, Index k, const Acc* a, Index lda, const Acc* b, Index ldb, Acc* c, Index ldc) const {
    GemmScratch<Acc> packing(lane.packing);
    gemm<OrderA, OrderB>(m, n, k, a, lda, b, ldb, c, ldc, packing);
  }
};

/// Rows [t, t + tile) × columns [c, c + n) of `out` = a tile.
template <class Acc, class X>
void store_tile(const Acc* tile, MatrixView<X> out, Index t, Index c, Index n) {
  for (Index i = 0; i < smaller(tile_rows, out.rows - t); ++i) {
    for (Index j = 0; j < n; ++j) out(t + i, c + j) = narrow<X>(tile[i * tile_cols + j]);
  }
}

/// z = scale · result of the tokens that chose an expert, 0 elsewhere, for one tile.
template <class Acc, class Score>
void scatter_ranks(const GateForm<Score>& gate, Index t, Index rank, Acc scale, const Acc* result, MatrixView<Acc> z) {
  for (Index i = t; i < smaller(t + tile_rows, z.rows); ++i) fill_zero(z.row(i), z.cols);
  for (Index e = 0; e < gate.experts; ++e) {
    const ChosenTokens<Acc> chosen(gate, t, e);
    for (Index i = 0; i < chosen.count; ++i) {
      for (Index j = 0; j < rank; ++j) {
        z(chosen.token[i], e * rank + j) = scale * result[(e * tile_rows + i) * rank + j];
      }
    }
  }
}

template <class E, class X, class W, class Acc, class Score, Major M>
MixLanes<Acc> carve(Arena<>& arena, const Backend<E>& be, const MixExperts<X, W, Acc, Score, Space::host, M>& op) {
  return carve_mix<W, Acc>(arena, be.lanes(), op.z1.cols, op.gate.experts, tile_rows, 0);
}
template <class E, class X, class W, class Acc, class Score, class G, Major M>
MixLanes<Acc> carve(Arena<>& arena, const Backend<E>& be,
                    const MixExpertsBackward<X, W, Acc, Score, G, Space::host, M>& op) {
  return carve_mix<W, Acc>(arena, be.lanes(), op.z1.cols, op.gate.experts, 2 * tile_rows, 3 * tile_cols);
}
}  // namespace detail

template <class E, class X, class W, class Acc, class Score, Major M>
Index scratch_impl(const Backend<E>& be, const MixExperts<X, W, Acc, Score, Space::host, M>& op) {
  return carved_bytes<Space::host>([&](Arena<>& arena) { detail::carve(arena, be, op); });
}

template <class E, class X, class W, class Acc, class Score, Major M>
void execute_impl(const Backend<E>& be, const MixExperts<X, W, Acc, Score, Space::host, M>& op, Arena<> work) {
  using namespace detail;
  const MixLanes<Acc> lanes = carve(work, be, op);
  const Index tokens = op.z1.rows, ranks = op.z1.cols, experts = op.gate.experts, rank = ranks / experts;
  be.run(blocks_of(tokens, tile_rows), [&](Index job, Index lane_id) {
    const MixLane<Acc> lane = lanes[lane_id];
    const Index t = job * tile_rows;
    fill_zero(lane.result, tile_rows * ranks);
    for (Index c = 0; c < op.u.cols; c += tile_cols) {
      const Index n = smaller(tile_cols, op.u.cols - c);
      fill_zero(lane.first, MixLane<Acc>::tile);
      for (Index e = 0; e < experts; ++e) {
        const ChosenTokens<Acc> chosen(op.gate, t, e);
        if (chosen.count == 0) continue;
        const MixBlock<Acc> block{lane, chosen, e, rank, c, n};
        block.activation(op.u, op.z1, op.scale, op.B1, lane.t1);
        block.activation(op.v, op.z3, op.scale, op.B3, lane.t3);
        for (Index i = 0; i < chosen.count; ++i) {
          mix_columns(n, loramix::detail::MixMask{op.dropout, chosen.token[i], c}, chosen.weight[i],
                      lane.t1 + i * tile_cols, lane.t3 + i * tile_cols, lane.first + (chosen.token[i] - t) * tile_cols);
        }
        block.into_ranks(lane.t1, weight_block<Acc>(op.A2, e * rank, rank, c, n, lane.weights).transposed(),
                         lane.result + e * tile_rows * rank);
      }
      store_tile(lane.first, op.hbar, t, c, n);
    }
    scatter_ranks(op.gate, t, rank, Acc(1), lane.result, op.z2);
  });
}

template <class E, class X, class W, class Acc, class Score, class G, Major M>
Index scratch_impl(const Backend<E>& be, const MixExpertsBackward<X, W, Acc, Score, G, Space::host, M>& op) {
  return carved_bytes<Space::host>([&](Arena<>& arena) { detail::carve(arena, be, op); });
}

namespace detail {
/// du, dv, dZ1, dZ3 and the weights' gradient of one tile.
template <class Acc, class Op>
void mix_backward_tile(const MixLane<Acc>& lane, const Op& op, Index t) {
  const Index ranks = op.z1.cols, experts = op.gate.experts, rank = ranks / experts;
  Acc* const dz1 = lane.result;
  Acc* const dz3 = lane.result + tile_rows * ranks;
  fill_zero(lane.result, 2 * tile_rows * ranks);
  fill_zero(lane.slopes, tile_rows * experts);
  for (Index c = 0; c < op.u.cols; c += tile_cols) {
    const Index n = smaller(tile_cols, op.u.cols - c);
    fill_zero(lane.first, 2 * MixLane<Acc>::tile);
    for (Index e = 0; e < experts; ++e) {
      const ChosenTokens<Acc> chosen(op.gate, t, e);
      if (chosen.count == 0) continue;
      const MixBlock<Acc> block{lane, chosen, e, rank, c, n};
      block.backward(op, t, lane.slopes + e * tile_rows);
      block.into_ranks(lane.t1, weight_block<Acc>(op.B1, c, n, e * rank, rank, lane.weights),
                       dz1 + e * tile_rows * rank);
      block.into_ranks(lane.t3, weight_block<Acc>(op.B3, c, n, e * rank, rank, lane.weights),
                       dz3 + e * tile_rows * rank);
    }
    store_tile(lane.first, op.du, t, c, n);
    store_tile(lane.then, op.dv, t, c, n);
  }
  scatter_ranks(op.gate, t, rank, op.scale, dz1, op.dz1);
  scatter_ranks(op.gate, t, rank, op.scale, dz3, op.dz3);
  if (op.dweights.data == nullptr) return;
  using Score = std::remove_reference_t<decltype(op.dweights(0, 0))>;
  for (Index i = t; i < smaller(t + tile_rows, op.dweights.rows); ++i) {
    for (Index s = 0; s < op.dweights.cols; ++s) op.dweights(i, s) = Score(0);
  }
  for (Index e = 0; e < experts; ++e) {
    const ChosenTokens<Acc> chosen(op.gate, t, e);
    for (Index i = 0; i < chosen.count; ++i) {
      op.dweights(chosen.token[i], chosen.slot[i]) = narrow<Score>(lane.slopes[e * tile_rows + i]);
    }
  }
}

/// Columns [c, c + n) of the gradients of expert e.
template <class Acc, class Op>
void mix_backward_columns(const MixLane<Acc>& lane, const Op& op, Index e, Index c) {
  const Index rank = op.z1.cols / op.gate.experts, n = smaller(tile_cols, op.u.cols - c);
  Acc* const dB1 = lane.result;
  Acc* const dB3 = dB1 + rank * tile_cols;
  Acc* const dA2 = dB3 + rank * tile_cols;
  fill_zero(lane.result, 3 * rank * tile_cols);
  for (Index t = 0; t < op.u.rows; t += tile_rows) {
    const ChosenTokens<Acc> chosen(op.gate, t, e);
    if (chosen.count == 0) continue;
    const MixBlock<Acc> block{lane, chosen, e, rank, c, n};
    block.backward(op, t, nullptr);
    if (op.dB1.data != nullptr) block.over_tokens(op.z1, op.scale, lane.t1, dB1);
    if (op.dB3.data != nullptr) block.over_tokens(op.z3, op.scale, lane.t3, dB3);
    if (op.dA2.data != nullptr) block.over_tokens(op.dz2, Acc(1), lane.q, dA2);
  }
  const auto store = [&](const Acc* sum, auto out) {  // out [E·r, ff]
    if (out.data == nullptr) return;
    using G = std::remove_reference_t<decltype(out(0, 0))>;
    for (Index i = 0; i < rank; ++i) {
      for (Index j = 0; j < n; ++j) {
        G& cell = out(e * rank + i, c + j);
        const Acc value = sum[i * tile_cols + j];
        cell = narrow<G>(op.parameters == Into::add ? widen<Acc>(cell) + value : value);
      }
    }
  };
  store(dB1, op.dB1.transposed());
  store(dB3, op.dB3.transposed());
  store(dA2, op.dA2);
}
}  // namespace detail

template <class E, class X, class W, class Acc, class Score, class G, Major M>
void execute_impl(const Backend<E>& be, const MixExpertsBackward<X, W, Acc, Score, G, Space::host, M>& op,
                  Arena<> work) {
  using namespace detail;
  const MixLanes<Acc> lanes = carve(work, be, op);
  be.run(blocks_of(op.z1.rows, tile_rows),
         [&](Index job, Index lane) { mix_backward_tile(lanes[lane], op, job * tile_rows); });
  if (op.dB1.data == nullptr && op.dB3.data == nullptr && op.dA2.data == nullptr) return;
  const Index columns = blocks_of(op.u.cols, tile_cols);
  be.run(columns * op.gate.experts, [&](Index job, Index lane) {
    mix_backward_columns(lanes[lane], op, job / columns, job % columns * tile_cols);
  });
}

}  // namespace cpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
