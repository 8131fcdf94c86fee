/// Normal draws, by Box and Muller in double from the counters of core/draws.hpp.
#pragma once
#include <cmath>

#include <loramix/core/draws.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// Column i of a row's standard normals: columns 2j and 2j + 1 are √(−2 ln u₂ⱼ)·(cos, sin)(2π u₂ⱼ₊₁); MATH.md section 1.
LORAMIX_HD inline double draw_normal(std::uint64_t key, Purpose purpose, std::uint64_t row, Index column) {
  const Index even = column / 2 * 2;
  const double radius = std::sqrt(-2 * std::log(draw_uniform(key, purpose, row, even)));
  const double angle = 6.283185307179586 * draw_uniform(key, purpose, row, even + 1);
  return radius * (column % 2 == 0 ? std::cos(angle) : std::sin(angle));
}

}  // namespace LORAMIX_ABI
}  // namespace loramix
