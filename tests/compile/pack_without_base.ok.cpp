// DoRA's pack holds the lengths of the rows that it was made for.
#include <loramix/adapter/dora_forward.hpp>
#include <loramix/cpu/cpu.hpp>

int main() {
  const loramix::Dora<float> dora({.d_in = 2, .d_out = 2});
  loramix::Matrix<float> weights(2, 2);
  loramix::Buffer<float> squares(2);
  loramix::prepack(loramix::cpu::Backend{}, dora, {weights, squares.view()});
}
