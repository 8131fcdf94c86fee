// expect: loramix: this adapter has no pack: its forward reads each parameter once, as it lies
#include <loramix/adapter/ia3_forward.hpp>
#include <loramix/adapter/pack.hpp>
#include <loramix/cpu/cpu.hpp>

int main() {
  const loramix::Ia3<float> ia3({.d_in = 2, .d_out = 2});
  loramix::prepack(loramix::cpu::Backend{}, ia3);
}
