// The GPU backend under test: a stream that does not wait for the default one, a cuBLAS handle, a status, tickets, and whatever
// Tuning a test sets. Memory handed to the code under test has guards behind it; scratch holds NaN, or under PTXEMU_INITCHECK nothing at all.
#pragma once

#include <doctest/doctest.h>

#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include <loramix/gpu/gpu.cuh>

namespace loramix_test {

class GpuHarness {
 public:
  static constexpr loramix::Space space = loramix::Space::device;
  loramix::gpu::Tuning tuning{};
  bool with_tickets = true;

  GpuHarness() {
    loramix::gpu::check_cuda("cudaStreamCreateWithFlags", cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    REQUIRE(cublasCreate(&cublas_) == CUBLAS_STATUS_SUCCESS);
  }
  ~GpuHarness() {
    release();
    cublasDestroy(cublas_);
    cudaStreamDestroy(stream_);
  }
  GpuHarness(const GpuHarness&) = delete;
  GpuHarness& operator=(const GpuHarness&) = delete;

  loramix::gpu::Backend backend() {
    loramix::gpu::Tuning fitting = tuning;  // a card may have less shared memory than the default asks for
    const loramix::Index there = loramix::gpu::machine_of(0).shared_bytes;
    if (fitting.machine.shared_bytes > there) fitting.machine.shared_bytes = there;
    return {.stream = stream_,
            .cublas = cublas_,
            .status = status(),
            .blas_bytes = 1 << 16,
            .tickets = with_tickets ? tickets_.address() : nullptr,
            .tuning = fitting};
  }
  cudaStream_t stream() const { return stream_; }
  cublasHandle_t cublas() const { return cublas_; }
  loramix::StatusFlags* status() { return status_.address(); }
  loramix::StatusFlags flags() const { return status_.read(stream_); }
  void clear_flags() { status_.clear(stream_); }
  void wait() const { loramix::gpu::check_cuda("cudaStreamSynchronize", cudaStreamSynchronize(stream_)); }

  template <class T>
  T* upload(const std::vector<T>& values) {
    const std::size_t bytes = values.size() * sizeof(T);
    T* const memory = reinterpret_cast<T*>(guarded(bytes));
    loramix::gpu::check_cuda("cudaMemcpy", cudaMemcpy(memory, values.data(), bytes, cudaMemcpyHostToDevice));
    return memory;
  }
  template <class T>
  void download(const T* from, std::vector<T>& values) const {
    wait();
    loramix::gpu::check_cuda("cudaMemcpy",
                             cudaMemcpy(values.data(), from, values.size() * sizeof(T), cudaMemcpyDeviceToHost));
  }
  loramix::Arena<space> arena(loramix::Index bytes) {
    const std::size_t size = static_cast<std::size_t>(bytes);
    std::byte* const memory = guarded(size);
    if (std::getenv("PTXEMU_INITCHECK") == nullptr) {
      loramix::gpu::check_cuda("cudaMemset", cudaMemset(memory, 0xff, size));
    }
    loramix::gpu::check_cuda("cudaStreamSynchronize", cudaStreamSynchronize(nullptr));
    return {memory, bytes};
  }
  /// Frees everything; false where a guard was overwritten or a kernel flagged bad data.
  bool release() {
    wait();
    const loramix::StatusFlags found = flags();
    bool good = found.bad_expert_id == 0 && found.bad_group_id == 0;
    for (const auto& [memory, bytes] : alive_) {
      std::byte guard[guard_bytes];
      cudaMemcpy(guard, memory + bytes, guard_bytes, cudaMemcpyDeviceToHost);
      for (const std::byte b : guard) good = good && b == std::byte{0x77};
      cudaFree(memory);
    }
    alive_.clear();
    return good;
  }

 private:
  static constexpr std::size_t guard_bytes = 64;

  std::byte* guarded(std::size_t bytes) {
    void* memory = nullptr;
    loramix::gpu::check_cuda("cudaMalloc", cudaMalloc(&memory, bytes + guard_bytes));
    alive_.emplace_back(static_cast<std::byte*>(memory), bytes);
    loramix::gpu::check_cuda("cudaMemset", cudaMemset(static_cast<std::byte*>(memory) + bytes, 0x77, guard_bytes));
    return static_cast<std::byte*>(memory);
  }

  cudaStream_t stream_ = nullptr;
  cublasHandle_t cublas_ = nullptr;
  loramix::gpu::Status status_;
  loramix::gpu::Tickets tickets_;
  std::vector<std::pair<std::byte*, std::size_t>> alive_;
};

/// The message of the error that f raises, "" if it raises none.
template <class F>
std::string error_of(const F& f) {
  try {
    f();
  } catch (const loramix::Error& error) {
    return error.what();
  }
  return "";
}

}  // namespace loramix_test
