/// The gated product on the GPU, composed: cuBLAS product, gate, cuBLAS product. Float, double and 16-bit activations and
/// weights in any mix, every gate, every size: what the fused kernels do not take, and what they are tested against.
///
/// Computes:    Shrink, ShrinkBackward (ops/shrink.hpp), Expand, ExpandBackward (ops/expand.hpp), TokenProduct. Tokens go in
///              chunks of 1024. What is not in the accumulation type (float or double) is widened into scratch, and results of
///              other types are summed there and rounded once; the rest is read and written in place.
/// Reads / Writes / Adds to: as the ops say; strided views are used as they are.
/// Errors:      as the ops say, before the first launch; cuBLAS and CUDA failures (ErrorCode::device). Bad ids, groups and
///              segments contribute nothing and set the backend's StatusFlags.
/// Cost:        the ops' flop. Scratch beside cuBLAS's (gpu/backend.cuh): widened weights; one chunk of x, y or dX where it
///              is widened or dropped out; T·R gated values, twice that backward, and what the gate's gradient needs.
/// Determinism: sums over tokens add chunk after chunk; the order inside a chunk is cuBLAS's. Run to run the same bits.
/// Example:     tests/gpu/product.cu
#pragma once
#include <loramix/gpu/staging.cuh>
#include <loramix/ops/expand.hpp>
#include <loramix/ops/shrink.hpp>
#include <loramix/ops/token_product.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace gpu {
namespace detail {

/// ũ = U ∘ g.
template <class Acc, class Score>
void apply_gate(const Backend& be, View<const Acc> u, const GateForm<Score, Space::device>& gate, View<Acc> gated) {
  using Body = loramix::detail::ApplyGate<Acc, Score, Space::device>;
  execute_impl(be, Rows<Body, Space::device>{u.rows, {u, gate, gated}}, DeviceArena{});
}

// ---- scratch ---------------------------------------------------------------------------------------------------------

template <class Acc>
struct ShrinkScratch {
  std::byte* blas;
  View<Acc> A, side;  // widened
  View<Acc> tile;     // [chunk, d_in]: x, x̂
  View<Acc> h;        // [chunk, n]
};
template <class X, class W, class Acc, class Score>
ShrinkScratch<Acc> carve(DeviceArena& arena, const Backend& be, const Shrink<X, W, Acc, Score, Space::device>& op) {
  const Index tokens = op.x.rows, width = op.x.cols, side = op.side.rows;
  return {carve_blas(arena, be), carve_widened<W, Acc>(arena, op.A.rows, width),
          carve_widened<W, Acc>(arena, side, width),
          carve_tile<Acc>(arena, widened<X, Acc> || op.dropout.on(), tokens, width),
          carve_tile<Acc>(arena, widened<Score, Acc>, tokens, side)};
}

template <class Acc>
struct ShrinkBackwardScratch {
  std::byte* blas;
  View<Acc> A, side;    // widened
  View<Acc> tile;       // [chunk, d_in]: x, x̂, then the sum for dX
  View<Acc> dh;         // [chunk, n]
  View<Acc> dA, dside;  // sums
};
template <class X, class W, class Acc, class Score, class G>
ShrinkBackwardScratch<Acc> carve(DeviceArena& arena, const Backend& be,
                                 const ShrinkBackward<X, W, Acc, Score, G, Space::device>& op) {
  const Index tokens = op.x.rows, width = op.x.cols, ranks = op.A.rows, side = op.side.rows;
  return {carve_blas(arena, be),
          carve_widened<W, Acc>(arena, ranks, width),
          carve_widened<W, Acc>(arena, side, width),
          carve_tile<Acc>(arena, widened<X, Acc> || op.dropout.on(), tokens, width),
          carve_tile<Acc>(arena, widened<Score, Acc>, tokens, side),
          carve_widened<G, Acc>(arena, ranks, width),
          carve_widened<G, Acc>(arena, side, width)};
}

template <class Acc>
struct ExpandScratch {
  std::byte* blas;
  View<Acc> B;      // widened, row-major in the order of storage
  View<Acc> gated;  // [T, R]
  View<Acc> tile;   // [chunk, d_out]: the sum for y
};
template <class Acc, class W, class Y, class Score, Major M>
ExpandScratch<Acc> carve(DeviceArena& arena, const Backend& be, const Expand<Acc, W, Y, Score, Space::device, M>& op) {
  const Index tokens = op.u.rows, ranks = op.B.cols, width = op.B.rows;
  constexpr bool rows = M == Major::row;
  return {carve_blas(arena, be), carve_widened<W, Acc>(arena, rows ? width : ranks, rows ? ranks : width),
          arena.matrix<Acc>(tokens, ranks), carve_tile<Acc>(arena, widened<Y, Acc>, tokens, width)};
}

template <class Acc>
struct ExpandBackwardScratch {
  std::byte* blas;
  View<Acc> B;           // widened, row-major in the order of storage
  View<Acc> gated, dut;  // [T, R]
  View<Acc> tile;        // [chunk, d_out]: dy
  View<Acc> dB;          // sum, in the order of storage
  loramix::detail::GateContributions<Acc, Space::device> by_token;
};
template <class Acc, class W, class Y, class Score, class G, Major M>
ExpandBackwardScratch<Acc> carve(DeviceArena& arena, const Backend& be,
                                 const ExpandBackward<Acc, W, Y, Score, G, Space::device, M>& op) {
  const Index tokens = op.u.rows, ranks = op.B.cols, width = op.B.rows;
  constexpr bool rows = M == Major::row;
  return {carve_blas(arena, be),
          carve_widened<W, Acc>(arena, rows ? width : ranks, rows ? ranks : width),
          arena.matrix<Acc>(tokens, ranks),
          arena.matrix<Acc>(tokens, ranks),
          carve_tile<Acc>(arena, widened<Y, Acc>, tokens, width),
          carve_widened<G, Acc>(arena, rows ? width : ranks, rows ? ranks : width),
          loramix::detail::carve_contributions<Acc>(arena, op.gate, op.dgate, op.gate_values)};
}

/// dX (+)= (dU A) ∘ keep / (1 − p̄) + dH side, for the rows of one chunk.
template <class X, class Acc>
void input_gradient(const Backend& be, const Blas& blas, View<const Acc> du, View<const Acc> A, View<const Acc> dh,
                    View<const Acc> side, const Dropout& dropout, View<Acc> tile, View<X> dx, Into into) {
  if constexpr (!widened<X, Acc>) {
    if (!dropout.on()) {
      blas.multiply(Acc(1), du, A, dx, into);
      if (side.rows != 0) blas.multiply(Acc(1), dh, side, dx, Into::add);
      return;
    }
  }
  const auto sum = tile.row_range(0, dx.rows);
  const View<const Acc> summed = sum;
  blas.multiply(Acc(1), du, A, sum, Into::set);
  if (dropout.on()) load(be, summed, dropout, sum);
  if (side.rows != 0) blas.multiply(Acc(1), dh, side, sum, Into::add);
  store(be, summed, dx, into);
}

template <class Acc>
struct TokenProductScratch {
  std::byte* blas;
  MatrixView<Acc, Space::device> room;  // the sum, where Out is not Acc
};
template <class Acc, class Out>
TokenProductScratch<Acc> carve(Arena<Space::device>& arena, const Backend& be,
                               const TokenProduct<Acc, Out, Space::device>& op) {
  return {carve_blas(arena, be), carve_widened<Out, Acc>(arena, op.out.rows, op.out.cols)};
}

namespace composed {

template <class Op>
Index scratch(const Backend& be, const Op& op) {
  return carved_bytes<Space::device>([&](DeviceArena& arena) { carve(arena, be, op); });
}

// ---- shrink ----------------------------------------------------------------------------------------------------------

template <class X, class W, class Acc, class Score>
void execute(const Backend& be, const Shrink<X, W, Acc, Score, Space::device>& op, DeviceArena work) {
  const ShrinkScratch<Acc> scratch = carve(work, be, op);
  const Blas blas(be, scratch.blas);
  const auto A = load_weights(be, op.A, scratch.A), side = load_weights(be, op.side, scratch.side);
  for_chunks(op.x.rows, [&](Index t, Index n) {
    const auto x = op.x.row_range(t, n);
    if (side.rows != 0) {
      const auto plain = load(be, x, Dropout{}, scratch.tile);
      const auto h = op.h.row_range(t, n);
      if constexpr (widened<Score, Acc>) {
        const auto sum = scratch.h.row_range(0, n);
        blas.multiply(Acc(1), plain, side.transposed(), sum, Into::set);
        store(be, View<const Acc>(sum), h, Into::set);
      } else {
        blas.multiply(Acc(1), plain, side.transposed(), h, Into::set);
      }
    }
    const auto dropped = load(be, x, from_token(op.dropout, t), scratch.tile);
    blas.multiply(Acc(1), dropped, A.transposed(), op.u.row_range(t, n), Into::set);
  });
}

template <class X, class W, class Acc, class Score, class G>
void execute(const Backend& be, const ShrinkBackward<X, W, Acc, Score, G, Space::device>& op, DeviceArena work) {
  const ShrinkBackwardScratch<Acc> scratch = carve(work, be, op);
  const Blas blas(be, scratch.blas);
  const auto A = load_weights(be, op.A, scratch.A), side = load_weights(be, op.side, scratch.side);
  const TokenSum<Acc, G> dA{op.dA, op.parameters, scratch.dA}, dside{op.dside, op.parameters, scratch.dside};
  for_chunks(op.x.rows, [&](Index t, Index n) {
    const auto x = op.x.row_range(t, n);
    const auto du = op.du.row_range(t, n);
    const Dropout dropout = from_token(op.dropout, t);
    View<const Acc> dh;
    if (side.rows != 0) dh = load(be, op.dh.row_range(t, n), Dropout{}, scratch.dh);
    if (dside.wanted()) dside.add(blas, Acc(1), dh, load(be, x, Dropout{}, scratch.tile), t == 0);
    if (dA.wanted()) dA.add(blas, Acc(1), du, load(be, x, dropout, scratch.tile), t == 0);
    if (op.dx.data != nullptr) {
      input_gradient(be, blas, du, A, dh, side, dropout, scratch.tile, op.dx.row_range(t, n), op.input);
    }
  });
  if (dside.wanted()) dside.finish(be);
  if (dA.wanted()) dA.finish(be);
}

// ---- expand ----------------------------------------------------------------------------------------------------------

template <class Acc, class W, class Y, class Score, Major M>
void execute(const Backend& be, const Expand<Acc, W, Y, Score, Space::device, M>& op, DeviceArena work) {
  const ExpandScratch<Acc> scratch = carve(work, be, op);
  const Blas blas(be, scratch.blas);
  const auto B = load_weights(be, op.B, scratch.B);
  apply_gate(be, op.u, reporting(be, op.gate), scratch.gated);
  for_chunks(op.u.rows, [&](Index t, Index n) {
    const auto gated = scratch.gated.row_range(t, n);
    const auto y = op.y.row_range(t, n);
    if constexpr (widened<Y, Acc>) {
      const auto sum = scratch.tile.row_range(0, n);
      blas.multiply(op.scale, gated, B.transposed(), sum, Into::set);
      store(be, View<const Acc>(sum), y, op.into);
    } else {
      blas.multiply(op.scale, gated, B.transposed(), y, op.into);
    }
  });
}

template <class Acc, class W, class Y, class Score, class G, Major M>
void execute(const Backend& be, const ExpandBackward<Acc, W, Y, Score, G, Space::device, M>& op, DeviceArena work) {
  const ExpandBackwardScratch<Acc> scratch = carve(work, be, op);
  const Blas blas(be, scratch.blas);
  const auto B = load_weights(be, op.B, scratch.B);
  const auto gate = reporting(be, op.gate);
  const auto dB_rows = [&] {  // dB or, where it is column-major, dBᵀ
    if constexpr (M == Major::row)
      return op.dB;
    else
      return op.dB.transposed();
  }();
  const TokenSum<Acc, G> dB{dB_rows, op.parameters, scratch.dB};

  if (dB.wanted()) apply_gate(be, op.u, gate, scratch.gated);
  for_chunks(op.u.rows, [&](Index t, Index n) {
    const auto dy = load(be, op.dy.row_range(t, n), Dropout{}, scratch.tile);
    const View<const Acc> gated = scratch.gated.row_range(t, n);
    blas.multiply(op.scale, dy, B, scratch.dut.row_range(t, n), Into::set);
    if (dB.wanted()) dB.add(blas, op.scale, M == Major::row ? dy : gated, M == Major::row ? gated : dy, t == 0);
  });
  if (dB.wanted()) dB.finish(be);

  using Body = loramix::detail::ApplyGateBackward<Acc, Score, Space::device>;
  const Body body{op.u, scratch.dut, gate, op.du, scratch.by_token, op.dgate.values, op.gate_values};
  gpu::execute_impl(be, Rows<Body, Space::device>{op.u.rows, body}, DeviceArena{});
  loramix::detail::sum_contributions(be, gate, scratch.by_token, op.dgate, op.parameters, op.gate_values);
}

// ---- token product ---------------------------------------------------------------------------------------------------

template <class Acc, class Out>
void execute(const Backend& be, const TokenProduct<Acc, Out, Space::device>& op, Arena<Space::device> work) {
  const TokenProductScratch<Acc> scratch = carve(work, be, op);
  const Blas blas(be, scratch.blas);
  const TokenSum<Acc, Out> sum{op.out, op.into, scratch.room};
  for_chunks(op.left.rows, [&](Index t, Index n) {
    sum.add(blas, Acc(1), op.left.row_range(t, n), op.right.row_range(t, n), t == 0);
  });
  sum.finish(be);
}

}  // namespace composed
}  // namespace detail
}  // namespace gpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
