/// Every launch of this room.
///
/// Computes:    launch(be, name, kernel, grid, threads, shared, arguments…): the kernel in be.stream, with so many bytes of dynamic
///              shared memory; of an empty grid, nothing.
/// Errors:      a launch that CUDA refuses (ErrorCode::device, with the kernel's name). It is what this launch returned: an error of
///              the engine's own that lies in cudaGetLastError stays there. What a kernel does later shows at the next call.
/// Cost:        beyond 40 KiB of shared memory, a question for what the kernel may have.
/// Determinism: nothing is computed.
/// Example:     gpu/rows.cuh
#pragma once
#include <loramix/gpu/backend.cuh>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace gpu {
namespace detail {

/// Lets a kernel have so much dynamic shared memory where it may not yet: all that a block can have, whoever asks, for other
/// threads launch the kernel, too, with sizes of their own, and the limit is the kernel's.
template <class Kernel>
void allow_shared(Kernel* kernel, Index bytes) {
  cudaFuncAttributes of_kernel;
  check_cuda("cudaFuncGetAttributes", cudaFuncGetAttributes(&of_kernel, kernel));
  // 48 KiB is what was not asked for yet; whether a kernel's own variables count in it, CUDA does not say.
  const Index may = of_kernel.maxDynamicSharedSizeBytes;
  if (may >= bytes && may > Index{48} << 10) return;
  int device = 0;
  check_cuda("cudaGetDevice", cudaGetDevice(&device));
  const Index most = machine_of(device).shared_bytes - static_cast<Index>(of_kernel.sharedSizeBytes);
  check_cuda("cudaFuncSetAttribute",
             cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most)));
}

template <class... Parameters, class... Arguments>
void launch(const Backend& be, const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, Index shared,
            const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  // 48 KiB, with a kernel's own variables, needs no asking.
  if (shared > (Index{40} << 10)) allow_shared(kernel, shared);
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(shared);
  config.stream = be.stream;
  check_cuda("launch of ", cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

}  // namespace detail
}  // namespace gpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
