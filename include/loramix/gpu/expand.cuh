/// The kernel of products that contract over ranks: Y (+)= s (U ∘ g) Bᵀ, and in backward dX (+)= (dU A) ∘ keep/(1 − p̄) + dH side.
///
/// Computes:    a block has 64 tokens and `tiles` times 32 columns per warp. It fills its tile of ũ once (ranks.cuh), then every
///              warp streams its own strip of B and adds its own sums to y: one rounding per element.
/// Reads:       ranks (u [T, R_a], a gate, h [T, n]), B [R, N] or [N, R], side [n, N].
/// Adds to:     y [T, N], or assigns: then y is never read. Where ranks are grouped, a row to which nothing is added stays as it is.
/// Cost:        y once; B once per 64 tokens; ũ once per block. More than `window` steps of ranks: once per tile of columns.
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

/// Warps of a block, each with 32 columns.
template <class Math, bool sparse>
inline constexpr int strip_warps = sparse ? 8 : Math::strip_warps;

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
  int tiles = 1;         // of 32 columns per warp, per block
  int window = 16;       // steps of ranks in shared memory at a time
  int unit = 1;          // steps that a token has open together, where ranks.sparse; window is a multiple of it
};

/// `sparse`: steps of ranks are taken unit by unit (gpu/selection.cuh), and of a unit the rows that have one of its ranks open,
/// sixteen at a time. Where the next unit has other rows, sums change places with the tile's in shared memory: every row's is one
/// chain over its own units.
template <class Math, class Y, bool by_column, bool sparse = false>
class ExpandBlock {
  using W = typename Math::Right;
  using Task = ExpandTask<Y, W>;
  using WeightStrip = Strip<W, by_column>;
  static constexpr int warps = strip_warps<Math, sparse>;

 public:
  static constexpr Index shared_bytes(int window, int units) {
    return shared_bytes_of(window) + (sparse ? warps * sum_bytes + window * tile_rows + Units::bytes(units) : 0);
  }

  __device__ ExpandBlock(const Task& task_, unsigned char* shared)
      : task(task_),
        sums(reinterpret_cast<float*>(shared + shared_bytes_of(task_.window) + threadIdx.x / 32 * sum_bytes)),
        rows_of(shared + shared_bytes_of(task_.window) + warps * sum_bytes),
        units(rows_of + task_.window * tile_rows, task_.ranks.padded / (task_.unit * tile_step)),
        strip(shared + threadIdx.x / 32 * (WeightStrip::slots * WeightStrip::slot_bytes)),
        ranks(reinterpret_cast<float*>(shared + warps * WeightStrip::slots * WeightStrip::slot_bytes)),
        rank_pitch(pitch_of(task_.window)),
        token(Index{blockIdx.x} * tile_rows),
        steps(task_.ranks.steps()),
        all_rank_steps(task_.ranks.padded / tile_step),
        rank_steps(all_rank_steps) {
    const Index left = task.y.rows - token;
    rows = left < tile_rows ? static_cast<int>(left) : tile_rows;
    extent.rows = (rows + 15) / 16;
    const Index before = Index{blockIdx.y} * task.tiles;
    const Index all = (task.y.cols + warps * tile_cols - 1) / (warps * tile_cols);
    tiles = static_cast<int>(min(Index{task.tiles}, all - before));
    first_column = before * warps * tile_cols + threadIdx.x / 32 * tile_cols;
  }

  __device__ void run() {
    if constexpr (sparse)
      run_units();
    else
      run_steps();
  }

 private:
  // ---- step by step ------------------------------------------------------------------------------------------------------

  __device__ void run_steps() {
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

  LORAMIX_HD static constexpr int pitch_of(int window) { return (window * tile_step + 31) / 32 * 32 + Math::pad_ranks; }
  LORAMIX_HD static constexpr int shared_bytes_of(int window) {
    return warps * WeightStrip::slots * WeightStrip::slot_bytes +
           tile_rows * pitch_of(window) * static_cast<int>(sizeof(float));
  }

  // ---- unit by unit ------------------------------------------------------------------------------------------------------

  static constexpr int sum_pitch = tile_cols + 8;  // of a warp's sums
  static constexpr int sum_bytes = tile_rows * sum_pitch * static_cast<int>(sizeof(float));

  __device__ void run_units() {
    select();
    const bool adds = steps == 0 && task.into == Into::add;  // nothing: y stays as it is
    const int count = adds ? 0 : tiles * steps, window = task.window / task.unit;
    for (int s = 0; s < WeightStrip::ahead; ++s) request(s, count);
    int filled = -1, s = 0;
    for (int tile = 0; tile < tiles && !adds; ++tile) {
      const Index column = column_of(tile);
      prefetch_rows(column);
      Accumulator acc;
      acc.clear();
      const RowSet all = ~RowSet{0} >> (64 - rows);
      RowSet held = 0, left = 0;  // rows whose sums acc has, listed at `place` of the window; and shared memory
      for (int unit = 0, place = 0;; ++unit) {
        const bool more = unit * task.unit < rank_steps;
        if (!more && held == all) break;  // row by row already: such a list has no gap
        const bool refill = more && unit / window != filled;
        const RowSet next = more ? units.rows(unit) : 0;
        if (refill || next != held) {
          if (held != 0) exchange<true>(acc, held, place);
          left |= held;
          if (refill) fill_units(filled = unit / window, window);
          held = next;
          place = unit % window;
          extent.rows = (__popcll(held) + 15) / 16;
          if (held != 0) exchange<false>(acc, left, place);
        }
        if (!more) break;
        for (int i = 0; i < task.unit; ++i, ++s) multiply(acc, s, count, unit % window * task.unit + i, column);
      }
      if (held != all) gather(acc, left);
      extent.rows = (rows + 15) / 16;
      if (task.dropout.on()) drop(acc, column);
      for (int step = rank_steps; step < steps; ++step, ++s) {  // side rows: every row
        const int w = (step - rank_steps) / task.window, behind = (rank_steps / task.unit + window - 1) / window;
        if (behind + w != filled) fill_side(w), filled = behind + w;
        multiply(acc, s, count, (step - rank_steps) % task.window, column);
      }
      add_to_y(acc, column);
    }
    wait_copies<0>();
  }
  /// Step s of all tiles' steps, whose ranks are step `place` of the window.
  __device__ void multiply(Accumulator& acc, int s, int count, int place, Index column) const {
    __syncwarp();
    request(s + WeightStrip::ahead, count);
    WeightStrip::wait();
    if (column >= task.y.cols) return;
    Math::step(lane, acc, LeftRanks{ranks + place * tile_step, rank_pitch}, strip.right(s), 0, extent);
  }
  /// Puts the rows of acc, those of `set`, where the warp's sums are; or takes what is there of them, zeros for rows that are not
  /// in `set`. Place `place` of the window lists them.
  template <bool put>
  __device__ void exchange(Accumulator& acc, RowSet set, int place) const {
    const unsigned char* const list = rows_of + place * tile_rows;
    const int listed = extent.rows * 16;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (16 * i >= listed) break;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = list[16 * i + lane.g + 8 * r];  // 64: none
        const bool there = row < tile_rows && (set >> row & 1u) != 0;
        float* const at = sums + (there ? row : 0) * sum_pitch + 2 * lane.t;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float2* const cell = reinterpret_cast<float2*>(at + 8 * j);
          float* const v = acc.sum[i][j] + 2 * r;
          if constexpr (put) {
            if (there) *cell = {v[0], v[1]};
          } else {
            const float2 from = there ? *cell : float2{0, 0};
            v[0] = from.x, v[1] = from.y;
          }
        }
      }
    }
    __syncwarp();
  }
  /// The warp's sums, row by row, zeros for rows that are not in `set`.
  __device__ void gather(Accumulator& acc, RowSet set) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = 16 * i + lane.g + 8 * r;
        const bool there = (set >> row & 1u) != 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float2 v =
              there ? *reinterpret_cast<const float2*>(sums + row * sum_pitch + 8 * j + 2 * lane.t) : float2{0, 0};
          acc.sum[i][j][2 * r] = v.x;
          acc.sum[i][j][2 * r + 1] = v.y;
        }
      }
    }
    __syncwarp();
  }

  /// The units that a token of the tile has open, and their rows.
  __device__ void select() {
    const int ranks_of_unit = task.unit * tile_step;
    units.clear();
    for (int i = static_cast<int>(threadIdx.x); i < rows; i += static_cast<int>(blockDim.x)) {
      each_open_range(task.ranks.gate, token + i, [&](int begin, int end) {
        for (int unit = begin / ranks_of_unit; unit * ranks_of_unit < end; ++unit) units.add(unit, i);
      });
    }
    rank_steps = units.finish() * task.unit;
    steps += rank_steps - all_rank_steps;
  }
  /// Window w of units: the rows of each, one below the other, and zeros up to a multiple of 16.
  __device__ void fill_units(int w, int window) const {
    const int first = w * window, count = min(window, rank_steps / task.unit - first), width = task.unit * tile_step;
    const int warp = static_cast<int>(threadIdx.x) / 32;
    __syncthreads();  // nobody reads the window before
    for (int place = warp; place < count; place += warps) units.list_rows(first + place, rows_of + place * tile_rows);
    __syncthreads();
    for (int place = 0; place < count; ++place) {
      const int listed = __popcll(units.rows(first + place)), rank = units[first + place] * width;
      const unsigned char* const list = rows_of + place * tile_rows;
      for (int i = warp; i < (listed + 15) / 16 * 16; i += warps) {
        fill_rank_row(task.ranks, list[i] < tile_rows ? token + list[i] : Index{-1}, width,
                      ranks + i * rank_pitch + place * width, false, [rank](int c) { return rank + c; });
      }
    }
    __syncthreads();
  }
  /// Window w of side rows.
  __device__ void fill_side(int w) const {
    const int first = w * task.window, count = min(task.window, steps - rank_steps - first) * tile_step;
    const int column = (all_rank_steps + first) * tile_step;
    __syncthreads();
    fill_rank_tile(
        task.ranks, [this](int i) { return token + i; }, rows, extent.rows * 16, count, ranks, rank_pitch, false,
        [column](int c) { return column + c; });
    __syncthreads();
  }

  // ---- both --------------------------------------------------------------------------------------------------------------

  /// The i-th step, of ranks or of side rows, in steps of all.
  __device__ int step_at(int i) const {
    if (i >= rank_steps) return all_rank_steps + i - rank_steps;
    if constexpr (sparse)
      return units[i / task.unit] * task.unit + i % task.unit;
    else
      return i;
  }
  __device__ Index column_of(int tile) const { return first_column + Index{tile} * (warps * tile_cols); }

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
    fill_rank_tile(
        task.ranks, [this](int i) { return token + i; }, rows, extent.rows * 16, count, ranks, rank_pitch,
        w == 0 && blockIdx.y == 0, [&](int c) { return first * tile_step + c; });
    __syncthreads();
  }

  /// acc ∘ keep / (1 − p̄). Lane t of a quad draws for the t-th eight columns of a row. A mask that was saved ends with the last
  /// token and the last column.
  __device__ void drop(Accumulator& acc, Index column) const {
    constexpr unsigned all = 0xffffffffu;
    if (column >= task.y.cols) return;  // the same for all lanes
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i >= extent.rows) break;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = 16 * i + lane.g + 8 * r;
        const std::uint32_t drawn = task.dropout.keep8(token + (row < rows ? row : rows - 1), column / 8 + lane.t);
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
    for (int row = lane.id; row < rows; row += 32) {
      if (is_written(row)) prefetch(task.y.row(token + row) + column);
    }
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
          if (is_written(row)) add<8>(token + row, column + 8 * lane.t, eight);
        } else {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float two[2] = {acc.sum[i][j][2 * r], acc.sum[i][j][2 * r + 1]};
            if (is_written(row)) add<2>(token + row, column + 8 * j + 2 * lane.t, two);
          }
        }
      }
    }
  }
  /// A row to which nothing is added stays as it is.
  __device__ bool is_written(int row) const {
    if (row >= rows) return false;
    if constexpr (sparse) return task.into == Into::set || steps != rank_steps || units.has(row);
    return true;
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
    return as<Y>(task.into == Into::add ? as_float(before) + v : v);
  }

  const Task& task;
  float* const sums;             // sparse: of this warp [64, sum_pitch]
  unsigned char* const rows_of;  // sparse: [units of the window, 64] their rows
  const Units units;             // sparse
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

template <class Math, class Y, bool by_column, bool sparse>
__global__ void __launch_bounds__(32 * strip_warps<Math, sparse>, 1)
    expand_kernel(const __grid_constant__ ExpandTask<Y, typename Math::Right> task) {
  extern __shared__ __align__(128) unsigned char shared_memory[];
  ExpandBlock<Math, Y, by_column, sparse>(task, shared_memory).run();
}

}  // namespace detail
}  // namespace gpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
