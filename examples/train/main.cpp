// A training loop of one's own: exact gradients, AdamW with LoRA+, clipping, a schedule. No autograd, no framework: the
// loop owns every buffer and says what happens when. The same function trains LoRA and a mixture of one's own
// (mixture.hpp).
//
// The task: the frozen base y = x Wᵀ must become y = x (W + ΔW)ᵀ, ΔW depending on the sign of the token's first value.
// One LoRA can learn the average of the two; a mixture whose router reads the token can learn both.
#include <cstddef>
#include <cstdio>
#include <random>
#include <vector>

#include <loramix/adapter/initialise.hpp>
#include <loramix/adapter/lora.hpp>
#include <loramix/cpu/cpu.hpp>
#include <loramix/train/adamw.hpp>
#include <loramix/train/schedule.hpp>

#include "mixture.hpp"

namespace lm = loramix;

namespace {

constexpr lm::Index d_in = 48, d_out = 40, tokens = 128, steps = 600;

/// What the task is made of.
struct Task {
  lm::Matrix<float> W{d_out, d_in}, change[2] = {{d_out, d_in}, {d_out, d_in}};
  std::mt19937 random{1};

  Task() {
    std::normal_distribution<float> normal;
    for (lm::Index i = 0; i < d_out * d_in; ++i) W.data()[i] = normal(random) / 7;
    for (auto& delta : change) {  // of rank 2
      for (int r = 0; r < 2; ++r) {
        std::vector<float> up(d_out), down(d_in);
        for (float& v : up) v = normal(random) / 7;
        for (float& v : down) v = normal(random);
        for (std::size_t o = 0; o < up.size(); ++o) {
          for (std::size_t c = 0; c < down.size(); ++c) {
            delta(static_cast<lm::Index>(o), static_cast<lm::Index>(c)) += up[o] * down[c];
          }
        }
      }
    }
  }

  /// Fresh tokens, what the base makes of them, and what it should make of them.
  void draw(lm::Matrix<float>& x, lm::Matrix<float>& base, lm::Matrix<float>& target) {
    std::normal_distribution<float> normal;
    for (lm::Index i = 0; i < tokens * d_in; ++i) x.data()[i] = normal(random);
    for (lm::Index t = 0; t < tokens; ++t) {
      x(t, 0) = t % 2 == 0 ? 3.0f : -3.0f;
      const auto& delta = change[t % 2];
      for (lm::Index o = 0; o < d_out; ++o) {
        float y = 0, add = 0;
        for (lm::Index c = 0; c < d_in; ++c) {
          y += W(o, c) * x(t, c);
          add += delta(o, c) * x(t, c);
        }
        base(t, o) = y;
        target(t, o) = y + add;
      }
    }
  }
};

/// Mean squared error; its gradient into dy.
double mse(const lm::Matrix<float>& y, const lm::Matrix<float>& target, lm::Matrix<float>& dy) {
  const double n = static_cast<double>(tokens * d_out);
  double loss = 0;
  for (lm::Index i = 0; i < tokens * d_out; ++i) {
    const float error = y.data()[i] - target.data()[i];
    loss += static_cast<double>(error) * static_cast<double>(error) / n;
    dy.data()[i] = static_cast<float>(2 * static_cast<double>(error) / n);
  }
  return loss;
}

/// Trains `adapter`; returns the loss of the last step over that of the first.
template <lm::ProductAdapter A>
double train(A& adapter) {
  lm::cpu::Backend be;
  Task task;
  lm::Matrix<float> x(tokens, d_in), y(tokens, d_out), target(tokens, d_out), dy(tokens, d_out);
  const lm::MatrixView<float> dx;  // empty: no layer below wants its gradient

  // [memory]
  // Asked once for the largest batch. The workspace is free again after every call; the reserve holds what backward
  // needs, so a model gives each of its layers one after the other from one reserve.
  std::vector<std::byte> scratch(lm::workspace_bytes(be, adapter, tokens, lm::Pass::backward));
  std::vector<std::byte> kept(lm::reserve_bytes(adapter, tokens));
  const lm::Arena work{scratch};
  lm::Arena reserve{kept};
  // [/memory]

  // [setup]
  lm::initialise(adapter, {.seed = 7, .site = "layers.0.mlp.up_proj"});
  auto grad = lm::zeros_like(adapter);                                       // one flat buffer, same names
  lm::AdamW opt(adapter, {.lr = 2e-3, .groups = {{"B", {.lr_ratio = 4}}}});  // LoRA+: B learns faster
  const lm::CosineSchedule schedule{.base = opt.lr(), .warmup = 20, .total = steps};
  // [/setup]

  double first = 0, loss = 0;
  for (lm::Index step = 0; step < steps; ++step) {
    task.draw(x, y, target);  // y: the base's output
    const lm::Key key{.seed = 7, .site = lm::site("layers.0.mlp.up_proj"), .step = static_cast<std::uint64_t>(step)};
    // [step]
    reserve.reset();
    auto saved = lm::forward(be, adapter, x, y, work, {.save = &reserve, .key = key});  // y += delta
    loss = mse(y, target, dy);
    lm::backward(be, adapter, saved, x, dy, dx, grad, work);
    opt.lr(schedule(step));
    if (lm::clip_norm(be, grad, 1.0).finite) opt.step(be, adapter, grad);
    lm::zero(be, grad);
    // [/step]
    if (step == 0) first = loss;
    if (step % 100 == 0 || step + 1 == steps) {
      std::printf("%-8s step %3lld  loss %.4f\n", A::kind, static_cast<long long>(step), loss);
    }
  }
  return loss / first;
}

}  // namespace

int main() {
  // One rank budget for both: 8.
  lm::Lora<float> lora({.d_in = d_in, .d_out = d_out, .rank = 8, .alpha = 16, .dropout = 0.01});
  Mixture<float> mixture({.d_in = d_in, .d_out = d_out, .experts = 2, .rank = 4, .alpha = 8, .dropout = 0.01});

  const double one = train(lora), both = train(mixture);
  std::printf("loss left: LoRA %.1f %%, mixture %.1f %%\n", 100 * one, 100 * both);
  return one < 0.8 && both < 0.3 * one ? 0 : 1;
}
