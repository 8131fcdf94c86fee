/// The kernel of products that contract over tokens: dA (+)= dUᵀ x̂ and dside (+)= dHᵀ x in one pass over x; dB (+)= s (U ∘ g)ᵀ dY.
///
/// Computes:    a block has up to 64 rows of (ranks, side rows) and 32 columns per warp, of the tokens of one chunk. It fills a tile
///              of rank space for 64 tokens while the warps multiply the tile before with their strips of x. Chunks are
///              added in order by the last block to arrive (Tickets).
/// Reads:       ranks (u [T, R_a], a gate, h [T, n]), x [T, N].
/// Adds to:     out [R, N] in either order, side_out [n, N], or assigns.
/// Cost:        x once per 64 rows; the ranks once per block of columns; partial sums 64 rows · N per chunk where there are several.
/// Determinism: tokens in order inside a chunk, then chunk after chunk; chunks depend on sizes.
/// Example:     gpu/fused.cuh
#pragma once
#include <loramix/core/draws.hpp>
#include <loramix/gpu/selection.cuh>
#include <loramix/gpu/strip.cuh>
#include <loramix/gpu/tickets.cuh>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace gpu {
namespace detail {

/// A gradient in either order; empty: not wanted.
template <class G>
struct SumTarget {
  G* data = nullptr;
  Index row_stride = 0, col_stride = 0;
  bool paired = false;  // two neighbouring columns, the first of them even, are one aligned access
  __device__ G* at(Index row, Index col) const { return data + row * row_stride + col * col_stride; }
};
template <class G, Major M>
SumTarget<G> sum_target(MatrixView<G, Space::device, M> rows) {
  if (M == Major::column) return {rows.data, 1, rows.stride, false};
  const bool paired = reinterpret_cast<std::uintptr_t>(rows.data) % (2 * sizeof(G)) == 0 && rows.stride % 2 == 0;
  return {rows.data, rows.stride, 1, paired};
}

template <class X, class G>
struct TokenSumTask {
  RankSource<float> ranks;
  Source<X> x;      // [T, N]
  Dropout dropout;  // of x as the ranks see it
  float scale = 1;  // of the ranks' sums
  SumTarget<G> out, side_out;
  Into into = Into::add;
  Index chunk = 0;  // tokens, a multiple of 64
  int chunks = 1;
  float* partial = nullptr;     // [chunks, row_tiles() · 16, pitch()]
  unsigned* tickets = nullptr;  // one per block of columns and group of rows; null: nobody adds up
  LORAMIX_HD constexpr int row_tiles() const { return ranks.steps(); }
  LORAMIX_HD constexpr Index pitch() const { return (x.cols + 7) / 8 * 8; }
};

/// n sums of row `row` (ranks in whole tiles, side rows behind) and columns from `col`, which is a multiple of n, go home.
template <int n, class X, class G>
__device__ void store(const TokenSumTask<X, G>& task, int row, Index col, const float (&sum)[n]) {
  const bool side = row >= task.ranks.padded;
  const int own = side ? row - task.ranks.padded : row;
  const SumTarget<G>& target = side ? task.side_out : task.out;
  if (target.data == nullptr || own >= (side ? task.ranks.h.cols : Index{task.ranks.ranks})) return;
  const float scale = side ? 1.0f : task.scale;
  const auto added = [&](G before, float v) {
    return as<G>(task.into == Into::add ? as_float(before) + scale * v : scale * v);
  };
  if (target.paired && col + n <= task.x.cols) {
    G* const cell = target.at(own, col);
    Vector<n, G> vector{};
    if (task.into == Into::add) vector = Vector<n, G>::load(cell);
#pragma unroll
    for (int c = 0; c < n; ++c) vector.v[c] = added(vector.v[c], sum[c]);
    vector.store(cell);
  } else {
#pragma unroll
    for (int c = 0; c < n; ++c) {
      if (col + c >= task.x.cols) break;
      G* const cell = target.at(own, col + c);
      *cell = added(task.into == Into::add ? *cell : G{}, sum[c]);
    }
  }
}

/// Adds up what the chunks left of rows [row, row + rows) and columns [col, col + cols); by all threads of a block.
template <class X, class G>
__device__ void add_chunks(const TokenSumTask<X, G>& task, int row, int rows, Index col, int cols) {
  const Index apart = Index{task.row_tiles()} * 16 * task.pitch();
  for (int i = static_cast<int>(threadIdx.x); i < rows * cols / 2; i += static_cast<int>(blockDim.x)) {
    const int r = row + i / (cols / 2);
    const Index c = col + i % (cols / 2) * 2;
    if (c >= task.x.cols) continue;
    const float* from = task.partial + r * task.pitch() + c;
    float total[2] = {0, 0};
    for (int s = 0; s < task.chunks; ++s) {
      const float2 v = __ldcg(reinterpret_cast<const float2*>(from + s * apart));
      total[0] += v.x;
      total[1] += v.y;
    }
    store(task, r, c, total);
  }
}

/// `sparse`: of every selection_units tokens those are listed that have one of the block's ranks open (gpu/selection.cuh), and only
/// they are read; a kernel of its own, for registers are what is scarce.
template <class Math, class G, bool sparse>
class TokenSumBlock {
  using X = typename Math::Left;
  using Task = TokenSumTask<X, G>;
  using TokenStrip = Strip<X>;

 public:
  static constexpr int pitch = tile_rows + Math::pad_tokens;
  static constexpr int tile_floats = tile_rows * pitch;
  static constexpr Index shared_bytes(int warps, bool copy_of_x) {
    return 2 * tile_floats * static_cast<int>(sizeof(float)) +
           warps * (TokenStrip::slots + (copy_of_x ? 1 : 0)) * TokenStrip::slot_bytes + (sparse ? selection_bytes : 0);
  }

  __device__ TokenSumBlock(const Task& task_, unsigned char* shared)
      : task(task_),
        strip(shared + threadIdx.x / 32 * (TokenStrip::slots * TokenStrip::slot_bytes)),
        ranks(reinterpret_cast<float*>(shared + blockDim.x * Index{TokenStrip::slots * TokenStrip::slot_bytes} / 32)),
        column(static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x / 32 * tile_cols)),
        first_tile(static_cast<int>(blockIdx.y) * 4),
        begin(Index{blockIdx.z} * task_.chunk),
        tokens(static_cast<int>(min(task_.chunk, task_.x.rows - begin))) {
    all.rows = min(task.row_tiles() - first_tile, 4);
    const int rank_tiles = task.ranks.padded / tile_step - first_tile;
    masked = task.dropout.on() && rank_tiles > 0;
    of_ranks = min(max(rank_tiles, 0), all.rows);
    apart = masked && of_ranks < all.rows;
  }

  __device__ void run() {
    Accumulator acc;
    acc.clear();
    if constexpr (sparse) {
      for (window = 0; window < tokens; window += selection_units) {
        count = select();
        sum(acc);
      }
    } else {
      count = tokens;
      sum(acc);
    }
    if (task.chunks == 1) {
      each(acc, [&](int row, Index col, float a, float b) {
        const float pair[2] = {a, b};
        if (col < task.x.cols) store(task, row, col, pair);
      });
      return;
    }
    leave(acc);
    if (task.tickets == nullptr || !last_to_arrive(task.tickets + blockIdx.y * gridDim.x + blockIdx.x, gridDim.z))
      return;
    add_chunks(task, first_tile * 16, all.rows * 16, Index{blockIdx.x} * static_cast<int>(blockDim.x),
               static_cast<int>(blockDim.x));
  }

 private:
  /// Adds what `count` tokens have to add.
  __device__ void sum(Accumulator& acc) const {
    const int steps = (count + tile_step - 1) / tile_step;
    for (int s = 0; s < TokenStrip::ahead; ++s) request(s, steps);
    if (steps > 0) fill(0);
    __syncthreads();
    for (int s = 0; s < steps; ++s) {
      const int tile = s / 4;
      if (s % 4 == 0 && s + 4 < steps) fill(tile + 1);
      __syncwarp();
      request(s + TokenStrip::ahead, steps);
      TokenStrip::wait();
      if (column < task.x.cols) multiply(acc, s, ranks + tile % 2 * tile_floats + s % 4 * tile_step * pitch);
      if (s % 4 == 3) __syncthreads();  // the next tile is filled, and nobody reads this one
    }
    wait_copies<0>();
  }

  /// Lists the tokens of the window that have a rank of this block's open; returns how many there are.
  __device__ int select() const {
    const int here = min(tokens - window, selection_units), from = first_tile * 16, to = from + all.rows * 16;
    const bool side = to > task.ranks.padded;  // side rows are open everywhere
    const Listed selected = listed();
    __syncthreads();  // the list before, and its tiles of ranks, have been read
    selected.clear(here);
    for (int i = static_cast<int>(threadIdx.x); i < here; i += static_cast<int>(blockDim.x)) {
      if (side) selected.add(i);
      each_open_range(task.ranks.gate, begin + window + i, [&](int first, int end) {
        if (first < to && end > from) selected.add(i);
      });
    }
    return selected.finish(here);
  }
  /// The list, behind the tiles of ranks in shared memory.
  __device__ Listed listed() const { return Listed(reinterpret_cast<unsigned char*>(ranks + 2 * tile_floats)); }
  /// This warp's x̂, behind that, where side rows need x as well.
  __device__ SharedTile<X> copy() const {
    unsigned char* const all_copies =
        reinterpret_cast<unsigned char*>(ranks + 2 * tile_floats) + (sparse ? selection_bytes : Index{0});
    return {all_copies + threadIdx.x / 32 * TokenStrip::slot_bytes, TokenStrip::chunks};
  }
  /// The i-th of the tokens to be summed.
  __device__ Index token_at(int i) const { return begin + (sparse ? window + listed()[i] : i); }

  __device__ void request(int s, int steps) const {
    if (s < steps && column < task.x.cols) {
      if constexpr (sparse) {
        const auto row_at = [&](int r) {
          const int i = s * tile_step + r;
          return i < count ? token_at(i) : task.x.rows;  // beyond: zeros
        };
        strip.request_rows(lane, s, task.x, row_at, column);
      } else {
        strip.request(lane, s, task.x, begin + s * tile_step, column);
      }
    }
    commit_copies();
  }
  /// Ranks and side rows of 64 tokens, the i-th tile's.
  __device__ void fill(int i) const {
    const int token = i * tile_rows, rows = min(count - token, tile_rows), first = first_tile * 16;
    fill_rank_tile<0>(  // registers are short here: no ids in them
        task.ranks, [&](int row) { return token_at(token + row); }, rows, (rows + 15) / 16 * 16, all.rows * 16,
        ranks + i % 2 * tile_floats, pitch, !sparse && blockIdx.x == 0 && blockIdx.y == 0,
        [first](int c) { return first + c; });
  }

  __device__ void multiply(Accumulator& acc, int s, const float* values) const {
    const SharedTile<X> raw = strip.tile(s), dropped = apart ? copy() : raw;
    if (masked) drop(raw, dropped, s * tile_step);
    Extent some;
    some.rows = of_ranks;
    const LeftTokens left{values, pitch};
    if (apart) {
      Math::step(lane, acc, left, RightColumns<X>{dropped}, 0, some);
      some.first = of_ranks;
    }
    some.rows = all.rows;
    Math::step(lane, acc, left, RightColumns<X>{raw}, 0, some);
  }
  /// x ∘ keep for a step of the strip; the factor 1 / (1 − p̄) is in scale.
  __device__ void drop(const SharedTile<X>& from, const SharedTile<X>& to, int first) const {
    constexpr int chunks = 8 / per_chunk<X>;
    for (int i = lane.id; i < tile_step * 4; i += 32) {
      const int at = first + i / 4;
      const std::uint32_t keep = task.dropout.keep8(token_at(at < count ? at : count - 1), column / 8 + i % 4);
#pragma unroll
      for (int c = 0; c < chunks; ++c) {
        const int chunk = i % 4 * chunks + c;
        drop_chunk(from.chunk(i / 4, chunk), to.chunk(i / 4, chunk), keep >> c * per_chunk<X>);
      }
    }
    __syncwarp();
  }

  /// f(row, column, two sums) for what this lane has.
  template <class F>
  __device__ void each(const Accumulator& acc, const F& f) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i >= all.rows) break;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          f((first_tile + i) * 16 + lane.g + 8 * r, column + 8 * j + 2 * lane.t, acc.sum[i][j][2 * r],
            acc.sum[i][j][2 * r + 1]);
        }
      }
    }
  }
  /// Partial sums for whoever comes last.
  __device__ void leave(const Accumulator& acc) const {
    float* const mine = task.partial + Index{blockIdx.z} * task.row_tiles() * 16 * task.pitch();
    each(acc, [&](int row, Index col, float a, float b) {
      if (col < task.pitch()) __stcg(reinterpret_cast<float2*>(mine + row * task.pitch() + col), float2{a, b});
    });
  }

  const Task& task;
  const TokenStrip strip;
  float* const ranks;  // two tiles [64 tokens, pitch]
  const Lane lane;
  const int column;      // of this warp
  const int first_tile;  // of 16 rows
  const Index begin;     // the chunk\'s first token
  const int tokens;
  int window = 0;  // sparse: the first token that is listed, in the chunk
  int count = 0;   // tokens to be summed
  Extent all;
  int of_ranks;  // 16-row tiles of ranks, before those of side rows
  bool masked, apart;
};

template <class Math, class G, bool sparse>
__global__ void __launch_bounds__(32 * Math::token_warps, 1)
    token_sum_kernel(const __grid_constant__ TokenSumTask<typename Math::Left, G> task) {
  extern __shared__ __align__(128) unsigned char shared_memory[];
  TokenSumBlock<Math, G, sparse>(task, shared_memory).run();
}

}  // namespace detail
}  // namespace gpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
