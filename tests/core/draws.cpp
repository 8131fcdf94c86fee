// Keyed draws: the known answers of MATH.md section 1, Philox against its authors' library, and the promises that make
// a mask independent of batching.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <random>
#include <string>

#if __has_include(<Random123/philox.h>)
#include <Random123/philox.h>
#define LORAMIX_TEST_RANDOM123
#endif

#include <loramix/core/draws.hpp>

#include "core/caught.hpp"
#include "support/seed.hpp"

namespace lm = loramix;
using loramix_test::check_error;

namespace {

constexpr lm::Key known{.seed = 42, .site = lm::site("layers.0.mlp.up_proj"), .step = 3};

std::string keep_bits(const lm::Dropout& dropout, lm::Index t, int columns) {
  std::string bits;
  for (int c = 0; c < columns; ++c) bits += dropout.keep(t, c) ? '1' : '0';
  return bits;
}

}  // namespace

TEST_CASE("known answers of MATH.md section 1") {
  static_assert(lm::site("layers.0.mlp.up_proj") == 0xf13fb8f15d1e4c8fu);
  static_assert(lm::detail::fold(42, lm::site("layers.0.mlp.up_proj")) == 0xa7d0a45eb6eb8f56u);
  static_assert(lm::philox_key(known) == 0x90ab6ccd94e807c8u);
  constexpr lm::PhiloxWords block = lm::draw_block(lm::philox_key(known), lm::Purpose::dropout, 5, 0);
  CHECK(block.word[0] == 0x4c8a82b6u);
  CHECK(block.word[1] == 0x4b0cb6e7u);
  CHECK(block.word[2] == 0x2f59aa34u);
  CHECK(block.word[3] == 0x354403e4u);
  CHECK(keep_bits(lm::make_dropout("test", 0.5, known), 5, 20) == "10101000010110101101");
  CHECK(keep_bits(lm::make_dropout("test", 0.1, known), 5, 20) == "11111101111111111111");
  CHECK(keep_bits(lm::make_dropout("test", 0.5, known), 7 * (lm::Index{1} << 32) + 5, 20) == "01011011001111110101");
  CHECK(lm::site("") == 0xcbf29ce484222325u);   // FNV's offset basis
  CHECK(lm::site("a") == 0xaf63dc4c8601ec8cu);  // the published test vectors of FNV-1a-64
  CHECK(lm::site("foobar") == 0x85944171f73967e8u);
  CHECK(lm::detail::splitmix64(0) == 0xe220a8397b1dcdafu);  // first output from state 0
}

TEST_CASE("Philox4x32-10: the authors' vectors") {
  const auto same = [](lm::PhiloxWords got, lm::PhiloxWords want) {
    for (int w = 0; w < 4; ++w) CHECK(got.word[w] == want.word[w]);
  };
  same(lm::philox(0, {{0, 0, 0, 0}}), {{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}});
  same(lm::philox(~std::uint64_t{0}, {{~0u, ~0u, ~0u, ~0u}}), {{0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}});
  same(lm::philox(0x299f31d0a4093822u, {{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}}),
       {{0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}});
}

TEST_CASE("Philox4x32-10 against Random123") {
#ifdef LORAMIX_TEST_RANDOM123
  std::mt19937_64 random(loramix_test::seed(10));
  long wrong = 0;
  for (int i = 0; i < 20000; ++i) {
    const std::uint64_t key = random(), low = random(), high = random();
    const auto u32 = [](std::uint64_t v) { return static_cast<std::uint32_t>(v); };
    const r123::Philox4x32::ctr_type counter = {{u32(low), u32(low >> 32), u32(high), u32(high >> 32)}};
    const r123::Philox4x32::key_type words = {{u32(key), u32(key >> 32)}};
    const auto want = r123::Philox4x32()(counter, words);
    const lm::PhiloxWords got = lm::philox(key, {{counter[0], counter[1], counter[2], counter[3]}});
    for (int w = 0; w < 4; ++w) wrong += got.word[w] != want[w];
  }
  CHECK(wrong == 0);
#else
  MESSAGE("not run: librandom123-dev is not installed");
#endif
}

TEST_CASE("draw_block puts block, purpose and token into the counter") {
  const std::uint64_t key = 0x0123456789abcdefu, token = 0xdeadbeef00000007u;
  const lm::PhiloxWords got = lm::draw_block(key, lm::Purpose::sampling, token, 9);
  const lm::PhiloxWords want = lm::philox(key, {{9, 4, 0x00000007u, 0xdeadbeefu}});
  for (int w = 0; w < 4; ++w) CHECK(got.word[w] == want.word[w]);
  CHECK(static_cast<int>(lm::Purpose::dropout) == 0);
  CHECK(static_cast<int>(lm::Purpose::router_noise) == 1);
  CHECK(static_cast<int>(lm::Purpose::jitter) == 2);
  CHECK(static_cast<int>(lm::Purpose::initialisation) == 3);
}

TEST_CASE("every part of a key changes the draws") {
  const auto first = [](const lm::Key& key) {
    return lm::draw_block(lm::philox_key(key), lm::Purpose::dropout, 0, 0).word[0];
  };
  lm::Key other = known;
  other.seed += 1;
  CHECK(first(other) != first(known));
  other = known;
  other.site += 1;
  CHECK(first(other) != first(known));
  other = known;
  other.step += 1;
  CHECK(first(other) != first(known));
}

TEST_CASE("keep8 is keep eight times; bits follow the half-words") {
  std::mt19937_64 random(loramix_test::seed(11));
  long wrong = 0;
  for (int i = 0; i < 2000; ++i) {
    const lm::Dropout d{random(), random(), static_cast<std::uint32_t>(random() % 65536)};
    const lm::Index t = static_cast<lm::Index>(random() % 1000), block = static_cast<lm::Index>(random() % 1000);
    const std::uint32_t bits = d.keep8(t, block);
    wrong += bits > 255;
    for (int b = 0; b < 8; ++b) {
      const lm::Index column = 8 * block + b;
      const lm::PhiloxWords words =
          lm::philox(d.key, {{static_cast<std::uint32_t>(block), 0, static_cast<std::uint32_t>(d.first_token + t),
                              static_cast<std::uint32_t>((d.first_token + t) >> 32)}});
      const std::uint32_t draw16 = words.word[b / 2] >> (b % 2 * 16) & 0xffffu;
      wrong += (bits >> b & 1u) != (draw16 >= d.p16 ? 1u : 0u);
      wrong += d.keep(t, column) != ((bits >> b & 1u) != 0);
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE("a draw equal to p16 is kept, one below is not") {
  const std::uint64_t key = lm::philox_key(known);
  for (lm::Index column = 0; column < 64; ++column) {
    const lm::PhiloxWords words = lm::draw_block(key, lm::Purpose::dropout, 3, static_cast<std::uint32_t>(column / 8));
    const std::uint32_t draw16 = words.word[column % 8 / 2] >> (column % 2 * 16) & 0xffffu;
    CHECK(lm::Dropout{key, 0, draw16}.keep(3, column));
    CHECK(!lm::Dropout{key, 0, draw16 + 1}.keep(3, column));
  }
}

TEST_CASE("first_token shifts the rows, across 2^32 too") {
  for (const std::uint64_t shift : {std::uint64_t{1}, std::uint64_t{37}, (std::uint64_t{1} << 32) - 2}) {
    lm::Key later = known;
    later.first_token = shift;
    const lm::Dropout whole = lm::make_dropout("test", 0.5, known), part = lm::make_dropout("test", 0.5, later);
    for (lm::Index t = 0; t < 6; ++t) {
      CHECK(keep_bits(part, t, 64) == keep_bits(whole, t + static_cast<lm::Index>(shift), 64));
    }
    CHECK(keep_bits(part, 0, 64) != keep_bits(whole, 0, 64));
  }
}

TEST_CASE("p16 rounds to nearest, and refuses what is not a probability below one") {
  CHECK(lm::dropout_p16("test", 0.0) == 0);
  CHECK(lm::dropout_p16("test", -0.0) == 0);
  CHECK(lm::dropout_p16("test", 0.5) == 32768);
  CHECK(lm::dropout_p16("test", 0.1) == 6554);
  CHECK(lm::dropout_p16("test", 0.05) == 3277);
  CHECK(lm::dropout_p16("test", 0.5 / 65536) == 1);
  CHECK(lm::dropout_p16("test", 0.49 / 65536) == 0);
  CHECK(lm::dropout_p16("test", std::nextafter(0.5, 0.0) / 65536) == 0);  // 0.5 + this rounds to 1
  CHECK(lm::dropout_p16("test", 65535.0 / 65536) == 65535);
  CHECK(lm::dropout_p16("test", std::nextafter(65535.5, 0.0) / 65536) == 65535);
  for (const double bad : {1.0, 1.5, -0.1, -1e-300, 65535.5 / 65536, std::nextafter(1.0, 0.0),
                           std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    CAPTURE(bad);
    check_error(lm::ErrorCode::value, {"loramix: my op: dropout"}, [&] { lm::dropout_p16("my op", bad); });
    check_error(lm::ErrorCode::value, {"my op"}, [&] { lm::make_dropout("my op", bad, known); });
    check_error(lm::ErrorCode::value, {"my op"}, [&] { lm::make_dropout("my op", bad, lm::no_draws); });
  }
}

TEST_CASE("dropout that is off keeps all") {
  const lm::Dropout off = lm::make_dropout("test", 0.5, lm::no_draws), zero = lm::make_dropout("test", 0.0, known);
  for (const lm::Dropout& d : {off, zero, lm::Dropout{}}) {
    CHECK(!d.on());
    CHECK(d.kept_scale() == 1.0);
    for (lm::Index block = 0; block < 100; ++block) CHECK(d.keep8(3, block) == 255u);
  }
  const lm::Dropout half = lm::make_dropout("test", 0.5, known);
  CHECK(half.on());
  CHECK(half.kept_scale() == 2.0);
  CHECK(lm::make_dropout("test", 0.1, known).kept_scale() == doctest::Approx(65536.0 / 58982).epsilon(1e-15));
}

TEST_CASE("the keep rate is what p says, at every column and between neighbours") {
  constexpr lm::Index tokens = 4096, columns = 64;
  for (const double p : {0.05, 0.5, 0.9}) {
    const lm::Dropout d = lm::make_dropout("test", p, known);
    const double keep = 1.0 - d.p16 / 65536.0;
    long all = 0, both = 0, down = 0;
    for (lm::Index c = 0; c < columns; ++c) {
      long kept = 0;
      for (lm::Index t = 0; t < tokens; ++t) {
        const bool here = d.keep(t, c);
        kept += here;
        both += here && d.keep(t, c ^ 1);
        down += here && d.keep(t ^ 1, c);
      }
      all += kept;
      CHECK(std::abs(kept - keep * tokens) <= 5.5 * std::sqrt(keep * (1 - keep) * tokens));
    }
    const double n = tokens * columns, sigma = std::sqrt(keep * (1 - keep) * n);
    CHECK(std::abs(all - keep * n) <= 5 * sigma);
    CHECK(std::abs(both - keep * keep * n) <= 7 * sigma);  // pairs are counted twice
    CHECK(std::abs(down - keep * keep * n) <= 7 * sigma);
  }
}

TEST_CASE("uniform draws: column i is word i mod 4 of block i / 4, inside (0, 1)") {
  const std::uint64_t key = lm::philox_key(known);
  double sum = 0, squares = 0, low = 1, high = 0;
  constexpr int rows = 64, columns = 1024;
  long wrong = 0;
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < columns; ++c) {
      const double u = lm::draw_uniform(key, lm::Purpose::jitter, static_cast<std::uint64_t>(r), c);
      const lm::PhiloxWords words =
          lm::philox(key, {{static_cast<std::uint32_t>(c / 4), 2, static_cast<std::uint32_t>(r), 0}});
      wrong += u != std::ldexp(static_cast<double>(words.word[c % 4]) + 0.5, -32);
      sum += u;
      squares += u * u;
      low = u < low ? u : low;
      high = u > high ? u : high;
    }
  }
  CHECK(wrong == 0);
  constexpr double n = rows * columns;
  CHECK(low > 0.0);
  CHECK(low < 1e-3);
  CHECK(high < 1.0);
  CHECK(high > 1 - 1e-3);
  CHECK(std::abs(sum / n - 0.5) < 5 * std::sqrt(1.0 / 12 / n));
  CHECK(std::abs(squares / n - 1.0 / 3) < 5 * std::sqrt(4.0 / 45 / n));
  CHECK(lm::draw_uniform(key, lm::Purpose::jitter, 0, 0) != lm::draw_uniform(key, lm::Purpose::router_noise, 0, 0));
  // The largest word gives less than one, the smallest more than zero.
  static_assert((0xffffffffu + 0.5) * 0x1p-32 < 1.0 && 0.5 * 0x1p-32 > 0.0);
}
