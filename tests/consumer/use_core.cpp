// A component's least program: sizes and draws, no backend.
#include <cstdio>
#include <loramix/adapter/lora.hpp>
#include <loramix/core/version.hpp>

int main() {
  const loramix::Lora<float> lora({.d_in = 8, .d_out = 6, .rank = 2, .alpha = 4});
  std::printf("loramix %d.%d.%d\n", loramix::version_major, loramix::version_minor, loramix::version_patch);
  return lora.parameters().size == 2 * (8 + 6) ? 0 : 1;
}
