/// What CUDA calls return is never dropped.
///
/// Errors:  a status other than success becomes an Error (ErrorCode::device) that names the call and the status.
///          Kernels report what they find wrong with data in gpu::Status instead (gpu/status.cuh).
/// Example: tests/gpu/buffer.cu
#pragma once
#include <cuda_runtime.h>

#include <loramix/core/error.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace gpu {

/// Fails unless `status`, which `call` (`of` a kernel) returned, is success. CUDA's own memory of it is cleared: the engine would
/// read it as that of a call of its own.
inline void check_cuda(const char* call, cudaError_t status, const char* of = "") {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  Error error(ErrorCode::device);
  fail(error << "loramix: " << call << of << " failed: " << cudaGetErrorName(status) << ", "
             << cudaGetErrorString(status));
}

}  // namespace gpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
