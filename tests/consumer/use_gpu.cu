// A consumer of loramix::gpu, without Eigen: LoRA on the device compiles and links; it runs where there is one.
#include <cstdio>

#include <loramix/adapter/forward.hpp>
#include <loramix/adapter/initialise.hpp>
#include <loramix/adapter/lora.hpp>
#include <loramix/gpu/gpu.cuh>

namespace lm = loramix;

int main() {
  lm::Lora<float> lora({.d_in = 8, .d_out = 4, .rank = 2});
  lm::initialise(lora, {.seed = 1});
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::puts("GPU: not run (no GPU)");
    return 0;
  }
  lm::gpu::Backend be;
  cublasCreate(&be.cublas);
  const auto there = lm::gpu::to_device(lora);
  lm::Matrix<float, lm::Space::device> x(3, 8), y(3, 4);
  const lm::Index bytes = lm::workspace_bytes(be, there, 3);
  lm::Buffer<std::byte, lm::Space::device> scratch(bytes);
  lm::forward(be, there, x, y, lm::Arena<lm::Space::device>(scratch.data(), bytes));
  cublasDestroy(be.cublas);
  return cudaDeviceSynchronize() == cudaSuccess ? 0 : 1;
}
