/// The halves of the product for kernels of your own: what one block does of it, on tensor cores or in FFMA.
///
///   block::expand   sums [64, 32 per warp] += scale · (U ∘ g) Bᵀ: the adapter in the epilogue of a GEMM, y is moved once for both
///   block::shrink   u [64, R] = x Aᵀ: a prologue, for a kernel that has its tokens' tile to itself
///
/// Computes:    the sums of gpu/expand.cuh and gpu/shrink.cuh for tokens [token, token + 64). Sums stay in registers, in an
///              Accumulator, which is what mma.sync leaves: lane 4g + t of warp w has, of rows 16i + g + 8r, columns
///              32w + 8j + 2t and the next one as sum[i][j][2r] and sum[i][j][2r + 1]. each() goes through them.
///              Products are exact (16-bit weights: floats of rank space as terms that hold all of their bits).
/// Reads:       U [T, R_a] of float with a gate's normal form, B [d_out, R] in either order; x [T, d_in], A [R, d_in]. What is
///              outside a matrix counts as 0.
/// Adds to:     an Accumulator per thread; shrink calls f(row, rank, sum), once for every row inside x and every rank.
/// Errors:      none on the device; bad ids close their ranks (and set the form's StatusFlags). The host checks what it launches.
/// Cost:        expand: the strip of B once, ũ once per block. expand_bytes(warps, ranks), shrink_bytes(ranks) of dynamic
///              shared memory, 128-byte aligned, free again at return; a barrier at the beginning and at the end.
/// Determinism: a sum runs over the ranks (or features) in order and depends on its own row and column only. `scale` is applied
///              to ũ, not to the sum: bits differ from those of the op expand.
/// Example:     examples/gpu_engine
#pragma once
#include <loramix/gpu/expand.cuh>
#include <loramix/gpu/shrink.cuh>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace gpu {
namespace block {

/// Sums of a warp, 64 × 32; clear() makes them 0.
using Accumulator = detail::Accumulator;

/// Rank space as expand reads it: a kernel parameter, made on the host.
using Ranks = detail::RankSource<float>;

/// U [T, R_a] through a gate's normal form.
inline Ranks ranks_of(MatrixView<const float, Space::device> u, const GateForm<float, Space::device>& gate) {
  return detail::rank_source(u, gate);
}
/// Every rank open.
inline Ranks ranks_of(MatrixView<const float, Space::device> u) {
  GateForm<float, Space::device> open;
  open.tokens = u.rows;
  open.ranks = u.cols;
  return detail::rank_source(u, open);
}

/// A matrix as kernels copy it: a kernel parameter, made on the host by matrix_of.
template <class E, Major M>
struct Matrix {
  detail::Source<E> source;
};
/// The Matrix of a view.
template <class E, Major M>
Matrix<std::remove_const_t<E>, M> matrix_of(MatrixView<E, Space::device, M> view) {
  using Value = std::remove_const_t<E>;
  return {detail::source_of(MatrixView<const Value, Space::device, M>(view))};
}

namespace detail {

using namespace gpu::detail;

/// The arithmetic of stored operands X and W.
template <class X, class W>
using MathOf = std::conditional_t<is_16bit<W> && std::is_same_v<X, W>, Tensor<W>, Fma<X, W>>;
template <class W>
using RankMathOf = std::conditional_t<is_16bit<W>, Tensor<W>, Fma<float, W>>;

template <class W>
LORAMIX_HD constexpr int rank_pitch(int steps) {
  return (steps * tile_step + 31) / 32 * 32 + RankMathOf<W>::pad_ranks;
}
/// Columns that the 256 threads of shrink have at a time.
LORAMIX_HD constexpr int shrink_group(Index ranks) { return ranks <= 64 ? 64 : ranks <= 128 ? 128 : 256; }

}  // namespace detail

/// Shared memory that expand takes in a block of `warps` warps.
template <class W, Major M>
constexpr Index expand_bytes(int warps, Index ranks) {
  using Strip = detail::Strip<W, M == Major::row>;
  const int steps = static_cast<int>((ranks + detail::tile_step - 1) / detail::tile_step);
  return Index{warps} * Strip::slots * Strip::slot_bytes +
         detail::tile_rows * detail::rank_pitch<W>(steps) * Index{sizeof(float)};
}

/// sums += scale · (U ∘ g) Bᵀ for rows [token, token + 64) and, in warp w, columns [column + 32 w, column + 32 w + 32).
template <class W, Major M>
__device__ void expand(const Ranks& ranks, const Matrix<W, M>& B, float scale, Index token, Index column,
                       Accumulator& sums, unsigned char* shared) {
  using Math = detail::RankMathOf<W>;
  using Strip = detail::Strip<W, M == Major::row>;
  const detail::Lane lane;
  const int warp = static_cast<int>(threadIdx.x) / warp_width, warps = static_cast<int>(blockDim.x) / warp_width;
  const int steps = ranks.steps(), pitch = detail::rank_pitch<W>(steps);
  const Index mine = column + Index{warp} * detail::tile_cols;
  const Strip strip(shared + warp * (Strip::slots * Strip::slot_bytes));
  float* const tile = reinterpret_cast<float*>(shared + warps * (Strip::slots * Strip::slot_bytes));
  const auto request = [&](int s) {
    if (s < steps) strip.request(lane, s, B.source, Index{s} * detail::tile_step, mine);
    detail::commit_copies();
  };
  __syncthreads();  // the caller's use of `shared` is over
  for (int s = 0; s < Strip::ahead; ++s) request(s);
  const Index left = ranks.u.rows - token;
  const int rows = left < 0 ? 0 : left < detail::tile_rows ? static_cast<int>(left) : detail::tile_rows;
  detail::fill_rank_tile(
      ranks, [token](int i) { return token + i; }, rows, detail::tile_rows, steps * detail::tile_step, tile, pitch,
      true, [](int c) { return c; });
  for (int i = warp; i < rows; i += warps) {  // what the same lane has filled
    for (int c = lane.id; c < steps * detail::tile_step; c += warp_width) tile[i * pitch + c] *= scale;
  }
  __syncthreads();
  detail::Extent extent;
  extent.rows = (rows + 15) / 16;
  for (int s = 0; s < steps; ++s) {
    __syncwarp();
    request(s + Strip::ahead);
    Strip::wait();
    Math::step(lane, sums, detail::LeftRanks{tile + s * detail::tile_step, pitch}, strip.right(s), 0, extent);
  }
  detail::wait_copies<0>();
  __syncthreads();
}

/// f(row, column, value) for the sums of this thread: row in [0, 64), column in [0, 32 · warps).
template <class F>
__device__ void each(Accumulator& sums, const F& f) {
  const detail::Lane lane;
  const int first = static_cast<int>(threadIdx.x) / warp_width * detail::tile_cols + 2 * lane.t;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int v = 0; v < 4; ++v) f(16 * i + lane.g + v / 2 * 8, first + 8 * j + v % 2, sums.sum[i][j][v]);
    }
  }
}

/// Shared memory that shrink takes.
template <class X, class W>
constexpr Index shrink_bytes(Index ranks) {
  return detail::ShrinkBlock<detail::MathOf<X, W>, true>::shared_bytes(detail::shrink_group(ranks), false);
}

/// f(row, rank, sum) for u = x Aᵀ of rows [token, token + 64). The block has 256 threads; any of them may get any sum.
template <class X, class W, class F>
__device__ void shrink(const Matrix<X, Major::row>& x, const Matrix<W, Major::row>& A, Index token, const F& f,
                       unsigned char* shared) {
  using Block = detail::ShrinkBlock<detail::MathOf<X, W>, true>;
  detail::ShrinkTask<X, W> task;
  task.x = x.source;
  task.weights = A.source;
  task.ranks = A.source.rows;
  task.columns = static_cast<int>(A.source.rows);
  task.padded = (task.columns + 7) / 8 * 8;
  task.group = detail::shrink_group(task.columns);
  task.chunk = x.source.cols;
  for (int column = 0; column < task.columns; column += task.group) {
    __syncthreads();
    Block(task, shared, token, column).run(f);
  }
  __syncthreads();
}

}  // namespace block
}  // namespace gpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
