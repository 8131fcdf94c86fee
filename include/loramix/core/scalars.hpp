/// bfloat16 and half as plain 16-bit storage types, and the conversions that every kernel uses.
///
/// They are own types so that no header needs Eigen or CUDA to name them: the bits are those of Eigen::bfloat16,
/// __nv_bfloat16, Eigen::half and __half. Arithmetic is done in the accumulation type; these types only store.
///
/// Computes:    narrow<To>(v) rounds once, to nearest even, straight from the type of v (also from double);
///              overflow gives infinity, NaN stays NaN (quiet). widen<Acc>(v) is exact.
/// Determinism: a pure function of the bits, the same on every device.
#pragma once
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include <loramix/core/config.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

namespace detail {
/// The relative error of an operation; 0 for a scalar that says none.
template <class Acc>
constexpr double rounding_of() {
  if constexpr (std::is_floating_point_v<Acc>)
    return static_cast<double>(std::numeric_limits<Acc>::epsilon());
  else
    return 0;
}
}  // namespace detail

/// 1 sign, 8 exponent, 7 mantissa bits.
struct bfloat16 {
  std::uint16_t bits;
  friend constexpr bool operator==(bfloat16, bfloat16) = default;
};

/// IEEE binary16: 1 sign, 5 exponent, 10 mantissa bits.
struct half {
  std::uint16_t bits;
  friend constexpr bool operator==(half, half) = default;
};

template <class T>
inline constexpr bool is_16bit = std::is_same_v<T, bfloat16> || std::is_same_v<T, half>;

namespace detail {

template <class To, class From>
LORAMIX_HD inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

LORAMIX_HD inline float to_float(bfloat16 v) { return bit_cast<float>(std::uint32_t{v.bits} << 16); }

LORAMIX_HD inline float to_float(half v) {
  const std::uint32_t sign = std::uint32_t{v.bits & 0x8000u} << 16;
  const std::uint32_t magnitude = v.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x0400u) return bit_cast<float>(sign | ((magnitude << 13) + (112u << 23)));
  const float subnormal = static_cast<float>(magnitude) * 5.9604644775390625e-8f;  // 2^-24, exact
  return bit_cast<float>(sign | bit_cast<std::uint32_t>(subnormal));
}

LORAMIX_HD inline bfloat16 round_to(float v, bfloat16) {
  std::uint32_t u = bit_cast<std::uint32_t>(v);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<std::uint16_t>(u >> 16 | 0x40u)};
  u += 0x7fffu + ((u >> 16) & 1u);
  return {static_cast<std::uint16_t>(u >> 16)};
}

LORAMIX_HD inline half round_to(float v, half) {
  const std::uint32_t u = bit_cast<std::uint32_t>(v);
  const std::uint32_t sign = (u >> 16) & 0x8000u;
  std::uint32_t m = u & 0x7fffffffu;
  if (m > 0x7f800000u) return {static_cast<std::uint16_t>(sign | 0x7e00u | ((m >> 13) & 0x3ffu))};
  if (m >= 0x477ff000u) return {static_cast<std::uint16_t>(sign | 0x7c00u)};  // from 65520 on: infinity
  if (m < 0x38800000u) {                                                      // below 2^-14: subnormal
    // Adding 0.5 aligns the mantissa so that its last bit is worth 2^-24; the addition rounds to nearest even.
    const float aligned = bit_cast<float>(m) + 0.5f;
    return {static_cast<std::uint16_t>(sign | (bit_cast<std::uint32_t>(aligned) - 0x3f000000u))};
  }
  m += 0xfffu + ((m >> 13) & 1u);
  return {static_cast<std::uint16_t>(sign | ((m - (112u << 23)) >> 13))};
}

/// double to float rounded to odd: a second rounding to at most 22 bits then equals one rounding from double.
LORAMIX_HD inline float round_to_odd(double v) {
  const float f = static_cast<float>(v);
  if (static_cast<double>(f) == v || v != v) return f;
  std::uint32_t u = bit_cast<std::uint32_t>(f);
  const double magnitude_f = f < 0 ? -static_cast<double>(f) : static_cast<double>(f);
  const double magnitude_v = v < 0 ? -v : v;
  if (magnitude_f > magnitude_v) --u;
  return bit_cast<float>(u | 1u);
}

}  // namespace detail

/// v as To, rounded once to nearest even.
template <class To, class From>
LORAMIX_HD inline To narrow(From v) {
  if constexpr (std::is_same_v<To, From>) {
    return v;
  } else if constexpr (is_16bit<To>) {
    if constexpr (is_16bit<From>)
      return detail::round_to(detail::to_float(v), To{});
    else if constexpr (std::is_same_v<From, double>)
      return detail::round_to(detail::round_to_odd(v), To{});
    else
      return detail::round_to(static_cast<float>(v), To{});
  } else if constexpr (is_16bit<From>) {
    return static_cast<To>(detail::to_float(v));
  } else {
    return static_cast<To>(v);
  }
}

/// v as Acc, exact: Acc holds every value of From.
template <class Acc, class From>
LORAMIX_HD inline Acc widen(From v) {
  return narrow<Acc>(v);
}

/// Whether v is neither NaN nor infinite, asked of the bits: it holds under -ffast-math too.
template <class T>
LORAMIX_HD inline bool is_finite(T v) {
  return (detail::bit_cast<std::uint64_t>(widen<double>(v)) >> 52 & 0x7ffu) != 0x7ffu;
}

}  // namespace LORAMIX_ABI
}  // namespace loramix
