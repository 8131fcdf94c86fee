// The weight-space adapters through files: every parameter and every field; AdaLoRA's active ranks too (PEERS 1.13).
#include <loramix/adapter/ada_lora.hpp>
#include <loramix/adapter/dora.hpp>
#include <loramix/adapter/ia3.hpp>
#include <loramix/adapter/moslora.hpp>
#include <loramix/adapter/multi_lora.hpp>
#include <loramix/adapter/prompt.hpp>
#include <loramix/io/adapter.hpp>

#include "io/support.hpp"

namespace lm = loramix;
using loramix_test::Folder;

namespace {

template <class A>
A round_trip(const typename A::Config& config) {
  const Folder folder;
  A adapter(config);
  int next = 1;
  A::visit(adapter, [&](const char*, auto view, lm::ParameterGroup) {
    for (lm::Index i = 0; i < view.rows * view.cols; ++i) view.data[i] = static_cast<float>(next++);
  });
  lm::io::save(folder / "a.safetensors", "layers.0", adapter);
  const A loaded = lm::io::load<A>(folder / "a.safetensors", "layers.0");
  REQUIRE(loaded.parameters().size == adapter.parameters().size);
  for (lm::Index i = 0; i < adapter.parameters().size; ++i) CHECK(loaded.parameters()[i] == adapter.parameters()[i]);
  CHECK(next > 1);
  return loaded;
}

TEST_CASE("weight-space adapters come back from files") {
  CHECK(round_trip<lm::Dora<float>>({.d_in = 5, .d_out = 3, .rank = 2, .drop_base = true}).config().drop_base);
  CHECK(round_trip<lm::Ia3<float>>({.d_in = 5, .d_out = 3, .feed_forward = true}).l().cols == 5);
  CHECK(
      round_trip<lm::MosLora<float>>({.d_in = 5, .d_out = 3, .rank = 2, .mixer = lm::Mixer::identity}).config().mixer ==
      lm::Mixer::identity);
  CHECK(round_trip<lm::MultiLora<float>>({.d_in = 5, .d_out = 3, .experts = 3, .rank = 2}).gamma().rows == 3);
  CHECK(round_trip<lm::Prompt<float>>({.d_in = 5, .rows = 4}).rows().rows == 4);
}

TEST_CASE("PEERS 1.13 and 3.16: the active rank is saved, and an AdaLoRA of rank 0 comes back") {
  const auto loaded = round_trip<lm::AdaLora<float>>(
      {.d_in = 5, .d_out = 3, .rank = 4, .alpha = 8, .per_active_rank = true, .active_rank = 2});
  CHECK(loaded.active_rank() == 2);
  CHECK(loaded.scale() == 8 / (2 + 1e-5));
  const Folder folder;
  const lm::AdaLora<float> none({.d_in = 5, .d_out = 3, .rank = 0});
  lm::io::save(folder / "a.safetensors", "m", none);
  CHECK(lm::io::load<lm::AdaLora<float>>(folder / "a.safetensors", "m").config().rank == 0);
}

}  // namespace
