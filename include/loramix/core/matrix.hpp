/// Owning memory: Buffer<T, Space> (flat), Matrix<T, Space, Major> (a Buffer with a shape). Value types, zero-filled.
///
/// Only objects that outlive a call own memory (adapters, gradients, optimiser state, packs); ops never do.
/// Device memory: Buffer<T, Space::device> is in gpu/buffer.cuh.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#include <loramix/core/check.hpp>
#include <loramix/core/views.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

template <class T, Space S = Space::host>
class Buffer;

template <class T>
class Buffer<T, Space::host> {
  static_assert(std::is_trivially_copyable_v<T>, "loramix: a Buffer holds trivially copyable values");

 public:
  Buffer() = default;
  explicit Buffer(Index size) : size_(size) {
    check::at_least("Buffer", "size", size, 0);
    if (size == 0) return;
    const Index bytes = check::detail::product(size, static_cast<Index>(sizeof(T)));
    const Index rounded = bytes < 0 || bytes > INT64_MAX - 64 ? -1 : (bytes + 63) / 64 * 64;
    if (rounded > 0) data_ = static_cast<T*>(std::aligned_alloc(64, static_cast<std::size_t>(rounded)));
    if (data_ == nullptr) {
      size_ = 0;
      fail(check::detail::about(ErrorCode::overflow, "Buffer", "size") << " of " << size << " elements: no memory");
    }
    std::memset(static_cast<void*>(data_), 0, static_cast<std::size_t>(rounded));
  }
  Buffer(const Buffer& other) : Buffer(other.size_) {
    if (size_ != 0) std::memcpy(static_cast<void*>(data_), other.data_, static_cast<std::size_t>(size_) * sizeof(T));
  }
  Buffer(Buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, Index{0})) {}
  Buffer& operator=(Buffer other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Buffer() { std::free(data_); }

  T* data() { return data_; }
  const T* data() const { return data_; }
  Index size() const { return size_; }
  T& operator[](Index i) { return data_[i]; }
  const T& operator[](Index i) const { return data_[i]; }
  T* begin() { return data_; }
  T* end() { return data_ + size_; }
  const T* begin() const { return data_; }
  const T* end() const { return data_ + size_; }
  VectorView<T, Space::host> view() { return {data_, size_}; }
  VectorView<const T, Space::host> view() const { return {data_, size_}; }

 private:
  T* data_ = nullptr;
  Index size_ = 0;
};

template <class T, Space S = Space::host, Major M = Major::row>
class Matrix {
 public:
  Matrix() = default;
  Matrix(Index rows, Index cols) : buffer_(elements(rows, cols)), rows_(rows), cols_(cols) {}
  Matrix(const Matrix&) = default;
  Matrix(Matrix&& other) noexcept
      : buffer_(std::move(other.buffer_)), rows_(std::exchange(other.rows_, 0)), cols_(std::exchange(other.cols_, 0)) {}
  Matrix& operator=(Matrix other) noexcept {
    std::swap(buffer_, other.buffer_);
    std::swap(rows_, other.rows_);
    std::swap(cols_, other.cols_);
    return *this;
  }

  Index rows() const { return rows_; }
  Index cols() const { return cols_; }
  T* data() { return buffer_.data(); }
  const T* data() const { return buffer_.data(); }
  MatrixView<T, S, M> view() { return {buffer_.data(), rows_, cols_}; }
  MatrixView<const T, S, M> view() const { return {buffer_.data(), rows_, cols_}; }
  operator MatrixView<T, S, M>() { return view(); }
  operator MatrixView<const T, S, M>() const { return view(); }
  T& operator()(Index i, Index j) requires(S == Space::host) { return view()(i, j); }
  const T& operator()(Index i, Index j) const requires(S == Space::host) { return view()(i, j); }

 private:
  static Index elements(Index rows, Index cols) {
    const bool negative = rows < 0 || cols < 0;
    const Index n = negative ? -1 : check::detail::product(rows, cols);
    if (n < 0) {
      fail(check::detail::about(negative ? ErrorCode::shape : ErrorCode::overflow, "Matrix", "size")
           << " [" << rows << ", " << cols << "] is " << (negative ? "negative" : "too large"));
    }
    return n;
  }

  Buffer<T, S> buffer_;
  Index rows_ = 0, cols_ = 0;
};

}  // namespace LORAMIX_ABI
}  // namespace loramix
