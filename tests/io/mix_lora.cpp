// A MixLoRA block through a file: seven tensors by the names of its projections.
#include <loramix/io/adapter.hpp>

#include <cstring>

#include <loramix/adapter/initialise.hpp>
#include <loramix/adapter/mix_lora.hpp>

#include "io/support.hpp"

namespace lm = loramix;
using loramix_test::Folder;

TEST_CASE("MixLoRA: save and load keep config and every parameter") {
  const Folder folder;
  lm::MixLora<float> mix({.d_in = 7,
                          .d_hidden = 11,
                          .d_out = 5,
                          .experts = 3,
                          .rank = 2,
                          .alpha = 3,
                          .rule = {.k = 1, .renormalise = false, .capacity = 1.25}});
  lm::initialise(mix, {.seed = 3, .site = "layers.0"});
  const auto flat = mix.parameters();
  lm::MixLora<float>::visit(mix, [](const char*, auto view, lm::ParameterGroup) {
    for (lm::Index i = 0; i < view.rows; ++i) {
      for (lm::Index j = 0; j < view.cols; ++j) view(i, j) += static_cast<float>(i) - static_cast<float>(j);
    }
  });
  lm::io::save(folder / "mix", "layers.0.mlp", mix);
  const auto back = lm::io::load<lm::MixLora<float>>(folder / "mix", "layers.0.mlp");
  CHECK(back.config().d_hidden == 11);
  CHECK(back.config().rule.k == 1);
  CHECK(!back.config().rule.renormalise);
  CHECK(back.config().rule.capacity == 1.25);
  REQUIRE(back.parameters().size == flat.size);
  CHECK(std::memcmp(back.parameters().data, flat.data, static_cast<std::size_t>(flat.size) * sizeof(float)) == 0);
  const std::string bytes = loramix_test::get(folder / "mix");
  for (const char* name : {"layers.0.mlp.gate_proj.experts.0.lora_A.weight",
                           "layers.0.mlp.down_proj.experts.2.lora_B.weight", "layers.0.mlp.moe_gate.weight"}) {
    CHECK_MESSAGE(loramix_test::has(bytes, name), name);
  }
}
