/// Owning device memory, and copies between host and device.
///
/// Computes:    Buffer<T, Space::device>(n): n zeros. Matrix<T, Space::device> is one with a shape (core/matrix.hpp).
///              copy(from, to): to = from, between any two spaces; both in the same storage order, rows may be strided.
/// Reads:       from [rows, cols] or [size].
/// Writes:      to, of the same shape.
/// Errors:      cudaMalloc, cudaMemcpy and the like failing (ErrorCode::device); sizes that overflow or disagree.
/// Cost:        for loaders and tests: a Buffer allocates, and it and copy(from, to) wait until the memory is ready.
///              copy(stream, from, to) only enqueues; host memory must live until the stream has passed it.
/// Determinism: nothing is computed.
/// Example:     tests/gpu/buffer.cu
#pragma once
#include <loramix/core/matrix.hpp>
#include <loramix/gpu/check.cuh>

namespace loramix {
inline namespace LORAMIX_ABI {

/// A value type: copies are copies of the memory, made and finished on the default stream.
template <class T>
class Buffer<T, Space::device> {
  static_assert(std::is_trivially_copyable_v<T>, "loramix: a Buffer holds trivially copyable values");

 public:
  Buffer() = default;
  explicit Buffer(Index size) : size_(size) {
    check::at_least("Buffer", "size", size, 0);
    if (size == 0) return;
    if (check::detail::product(size, static_cast<Index>(sizeof(T))) < 0) {
      fail(check::detail::about(ErrorCode::overflow, "Buffer", "size") << " of " << size << " elements overflows");
    }
    void* memory = nullptr;
    gpu::check_cuda("cudaMalloc", cudaMalloc(&memory, bytes()));
    data_ = static_cast<T*>(memory);
    gpu::check_cuda("cudaMemset", cudaMemset(memory, 0, bytes()));
    wait();
  }
  /// A copy of host memory.
  explicit Buffer(const Buffer<T, Space::host>& host) : Buffer(host.size()) {
    if (size_ == 0) return;
    gpu::check_cuda("cudaMemcpy", cudaMemcpy(data_, host.data(), bytes(), cudaMemcpyHostToDevice));
    wait();
  }
  Buffer(const Buffer& other) : Buffer(other.size_) {
    if (size_ == 0) return;
    gpu::check_cuda("cudaMemcpy", cudaMemcpy(data_, other.data_, bytes(), cudaMemcpyDeviceToDevice));
    wait();
  }
  Buffer(Buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, Index{0})) {}
  Buffer& operator=(Buffer other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Buffer() { cudaFree(data_); }  // waits for kernels that use it; at exit the driver may be gone, which is no error

  T* data() { return data_; }
  const T* data() const { return data_; }
  Index size() const { return size_; }
  VectorView<T, Space::device> view() { return {data_, size_}; }
  VectorView<const T, Space::device> view() const { return {data_, size_}; }

 private:
  std::size_t bytes() const { return static_cast<std::size_t>(size_) * sizeof(T); }
  // Other streams do not wait for the default stream when they were made with cudaStreamNonBlocking.
  static void wait() { gpu::check_cuda("cudaStreamSynchronize", cudaStreamSynchronize(nullptr)); }

  T* data_ = nullptr;
  Index size_ = 0;
};

namespace gpu {

namespace detail {
template <class From, class To>
concept CopyOf = std::is_same_v<std::remove_const_t<From>, To> && std::is_trivially_copyable_v<To>;
}  // namespace detail

/// Enqueues to = from.
template <class From, class To, Space A, Space B, Major M>
  requires detail::CopyOf<From, To>
void copy(cudaStream_t stream, MatrixView<From, A, M> from, MatrixView<To, B, M> to) {
  check::view("copy", "from", from);
  check::shape("copy", "to", to, "rows of from", from.rows, "columns of from", from.cols);
  if (from.empty()) return;
  const Index outer = M == Major::row ? from.rows : from.cols, inner = M == Major::row ? from.cols : from.rows;
  const auto bytes = [](Index n) { return static_cast<std::size_t>(n) * sizeof(To); };
  if (outer == 1 || (from.stride == inner && to.stride == inner)) {
    check_cuda("cudaMemcpyAsync", cudaMemcpyAsync(to.data, from.data, bytes(outer * inner), cudaMemcpyDefault, stream));
  } else {
    check_cuda("cudaMemcpy2DAsync",
               cudaMemcpy2DAsync(to.data, bytes(to.stride), from.data, bytes(from.stride), bytes(inner),
                                 static_cast<std::size_t>(outer), cudaMemcpyDefault, stream));
  }
}
template <class From, class To, Space A, Space B>
  requires detail::CopyOf<From, To>
void copy(cudaStream_t stream, VectorView<From, A> from, VectorView<To, B> to) {
  copy(stream, MatrixView<From, A>(from.data, 1, from.size), MatrixView<To, B>(to.data, 1, to.size));
}

/// to = from, finished when it returns.
template <class From, class To>
void copy(From from, To to) {
  copy(cudaStream_t{}, from, to);
  check_cuda("cudaStreamSynchronize", cudaStreamSynchronize(nullptr));
}

}  // namespace gpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
