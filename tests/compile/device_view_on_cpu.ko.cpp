// expect: this backend has no implementation of this op for these types
#include <loramix/cpu/cpu.hpp>
#include <loramix/ops/shrink.hpp>

int main() {
  const loramix::Shrink<float, float, float, float, loramix::Space::device> shrink{};
  return static_cast<int>(loramix::scratch_bytes(loramix::cpu::Backend{}, shrink));
}
