// y += ΔY of a LoRA whose weights are all one: each element grows by s · r · d_in. Shared by the consumers' programs.
#pragma once
#include <cstddef>
#include <loramix/adapter/forward.hpp>
#include <loramix/adapter/lora.hpp>
#include <loramix/cpu/cpu.hpp>
#include <vector>

template <class Backend>
int add_lora(const Backend& be) {
  namespace lm = loramix;
  constexpr int tokens = 5, d_in = 8, d_out = 6, rank = 2;
  lm::Lora<float> lora({.d_in = d_in, .d_out = d_out, .rank = rank, .alpha = rank});
  for (lm::Index i = 0; i < lora.parameters().size; ++i) lora.parameters()[i] = 1;
  const std::vector<float> x(tokens * d_in, 1.0f);
  std::vector<float> y(tokens * d_out, 3.0f);
  std::vector<std::byte> scratch(static_cast<std::size_t>(lm::workspace_bytes(be, lora, tokens)));
  lm::forward(be, lora, {x.data(), tokens, d_in}, {y.data(), tokens, d_out}, lm::Arena<>{scratch});
  for (const float v : y) {
    if (v != 3.0f + rank * d_in) return 1;
  }
  return 0;
}
