// A gate that is the same for all tokens folds into the weights.
#include <loramix/adapter/lora.hpp>
#include <loramix/adapter/merge.hpp>
#include <loramix/cpu/cpu.hpp>

int main() {
  const loramix::Lora<float> lora({.d_in = 2, .d_out = 2});
  loramix::Matrix<float> weights(2, 2);
  loramix::merge(loramix::cpu::Backend{}, lora, weights);
}
