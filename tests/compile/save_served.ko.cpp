// expect: loramix: what is served has no file; save and load its LoRAs
#include <loramix/adapter/served.hpp>
#include <loramix/io/adapter.hpp>

int main() {
  const loramix::Served<float> served({.d_in = 2, .d_out = 2});
  loramix::io::save("served.safetensors", "layers.0", served);
}
