// expect: loramix: this adapter's gate depends on the token: it has no one delta W to be summed
#include <loramix/adapter/combine.hpp>
#include <loramix/cpu/cpu.hpp>

#include "../../examples/train/mixture.hpp"

int main() {
  const Mixture<float> mine({.d_in = 2, .d_out = 2});
  loramix::weighted_sum<Mixture<float>>({{&mine, 1}});
}
