// An adapter is whatever satisfies the concept: one of the user's own.
#include "../../examples/train/mixture.hpp"

int main() {
  const Mixture<float> mine({.d_in = 2, .d_out = 2});
  return static_cast<int>(loramix::parameter_count(mine));
}
