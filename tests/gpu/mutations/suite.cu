// What tests/gpu/mutations/run.py expects to be green as it is, and red with any of its patches: the product's conformance on
// tensor cores, cut so that blocks share sums, dense in whole tiles, and grouped by expert.
#include "conformance/product.hpp"
#include "gpu/harness.cuh"

using namespace loramix_test;

namespace {

constexpr loramix::gpu::Tuning fine{.machine = {.multiprocessors = 1000}, .block_bytes = 1};

}  // namespace

TEST_CASE("the gated product conforms") {
  GpuHarness gpu;
  product_conforms<loramix::bfloat16>(gpu, {.max_width = 64, .every = 23, .first = 1});
  gpu.tuning = fine;
  product_conforms<loramix::bfloat16>(gpu, {.max_width = 264, .every = 29, .first = 2});
  gpu.tuning = {.dense_ranks = 0};
  product_conforms<loramix::bfloat16>(gpu, {.max_width = 64, .every = 13, .first = 3});
  CHECK(gpu.release());
}
