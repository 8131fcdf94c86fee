// The composed path of the GPU backend conforms. Under an emulator the table is thinned out, another third for each
// precision.
#include "conformance/product.hpp"
#include "gpu/harness.cuh"

namespace lm = loramix;

namespace {
template <class P>
void conforms(int first) {
  loramix_test::GpuHarness harness;
  loramix_test::product_conforms<P>(harness, {.max_width = 64, .every = 3, .first = first});
}
}  // namespace

TEST_CASE("the gated product conforms: float") { conforms<float>(0); }
TEST_CASE("the gated product conforms: double") { conforms<double>(1); }
TEST_CASE("the gated product conforms: bfloat16") { conforms<lm::bfloat16>(2); }
TEST_CASE("the gated product conforms: half") { conforms<lm::half>(0); }
TEST_CASE("the gated product conforms: float on bfloat16") { conforms<lm::Precision<lm::bfloat16, float>>(1); }
