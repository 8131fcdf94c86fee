/// The kernel of products that contract over features: u = scale · x̂ Aᵀ and h = x sideᵀ in one pass over x; in backward
/// dŨ = s dY B.
///
/// Computes:    a block has 64 tokens and up to 256 columns of (u, h). The contracted axis is cut into chunks that depend on the
///              shape alone; every chunk is summed by itself and the chunks are added in order, by one block or, where tokens
///              are few, by one block each: they leave partial sums, and the last to arrive (Tickets) adds them up. Then a row body
///              (a router, the backward of a gate) runs for the tile's tokens in the same launch.
/// Reads:       x [T, K], weights [R, K] or [K, R], side [n, K].
/// Writes:      u [T, R], h [T, n].
/// Cost:        x once, the weights once per 64 tokens; partial sums T·(R + n) floats per chunk where blocks share a tile.
/// Determinism: a token's sums depend on its own row, the shape and the class of T; masks are core/draws.hpp's, bit by bit.
/// Example:     gpu/fused.cuh
#pragma once
#include <loramix/core/draws.hpp>
#include <loramix/gpu/math.cuh>
#include <loramix/gpu/selection.cuh>
#include <loramix/gpu/team.cuh>
#include <loramix/gpu/tickets.cuh>
#include <loramix/ops/rows.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace gpu {
namespace detail {

inline constexpr int shrink_stage = 64;  // contracted columns that are in shared memory at a time

/// How the warps of a block share `group` columns and the steps of a stage.
struct ShrinkWarps {
  int across, along;  // blocks of 32 columns; steps of 16, every along-th one
  LORAMIX_HD constexpr explicit ShrinkWarps(int group)
      : across(group / tile_cols),
        along(group >= 256   ? 1
              : group >= 128 ? 2
                             : 4) {}
  LORAMIX_HD constexpr int threads() const { return 32 * across * along; }
};

template <class X, class W>
struct ShrinkTask {
  Source<X> x;                            // [T, K]
  Source<W> weights;                      // [R, K], or [K, R] where R is contiguous
  Source<W> side;                         // [n, K]
  Dropout dropout;                        // of x as the weights see it
  float scale = 1;                        // of u
  GateForm<float, Space::device> select;  // where `sparse`: what it closes may be left as it is
  bool sparse = false;
  MatrixView<float, Space::device> u, h;
  Index ranks = 0;
  int padded = 0;   // R as whole 8-column tiles: where h begins
  int columns = 0;  // padded + n
  int group = 32;   // columns of a block: 32, 64, 128, 256
  Index chunk = 0;  // contracted columns per chunk, a multiple of shrink_stage
  int chunks = 1;
  int splits = 1;               // blocks along the contracted axis: 1 or chunks
  bool near = false;            // u goes on in shared memory, for the row body; and home where it has one
  float* partial = nullptr;     // [splits, T, pitch()]
  unsigned* tickets = nullptr;  // one per token tile, zero before and after; null: nobody adds up
  LORAMIX_HD constexpr Index pitch() const { return (columns + 7) / 8 * 8; }
};

/// The row body where there is nothing more to do.
struct NoRows {
  template <class Team>
  __device__ void operator()(const Team&, Index) const {}
};

/// What one of the blocks, which adds up, still has in shared memory: [rows, columns from `first` on], of split `split`. The sums take its
/// place where task.near says so.
struct OwnSums {
  float* tile = nullptr;
  int pitch = 0, split = -1, first = 0, columns = 0;
};

/// `sparse`: every warp multiplies only the rows that have one of its 32 columns open (gpu/selection.cuh), sixteen at a time; what
/// no row of the tile has open is not read, and what is closed is not written.
template <class Math, bool k_major, bool sparse = false>
class ShrinkBlock {
  using X = typename Math::Left;
  using W = typename Math::Right;
  using Task = ShrinkTask<X, W>;

 public:
  static constexpr int stages = sizeof(X) == 2 && sizeof(W) == 2 ? 3 : 2;

  /// Of its own, beside what a launch gives.
  static constexpr Index own_bytes = 1024;
  static constexpr Index shared_bytes(int group, bool copy_of_x) {
    const int x = tile_bytes<X>(tile_rows, shrink_stage), w = tile_bytes<W>(group, shrink_stage);
    const int sums = tile_rows * (group + 8) * static_cast<int>(sizeof(float));
    const int tiles = stages * (x + w) + (copy_of_x ? x : 0);
    return tiles > sums ? tiles : sums;
  }

  __device__ ShrinkBlock(const Task& task_, unsigned char* shared_)
      : ShrinkBlock(task_, shared_, Index{blockIdx.x} * tile_rows, static_cast<int>(blockIdx.y) * task_.group) {}
  __device__ ShrinkBlock(const Task& task_, unsigned char* shared_, Index token_, int column_)
      : task(task_), shared(shared_), warps(task_.group), token(token_), column(column_) {
    const Index left = task.x.rows - token;
    rows = left < tile_rows ? static_cast<int>(left) : tile_rows;
    across = static_cast<int>(threadIdx.x) / 32 % warps.across;
    along = static_cast<int>(threadIdx.x) / 32 / warps.across;
    masked = task.dropout.on() && column < task.padded;
    apart = masked && task.columns > task.padded;
    // 8-column tiles of this warp: those of ranks see x̂, those of side rows x.
    const int here = column + across * tile_cols, end = min(task.columns - here, tile_cols);
    plain.rows = (rows + 15) / 16;
    plain.to = end < 0 ? 0 : (end + 7) / 8;
    dropped = plain;
    if (apart) {
      const int first_side = min(max((task.padded - here) / 8, 0), plain.to);
      dropped.to = first_side;
      plain.from = first_side;
    }
  }

  /// True where u and h of the tile's tokens are complete and it is this block that goes on with them.
  __device__ bool run() {
    const bool split = task.splits > 1;
    if constexpr (sparse) {
      select();
      if (slices == 0) return split ? hand_over() && add_up() : gridDim.y == 1 || hand_over();
    }
    const int first = split ? static_cast<int>(blockIdx.z) : 0, last = split ? first + 1 : task.chunks;
    float4 total[16];
    for (int c = first; c < last; ++c) {
      sum_chunk(c);
      add_to(total, c == first);
    }
    if (split) {
      leave(total);
      return hand_over() && add_up();
    }
    finish(total);
    return gridDim.y == 1 || hand_over();
  }

  /// The sums of the block's tokens and columns over the whole contracted axis, to f(row, column, sum); every thread calls.
  template <class F>
  __device__ void run(const F& f) {
    float4 total[16];
    for (int c = 0; c < task.chunks; ++c) {
      sum_chunk(c);
      add_to(total, c == 0);
    }
    finish(total, f);
  }

 private:
  /// Which 32-column slices hold side rows or a rank that a token of the tile has open. In the tile, rows with the same slices lie side
  /// by side: eight of a slice's list are then mostly neighbours, in eight groups of banks.
  struct Chosen {
    unsigned short keys[tile_rows];   // of a token: its slices, then how many tokens come after it; the greatest first
    unsigned char slices[tile_rows];  // of a row
    unsigned char tokens[tile_rows];  // of a row, in the tile of tokens
    unsigned char rows[256 / tile_cols]
                      [tile_rows];  // of a slice: as many as there are, then the first again up to a multiple of 16
    unsigned all;
  };
  static_assert(sizeof(Chosen) < own_bytes);
  __device__ static Chosen& chosen() {
    __shared__ Chosen chosen_rows;
    return chosen_rows;
  }
  __device__ void select() {
    const auto slices_of = [this](int begin, int end) {  // of columns [begin, end) of all
      const int first = max(begin - column, 0) / tile_cols,
                last = (min(end - column, task.group) + tile_cols - 1) / tile_cols;
      return last <= first || end <= begin ? 0u : (1u << last) - (1u << first);
    };
    Chosen& to = chosen();
    if (threadIdx.x == 0) to.all = 0;
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < tile_rows; i += static_cast<int>(blockDim.x)) {
      unsigned mine = 0;
      if (i < rows) {
        mine = slices_of(task.padded, task.columns);
        each_open_range(task.select, token + i, [&](int begin, int end) { mine |= slices_of(begin, end); });
      }
      to.keys[i] = static_cast<unsigned short>(mine * tile_rows + (tile_rows - 1 - i));
      if (mine != 0) atomicOr(&to.all, mine);
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < tile_rows; i += static_cast<int>(blockDim.x)) {
      const int key = to.keys[i];
      int row = 0;
#pragma unroll 16
      for (int other = 0; other < tile_rows; ++other) row += to.keys[other] > key ? 1 : 0;
      to.slices[row] = static_cast<unsigned char>(key / tile_rows);
      to.tokens[row] = static_cast<unsigned char>(i);
    }
    __syncthreads();
    slices = to.all;
    const bool low = row_has(lane.id, across), high = row_has(lane.id + 32, across);
    const unsigned lows = __ballot_sync(whole_warp, low), highs = __ballot_sync(whole_warp, high);
    listed = __popc(lows) + __popc(highs);
    if (along == 0 && listed != 0) {
      unsigned char* const list = to.rows[across];
      const unsigned below = (1u << lane.id) - 1;
      if (low) list[__popc(lows & below)] = static_cast<unsigned char>(lane.id);
      if (high) list[__popc(lows) + __popc(highs & below)] = static_cast<unsigned char>(lane.id + 32);
      const int first = lows != 0 ? __ffs(static_cast<int>(lows)) - 1 : 31 + __ffs(static_cast<int>(highs));
      if (lane.id < (16 - listed % 16) % 16) list[listed + lane.id] = static_cast<unsigned char>(first);
    }
    __syncthreads();
    plain.rows = dropped.rows = (listed + 15) / 16;
    if (listed == 0) plain.to = dropped.to = 0;
  }
  __device__ bool is_wanted(int slice) const { return (slices >> slice & 1u) != 0; }
  __device__ static bool row_has(int row, int slice) { return (chosen().slices[row] >> slice & 1u) != 0; }
  /// Which of the tile's tokens a row is.
  __device__ static int token_of(int row) { return sparse ? chosen().tokens[row] : row; }
  /// Whether this block multiplies a row of x at all.
  __device__ static bool reads_row(int row) { return !sparse || chosen().slices[row] != 0; }
  /// Whether the sum in a row and column of the block's tile is wanted.
  __device__ static bool is_summed(int row, int c) { return !sparse || row_has(row, c / tile_cols); }
  template <class Tile>
  __device__ auto left(const Tile& tile) const {
    if constexpr (sparse)
      return LeftRows<X>{tile, chosen().rows[across], listed};
    else
      return LeftTile<X>{tile};
  }

  // ---- one chunk of the contracted axis ------------------------------------------------------------------------------

  /// Sums of chunk c in the block's tile of sums.
  __device__ void sum_chunk(int c) {
    const Index begin = c * task.chunk, end = min(begin + task.chunk, task.x.cols);
    const int count = slices == 0 ? 0 : static_cast<int>((end - begin + shrink_stage - 1) / shrink_stage);
    Accumulator acc;
    acc.clear();
    __syncthreads();  // the sums of the chunk before have been read
    for (int s = 0; s < stages - 1; ++s) request(s, begin, count);
    for (int s = 0; s < count; ++s) {
      wait_copies<stages - 2>();
      __syncthreads();  // stage s is there, and nobody reads the one that is requested next
      request(s + stages - 1, begin, count);
      if (masked) {
        drop(s % stages, begin + s * shrink_stage);
        __syncthreads();
      }
      __syncwarp();  // ldmatrix is for whole warps, and lanes come from loops of different lengths
      multiply(acc, s % stages);
      if (apart) __syncthreads();  // the copy of x is free
    }
    wait_copies<0>();
    __syncthreads();
    for (int w = 0; w < warps.along; ++w) {
      if (along == w) put(acc, w == 0);
      __syncthreads();
    }
  }

  __device__ SharedTile<X> x_tile(int slot) const { return {stage(slot), shrink_stage / per_chunk<X>}; }
  /// x̂ where side rows need x as well.
  __device__ SharedTile<X> dropped_tile(int slot) const {
    return apart ? SharedTile<X>{stage(stages), shrink_stage / per_chunk<X>} : x_tile(slot);
  }
  __device__ SharedTile<W> weight_tile(int slot) const {
    unsigned char* const base = stage(slot) + tile_bytes<X>(tile_rows, shrink_stage);
    return {base, (k_major ? shrink_stage : task.group) / per_chunk<W>};
  }
  __device__ unsigned char* stage(int slot) const {
    return shared + slot * (tile_bytes<X>(tile_rows, shrink_stage) + tile_bytes<W>(task.group, shrink_stage));
  }

  /// Asks for stage s of `count` from column `begin` on; past the end an empty group, so that groups count stages.
  __device__ void request(int s, Index begin, int count) {
    if (s < count) {
      const Index k = begin + s * shrink_stage;
      const SharedTile<X> x = x_tile(s % stages);
      const int threads = static_cast<int>(blockDim.x);
      for (int i = static_cast<int>(threadIdx.x); i < tile_extent() * x.chunks; i += threads) {
        const int row = i / x.chunks, c = i % x.chunks;
        if (!reads_row(row)) continue;
        copy_chunk(x.chunk(row, c), task.x, token + token_of(row), k + c * per_chunk<X>);
      }
      request_weights(weight_tile(s % stages), k);
    }
    commit_copies();
  }
  __device__ void request_weights(const SharedTile<W>& tile, Index k) {
    const int threads = static_cast<int>(blockDim.x);
    if constexpr (k_major) {
      const int wanted = min(task.columns - column, task.group);
      for (int i = static_cast<int>(threadIdx.x); i < (wanted + 31) / 32 * 32 * tile.chunks; i += threads) {
        const int row = i / tile.chunks, c = i % tile.chunks, n = column + row;
        if (!is_wanted(row / tile_cols)) continue;
        const bool side = n >= task.padded;
        copy_chunk(tile.chunk(row, c), side ? task.side : task.weights, side ? n - task.padded : n,
                   k + c * per_chunk<W>);
      }
    } else {
      for (int i = static_cast<int>(threadIdx.x); i < shrink_stage * tile.chunks; i += threads) {
        const int row = i / tile.chunks, c = i % tile.chunks;
        if (!is_wanted(c * per_chunk<W> / tile_cols)) continue;
        copy_chunk(tile.chunk(row, c), task.weights, k + row, Index{column} + c * per_chunk<W>);
      }
    }
  }

  /// x ∘ keep for a stage; the factor 1 / (1 − p̄) is in scale.
  __device__ void drop(int slot, Index k) {
    const SharedTile<X> from = x_tile(slot), to = dropped_tile(slot);
    constexpr int chunks = 8 / per_chunk<X>;  // of the eight columns that one draw decides
    for (int i = static_cast<int>(threadIdx.x); i < tile_extent() * shrink_stage / 8;
         i += static_cast<int>(blockDim.x)) {
      const int row = i / (shrink_stage / 8), block = i % (shrink_stage / 8);
      if (!reads_row(row)) continue;
      const int own = token_of(row);  // or none, behind the last token: a mask that was saved ends there
      const std::uint32_t keep = task.dropout.keep8(token + (own < rows ? own : rows - 1), k / 8 + block);
#pragma unroll
      for (int c = 0; c < chunks; ++c) {
        drop_chunk(from.chunk(row, block * chunks + c), to.chunk(row, block * chunks + c), keep >> c * per_chunk<X>);
      }
    }
  }

  __device__ void multiply(Accumulator& acc, int slot) {
    const SharedTile<W> weights = weight_tile(slot);
    for (int k = along * tile_step; k < shrink_stage; k += warps.along * tile_step) {
      if constexpr (k_major) {
        multiply(acc, slot, RightRows<W>{weights.rows_from(across * tile_cols)}, k);
      } else {
        multiply(acc, slot, RightColumns<W>{weights, across * tile_cols}, k);
      }
    }
  }
  template <class Right>
  __device__ void multiply(Accumulator& acc, int slot, const Right& right, int k) {
    if (dropped.from < dropped.to) Math::step(lane, acc, left(dropped_tile(slot)), right, k, dropped);
    if (apart && plain.from < plain.to) Math::step(lane, acc, left(x_tile(slot)), right, k, plain);
  }

  // ---- sums ----------------------------------------------------------------------------------------------------------

  __device__ int sum_pitch() const { return task.group + 8; }
  __device__ float* sums() const { return reinterpret_cast<float*>(shared); }
  /// Rows of the tile in whole sixteens.
  __device__ int tile_extent() const { return (rows + 15) / 16 * 16; }

  /// This warp's share into the tile of sums, or added to it.
  __device__ void put(const Accumulator& acc, bool first) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          int row = 16 * i + lane.g + 8 * r;
          if constexpr (sparse) {
            if (row >= listed) continue;
            row = chosen().rows[across][row];
          }
          float2* const cell =
              reinterpret_cast<float2*>(sums() + row * sum_pitch() + across * tile_cols + 8 * j + 2 * lane.t);
          const float2 before = first ? float2{0, 0} : *cell;
          *cell = {before.x + acc.sum[i][j][2 * r], before.y + acc.sum[i][j][2 * r + 1]};
        }
      }
    }
  }

  /// f(i, row, column) for the fours of columns that this thread owns.
  template <class F>
  __device__ void each_four(const F& f) {
    const int fours = task.group / 4;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int at = static_cast<int>(threadIdx.x) + i * static_cast<int>(blockDim.x);
      if (at < tile_rows * fours && is_summed(at / fours, at % fours * 4)) f(i, at / fours, at % fours * 4);
    }
  }
  __device__ void add_to(float4 (&total)[16], bool first) {
    each_four([&](int i, int row, int c) {
      const float4 v = *reinterpret_cast<const float4*>(sums() + row * sum_pitch() + c);
      total[i] = first ? v : float4{total[i].x + v.x, total[i].y + v.y, total[i].z + v.z, total[i].w + v.w};
    });
  }

  /// Partial sums for whoever comes last.
  __device__ void leave(const float4 (&total)[16]) {
    float* const mine = task.partial + (Index{blockIdx.z} * task.x.rows + token) * task.pitch() + column;
    each_four([&](int i, int row, int c) {
      if (row < rows && column + c < task.pitch())
        *reinterpret_cast<float4*>(mine + token_of(row) * task.pitch() + c) = total[i];
    });
  }

  /// One arrival more: true for the last of the tile's blocks.
  __device__ bool hand_over() {
    return task.tickets != nullptr && last_to_arrive(task.tickets + blockIdx.x, gridDim.y * gridDim.z);
  }
  __device__ bool add_up() {
    add_partial_sums(task, token, rows, OwnSums{sums(), sum_pitch(), static_cast<int>(blockIdx.z), column, task.group});
    __syncthreads();
    return true;
  }

  /// All chunks were this block's: u and h.
  __device__ void finish(const float4 (&total)[16]) {
    finish(total, [this](int row, int c, float sum) {
      store(task, token + row, c, sum);
      if (task.near) sums()[row * sum_pitch() + c] = task.scale * sum;  // in its own place, once more
    });
  }
  template <class F>
  __device__ void finish(const float4 (&total)[16], const F& f) {
    __syncthreads();
    each_four([&](int i, int row, int c) { *reinterpret_cast<float4*>(sums() + row * sum_pitch() + c) = total[i]; });
    __syncthreads();
    const int wanted = min(task.columns - column, task.group);
    for (int i = static_cast<int>(threadIdx.x); i < rows * task.group; i += static_cast<int>(blockDim.x)) {
      const int row = i / task.group, c = i % task.group;
      if (c < wanted && is_summed(row, c)) f(token_of(row), column + c, sums()[row * sum_pitch() + c]);
    }
    __syncthreads();
  }

  const Task& task;
  unsigned char* const shared;
  const ShrinkWarps warps;
  const Lane lane;
  const Index token;   // first of the tile
  const int column;    // first of the group
  int rows;            // tokens of the tile
  int across, along;   // this warp's place
  bool masked, apart;  // dropout; x is needed beside x̂
  Extent dropped, plain;
  unsigned slices = ~0u;  // of 32 columns that are wanted
  int listed = 0;         // sparse: rows of this warp's slice
};

/// A finished sum, at home.
template <class X, class W>
__device__ void store(const ShrinkTask<X, W>& task, Index t, int column, float sum) {
  if (column < task.ranks) {
    if (task.u.data != nullptr) task.u(t, column) = task.scale * sum;
  } else if (column >= task.padded) {
    task.h(t, column - task.padded) = sum;
  }
}

/// Adds up what the blocks of tokens [token, token + rows) left, chunk after chunk; by all threads of a block.
template <class X, class W>
__device__ void add_partial_sums(const ShrinkTask<X, W>& task, Index token, int rows, const OwnSums& own = {}) {
  const Index pitch = task.pitch(), apart = task.x.rows * pitch;
  if (task.sparse) {  // what is open, and side rows
    const int warps = static_cast<int>(blockDim.x) / warp_width, lane = static_cast<int>(threadIdx.x) % warp_width;
    for (int row = static_cast<int>(threadIdx.x) / warp_width; row < rows; row += warps) {
      const Index t = token + row;
      const auto add = [&](int begin, int end) {
        for (int column = begin + lane; column < end; column += warp_width) {
          const float* from = task.partial + t * pitch + column;
          float total = __ldcg(from);
          for (int s = 1; s < task.splits; ++s) total += __ldcg(from + s * apart);
          store(task, t, column, total);
        }
      };
      each_open_range(task.select, t, add);
      add(task.padded, task.columns);
    }
    return;
  }
  for (int i = static_cast<int>(threadIdx.x); i < rows * static_cast<int>(pitch); i += static_cast<int>(blockDim.x)) {
    const Index t = token + i / pitch;
    const int column = static_cast<int>(i % pitch);
    const float* from = task.partial + t * pitch + column;
    float* const here = own.tile + i / static_cast<int>(pitch) * own.pitch + (column - own.first);
    const int kept = column >= own.first && column - own.first < own.columns ? own.split : -1;
    float total = kept == 0 ? *here : __ldcg(from);
    for (int s = 1; s < task.splits; ++s) total += kept == s ? *here : __ldcg(from + s * apart);
    if (column < task.columns) store(task, t, column, total);
    if (task.near) *here = task.scale * total;
  }
}

/// Rows of u that are not at home, by token.
using NearRows = MatrixView<const float, Space::device>;

/// The warps of a block share its rows [begin, begin + count).
template <class Body>
__device__ void each_row(const Body& body, Index begin, int count, const NearRows& near = {}) {
  const int warps = static_cast<int>(blockDim.x) / warp_width;
  for (int i = static_cast<int>(threadIdx.x) / warp_width; i < count; i += warps) {
    if constexpr (ReadsBefore<Body, WarpTeam, NearRows>)
      body(WarpTeam{}, begin + i, near);
    else
      body(WarpTeam{}, begin + i);
  }
}

/// One copy for all row bodies.
template <class Math, bool k_major, bool sparse>
__device__ __noinline__ int shrink_tile(const ShrinkTask<typename Math::Left, typename Math::Right>& task,
                                        unsigned char* shared) {
  return ShrinkBlock<Math, k_major, sparse>(task, shared).run() ? 1 : 0;
}

template <class Math, bool k_major, class Body>
__global__ void __launch_bounds__(256, 1)
    shrink_kernel(const __grid_constant__ ShrinkTask<typename Math::Left, typename Math::Right> task,
                  const __grid_constant__ Body body) {
  extern __shared__ __align__(128) unsigned char shared_memory[];
  const int goes_on = task.sparse ? shrink_tile<Math, k_major, true>(task, shared_memory)
                                  : shrink_tile<Math, k_major, false>(task, shared_memory);
  if (goes_on == 0) return;
  const Index token = Index{blockIdx.x} * tile_rows, left = task.x.rows - token;
  NearRows near;
  if (task.near) {
    const Index pitch = task.group + 8;  // the block's tile of sums, as if it began with token 0
    std::uintptr_t sums = reinterpret_cast<std::uintptr_t>(shared_memory);
    asm("" : "+l"(sums));  // from here on a generic address: in the 32 bits of a shared one the difference would wrap
    near = {reinterpret_cast<const float*>(sums) - token * pitch, task.x.rows, task.ranks, pitch};
  }
  each_row(body, token, left < tile_rows ? static_cast<int>(left) : tile_rows, near);
}

}  // namespace detail
}  // namespace gpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
