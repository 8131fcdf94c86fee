// The composed path of the GPU backend conforms, launched directly and captured in graphs. The table is thinned out for
// the emulator: widths up to 64, a third of the cases, another third for each precision.
#include "conformance/product.hpp"
#include "gpu/captured.cuh"

namespace lm = loramix;
using namespace loramix_test;

namespace {
template <class P, class Harness = GpuHarness>
void conforms(int first, int every = 3) {
  Harness harness;
  product_conforms<P>(harness, {.max_width = 64, .every = every, .first = first});
}
}  // namespace

TEST_CASE("the gated product conforms: float") { conforms<float>(0); }
TEST_CASE("the gated product conforms: double") { conforms<double>(1); }
TEST_CASE("the gated product conforms: bfloat16") { conforms<lm::bfloat16>(2); }
TEST_CASE("the gated product conforms: half") { conforms<lm::half>(0); }
TEST_CASE("the gated product conforms: float on bfloat16") { conforms<lm::Precision<lm::bfloat16, float>>(1); }

TEST_CASE("in a graph the gated product conforms: float") { conforms<float, CapturingHarness>(1, 7); }
TEST_CASE("in a graph the gated product conforms: bfloat16") { conforms<lm::bfloat16, CapturingHarness>(4, 7); }
