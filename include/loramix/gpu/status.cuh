/// What kernels found wrong with the contents of device memory, which the host cannot check at the door.
///
/// Computes:    Status owns a StatusFlags on the device; a Backend carries its address. A bad id contributes nothing to
///              any result and sets its flag, which stays set until clear().
/// Errors:      CUDA calls failing (ErrorCode::device).
/// Cost:        read() waits for the stream: once per step or less, never inside an op. clear() is enqueued.
/// Determinism: flags are set, never counted.
/// Example:     tests/gpu/faults.cu
#pragma once
#include <loramix/gate/form.hpp>
#include <loramix/gpu/buffer.cuh>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace gpu {

/// Flags on the device; give `address()` to Backend::status.
class Status {
 public:
  Status() : flags_(1) {}
  StatusFlags* address() { return flags_.data(); }

  /// The flags after everything that `stream` was given so far.
  StatusFlags read(cudaStream_t stream) const {
    StatusFlags flags;
    copy(stream, flags_.view(), VectorView<StatusFlags>(&flags, 1));
    check_cuda("cudaStreamSynchronize", cudaStreamSynchronize(stream));
    return flags;
  }
  void clear(cudaStream_t stream) {
    check_cuda("cudaMemsetAsync", cudaMemsetAsync(flags_.data(), 0, sizeof(StatusFlags), stream));
  }

 private:
  Buffer<StatusFlags, Space::device> flags_;
};

}  // namespace gpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
