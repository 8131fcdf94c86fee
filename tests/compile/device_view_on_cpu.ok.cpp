// Host views on the CPU backend.
#include <loramix/cpu/cpu.hpp>
#include <loramix/ops/shrink.hpp>

int main() {
  const loramix::Shrink<float, float, float, float, loramix::Space::host> shrink{};
  return static_cast<int>(loramix::scratch_bytes(loramix::cpu::Backend{}, shrink));
}
