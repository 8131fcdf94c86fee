// One forward and backward of MoA, described so that a .cu and a .cpp can both run it.
#pragma once

#include <cstdint>
#include <vector>

namespace loramix_test {

struct DomainStep {
  static constexpr std::int64_t tokens = 23, d_in = 40, d_out = 24, experts = 3, places = 4, rank = 4, sequences = 7;
  static constexpr double dropout = 0.25;
  bool last;                          // pooling
  std::vector<float> parameters;      // of the adapter, flat
  std::vector<float> x, dy;           // [T, d_in], [T, d_out]
  std::vector<float> dp;              // [sequences, E] what a loss says
  std::vector<std::int64_t> offsets;  // [sequences + 1]
  std::vector<std::int32_t> labels;   // [sequences]
  std::vector<std::uint8_t> valid;    // [T]
};

struct DomainStepResults {
  std::vector<float> y, dx, gradient;
  std::vector<std::int32_t> ids;
};

/// On the CPU backend.
DomainStepResults domain_step_on_host(const DomainStep& step);

}  // namespace loramix_test
