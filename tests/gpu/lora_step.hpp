// One forward and backward of LoRA, described so that a .cu and a .cpp can both run it.
#pragma once

#include <cstdint>
#include <vector>

namespace loramix_test {

struct LoraStep {
  static constexpr std::int64_t tokens = 70, d_in = 40, d_out = 24, rank = 6;
  static constexpr double dropout = 0.25;
  std::vector<float> A, B, x, dy, y;  // [rank, d_in], [d_out, rank] rank-major, [T, d_in], [T, d_out], [T, d_out]
};

struct LoraStepResults {
  std::vector<float> y, dx, dA, dB;
};

/// On the CPU backend.
LoraStepResults lora_step_on_host(const LoraStep& step);

}  // namespace loramix_test
