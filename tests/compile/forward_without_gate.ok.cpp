// A product adapter: A, B, scale, dropout and a gate.
#include <loramix/cpu/cpu.hpp>

#include "../../examples/train/mixture.hpp"

int main() {
  const Mixture<float> mine({.d_in = 2, .d_out = 2});
  return static_cast<int>(loramix::workspace_bytes(loramix::cpu::Backend{}, mine, 1) == 0);
}
