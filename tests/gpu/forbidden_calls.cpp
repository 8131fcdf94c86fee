// The program's calls of these functions arrive here first, for the CUDA runtime is a shared library; they are counted and
// passed on. (Not in a .cu file: nvcc defines some of them there for device code.)
#include "gpu/forbidden_calls.hpp"

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cstddef>

namespace {

int count = 0, launched = 0;

template <class F>
F* next(const char* name, F*, int& counter = count) {
  ++counter;
  return reinterpret_cast<F*>(dlsym(RTLD_NEXT, name));
}

}  // namespace

int loramix_test::forbidden_calls() { return count; }
int loramix_test::launches() { return launched; }

extern "C" {
// What <<<>>> becomes, and what gpu/launch.cuh calls.
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, std::size_t shared,
                               cudaStream_t stream) {
  using Launch = cudaError_t(cudaKernel_t, dim3, dim3, void**, std::size_t, cudaStream_t);
  return next("__cudaLaunchKernel", static_cast<Launch*>(nullptr), launched)(kernel, grid, block, arguments, shared,
                                                                             stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** arguments) {
  using Launch = cudaError_t(const cudaLaunchConfig_t*, const void*, void**);
  return next("cudaLaunchKernelExC", static_cast<Launch*>(nullptr), launched)(config, kernel, arguments);
}
cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t stream) {
  return next("cudaMemsetAsync", &cudaMemsetAsync, launched)(memory, value, bytes, stream);
}
cudaError_t cudaMalloc(void** memory, std::size_t bytes) { return next("cudaMalloc", &cudaMalloc)(memory, bytes); }
cudaError_t cudaFree(void* memory) { return next("cudaFree", &cudaFree)(memory); }
cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
  return next("cudaMemcpy", &cudaMemcpy)(to, from, bytes, kind);
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return next("cudaStreamSynchronize", &cudaStreamSynchronize)(stream);
}
cudaError_t cudaDeviceSynchronize() { return next("cudaDeviceSynchronize", &cudaDeviceSynchronize)(); }
}
