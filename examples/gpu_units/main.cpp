// Host code that uses adapters on the GPU without nvcc: everything of loramix is in layer.cu, instantiated once.
#include <cmath>
#include <cstdio>

#include "layer.hpp"

namespace {

/// Tokens alone give the rows that they have in their batch, within one class of T even the same bits, and something is added.
template <class Method>
bool run(const char* name) {
  constexpr std::int64_t d_in = 40, d_out = 24, tokens = 4;
  engine::Layer<Method> layer({d_in, d_out, 2, 4}, 7);
  std::vector<float> x, y(tokens * d_out, 1.0f);
  for (int i = 0; i < tokens * d_in; ++i) x.push_back(std::sin(0.37f * static_cast<float>(i)));
  const std::vector<float> all = layer.forward(x, y);
  bool same = true, added = false;
  for (std::ptrdiff_t t = 0; t < tokens; ++t) {
    const std::vector<float> row(x.begin() + t * d_in, x.begin() + (t + 1) * d_in);
    const std::vector<float> alone = layer.forward(row, std::vector<float>(d_out, 1.0f));
    for (std::ptrdiff_t o = 0; o < d_out; ++o) {
      const float in_batch = all[static_cast<std::size_t>(t * d_out + o)];
      same = same && alone[static_cast<std::size_t>(o)] == in_batch;
      added = added || in_batch != 1.0f;
    }
  }
  std::printf("%-8s %lld parameters: %s\n", name, static_cast<long long>(layer.parameters()),
              same && added ? "ok" : "WRONG");
  return same && added;
}

}  // namespace

int main() { return run<engine::Lora>("LoRA") && run<engine::TeamLora>("TeamLoRA") ? 0 : 1; }
