// The composed path of the CPU backend conforms, for the scalars that are widened first.
#include "conformance/product.hpp"
#include "cpu/harness.hpp"

namespace lm = loramix;

TEST_CASE_TEMPLATE("the gated product conforms", P, lm::bfloat16, lm::half, lm::Precision<lm::bfloat16, float>) {
  loramix_test::CpuHarness<> harness;
  loramix_test::product_conforms<P>(harness, {});
  loramix_test::product_outputs_are_optional<P>(harness);
}
