/// Non-owning strided views whose type says where the memory lies and in which order it is stored.
///
///   MatrixView<T, Space, Major>   [rows, cols]; consecutive rows (Major::row) or columns (Major::column) are `stride`
///                                 elements apart
///   VectorView<T, Space>          [size], contiguous
///
/// A B matrix of shape [d_out, R] with Major::column is stored rank-major (R rows of d_out): the fast order, which the
/// owning adapters use. PEFT's order is Major::row of the same shape. Both are accepted everywhere.
#pragma once
#include <cstdint>
#include <type_traits>

#include <loramix/core/config.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// Sizes and offsets: always 64 bits, signed, so that a negative size is an error and not a huge one.
using Index = std::int64_t;

enum class Space { host, device };
enum class Major { row, column };

template <class T, Space S = Space::host>
struct VectorView {
  T* data = nullptr;
  Index size = 0;

  constexpr VectorView() = default;
  LORAMIX_HD constexpr VectorView(T* data_, Index size_) : data(data_), size(size_) {}
  template <class U>
  requires std::is_same_v<T, const U> LORAMIX_HD constexpr VectorView(VectorView<U, S> other)
      : data(other.data), size(other.size) {}

  LORAMIX_HD constexpr T& operator[](Index i) const { return data[i]; }
  LORAMIX_HD constexpr bool empty() const { return size == 0; }
  LORAMIX_HD constexpr VectorView part(Index begin, Index count) const {
    return {data == nullptr ? nullptr : data + begin, count};
  }
};

template <class T, Space S = Space::host, Major M = Major::row>
struct MatrixView {
  T* data = nullptr;
  Index rows = 0;
  Index cols = 0;
  Index stride = 0;

  static constexpr Space space = S;
  static constexpr Major major = M;

  constexpr MatrixView() = default;
  /// Contiguous.
  LORAMIX_HD constexpr MatrixView(T* data_, Index rows_, Index cols_)
      : MatrixView(data_, rows_, cols_, M == Major::row ? cols_ : rows_) {}
  LORAMIX_HD constexpr MatrixView(T* data_, Index rows_, Index cols_, Index stride_)
      : data(data_), rows(rows_), cols(cols_), stride(stride_) {}
  template <class U>
  requires std::is_same_v<T, const U> LORAMIX_HD constexpr MatrixView(MatrixView<U, S, M> other)
      : MatrixView(other.data, other.rows, other.cols, other.stride) {}

  LORAMIX_HD constexpr T& operator()(Index i, Index j) const {
    return M == Major::row ? data[i * stride + j] : data[j * stride + i];
  }
  LORAMIX_HD constexpr bool empty() const { return rows == 0 || cols == 0; }
  LORAMIX_HD constexpr T* row(Index i) const requires(M == Major::row) { return data + i * stride; }
  LORAMIX_HD constexpr MatrixView block(Index row, Index row_count, Index col, Index col_count) const {
    const Index offset = M == Major::row ? row * stride + col : col * stride + row;
    return {data == nullptr ? nullptr : data + offset, row_count, col_count, stride};
  }
  LORAMIX_HD constexpr MatrixView row_range(Index begin, Index count) const { return block(begin, count, 0, cols); }
  LORAMIX_HD constexpr MatrixView col_range(Index begin, Index count) const { return block(0, rows, begin, count); }
  LORAMIX_HD constexpr auto transposed() const {
    return MatrixView < T, S, M == Major::row ? Major::column : Major::row > (data, cols, rows, stride);
  }
};

/// Into::add accumulates; Into::set assigns and never reads the destination.
enum class Into { add, set };

}  // namespace LORAMIX_ABI
}  // namespace loramix
