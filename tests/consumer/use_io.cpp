// A consumer of loramix::io: saves an adapter, loads it back.
#include <loramix/adapter/initialise.hpp>
#include <loramix/adapter/lora.hpp>
#include <loramix/io/adapter.hpp>

#include <cstdio>

namespace lm = loramix;

int main() {
  lm::Lora<float> lora({.d_in = 8, .d_out = 4, .rank = 2});
  lm::initialise(lora, {.seed = 1});
  lm::io::save("consumer.safetensors", "up_proj", lora);
  const auto loaded = lm::io::load<lm::Lora<float>>("consumer.safetensors", "up_proj");
  std::remove("consumer.safetensors");
  return loaded.A()(1, 7) == lora.A()(1, 7) ? 0 : 1;
}
