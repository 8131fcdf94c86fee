// The CPU backend conforms, however it is told to work: scalars that are not widened.
#include "conformance/product.hpp"
#include "cpu/harness.hpp"

TEST_CASE_TEMPLATE("the gated product conforms", P, float, double) {
  for (const loramix::cpu::Tuning& tuning : loramix_test::tunings()) {
    loramix_test::CpuHarness<> harness({}, tuning);
    loramix_test::product_conforms<P>(harness, {});
    loramix_test::product_outputs_are_optional<P>(harness);
  }
}
