// The one seed of a test run: fixed, printed by main, replayed with LORAMIX_SEED=n.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace loramix_test {

/// Seed of this run: LORAMIX_SEED from the environment, else a fixed number.
inline std::uint64_t seed() {
  static const std::uint64_t value = [] {
    const char* text = std::getenv("LORAMIX_SEED");
    return text != nullptr ? std::strtoull(text, nullptr, 0) : std::uint64_t{20250213};
  }();
  return value;
}

/// A stream of its own for each place that draws: mixes `site` into the seed (splitmix64).
inline std::uint64_t seed(std::uint64_t site) {
  std::uint64_t z = seed() + 0x9E3779B97F4A7C15u * (site + 1);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

}  // namespace loramix_test
