// Scales, ranks, starts and numbers that peers lose (docs/peers.md 1.14, 3.9, 3.10, 3.13, 3.14, 3.19 and 3.23).
#include <loramix/adapter/hydra_lora.hpp>
#include <loramix/adapter/lora_moe.hpp>
#include <loramix/io/adapter.hpp>

#include "adapter/kinds.hpp"
#include "io/support.hpp"

namespace loramix_test {

TEST_CASE("sglang#40835, vllm#6909, TensorRT-LLM#1668, lorax#299: an rsLoRA comes back with its scale") {
  const Folder folder;
  lm::io::save(folder / "a.safetensors", "layers.0.q",
               lm::Lora<float>({.d_in = 5, .d_out = 3, .rank = 8, .alpha = 16, .rank_stabilised = true}));
  const auto back = lm::io::load<lm::Lora<float>>(folder / "a.safetensors", "layers.0.q");
  CHECK(std::abs(back.scale() - 5.656854249492381) <= 1e-15);
  CHECK(lm::Lora<float>({.d_in = 5, .d_out = 3, .rank = 8, .alpha = 16}).scale() == 2);
}

TEST_CASE("peft#3582: modules of one file keep ranks and alphas of their own") {
  const Folder folder;
  lm::io::AdapterWriter writer;
  writer.add("layers.0.q", lm::Lora<float>({.d_in = 5, .d_out = 3, .rank = 4, .alpha = 8}));
  writer.add("layers.1.q", lm::Lora<float>({.d_in = 5, .d_out = 3, .rank = 2, .alpha = 32}));
  writer.save(folder / "a.safetensors");
  const auto first = lm::io::load<lm::Lora<float>>(folder / "a.safetensors", "layers.0.q");
  const auto second = lm::io::load<lm::Lora<float>>(folder / "a.safetensors", "layers.1.q");
  CHECK((first.config().rank == 4 && first.scale() == 2));
  CHECK((second.config().rank == 2 && second.scale() == 16));
}

TEST_CASE("torchtune's grouped experts: an expert's A starts as a LoRA's, however many experts and ranks there are") {
  for (const Index experts : {1, 8}) {
    for (const Index rank : {2, 32}) {
      lm::LoraMoe<float> moe({.d_in = 256, .d_out = 3, .experts = experts, .rank = rank});
      lm::initialise(moe, {.seed = 7});
      float largest = 0;
      for (Index i = 0; i < experts * rank * 256; ++i) largest = std::max(largest, std::abs(moe.A().data[i]));
      CHECK(largest <= 1 / 16.0f);
      CHECK(largest > 0.97f / 16);  // of 512 draws at least: not smaller by √r
    }
  }
}

TEST_CASE("HydraLoRA#19: what is counted as trained includes the routers") {
  const lm::HydraLora<float> hydra({.d_in = 40, .d_out = 30, .experts = 4, .rank = 3});
  CHECK(lm::parameter_count(hydra) == 3 * 40 + 4 * 3 * 30 + 4 * 40);
  CHECK(hydra.cost(1).parameters == lm::parameter_count(hydra));
}

TEST_CASE("vllm#4708, #2847, #55158: any width and any rank, no list of them") {
  for (const Index width : {1, 2, 97, 3584}) {
    for (const Index rank : {1, 7, 300}) {
      Batch<lm::Lora<double>> b({.d_in = width, .d_out = 3, .rank = rank, .alpha = 1.0 * static_cast<double>(rank)}, 2);
      auto y = b.zeros_y();
      b.forward(y);
      for (Index t = 0; t < 2; ++t) {
        for (Index o = 0; o < 3; ++o) {
          double want = 0, absolute = 0;
          for (Index j = 0; j < rank; ++j) {
            double u = 0, a = 0;
            for (Index i = 0; i < width; ++i) {
              u += b.x(t, i) * b.adapter.A()(j, i);
              a += std::abs(b.x(t, i) * b.adapter.A()(j, i));
            }
            want += u * b.adapter.B()(o, j);
            absolute += a * std::abs(b.adapter.B()(o, j));
          }
          CHECK(std::abs(y(t, o) - want) <= static_cast<double>(width + rank + 4) * 0x1p-53 * 2 * absolute);
        }
      }
    }
  }
}

TEST_CASE("peft#341, #1249, diffusers#8871: half adapters; U beyond half's range is finite, and gradients are float") {
  using A = lm::Lora<lm::half>;
  static_assert(std::is_same_v<lm::gradient_t<A>::element, float>);
  Batch<A> b({.d_in = 64, .d_out = 2, .rank = 1, .alpha = 1}, 3);
  b.x = constant<lm::half>(3, 64, 64);
  for (Index i = 0; i < 64; ++i) b.adapter.A()(0, i) = lm::narrow<lm::half>(32.0f);
  for (Index o = 0; o < 2; ++o) b.adapter.B()(o, 0) = lm::narrow<lm::half>(0x1p-10f);
  b.dy = constant<lm::half>(3, 2, 1);
  auto y = b.zeros_y(), dx = b.zeros_dx();
  auto grad = lm::zeros_like(b.adapter);
  lm::Arena<> reserve = b.memory.arena();
  auto saved = b.forward(y, {.save = &reserve});
  b.backward(saved, dx, grad);
  for (Index t = 0; t < 3; ++t) {
    for (Index o = 0; o < 2; ++o) CHECK(lm::widen<float>(y(t, o)) == 128);  // U is 131072, the largest half 65504
  }
  for (Index o = 0; o < 2; ++o) CHECK(grad.B()(o, 0) == 3 * 131072.0f);
}

}  // namespace loramix_test
