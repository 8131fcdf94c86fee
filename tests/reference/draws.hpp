// Philox4x32-10 and the dropout mask, literally from MATH.md section 1 and Salmon et al. 2011.
#pragma once

#include <array>
#include <cstdint>

#include "reference/grid.hpp"

namespace loramix_test::reference {

inline std::uint64_t splitmix64(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

inline std::uint64_t fold(std::uint64_t k, std::uint64_t v) { return splitmix64(k ^ splitmix64(v)); }

using Words = std::array<std::uint32_t, 4>;

inline Words philox(std::uint64_t key, Words c) {
  std::uint32_t low = static_cast<std::uint32_t>(key), high = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = 0xd2511f53ull * c[0], b = 0xcd9e8d57ull * c[2];
    c = {static_cast<std::uint32_t>(b >> 32) ^ c[1] ^ low, static_cast<std::uint32_t>(b),
         static_cast<std::uint32_t>(a >> 32) ^ c[3] ^ high, static_cast<std::uint32_t>(a)};
    low += 0x9e3779b9u;
    high += 0xbb67ae85u;
  }
  return c;
}

/// Column i of a token uses half i mod 2 (0 = low) of word ⌊(i mod 8)/2⌋ of block ⌊i/8⌋; keep ⇔ draw16 ≥ p16.
inline bool keep(std::uint64_t seed, std::uint64_t site, std::uint64_t step, std::uint64_t token, Index i,
                 std::uint32_t p16) {
  const Words words =
      philox(fold(fold(seed, site), step), {static_cast<std::uint32_t>(i / 8), 0u, static_cast<std::uint32_t>(token),
                                            static_cast<std::uint32_t>(token >> 32)});
  const std::uint32_t word = words[static_cast<std::size_t>(i % 8 / 2)];
  return (i % 2 == 0 ? word & 0xffffu : word >> 16) >= p16;
}

}  // namespace loramix_test::reference
