// Trains TeamLoRA on a GPU: one stream, no allocation and no synchronisation inside a step; the host reads the loss when it
// wants to print it. The adapter is made on the host, trained on the device, and comes back.
//
// The task: the output of the base must become x (W + ΔW)ᵀ, ΔW depending on the sign of the token's first value.
#include <array>
#include <cstdio>
#include <random>
#include <vector>

#include <loramix/adapter/forward.hpp>
#include <loramix/adapter/initialise.hpp>
#include <loramix/adapter/team_lora.hpp>
#include <loramix/gpu/gpu.cuh>
#include <loramix/ops/squared_error.hpp>
#include <loramix/train/adamw.hpp>
#include <loramix/train/schedule.hpp>

namespace lm = loramix;
using lm::Index;

namespace {

constexpr lm::Space device = lm::Space::device;
constexpr Index d_in = 48, d_out = 40, tokens = 96, steps = 250, batches = 6;
using Rows = lm::Matrix<float, device>;

/// Tokens, what the frozen base makes of them, and what it should make of them; drawn on the host, kept on the device.
struct Batch {
  Rows x{tokens, d_in}, base{tokens, d_out}, target{tokens, d_out};
};
std::vector<Batch> draw_batches() {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  lm::Matrix<float> W(d_out, d_in);
  for (Index i = 0; i < d_out * d_in; ++i) W.data()[i] = normal(random) / 7;
  std::array<lm::Matrix<float>, 2> change{lm::Matrix<float>(d_out, d_in), lm::Matrix<float>(d_out, d_in)};
  for (lm::Matrix<float>& delta : change) {  // of rank 2
    for (int r = 0; r < 2; ++r) {
      std::vector<float> down(d_in);
      for (float& v : down) v = normal(random);
      for (Index o = 0; o < d_out; ++o) {
        const float up = normal(random) / 7;
        for (Index c = 0; c < d_in; ++c) delta(o, c) += up * down[static_cast<std::size_t>(c)];
      }
    }
  }
  std::vector<Batch> all(batches);
  lm::Matrix<float> x(tokens, d_in), base(tokens, d_out), target(tokens, d_out);
  for (Batch& batch : all) {
    for (Index i = 0; i < tokens * d_in; ++i) x.data()[i] = normal(random);
    for (Index t = 0; t < tokens; ++t) {
      x(t, 0) = t % 2 == 0 ? 3.0f : -3.0f;
      for (Index o = 0; o < d_out; ++o) {
        float y = 0, add = 0;
        for (Index c = 0; c < d_in; ++c) {
          y += W(o, c) * x(t, c);
          add += change[static_cast<std::size_t>(t % 2)](o, c) * x(t, c);
        }
        base(t, o) = y;
        target(t, o) = y + add;
      }
    }
    lm::gpu::copy(x.view(), batch.x.view());
    lm::gpu::copy(base.view(), batch.base.view());
    lm::gpu::copy(target.view(), batch.target.view());
  }
  return all;
}

}  // namespace

int main() {
  const std::vector<Batch> data = draw_batches();
  cudaStream_t stream = nullptr;
  lm::gpu::check_cuda("cudaStreamCreateWithFlags", cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));

  // [setup]
  lm::TeamLora<float> host(
      {.d_in = d_in, .d_out = d_out, .experts = 2, .rank = 4, .alpha = 8, .dropout = 0.01, .hidden = 8});
  lm::initialise(host, {.seed = 7, .site = "layers.0.mlp.up_proj"});
  auto team = lm::gpu::to_device(host);
  auto grad = lm::zeros_like(team);
  lm::AdamW opt(team, {.lr = 4e-3, .groups = {{"B", {.lr_ratio = 4}}}});

  lm::gpu::Tickets tickets;
  const lm::gpu::Backend be{
      .stream = stream, .tickets = tickets.address(), .tuning = lm::gpu::tune(lm::gpu::machine_of(0))};
  lm::Buffer<std::byte, device> scratch(lm::workspace_bytes(be, team, tokens, lm::Pass::backward));
  lm::Buffer<std::byte, device> loss_scratch(lm::loss_workspace_bytes<float, device>(tokens, d_out));
  lm::Buffer<std::byte, device> clip_scratch(lm::clip_bytes<device>());
  lm::Buffer<std::byte, device> kept(lm::reserve_bytes(team, tokens));
  const lm::Arena<device> work{scratch}, loss_work{loss_scratch}, clip_work{clip_scratch};
  lm::Arena<device> reserve{kept};
  // [/setup]
  Rows y(tokens, d_out), dy(tokens, d_out);
  lm::Buffer<float, device> loss(1);
  lm::Buffer<lm::Clip, device> clip(1);
  const lm::CosineSchedule schedule{.base = opt.lr(), .warmup = 10, .total = steps};
  const lm::MatrixView<float, device> dx;  // empty: no layer below wants its gradient

  float first = 0, last = 0;
  for (Index step = 0; step < steps; ++step) {
    const Batch& batch = data[static_cast<std::size_t>(step % batches)];
    const lm::Key key{.seed = 7, .site = lm::site("layers.0.mlp.up_proj"), .step = static_cast<std::uint64_t>(step)};
    lm::gpu::copy(stream, batch.base.view(), y.view());  // the base's product

    // [step]
    reserve.reset();
    auto saved = lm::forward(be, team, batch.x.view(), y.view(), work, {.save = &reserve, .key = key});
    lm::squared_error_loss(be, y.view(), batch.target.view(), dy.view(), {.into = lm::Into::set, .value = loss.view()},
                           loss_work);
    lm::backward(be, team, saved, batch.x.view(), dy.view(), dx, grad, work);
    lm::clip_norm(be, grad, 1.0, clip.view(), clip_work);
    opt.lr(schedule(step));
    opt.step(be, team, grad, clip.data());  // one launch; nothing where the norm is not finite
    lm::zero(be, grad);
    // [/step]

    if (step % 50 == 0 || step + 1 == steps) {
      lm::gpu::check_cuda("cudaStreamSynchronize", cudaStreamSynchronize(stream));
      lm::gpu::copy(std::as_const(loss).view(), lm::VectorView<float>(&last, 1));
      std::printf("step %3lld  loss %.4f\n", static_cast<long long>(step), static_cast<double>(last));
      if (step == 0) first = last;
    }
  }
  lm::gpu::copy_parameters(team, host);  // to be saved, merged or served
  cudaStreamDestroy(stream);
  std::printf("loss left: %.1f %%\n", 100 * static_cast<double>(last / first));
  return last < 0.3f * first ? 0 : 1;
}
