// Tiles for bfloat16 conform as the packet path does, but for the two parts that they split ranks into. Not run where the
// machine has none.
#include <loramix/cpu/amx.hpp>

#include "conformance/product.hpp"
#include "cpu/harness.hpp"

namespace loramix_test {
namespace {

class AmxHarness : public CpuHarness<lm::SerialExecutor, lm::cpu::AmxBackend<>> {
 public:
  using CpuHarness::CpuHarness;
  static constexpr double split_units = 0x1p-17 / 0x1p-24;
};

}  // namespace

TEST_CASE("the gated product conforms on tiles") {
  if (!lm::cpu::request_amx()) {
    MESSAGE("not run: this machine has no AMX, or its system does not lend it");
    return;
  }
  for (const lm::cpu::Tuning& tuning : tunings()) {
    AmxHarness harness({}, tuning);
    product_conforms<lm::bfloat16>(harness, {});
    product_outputs_are_optional<lm::bfloat16>(harness);
  }
}

}  // namespace loramix_test
