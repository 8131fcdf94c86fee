/// The kernel of products that contract over ranks: Y (+)= s (U ∘ g) Bᵀ, and in backward dX (+)= (dU A) ∘ keep/(1 − p̄) + dH side.
///
/// Computes:    a block has 64 tokens and `tiles` times 32 columns per warp. It fills its tile of ũ once (ranks.cuh), then every
///              warp streams its own strip of B and adds its own sums to y: one rounding per element.
/// Reads:       ranks (u [T, R_a], a gate, h [T, n]), B [R, N] or [N, R], side [n, N].
/// Adds to:     y [T, N], or assigns: then y is never read.
/// Cost:        y once; B once per 64 tokens; ũ once per block. More than `window` steps of ranks: once per 256 columns.
/// Determinism: an element's sum runs over the ranks in order, then over the side rows, whatever T and the grid.
/// Example:     gpu/fused.cuh
#pragma once
#include <loramix/core/draws.hpp>
#include <loramix/gpu/selection.cuh>
#include <loramix/gpu/strip.cuh>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace gpu {
namespace detail {

inline constexpr int strip_warps = 8;  // of a block, each with 32 columns

template <class Y, class W>
struct ExpandTask {
  RankSource<float> ranks;
  Source<W> weights;  // [R, N], or [N, R] where the ranks are contiguous
  Source<W> side;     // [n, N], as the weights
  float scale = 1;
  Dropout dropout;  // of the ranks' sum
  float kept = 1;   // 1 / (1 − p̄)
  MatrixView<Y, Space::device> y;
  Into into = Into::add;
  bool aligned = false;  // rows of y begin on 16 bytes
  int tiles = 1;         // of 256 columns, per block
  int window = 16;       // steps of ranks in shared memory at a time
};

template <class Math, class Y, bool by_column>
class ExpandBlock {
  using W = typename Math::Right;
  using Task = ExpandTask<Y, W>;
  using WeightStrip = Strip<W, by_column>;

 public:
  static constexpr Index shared_bytes(int window, bool sparse) {
    return shared_bytes_of(window) + (sparse ? selection_bytes : 0);
  }

  __device__ ExpandBlock(const Task& task_, unsigned char* shared)
      : task(task_),
        selected(shared + shared_bytes_of(task_.window)),
        strip(shared + threadIdx.x / 32 * (WeightStrip::slots * WeightStrip::slot_bytes)),
        ranks(reinterpret_cast<float*>(shared + strip_warps * WeightStrip::slots * WeightStrip::slot_bytes)),
        rank_pitch(pitch_of(task_.window)),
        token(Index{blockIdx.x} * tile_rows),
        steps(task_.ranks.steps()),
        all_rank_steps(task_.ranks.padded / tile_step),
        rank_steps(all_rank_steps) {
    const Index left = task.y.rows - token;
    rows = left < tile_rows ? static_cast<int>(left) : tile_rows;
    extent.rows = (rows + 15) / 16;
    const Index before = Index{blockIdx.y} * task.tiles;
    const Index all = (task.y.cols + strip_warps * tile_cols - 1) / (strip_warps * tile_cols);
    tiles = static_cast<int>(min(Index{task.tiles}, all - before));
    first_column = before * strip_warps * tile_cols + threadIdx.x / 32 * tile_cols;
  }

  __device__ void run() {
    if (task.ranks.sparse) select();
    const int count = tiles * steps;
    for (int s = 0; s < WeightStrip::ahead; ++s) request(s, count);
    int filled = -1, s = 0;
    for (int tile = 0; tile < tiles; ++tile) {
      const Index column = column_of(tile);
      prefetch_rows(column);
      Accumulator acc;
      acc.clear();
      for (int step = 0; step < steps; ++step, ++s) {
        if (step / task.window != filled) fill(filled = step / task.window);
        if (step == rank_steps && task.dropout.on()) drop(acc, column);
        __syncwarp();
        request(s + WeightStrip::ahead, count);
        WeightStrip::wait();
        if (column < task.y.cols) {
          const LeftRanks left{ranks + step % task.window * tile_step, rank_pitch};
          Math::step(lane, acc, left, strip.right(s), 0, extent);
        }
      }
      if (steps == rank_steps && task.dropout.on()) drop(acc, column);
      add_to_y(acc, column);
    }
    wait_copies<0>();
  }

 private:
  LORAMIX_HD static constexpr int pitch_of(int window) { return (window * tile_step + 31) / 32 * 32 + Math::pad_ranks; }
  LORAMIX_HD static constexpr int shared_bytes_of(int window) {
    return strip_warps * WeightStrip::slots * WeightStrip::slot_bytes +
           tile_rows * pitch_of(window) * static_cast<int>(sizeof(float));
  }

  /// Only the steps of ranks that a token of the tile has open; those of side rows stay.
  __device__ void select() {
    selected.clear(all_rank_steps);
    for (int i = static_cast<int>(threadIdx.x); i < rows; i += static_cast<int>(blockDim.x)) {
      each_open_range(task.ranks.gate, token + i, [&](int begin, int end) {
        for (int step = begin / tile_step; step * tile_step < end; ++step) selected.add(step);
      });
    }
    rank_steps = selected.finish(all_rank_steps);
    steps += rank_steps - all_rank_steps;
  }
  /// The i-th step, of ranks or of side rows, in steps of all.
  __device__ int step_at(int i) const {
    if (i >= rank_steps) return all_rank_steps + i - rank_steps;
    return task.ranks.sparse ? selected[i] : i;
  }
  __device__ Index column_of(int tile) const { return first_column + Index{tile} * (strip_warps * tile_cols); }

  /// Step s of all column tiles' steps, one after the other.
  __device__ void request(int s, int count) const {
    if (s < count) {
      const int step = s % steps;
      const Index column = column_of(s / steps);
      const bool side = step >= rank_steps;
      if (column < task.y.cols) {
        strip.request(lane, s, side ? task.side : task.weights,
                      Index{side ? step - rank_steps : step_at(step)} * tile_step, column);
      }
    }
    commit_copies();
  }

  /// Window w of ũ.
  __device__ void fill(int w) const {
    const int first = w * task.window;
    const int count = min(task.window, steps - first) * tile_step;
    __syncthreads();  // nobody reads the window before
    fill_rank_tile(task.ranks, token, rows, extent.rows * 16, count, ranks, rank_pitch, w == 0 && blockIdx.y == 0,
                   [&](int c) { return step_at(first + c / tile_step) * tile_step + c % tile_step; });
    __syncthreads();
  }

  /// acc ∘ keep / (1 − p̄). Lane t of a quad draws for the t-th eight columns of a row.
  __device__ void drop(Accumulator& acc, Index column) const {
    constexpr unsigned all = 0xffffffffu;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i >= extent.rows) break;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const std::uint32_t drawn = task.dropout.keep8(token + 16 * i + lane.g + 8 * r, column / 8 + lane.t);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const std::uint32_t keep = __shfl_sync(all, drawn, 4 * lane.g + j) >> 2 * lane.t;
          float* const v = acc.sum[i][j] + 2 * r;
          v[0] = keep & 1u ? v[0] * task.kept : 0.0f;
          v[1] = keep & 2u ? v[1] * task.kept : 0.0f;
        }
      }
    }
  }

  /// y will be wanted when the products are done.
  __device__ void prefetch_rows(Index column) const {
    if (task.into == Into::set || column >= task.y.cols) return;
    for (int row = lane.id; row < rows; row += 32) prefetch(task.y.row(token + row) + column);
  }

  __device__ void add_to_y(const Accumulator& acc, Index column) const {
    if (column >= task.y.cols) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i >= extent.rows) break;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = 16 * i + lane.g + 8 * r;
        if constexpr (sizeof(Y) == 2) {
          const float pairs[4][2] = {{acc.sum[i][0][2 * r], acc.sum[i][0][2 * r + 1]},
                                     {acc.sum[i][1][2 * r], acc.sum[i][1][2 * r + 1]},
                                     {acc.sum[i][2][2 * r], acc.sum[i][2][2 * r + 1]},
                                     {acc.sum[i][3][2 * r], acc.sum[i][3][2 * r + 1]}};
          float eight[8];
          quad_transpose(lane, pairs, eight);
          if (row < rows) add<8>(token + row, column + 8 * lane.t, eight);
        } else {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float two[2] = {acc.sum[i][j][2 * r], acc.sum[i][j][2 * r + 1]};
            if (row < rows) add<2>(token + row, column + 8 * j + 2 * lane.t, two);
          }
        }
      }
    }
  }
  /// n neighbouring elements of a row.
  template <int n>
  __device__ void add(Index t, Index column, const float (&sum)[n]) const {
    Y* const cell = task.y.row(t) + column;
    if (task.aligned && column + n <= task.y.cols) {
      Vector<n, Y> vector{};
      if (task.into == Into::add) vector = Vector<n, Y>::load(cell);
#pragma unroll
      for (int c = 0; c < n; ++c) vector.v[c] = added(vector.v[c], sum[c]);
      vector.store(cell);
    } else {
#pragma unroll
      for (int c = 0; c < n; ++c) {
        if (column + c < task.y.cols) cell[c] = added(task.into == Into::add ? cell[c] : Y{}, sum[c]);
      }
    }
  }
  __device__ Y added(Y before, float sum) const {
    const float v = task.scale * sum;
    return narrow<Y>(task.into == Into::add ? widen<float>(before) + v : v);
  }

  const Task& task;
  const Listed selected;
  const WeightStrip strip;
  float* const ranks;  // [64, rank_pitch]
  const int rank_pitch;
  const Lane lane;
  const Index token;  // first of the tile
  int steps;          // of ranks, then of side rows
  const int all_rank_steps;
  int rank_steps;
  int rows, tiles;  // tokens and column tiles of this block
  Index first_column;
  Extent extent;
};

template <class Math, class Y, bool by_column>
__global__ void __launch_bounds__(32 * strip_warps, 1)
    expand_kernel(const __grid_constant__ ExpandTask<Y, typename Math::Right> task) {
  extern __shared__ __align__(128) unsigned char shared_memory[];
  ExpandBlock<Math, Y, by_column>(task, shared_memory).run();
}

}  // namespace detail
}  // namespace gpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
