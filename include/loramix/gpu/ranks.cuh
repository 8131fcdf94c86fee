/// What products read of rank space: a block's tile of ũ = U ∘ g, with side rows behind it.
///
/// Computes:    tile(t, j) = U(t, j mod R_a) · g(t, j) where the gate is open, 0 where it is closed, and h(t, ·) from column
///              `padded` on; zeros outside. The gate arrives in its normal form (gate/form.hpp), as everywhere.
/// Reads:       u [T, R_a], the gate's slots, h [T, n].
/// Errors:      bad ids and groups close their ranks and set StatusFlags, once per tile.
/// Cost:        64·(R + n) floats of shared memory; a few loads per token beside them.
/// Determinism: every value by itself.
/// Example:     gpu/expand.cuh
#pragma once
#include <loramix/gate/form.hpp>
#include <loramix/gpu/math.cuh>
#include <loramix/gpu/team.cuh>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace gpu {
namespace detail {

template <class Score>
struct RankSource {
  MatrixView<const float, Space::device> u;  // [T, R_a]
  GateForm<Score, Space::device> gate;       // of R ranks
  bool open = true;                          // no gate: the form is not looked at, but where
  bool sparse = false;                       // kernels ask it which ranks tokens have open (gpu/selection.cuh)
  int ranks = 0;                             // R
  int padded = 0;                            // R in whole steps: where h begins
  int per_expert = 1;                        // R / E, where every expert has as many
  MatrixView<const Score, Space::device> h;  // [T, n]

  LORAMIX_HD constexpr int columns() const { return padded + static_cast<int>(h.cols); }
  LORAMIX_HD constexpr int steps() const {
    return padded / tile_step + (static_cast<int>(h.cols) + tile_step - 1) / tile_step;
  }
};

/// A RankSource; `gate` may be one that leaves every rank open.
template <class Score>
RankSource<Score> rank_source(MatrixView<const float, Space::device> u, const GateForm<Score, Space::device>& gate) {
  const bool open = gate.ids.data == nullptr && gate.prefix.data == nullptr && gate.subset.data == nullptr &&
                    gate.weights.data == nullptr && gate.values.data == nullptr && gate.multiplier.data == nullptr &&
                    gate.rank_scale.data == nullptr && u.cols == gate.ranks;
  const int ranks = static_cast<int>(gate.ranks);
  const int per_expert = gate.rank_offsets != nullptr || ranks == 0 ? 1 : ranks / static_cast<int>(gate.experts);
  return {u, gate, open, false, ranks, (ranks + tile_step - 1) / tile_step * tile_step, per_expert, {}};
}

/// Fills out[c] with column at(c), c < count, of token t, zeros where t is negative; by one warp. `report`: flag bad ids;
/// `Held`: GateRow's.
template <int Held = 2, class Score, class F>
__device__ void fill_rank_row(const RankSource<Score>& source, Index t, int count, float* out, bool report,
                              const F& at) {
  const int lane = static_cast<int>(threadIdx.x) % warp_width;
  if (t < 0) {
    for (int c = lane; c < count; c += warp_width) out[c] = 0;
    return;
  }
  const auto beside = [&](int j) {
    const int side = j - source.padded;
    return side < source.h.cols ? narrow<float>(source.h(t, side)) : 0.0f;
  };
  if (source.open) {
    for (int c = lane; c < count; c += warp_width) {
      const int j = at(c);
      out[c] = j < source.ranks ? source.u(t, j) : j < source.padded ? 0.0f : beside(j);
    }
    return;
  }
  const GateRow<float, Score, Space::device, Held> row(source.gate, t);
  if (report && !source.gate.computed) {
    for (Index k = 0; k < source.gate.ids.cols; ++k) row.expert_at(k);
  }
  const int shared_columns = static_cast<int>(source.u.cols);
  for (int c = lane; c < count; c += warp_width) {
    const int j = at(c);
    if (j >= source.ranks) {
      out[c] = j < source.padded ? 0.0f : beside(j);
      continue;
    }
    const Index e = source.gate.rank_offsets != nullptr ? source.gate.expert_of(j) : Index{j / source.per_expert};
    const int column = shared_columns == source.ranks ? j : j % shared_columns;
    out[c] = row.open(j, e) ? source.u(t, column) * row.factor(j, e) : 0.0f;
  }
}

/// Fills row i of a tile, rows `pitch` apart, for token token_at(i), i < rows, and zeros up to row `all_rows`; by all warps of a
/// block.
template <int Held = 2, class Score, class T, class F>
__device__ void fill_rank_tile(const RankSource<Score>& source, const T& token_at, int rows, int all_rows, int count,
                               float* tile, int pitch, bool report, const F& at) {
  const int warps = static_cast<int>(blockDim.x) / warp_width;
  for (int i = static_cast<int>(threadIdx.x) / warp_width; i < all_rows; i += warps) {
    fill_rank_row<Held>(source, i < rows ? Index{token_at(i)} : Index{-1}, count, tile + i * pitch, report, at);
  }
}

}  // namespace detail
}  // namespace gpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
