// expect: loramix: this adapter's gate is the same for all tokens: merge(be, adapter, weights) is exact
#include <loramix/adapter/average_merge.hpp>
#include <loramix/adapter/lora.hpp>
#include <loramix/cpu/cpu.hpp>

int main() {
  const loramix::Lora<float> lora({.d_in = 2, .d_out = 2});
  loramix::Matrix<float> weights(2, 2), x(1, 2);
  loramix::merge_average(loramix::cpu::Backend{}, lora, weights, x);
}
