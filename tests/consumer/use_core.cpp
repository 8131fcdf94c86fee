// A component's least program: sizes and draws, no backend.
#include <cstdio>
#include <loramix/adapter/lora.hpp>
#include <loramix/core/version.hpp>

int main() {
  const loramix::Lora<float> lora({.d_in = 8, .d_out = 6, .rank = 2, .alpha = 4});
  std::printf("loramix %d.%d.%d\n", loramix::version_major, loramix::version_minor, loramix::version_patch);
  return lora.A().cols == 8 && lora.B().rows == 6 && lora.scale() == 2 ? 0 : 1;
}
