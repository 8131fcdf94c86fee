/// The one place that calls Eigen's matrix product, on memory that the caller gives.
///
/// Eigen's public products take their packing buffers from the heap beyond a stack limit, start OpenMP threads of
/// their own under -fopenmp, and choose block sizes from the cache they find. Here the blocks are fixed, the memory is
/// the arena's and the calling thread does the work. `Eigen::internal` is not a stable interface: this and
/// cpu/packet.hpp name it, and nothing else. Tested with Eigen 3.4.0.
///
/// Determinism: rows of C that a call treats alike are summed alike: the composed path runs tiles of one fixed height.
#pragma once
#include <Eigen/Core>

#include <loramix/core/arena.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace cpu {
namespace detail {

/// Block sizes of the product, multiples of every register tile of Eigen's, and the packing memory for them.
template <class T>
class GemmScratch : public Eigen::internal::level3_blocking<T, T> {
 public:
  static constexpr Index depth = 256, wide = 192, tall = 64;
  static constexpr Index elements = depth * (wide + tall);

  explicit GemmScratch(T* memory) {
    this->m_kc = depth;
    this->m_mc = wide;
    this->m_nc = tall;
    this->m_blockA = memory;
    this->m_blockB = memory + depth * wide;
  }
};

/// C [m, n] += A [m, k] · B [k, n]; C is row-major, A and B in the order named. Rows of C are the kernel's columns, so
/// that every row of a tile whose height is a multiple of 8 is summed in the same way.
template <Major OrderA, Major OrderB, class T>
void gemm(Index m, Index n, Index k, const T* a, Index lda, const T* b, Index ldb, T* c, Index ldc,
          GemmScratch<T>& scratch) {
  if (m == 0 || n == 0 || k == 0) return;
  constexpr auto order = [](Major major) { return major == Major::row ? Eigen::RowMajor : Eigen::ColMajor; };
  Eigen::internal::general_matrix_matrix_product<Eigen::Index, T, order(OrderA), false, T, order(OrderB), false,
                                                 Eigen::RowMajor, 1>::run(m, n, k, a, lda, b, ldb, c, 1, ldc, T(1),
                                                                          scratch);
}

}  // namespace detail
}  // namespace cpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
