// expect: loramix: this adapter's gate depends on the token: no exact merge exists
#include <loramix/adapter/merge.hpp>
#include <loramix/cpu/cpu.hpp>

#include "../../examples/train/mixture.hpp"

int main() {
  const Mixture<float> mine({.d_in = 2, .d_out = 2});
  loramix::Matrix<float> weights(2, 2);
  loramix::merge(loramix::cpu::Backend{}, mine, weights);
}
