// The engine's handle is lent for the duration of an op, and sizes are known beforehand.
#include <loramix/gate/gates.hpp>

#include "conformance/harness.hpp"
#include "gpu/harness.cuh"

namespace lm = loramix;
using namespace loramix_test;
using lm::Index;

namespace {
constexpr lm::Space device = lm::Space::device;
using Shrink = lm::Shrink<float, float, float, float, device>;

__global__ void end_of_shared(int bytes, unsigned char* out) {
  extern __shared__ unsigned char memory[];
  memory[bytes - 1] = 7;
  *out = memory[bytes - 1];
}
}  // namespace

TEST_CASE("an op leaves the handle as it found it") {
  GpuHarness gpu;
  cudaStream_t other = nullptr;
  lm::gpu::check_cuda("cudaStreamCreate", cudaStreamCreate(&other));
  cublasSetStream(gpu.cublas(), other);
  cublasSetPointerMode(gpu.cublas(), CUBLAS_POINTER_MODE_DEVICE);
  cublasSetMathMode(gpu.cublas(), CUBLAS_TF32_TENSOR_OP_MATH);
  cublasSetAtomicsMode(gpu.cublas(), CUBLAS_ATOMICS_ALLOWED);

  const std::vector<float> ones(6, 1.0f);
  std::vector<float> u(4);
  float* const memory = gpu.upload(u);
  run(gpu, Shrink{{gpu.upload(ones), 2, 3}, {}, {gpu.upload(ones), 2, 3}, {}, {memory, 2, 2}, {}});
  gpu.download(memory, u);
  CHECK(u == std::vector<float>(4, 3.0f));

  cudaStream_t stream = nullptr;
  cublasPointerMode_t pointers;
  cublasMath_t math;
  cublasAtomicsMode_t atomics;
  cublasGetStream(gpu.cublas(), &stream);
  cublasGetPointerMode(gpu.cublas(), &pointers);
  cublasGetMathMode(gpu.cublas(), &math);
  cublasGetAtomicsMode(gpu.cublas(), &atomics);
  CHECK(stream == other);
  CHECK(pointers == CUBLAS_POINTER_MODE_DEVICE);
  CHECK(math == CUBLAS_TF32_TENSOR_OP_MATH);
  CHECK(atomics == CUBLAS_ATOMICS_ALLOWED);
  cudaStreamDestroy(other);
}

TEST_CASE("composed, scratch grows with tokens up to a chunk, and not where nothing is widened") {
  GpuHarness gpu;
  gpu.tuning.fused = false;
  const auto bytes = [&](Index tokens, bool dropout) {
    Shrink op{{nullptr, 2, 100}, {}, {nullptr, tokens, 100}, {}, {nullptr, tokens, 2}, {}};
    op.dropout.p16 = dropout ? 1 : 0;
    return lm::scratch_bytes(gpu.backend(), op);
  };
  const Index blas = bytes(0, false);
  CHECK(blas >= gpu.backend().blas_bytes);
  CHECK(bytes(1 << 20, false) == blas);
  CHECK(bytes(16, true) == blas + 16 * 100 * 4);
  CHECK(bytes(1024, true) == blas + 1024 * 100 * 4);
  CHECK(bytes(1 << 20, true) == bytes(1024, true));
}

TEST_CASE("an error of the engine's own stays the engine's") {
  GpuHarness gpu;
  std::vector<float> u(4);
  const std::vector<float> ones(6, 1.0f);
  float* const memory = gpu.upload(u);
  const Shrink op{{gpu.upload(ones), 2, 3}, {}, {gpu.upload(ones), 2, 3}, {}, {memory, 2, 2}, {}};
  const auto arena = gpu.arena(lm::scratch_bytes(gpu.backend(), op));
  REQUIRE(cudaSetDevice(1 << 20) == cudaErrorInvalidDevice);
  CHECK(error_of([&] { lm::execute(gpu.backend(), op, arena); }) == "");
  CHECK(cudaGetLastError() == cudaErrorInvalidDevice);
  gpu.download(memory, u);
  CHECK(u == std::vector<float>(4, 3.0f));
}

TEST_CASE("shared memory that one launch was given is not taken from the next one of another thread") {
  GpuHarness gpu;
  std::vector<unsigned char> out(1);
  unsigned char* const seven = gpu.upload(out);
  for (const int kilobytes : {100, 60, 100}) {
    lm::gpu::detail::launch(gpu.backend(), "end_of_shared", &end_of_shared, dim3(1), 1, Index{kilobytes} << 10,
                            kilobytes << 10, seven);
    cudaFuncAttributes attributes{};
    lm::gpu::check_cuda("cudaFuncGetAttributes", cudaFuncGetAttributes(&attributes, &end_of_shared));
    CHECK(attributes.maxDynamicSharedSizeBytes >= 100 << 10);
  }
  gpu.download(seven, out);
  CHECK(out[0] == 7);
  CHECK(error_of([&] {
          lm::gpu::detail::launch(gpu.backend(), "end_of_shared", &end_of_shared, dim3(1), 1, Index{1} << 20, 1, seven);
        }).find("launch of end_of_shared failed") != std::string::npos);
  CHECK(cudaGetLastError() == cudaSuccess);
}
