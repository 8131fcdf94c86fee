// The LoRAs of a server have files.
#include <loramix/adapter/lora.hpp>
#include <loramix/io/adapter.hpp>

int main() {
  const loramix::Lora<float> lora({.d_in = 2, .d_out = 2});
  loramix::io::save("served.safetensors", "layers.0", lora);
}
