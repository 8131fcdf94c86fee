// The gradient is made from the adapter.
#include <loramix/adapter/forward.hpp>
#include <loramix/adapter/lora.hpp>
#include <loramix/cpu/cpu.hpp>

int main() {
  loramix::Lora<float> lora({});
  loramix::Saved<loramix::Lora<float>> saved;
  auto grad = loramix::zeros_like(lora);
  loramix::backward(loramix::cpu::Backend{}, lora, saved, {}, {}, {}, grad, loramix::Arena<>{});
}
