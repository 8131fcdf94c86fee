// A gate that depends on the token has an average.
#include <loramix/adapter/average_merge.hpp>
#include <loramix/cpu/cpu.hpp>

#include "../../examples/train/mixture.hpp"

int main() {
  const Mixture<float> mine({.d_in = 2, .d_out = 2});
  loramix::Matrix<float> weights(2, 2), x(1, 2);
  loramix::merge_average(loramix::cpu::Backend{}, mine, weights, x);
}
