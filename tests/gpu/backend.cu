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
