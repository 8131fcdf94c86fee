// Device memory as a value, and copies.
#include "gpu/harness.cuh"

namespace lm = loramix;
using lm::Index, lm::Space;
using loramix_test::error_of;

namespace {
lm::Buffer<int> on_host(const lm::Buffer<int, Space::device>& buffer) {
  lm::Buffer<int> host(buffer.size());
  lm::gpu::copy(buffer.view(), host.view());
  return host;
}
}  // namespace

TEST_CASE("a device buffer is a value") {
  lm::Buffer<int, Space::device> a(3);
  CHECK(on_host(a)[2] == 0);
  lm::Buffer<int> numbers(3);
  for (int i = 0; i < 3; ++i) numbers[i] = i + 1;
  lm::gpu::copy(numbers.view(), a.view());

  lm::Buffer<int, Space::device> b = a;
  lm::gpu::copy(lm::Buffer<int>(3).view(), a.view());
  CHECK(on_host(a)[2] == 0);
  CHECK(on_host(b)[2] == 3);

  const int* const memory = b.data();
  const lm::Buffer<int, Space::device> c = std::move(b);
  CHECK(c.data() == memory);
  CHECK(b.size() == 0);
  a = c;
  CHECK(on_host(a)[0] == 1);
  CHECK(lm::Buffer<int, Space::device>(0).data() == nullptr);
  CHECK(lm::Buffer<int, Space::device>(lm::Buffer<int, Space::device>{}).size() == 0);
}

TEST_CASE("copies take strided views of one order") {
  lm::Matrix<float> from(4, 5);
  for (Index i = 0; i < 4; ++i) {
    for (Index j = 0; j < 5; ++j) from(i, j) = static_cast<float>(10 * i + j);
  }
  lm::Matrix<float, Space::device> device(4, 7);
  lm::Matrix<float> to(3, 2);
  loramix_test::GpuHarness gpu;
  lm::gpu::copy(gpu.stream(), from.view(), device.view().block(0, 4, 1, 5));
  lm::gpu::copy(gpu.stream(), device.view().block(1, 3, 4, 2), to.view());
  gpu.wait();
  for (Index i = 0; i < 3; ++i) {
    for (Index j = 0; j < 2; ++j) CHECK(to(i, j) == static_cast<float>(10 * (i + 1) + j + 3));
  }
  lm::gpu::copy(device.view().block(0, 0, 1, 5), from.view().block(0, 0, 1, 5));
  CHECK(error_of([&] { lm::gpu::copy(from.view(), device.view()); }).find("columns") != std::string::npos);
}

TEST_CASE("failures of CUDA carry the call and its status") {
  const std::string error = error_of([] { lm::Buffer<double, Space::device>(Index{1} << 45); });
  CHECK(error.find("cudaMalloc failed: cudaErrorMemoryAllocation") != std::string::npos);
  CHECK(cudaGetLastError() == cudaSuccess);  // the next launch would be blamed for it
  CHECK(error_of([] { lm::Buffer<double, Space::device>(INT64_MAX); }).find("overflows") != std::string::npos);
  CHECK(error_of([] { lm::Buffer<double, Space::device>(-1); }).find("-1") != std::string::npos);
}
