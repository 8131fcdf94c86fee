// The 16-bit scalars have the bits of Eigen's, where Eigen is installed.
#if __has_include(<eigen3/Eigen/Core>)
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <eigen3/Eigen/Core>
#include <random>

#include <loramix/core/scalars.hpp>

#include "support/seed.hpp"

namespace lm = loramix;

TEST_CASE("half and bfloat16 agree with Eigen's from float, and back") {
  std::mt19937 random(static_cast<unsigned>(loramix_test::seed(3)));
  long wrong = 0;
  for (int i = 0; i < 500000; ++i) {
    const std::uint32_t bits = static_cast<std::uint32_t>(random());
    float v;
    std::memcpy(&v, &bits, sizeof v);
    if (std::isnan(v)) continue;
    if (i % 2 == 0) v = std::ldexp(v / (std::fabs(v) + 1e-30f), static_cast<int>(random() % 48) - 28);
    wrong += lm::narrow<lm::half>(v).bits != Eigen::half(v).x;
    wrong += lm::narrow<lm::bfloat16>(v).bits != Eigen::bfloat16(v).value;
  }
  CHECK(wrong == 0);
  for (int bits = 0; bits < 65536; ++bits) {
    const std::uint16_t b = static_cast<std::uint16_t>(bits);
    const float h = static_cast<float>(Eigen::half(Eigen::half_impl::raw_uint16_to_half(b)));
    const float f = static_cast<float>(Eigen::bfloat16(Eigen::bfloat16_impl::raw_uint16_to_bfloat16(b)));
    wrong += !std::isnan(h) && lm::widen<float>(lm::half{b}) != h;
    wrong += !std::isnan(f) && lm::widen<float>(lm::bfloat16{b}) != f;
  }
  CHECK(wrong == 0);
}
#endif
