// A fused projection goes through a file: its slices are numbers of the config.
#include <cstdio>

#include <loramix/adapter/fused_lora.hpp>
#include <loramix/adapter/initialise.hpp>
#include <loramix/io/adapter.hpp>

#include <doctest/doctest.h>

namespace lm = loramix;

TEST_CASE("a fused LoRA keeps its slices and its bits through a file") {
  for (const bool shared : {false, true}) {
    lm::FusedLora<float> qv(
        {.d_in = 12, .d_out = 30, .slices = {{0, 10}, {20, 10}}, .rank = 3, .alpha = 6, .shared_A = shared});
    lm::initialise(qv, {.seed = 5});
    for (lm::Index i = 0; i < 2; ++i) qv.B(i)(7, 2) = 0.5f + static_cast<float>(i);
    lm::io::save("fused.safetensors", "qkv_proj", qv);
    const auto loaded = lm::io::load<lm::FusedLora<float>>("fused.safetensors", "qkv_proj");
    std::remove("fused.safetensors");
    REQUIRE(loaded.config().slices.size() == 2);
    CHECK(loaded.config().slices[1].begin == 20);
    CHECK(loaded.config().slices[1].width == 10);
    REQUIRE(loaded.parameters().size == qv.parameters().size);
    for (lm::Index i = 0; i < loaded.parameters().size; ++i) CHECK(loaded.parameters()[i] == qv.parameters()[i]);
    CHECK(loaded.B(1)(7, 2) == 1.5f);
  }
}
