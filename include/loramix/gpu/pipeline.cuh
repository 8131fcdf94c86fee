/// Copies from global to shared memory that run while a warp computes (cp.async).
///
/// Computes:    copy_chunk: 16 bytes in shared memory = the first `valid` elements at an address, zeros behind them.
/// Errors:      none; what is not valid is not read.
/// Cost:        aligned: one cp.async of 16 bytes, past L1. Otherwise element by element through registers: slower, for
///              matrices whose rows do not all begin on 16 bytes.
/// Determinism: nothing is computed. The copy has landed after commit_copies() and wait_copies<n>(), for the threads that a
///              barrier then brings together.
/// Example:     gpu/shrink.cuh
#pragma once
#include <loramix/gpu/tile.cuh>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace gpu {
namespace detail {

/// A matrix in global memory as kernels copy it: rows of E, `stride` apart.
template <class E>
struct Source {
  const E* data = nullptr;
  Index rows = 0, cols = 0, stride = 0;
  bool aligned = true;  // all rows begin on 16 bytes
};

/// A row-major view, or the transpose of a column-major one, as a Source.
template <class E, Major M>
Source<E> source_of(MatrixView<const E, Space::device, M> v) {
  const bool aligned =
      reinterpret_cast<std::uintptr_t>(v.data) % 16 == 0 && v.stride * static_cast<Index>(sizeof(E)) % 16 == 0;
  return {v.data, M == Major::row ? v.rows : v.cols, M == Major::row ? v.cols : v.rows, v.stride, aligned};
}

template <class E>
__device__ void copy_chunk(E* shared, const E* from, Index valid, bool aligned) {
  constexpr int n = per_chunk<E>;
  const int elements = valid < 0 ? 0 : valid < n ? static_cast<int>(valid) : n;
  if (aligned) {
    const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(elements * static_cast<int>(sizeof(E)))
                 : "memory");
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) shared[i] = i < elements ? from[i] : E{};
  }
}

/// Elements [col, col + per_chunk) of a row, zeros outside the matrix.
template <class E>
__device__ void copy_chunk(E* shared, const Source<E>& m, Index row, Index col) {
  const bool inside = row < m.rows && col < m.cols;
  copy_chunk(shared, inside ? m.data + row * m.stride + col : m.data, inside ? m.cols - col : Index{0}, m.aligned);
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until at most `pending` of this thread's groups of copies are on their way.
template <int pending>
__device__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

/// Asks for the line of an address to be in L2.
__device__ inline void prefetch(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

}  // namespace detail
}  // namespace gpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
