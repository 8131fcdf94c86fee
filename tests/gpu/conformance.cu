// Both paths of the GPU backend conform: the fused kernels, however their work is cut, launched directly and captured in
// graphs, and the composed path. The table is thinned out for the emulator: widths up to 64, a third of the cases or less,
// another part for each precision.
#include "conformance/product.hpp"
#include "gpu/captured.cuh"

namespace lm = loramix;
using namespace loramix_test;

namespace {

struct Cut {
  lm::gpu::Tuning tuning{};
  bool tickets = true;
  Index width = 64;
};

template <class P, class Harness = GpuHarness>
void conforms(int first, int every = 3, const Cut& cut = {}) {
  Harness harness;
  harness.tuning = cut.tuning;
  harness.with_tickets = cut.tickets;
  product_conforms<P>(harness, {.max_width = cut.width, .every = every, .first = first});
}

const Cut composed{.tuning = {.fused = false}};
/// Every product in as many chunks and blocks as it has stages of 64.
const Cut fine{.tuning = {.machine = {.multiprocessors = 1000}, .block_bytes = 1}, .width = 264};
const Cut fine_without_tickets{.tuning = fine.tuning, .tickets = false, .width = 264};
/// Many chunks, one block: it adds them up itself.
const Cut alone{.tuning = {.machine = {.multiprocessors = 1}, .block_bytes = 1}, .width = 264};
/// The least shared memory: ranks pass through windows of 32, weights in groups of 32.
const Cut narrow{.tuning = {.machine = {.shared_bytes = 74 << 10}}, .width = 264};

/// Every gate that selects says which ranks it has open; alone, and cut into many blocks.
const Cut selecting{.tuning = {.dense_ranks = 0}, .width = 264};
const Cut selecting_fine{.tuning = {.machine = {.multiprocessors = 1000}, .block_bytes = 1, .dense_ranks = 0},
                         .width = 264};
/// In so little shared memory that expand has no room for its sums, or for one unit of ranks at a time.
const Cut selecting_narrow{.tuning = {.machine = {.shared_bytes = 74 << 10}, .dense_ranks = 0}, .width = 264};
const Cut selecting_close{.tuning = {.machine = {.shared_bytes = 116 << 10}, .dense_ranks = 0}, .width = 264};

}  // namespace

TEST_CASE("the gated product conforms: float") { conforms<float>(0); }
TEST_CASE("the gated product conforms: bfloat16") { conforms<lm::bfloat16>(2); }
TEST_CASE("the gated product conforms: half") { conforms<lm::half>(0); }
TEST_CASE("the gated product conforms: float on bfloat16") { conforms<lm::Precision<lm::bfloat16, float>>(1); }

TEST_CASE("in a graph the gated product conforms: float") { conforms<float, CapturingHarness>(1, 7); }
TEST_CASE("in a graph the gated product conforms: bfloat16") { conforms<lm::bfloat16, CapturingHarness>(4, 7, fine); }

TEST_CASE("cut into many blocks the gated product conforms") {
  conforms<float>(3, 11, fine);
  conforms<lm::bfloat16>(5, 11, fine);
  conforms<lm::half>(6, 11, fine_without_tickets);
  conforms<float>(8, 11, fine_without_tickets);
}
TEST_CASE("cut into many chunks of one block the gated product conforms") {
  conforms<lm::bfloat16>(9, 11, alone);
  conforms<float>(10, 11, alone);
}
TEST_CASE("in little shared memory the gated product conforms") {
  conforms<float>(1, 11, narrow);
  conforms<lm::bfloat16>(2, 11, narrow);
  conforms<lm::half>(4, 11, narrow);
}

TEST_CASE("selecting ranks tile by tile the gated product conforms") {
  conforms<float>(5, 11, selecting);
  conforms<lm::bfloat16>(7, 11, selecting_fine);
  conforms<lm::half>(0, 11, selecting);
  conforms<lm::Precision<lm::bfloat16, float>>(3, 11, selecting_fine);
  conforms<lm::bfloat16>(1, 11, selecting_narrow);
  conforms<lm::bfloat16>(2, 11, selecting_close);
}

TEST_CASE("composed, the gated product conforms: float") { conforms<float>(1, 5, composed); }
TEST_CASE("composed, the gated product conforms: double") { conforms<double>(1); }
TEST_CASE("composed, the gated product conforms: bfloat16") { conforms<lm::bfloat16>(2, 5, composed); }
TEST_CASE("composed, the gated product conforms: half") { conforms<lm::half>(4, 5, composed); }
TEST_CASE("composed, the gated product conforms: float on bfloat16") {
  conforms<lm::Precision<lm::bfloat16, float>>(0, 5, composed);
}
