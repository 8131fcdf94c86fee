// What is multiplied with a matrix has a pack.
#include <loramix/adapter/lora.hpp>
#include <loramix/adapter/pack.hpp>
#include <loramix/cpu/cpu.hpp>

int main() {
  const loramix::Lora<float> lora({.d_in = 2, .d_out = 2});
  loramix::prepack(loramix::cpu::Backend{}, lora);
}
