// expect: backward's gradient must be lm::zeros_like(adapter) or lm::frozen
#include <loramix/adapter/forward.hpp>
#include <loramix/adapter/lora.hpp>
#include <loramix/cpu/cpu.hpp>

int main() {
  loramix::Lora<float> lora({});
  loramix::Saved<loramix::Lora<float>> saved;
  loramix::Matrix<float> grad(1, 1);
  loramix::backward(loramix::cpu::Backend{}, lora, saved, {}, {}, {}, grad, loramix::Arena<>{});
}
