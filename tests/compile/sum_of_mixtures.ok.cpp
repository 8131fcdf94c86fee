// LoRAs have one ΔW.
#include <loramix/adapter/combine.hpp>

int main() {
  const loramix::Lora<float> lora({.d_in = 2, .d_out = 2});
  loramix::weighted_sum<loramix::Lora<float>>({{&lora, 1}});
}
