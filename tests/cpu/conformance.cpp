// The composed path of the CPU backend conforms, for the scalars that widen nothing.
#include "conformance/product.hpp"
#include "cpu/harness.hpp"

TEST_CASE_TEMPLATE("the gated product conforms", P, float, double) {
  loramix_test::CpuHarness<> harness;
  loramix_test::product_conforms<P>(harness, {});
  loramix_test::product_outputs_are_optional<P>(harness);
}
