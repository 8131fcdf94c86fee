// Conversions of 16-bit scalars against an exact oracle: the list of all values of a format, built from its fields, and
// the midpoints between neighbours, which are exact in double.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include <loramix/core/precision.hpp>
#include <loramix/core/scalars.hpp>

#include "support/seed.hpp"

namespace lm = loramix;

namespace {

template <class T>
struct Format;
template <>
struct Format<lm::half> {
  static constexpr int mantissa = 10, exponent = 5;
};
template <>
struct Format<lm::bfloat16> {
  static constexpr int mantissa = 7, exponent = 8;
};

template <class T>
class Oracle {
  static constexpr int mantissa = Format<T>::mantissa, bias = (1 << (Format<T>::exponent - 1)) - 1;

 public:
  static constexpr std::uint16_t infinity = ((1 << Format<T>::exponent) - 1) << mantissa;

  Oracle() {
    for (int bits = 0; bits <= infinity; ++bits) {  // the last one: where the next finite value would lie
      const int e = bits >> mantissa, m = bits & ((1 << mantissa) - 1);
      values_.push_back(e == 0 ? std::ldexp(m, 1 - bias - mantissa)
                               : std::ldexp((1 << mantissa) + m, e - bias - mantissa));
    }
  }
  double value(int bits) const { return values_[bits]; }
  double middle(int bits) const { return (values_[bits] + values_[bits + 1]) / 2; }

  std::uint16_t nearest_even(double v) const {
    const std::uint16_t sign = std::signbit(v) ? 0x8000 : 0;
    const double magnitude = std::fabs(v);
    if (magnitude >= values_.back()) return sign | infinity;
    const auto above = std::upper_bound(values_.begin(), values_.end(), magnitude);
    const int low = static_cast<int>(above - values_.begin()) - 1;
    const bool up = magnitude > middle(low) || (magnitude == middle(low) && low % 2 == 1);
    return static_cast<std::uint16_t>(sign | (low + up));
  }

 private:
  std::vector<double> values_;
};

template <class To, class From>
class Comparison {
 public:
  void at(From v) {
    for (const From signed_v : {v, static_cast<From>(-v)}) {
      ++cases;
      const std::uint16_t want = oracle_.nearest_even(static_cast<double>(signed_v));
      const std::uint16_t got = lm::narrow<To>(signed_v).bits;
      if (got == want) continue;
      if (wrong++ == 0) {
        first_value = signed_v;
        first_got = got;
        first_want = want;
      }
    }
  }
  void around(From v) {
    constexpr From infinity = std::numeric_limits<From>::infinity();
    at(v);
    at(std::nextafter(v, infinity));
    at(std::nextafter(v, -infinity));
  }
  void done() const {
    CAPTURE(first_value);
    CAPTURE(first_got);
    CAPTURE(first_want);
    CHECK(wrong == 0);
    CHECK(cases > 100000);
  }
  const Oracle<To>& oracle() const { return oracle_; }

 private:
  Oracle<To> oracle_;
  long cases = 0, wrong = 0;
  From first_value{};
  int first_got = 0, first_want = 0;
};

template <class Bits, class From>
From from_bits(Bits bits) {
  static_assert(sizeof(Bits) == sizeof(From));
  From v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

template <class To, class From>
void compare_with_oracle() {
  Comparison<To, From> compare;
  for (int bits = 0; bits < Oracle<To>::infinity; ++bits) {  // every value, every tie, and both neighbours of each
    compare.around(static_cast<From>(compare.oracle().value(bits)));
    compare.around(static_cast<From>(compare.oracle().middle(bits)));
  }
  if constexpr (std::is_same_v<From, double>) {
    // Double-rounding traps: nearest to a tie, but not on it, by less than float can see.
    for (int bits = 0; bits < Oracle<To>::infinity; ++bits) {
      const double tie = compare.oracle().middle(bits);
      for (const int digits : {26, 30, 40, 51}) {
        compare.at(tie * (1 + std::ldexp(1.0, -digits)));
        compare.at(tie * (1 - std::ldexp(1.0, -digits)));
      }
    }
  }
  std::mt19937_64 random(loramix_test::seed(1));
  std::uniform_int_distribution<int> exponent(-160, 140);
  using Bits = std::conditional_t<sizeof(From) == 8, std::uint64_t, std::uint32_t>;
  for (int i = 0; i < 200000; ++i) {
    const From any = from_bits<Bits, From>(static_cast<Bits>(random()));
    if (any == any) compare.at(any);
    const double mantissa = 1 + static_cast<double>(random() >> 12) * 0x1p-52;
    compare.at(static_cast<From>(std::ldexp(mantissa, exponent(random))));
  }
  compare.done();
}

template <class T>
void check_round_trip() {
  const Oracle<T> oracle;
  long wrong_value = 0, wrong_back = 0, wrong_back_from_double = 0, nans = 0;
  for (int bits = 0; bits < 65536; ++bits) {
    const T v{static_cast<std::uint16_t>(bits)};
    const float f = lm::widen<float>(v);
    const double d = lm::widen<double>(v);
    const int magnitude = bits & 0x7fff;
    const bool nan = magnitude > Oracle<T>::infinity;
    if (nan) {
      ++nans;
      wrong_value += !std::isnan(f) || !std::isnan(d) || std::signbit(f) != (bits >= 0x8000);
      const std::uint16_t quiet = static_cast<std::uint16_t>(bits | 1 << (Format<T>::mantissa - 1));
      wrong_back += lm::narrow<T>(f).bits != quiet;
      wrong_back_from_double += lm::narrow<T>(d).bits != quiet;
      continue;
    }
    const double want =
        magnitude == Oracle<T>::infinity ? std::numeric_limits<double>::infinity() : oracle.value(magnitude);
    wrong_value += d != (bits >= 0x8000 ? -want : want) || static_cast<double>(f) != d;
    wrong_value += std::signbit(f) != (bits >= 0x8000) || std::signbit(d) != (bits >= 0x8000);
    wrong_back += lm::narrow<T>(f).bits != bits;
    wrong_back_from_double += lm::narrow<T>(d).bits != bits;
  }
  CHECK(nans == 2 * ((1 << Format<T>::mantissa) - 1));
  CHECK(wrong_value == 0);
  CHECK(wrong_back == 0);
  CHECK(wrong_back_from_double == 0);
}

}  // namespace

TEST_CASE("all 65,536 bit patterns widen exactly and come back") {
  check_round_trip<lm::half>();
  check_round_trip<lm::bfloat16>();
}

TEST_CASE("narrow rounds once to nearest even") {
  SUBCASE("float to half") { compare_with_oracle<lm::half, float>(); }
  SUBCASE("float to bfloat16") { compare_with_oracle<lm::bfloat16, float>(); }
  SUBCASE("double to half") { compare_with_oracle<lm::half, double>(); }
  SUBCASE("double to bfloat16") { compare_with_oracle<lm::bfloat16, double>(); }
}

TEST_CASE("narrow at the edges, as bits") {
  const auto h = [](auto v) { return lm::narrow<lm::half>(v).bits; };
  const auto b = [](auto v) { return lm::narrow<lm::bfloat16>(v).bits; };
  CHECK(h(1.0f) == 0x3c00);
  CHECK(h(65504.0f) == 0x7bff);
  CHECK(h(std::nextafter(65520.0f, 0.0f)) == 0x7bff);
  CHECK(h(65520.0f) == 0x7c00);
  CHECK(h(std::nextafter(65520.0, 0.0)) == 0x7bff);
  CHECK(h(65520.0) == 0x7c00);
  CHECK(h(-65520.0) == 0xfc00);
  CHECK(h(1e300) == 0x7c00);
  CHECK(h(0x1p-14) == 0x0400);
  CHECK(h(0x1p-24) == 0x0001);
  CHECK(h(0x1p-25) == 0x0000);
  CHECK(h(-0x1p-25) == 0x8000);
  CHECK(h(std::nextafter(0x1p-25, 1.0)) == 0x0001);
  CHECK(h(1.0 + 0x1p-11 + 0x1p-50) == 0x3c01);  // through float: a tie, and down
  CHECK(h(1.0 + 0x1p-11) == 0x3c00);
  CHECK(h(1.0 + 3 * 0x1p-11 - 0x1p-50) == 0x3c01);  // through float: a tie, and up
  CHECK(b(1.0 + 0x1p-8 + 0x1p-50) == 0x3f81);
  CHECK(b(1.0 + 0x1p-8) == 0x3f80);
  CHECK(b(std::numeric_limits<float>::max()) == 0x7f80);
  CHECK(b(std::numeric_limits<double>::max()) == 0x7f80);
  CHECK(b(0x1.fep127) == 0x7f7f);
  CHECK(b(std::nextafter(0x1.ffp127, 0.0)) == 0x7f7f);
  CHECK(b(0x1.ffp127) == 0x7f80);
  CHECK(b(0x1p-133) == 0x0001);
  CHECK(b(0x1p-134) == 0x0000);
  CHECK(b(std::nextafter(0x1p-134, 1.0)) == 0x0001);
  CHECK(b(std::numeric_limits<double>::denorm_min()) == 0x0000);
  CHECK(b(-std::numeric_limits<double>::denorm_min()) == 0x8000);

  constexpr double infinity = std::numeric_limits<double>::infinity();
  CHECK(h(infinity) == 0x7c00);
  CHECK(h(-infinity) == 0xfc00);
  CHECK(b(static_cast<float>(-infinity)) == 0xff80);
  CHECK(h(0.0) == 0x0000);
  CHECK(h(-0.0) == 0x8000);
  CHECK(b(-0.0f) == 0x8000);
  for (const double nan :
       {std::numeric_limits<double>::quiet_NaN(), -std::numeric_limits<double>::quiet_NaN(),
        std::numeric_limits<double>::signaling_NaN(), from_bits<std::uint64_t, double>(0x7ff0000000000001u)}) {
    CHECK(std::isnan(lm::widen<float>(lm::narrow<lm::half>(nan))));
    CHECK(std::isnan(lm::widen<float>(lm::narrow<lm::bfloat16>(nan))));
  }
  for (const std::uint32_t bits : {0x7f800001u, 0xff800001u, 0x7fffffffu, 0xffffffffu, 0x7fc00000u}) {
    const float nan = from_bits<std::uint32_t, float>(bits);
    CHECK((h(nan) & 0x7e00) == 0x7e00);
    CHECK((b(nan) & 0x7fc0) == 0x7fc0);
    CHECK((h(nan) >> 15) == (bits >> 31));
    CHECK((b(nan) >> 15) == (bits >> 31));
  }
}

TEST_CASE("between the 16-bit formats, and to themselves") {
  long wrong = 0;
  const Oracle<lm::half> to_half;
  const Oracle<lm::bfloat16> to_bfloat16;
  for (int bits = 0; bits < 65536; ++bits) {
    const lm::half h{static_cast<std::uint16_t>(bits)};
    const lm::bfloat16 b{static_cast<std::uint16_t>(bits)};
    wrong += lm::narrow<lm::half>(h) != h || lm::narrow<lm::bfloat16>(b) != b;
    const double vh = lm::widen<double>(h), vb = lm::widen<double>(b);
    if (!std::isnan(vh)) wrong += lm::narrow<lm::bfloat16>(h).bits != to_bfloat16.nearest_even(vh);
    if (!std::isnan(vb)) wrong += lm::narrow<lm::half>(b).bits != to_half.nearest_even(vb);
  }
  CHECK(wrong == 0);
  CHECK(lm::narrow<float>(1.0 + 0x1p-24 + 0x1p-50) == 1.0f + 0x1p-23f);
  CHECK(lm::narrow<double>(0.1f) == static_cast<double>(0.1f));
}

#if defined(__FLT16_MANT_DIG__) && defined(__SSE2__) && (!defined(__clang__) || __clang_major__ >= 15)
TEST_CASE("half agrees with the compiler's _Float16") {
  std::mt19937_64 random(loramix_test::seed(2));
  std::uniform_int_distribution<int> exponent(-30, 18);
  long wrong = 0;
  for (int i = 0; i < 300000; ++i) {
    const double mantissa = 1 + static_cast<double>(random() >> 12) * 0x1p-52;
    const double v = std::ldexp(i % 2 == 0 ? mantissa : -mantissa, exponent(random));
    const _Float16 from_double = static_cast<_Float16>(v), from_float = static_cast<_Float16>(static_cast<float>(v));
    wrong += lm::narrow<lm::half>(v).bits != from_bits<_Float16, lm::half>(from_double).bits;
    wrong += lm::narrow<lm::half>(static_cast<float>(v)).bits != from_bits<_Float16, lm::half>(from_float).bits;
    wrong += lm::widen<float>(lm::narrow<lm::half>(v)) != static_cast<float>(from_double);
  }
  CHECK(wrong == 0);
}
#endif

TEST_CASE("the 16-bit types are plain, and Precision names five types") {
  static_assert(std::is_trivially_copyable_v<lm::half> && std::is_trivial_v<lm::half> && sizeof(lm::half) == 2);
  static_assert(std::is_trivially_copyable_v<lm::bfloat16> && std::is_trivial_v<lm::bfloat16> &&
                sizeof(lm::bfloat16) == 2);
  static_assert(lm::is_16bit<lm::half> && lm::is_16bit<lm::bfloat16> && !lm::is_16bit<float>);
  static_assert(lm::half{1} == lm::half{1} && lm::half{1} != lm::half{2});

  using F = lm::precision_t<float>;
  static_assert(std::is_same_v<F::activation, float> && std::is_same_v<F::score, float>);
  using D = lm::precision_t<double>;
  static_assert(std::is_same_v<D::accumulation, double> && std::is_same_v<D::gradient, double> &&
                std::is_same_v<D::score, double>);
  using B = lm::precision_t<lm::bfloat16>;
  static_assert(std::is_same_v<B::activation, lm::bfloat16> && std::is_same_v<B::weight, lm::bfloat16> &&
                std::is_same_v<B::accumulation, float> && std::is_same_v<B::gradient, float> &&
                std::is_same_v<B::score, float>);
  using Mixed = lm::precision_t<lm::Precision<lm::bfloat16, float>>;
  static_assert(std::is_same_v<Mixed::activation, lm::bfloat16> && std::is_same_v<Mixed::weight, float> &&
                std::is_same_v<Mixed::gradient, float>);
  CHECK(std::is_same_v<lm::accumulation_t<lm::half>, float>);
}
