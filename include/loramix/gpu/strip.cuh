/// A warp's own strip of 32 columns of a matrix, streamed through shared memory 16 rows at a time.
///
/// Computes:    nothing; copies that run ahead of the warp by `ahead` steps. No other warp reads a strip, so no barrier of the
///              block is needed, only __syncwarp().
/// Errors:      none; zeros outside the matrix.
/// Cost:        every element once; (ahead + 1) steps of shared memory per warp.
/// Determinism: nothing is computed.
/// Example:     gpu/expand.cuh
#pragma once
#include <loramix/gpu/math.cuh>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace gpu {
namespace detail {

/// E in rows of 32 columns [16, 32], or, columns being stored as rows, [32, 16].
template <class E, bool by_column = false>
class Strip {
 public:
  static constexpr int ahead = 3;
  static constexpr int slots = ahead + 1;
  static constexpr int slot_bytes = tile_step * tile_cols * static_cast<int>(sizeof(E));
  static constexpr int chunks = (by_column ? tile_step : tile_cols) / per_chunk<E>;

  __device__ explicit Strip(unsigned char* shared) : shared_(shared) {}

  /// Asks for rows [row, row + 16) and columns [col, col + 32) as step `step`.
  __device__ void request(const Lane& lane, int step, const Source<E>& m, Index row, Index col) const {
    const SharedTile<E> to = tile(step);
#pragma unroll
    for (int i = lane.id; i < slot_bytes / 16; i += 32) {
      const int r = i / chunks, c = i % chunks;
      if constexpr (by_column)
        copy_chunk(to.chunk(r, c), m, col + r, row + c * per_chunk<E>);
      else
        copy_chunk(to.chunk(r, c), m, row + r, col + c * per_chunk<E>);
    }
  }
  /// The same for sixteen rows of a list: row_at(r) for r in [0, 16); columns are not stored as rows.
  template <class F>
  __device__ void request_rows(const Lane& lane, int step, const Source<E>& m, const F& row_at, Index col) const {
    static_assert(!by_column);
    const SharedTile<E> to = tile(step);
#pragma unroll
    for (int i = lane.id; i < slot_bytes / 16; i += 32) {
      const int r = i / chunks, c = i % chunks;
      copy_chunk(to.chunk(r, c), m, row_at(r), col + c * per_chunk<E>);
    }
  }
  /// After commit_copies() for every step, wanted or not, until `step` + ahead: step `step` is there for the whole warp.
  __device__ static void wait() {
    wait_copies<ahead>();
    __syncwarp();
  }
  __device__ SharedTile<E> tile(int step) const { return {shared_ + step % slots * slot_bytes, chunks}; }
  __device__ auto right(int step) const {
    if constexpr (by_column)
      return RightRows<E>{tile(step)};
    else
      return RightColumns<E>{tile(step)};
  }

 private:
  unsigned char* shared_;
};

}  // namespace detail
}  // namespace gpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
