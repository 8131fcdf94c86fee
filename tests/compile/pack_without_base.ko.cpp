// expect: loramix: this adapter's pack is made for a frozen layer: prepack(be, adapter, base)
#include <loramix/adapter/dora_forward.hpp>
#include <loramix/cpu/cpu.hpp>

int main() {
  const loramix::Dora<float> dora({.d_in = 2, .d_out = 2});
  loramix::prepack(loramix::cpu::Backend{}, dora);
}
