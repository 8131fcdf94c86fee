// expect: ProductAdapter
#include <loramix/adapter/forward.hpp>
#include <loramix/adapter/fused_lora.hpp>
#include <loramix/cpu/cpu.hpp>

int main() {
  const loramix::FusedLora<float> fused(
      {.d_in = 2, .d_out = 2});  // several products: <loramix/adapter/fused_forward.hpp>
  return static_cast<int>(loramix::reserve_bytes(fused, 1));
}
