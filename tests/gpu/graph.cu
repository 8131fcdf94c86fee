// A whole training step of LoRA on the device, clipping and optimiser included: captured in a CUDA graph and replayed, and
// without an allocation or a synchronisation inside. Every adapter's forward and backward: gpu/suite.cpp.
#include <random>

#include <loramix/adapter/forward.hpp>
#include <loramix/adapter/lora.hpp>
#include <loramix/train/adamw.hpp>
#include <loramix/train/clip.hpp>

#include "gpu/captured.cuh"
#include "gpu/forbidden_calls.hpp"
#include "gpu/harness.cuh"
#include "support/seed.hpp"

namespace lm = loramix;
using namespace loramix_test;
using lm::Index;

namespace {

constexpr lm::Space device = lm::Space::device;

struct LoraStep {
  static constexpr Index tokens = 70, d_in = 40, d_out = 24, rank = 6;
  static constexpr double dropout = 0.25;
  std::vector<float> A, B, x, dy, y;  // [rank, d_in], [d_out, rank] rank-major, [T, d_in], [T, d_out], [T, d_out]
};
struct LoraStepResults {
  std::vector<float> y, dx, dA, dB;
};

std::vector<float> random_values(Index n, std::uint64_t site) {
  std::mt19937_64 random(seed(site));
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<float> values(static_cast<std::size_t>(n));
  for (float& v : values) v = uniform(random);
  return values;
}

LoraStep draw_step() {
  using S = LoraStep;
  return {random_values(S::rank * S::d_in, 11), random_values(S::d_out * S::rank, 12),
          random_values(S::tokens * S::d_in, 13), random_values(S::tokens * S::d_out, 14),
          random_values(S::tokens * S::d_out, 15)};
}

/// X [T, d_in] on float adapters; everything the step needs, allocated beforehand.
template <class X>
class DeviceStep {
  using Adapter = lm::Lora<lm::Precision<X, float>, device>;

 public:
  DeviceStep(GpuHarness& gpu, const LoraStep& step)
      : gpu_(gpu),
        step_(step),
        adapter_({.d_in = step.d_in, .d_out = step.d_out, .rank = step.rank, .dropout = step.dropout}),
        gradient_(lm::zeros_like(adapter_)),
        m_(adapter_.parameters().size),
        v_(m_.size()),
        clip_(1),
        x_(step.tokens, step.d_in),
        dx_(step.tokens, step.d_in),
        y_(step.tokens, step.d_out),
        dy_(step.tokens, step.d_out) {
    const lm::gpu::Backend be = gpu.backend();
    const Index bytes = lm::workspace_bytes(be, adapter_, step.tokens, lm::Pass::backward);
    const Index clip = lm::clip_bytes<device>();
    work_ = gpu.arena(bytes > clip ? bytes : clip);
    reserve_ = gpu.arena(lm::reserve_bytes(adapter_, step.tokens));
    reset();
  }

  /// Everything as it was before the first step.
  void reset() {
    put(step_.A, adapter_.A().data);
    put(step_.B, adapter_.B().data);
    put(step_.x, x_.data());
    put(step_.dy, dy_.data());
    put(step_.y, y_.data());
    put(std::vector<float>(step_.x.size()), dx_.data());
    for (float* zeros : {m_.data(), v_.data(), gradient_.parameters().data}) {
      lm::gpu::copy(lm::Buffer<float>(m_.size()).view(), lm::VectorView<float, device>(zeros, m_.size()));
    }
  }

  void run() {
    const lm::gpu::Backend be = gpu_.backend();
    reserve_.reset();
    auto saved =
        lm::forward(be, adapter_, x_.view(), y_.view(), work_, {.save = &reserve_, .key = {.seed = 7, .step = 2}});
    lm::backward(be, adapter_, saved, x_.view(), dy_.view(), dx_.view(), gradient_, work_);
    lm::clip_norm(be, gradient_, 1.0, clip_.view(), work_);
    lm::adamw_step(be, adapter_.parameters(), gradient_.parameters(), m_.view(), v_.view(), {.lr = 0.01}, {},
                   clip_.data());
  }

  LoraStepResults results() {
    return {get(y_.data(), step_.y.size()), get(dx_.data(), step_.x.size()), get(gradient_.A().data, step_.A.size()),
            get(gradient_.B().data, step_.B.size())};
  }
  std::vector<float> weights() { return get(adapter_.parameters().data, static_cast<std::size_t>(m_.size())); }

 private:
  template <class T>
  static void put(const std::vector<float>& from, T* to) {
    std::vector<T> values(from.size());
    for (std::size_t i = 0; i < from.size(); ++i) values[i] = lm::narrow<T>(from[i]);
    const Index n = static_cast<Index>(from.size());
    lm::gpu::copy(lm::VectorView<const T>(values.data(), n), lm::VectorView<T, device>(to, n));
  }
  template <class T>
  std::vector<float> get(const T* from, std::size_t n) {
    std::vector<T> values(n);
    gpu_.download(from, values);
    std::vector<float> out(n);
    for (std::size_t i = 0; i < n; ++i) out[i] = lm::widen<float>(values[i]);
    return out;
  }

  GpuHarness& gpu_;
  const LoraStep& step_;
  Adapter adapter_;
  lm::gradient_t<Adapter> gradient_;
  lm::Buffer<float, device> m_, v_;
  lm::Buffer<lm::Clip, device> clip_;
  lm::Matrix<X, device> x_, dx_, y_, dy_;
  lm::Arena<device> work_, reserve_;
};

}  // namespace

TEST_CASE_TEMPLATE("a captured step gives the same bits every time", X, float, lm::bfloat16) {
  GpuHarness gpu;
  const LoraStep step = draw_step();
  DeviceStep<X> on_device(gpu, step);

  const int before = forbidden_calls();
  CHECK(before > 0);  // the making of buffers was seen
  on_device.run();
  CHECK(forbidden_calls() == before);
  const LoraStepResults direct = on_device.results();
  const std::vector<float> weights = on_device.weights();
  CHECK(weights[0] != step.A[0]);

  on_device.reset();
  const Graph graph(gpu.stream(), [&] { on_device.run(); });
  for (int replay = 0; replay < 2; ++replay) {
    on_device.reset();
    graph.launch(gpu.stream());
    const LoraStepResults replayed = on_device.results();
    CHECK(replayed.y == direct.y);
    CHECK(replayed.dx == direct.dx);
    CHECK(replayed.dA == direct.dA);
    CHECK(replayed.dB == direct.dB);
    CHECK(on_device.weights() == weights);
  }
  CHECK(gpu.release());
}
