// The token-routed mixtures on the device: the CPU's values, gradients and choices, and the same bits from a graph.
#include <cmath>
#include <random>

#include <loramix/gpu/adapter.cuh>

#include "gpu/captured.cuh"
#include "gpu/mixture_step.hpp"
#include "support/seed.hpp"

namespace lm = loramix;
using namespace loramix_test;
using lm::Index;

namespace {

constexpr lm::Space device = lm::Space::device;

/// Multiples of 1/4 in [−1, 1]: a router's logits are exact, so that they tie exactly or differ by 1/16.
/// fine: anything in [−1, 1].
std::vector<float> draw(Index n, std::uint64_t site, bool fine) {
  std::mt19937_64 random(seed(site));
  std::vector<float> values(static_cast<std::size_t>(n));
  for (float& v : values) {
    v = fine ? static_cast<float>(random() >> 40) * 0x1p-23f - 1 : static_cast<float>(random() % 9) / 4 - 1;
  }
  return values;
}

/// Sums of at most a few hundred products of size at most 8, in another order and through another exp.
void check_close(const char* what, const std::vector<float>& got, const std::vector<float>& want) {
  REQUIRE(got.size() == want.size());
  float largest = 0, difference = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    largest = std::fmax(largest, std::fabs(want[i]));
    difference = std::fmax(difference, got[i] == got[i] ? std::fabs(got[i] - want[i]) : INFINITY);
  }
  CAPTURE(std::string(what));
  CHECK(largest > 0);
  CHECK(difference <= 2e-5f * largest);
}

template <class A>
class OnDevice {
 public:
  using Adapter = lm::gpu::device_t<A>;
  using S = MixtureStep;

  OnDevice(GpuHarness& gpu, const typename A::Config& config, const MixtureStep& step)
      : gpu_(gpu), adapter_(config), gradient_(lm::zeros_like(adapter_)) {
    lm::gpu::copy(lm::VectorView<const float>(step.parameters.data(), adapter_.parameters().size),
                  adapter_.parameters());
    x_ = gpu.upload(step.x);
    dy_ = gpu.upload(step.dy);
    valid_ = gpu.upload(step.valid);
    offsets_ = gpu.upload(step.offsets);
    task_of_ = gpu.upload(step.task_of);
    y_ = gpu.upload(std::vector<float>(S::tokens * S::d_out));
    dx_ = gpu.upload(std::vector<float>(S::tokens * S::d_in));
    const lm::gpu::Backend be = gpu.backend();
    const Index there = lm::workspace_bytes(be, adapter_, S::tokens);
    const Index back = lm::workspace_bytes(be, adapter_, S::tokens, lm::Pass::backward);
    work_ = gpu.arena(there > back ? there : back);
    reserve_ = gpu.arena(lm::reserve_bytes(adapter_, S::tokens));
  }

  /// Enqueues the step; everything is assigned.
  void run() {
    const lm::gpu::Backend be = gpu_.backend();
    reserve_.reset();
    lm::ForwardOptions<device> options{
        .save = &reserve_, .key = {S::seed, S::site, S::number, S::first_token}, .into = lm::Into::set};
    options.valid = {valid_, S::tokens};
    options.sequences = lm::Groups<device>::by_segment(offsets_, S::sequences);
    options.tasks = lm::Groups<device>::by_segment(offsets_, S::sequences, task_of_, S::tasks);
    const lm::MatrixView<const float, device> x{x_, S::tokens, S::d_in}, dy{dy_, S::tokens, S::d_out};
    auto saved = lm::forward(be, adapter_, x, {y_, S::tokens, S::d_out}, work_, options);
    scores_ = saved.scores;
    lm::backward(be, adapter_, saved, x, dy, {dx_, S::tokens, S::d_in}, gradient_, work_,
                 {lm::Into::set, lm::Into::set});
  }
  MixtureResults results() {
    return {get(y_, S::tokens * S::d_out), get(dx_, S::tokens * S::d_in),
            get(gradient_.parameters().data, gradient_.parameters().size),
            get(scores_.p.data, scores_.p.rows * scores_.p.cols),
            get(scores_.ids.data, scores_.ids.rows * scores_.ids.cols)};
  }

 private:
  template <class T>
  std::vector<T> get(const T* from, Index n) {
    std::vector<T> values(static_cast<std::size_t>(n));
    if (n != 0) gpu_.download(from, values);
    return values;
  }

  GpuHarness& gpu_;
  Adapter adapter_;
  lm::gradient_t<Adapter> gradient_;
  float *x_, *dy_, *y_, *dx_;
  std::uint8_t* valid_;
  std::int64_t* offsets_;
  std::int32_t* task_of_;
  lm::Arena<device> work_, reserve_;
  lm::Scores<float, device> scores_;
};

template <class A>
void check_adapter(MixtureCase which, const typename A::Config& config, bool fine) {
  using S = MixtureStep;
  GpuHarness gpu;
  MixtureStep step{draw(lm::zeros_like(A(config)).parameters().size, 401, false),
                   draw(S::tokens * S::d_in, 402, fine),
                   draw(S::tokens * S::d_out, 403, true),
                   {}};
  for (Index t = 0; t < S::tokens; ++t) {
    step.valid.push_back(t % 5 != 3);
    for (Index i = 0; i < S::d_in && t % 8 == 0 && !fine; ++i) step.x[static_cast<std::size_t>(t * S::d_in + i)] = 0;
  }  // every eighth token: all experts tie
  const MixtureResults want = mixture_on_host(which, step);
  OnDevice<A> there(gpu, config, step);
  there.run();
  const MixtureResults got = there.results();
  CHECK(got.ids == want.ids);
  check_close("p", got.p, want.p);
  check_close("y", got.y, want.y);
  check_close("dx", got.dx, want.dx);
  check_close("gradient", got.gradient, want.gradient);

  const Graph graph(gpu.stream(), [&] { there.run(); });
  graph.launch(gpu.stream());
  const MixtureResults replayed = there.results();
  CHECK(replayed.ids == got.ids);
  CHECK(replayed.y == got.y);
  CHECK(replayed.dx == got.dx);
  CHECK(replayed.gradient == got.gradient);
  CHECK(gpu.release());
}

struct Check {
  MixtureCase which;
  bool fine;
  template <class A>
  void operator()(const typename A::Config& config) const {
    check_adapter<A>(which, config, fine);
  }
};
void check_mixture(MixtureCase which, bool fine = false) {
  CAPTURE(static_cast<int>(which));
  with_mixture(which, Check{which, fine});
}

}  // namespace

TEST_CASE("dense mixtures on the device are the host's") {
  check_mixture(MixtureCase::lora_moe);
  check_mixture(MixtureCase::hydra_lora);
  check_mixture(MixtureCase::team_lora);
  check_mixture(MixtureCase::team_lora_alone);
}

TEST_CASE("TeamLoRA whose S reads sequences or tasks") {
  check_mixture(MixtureCase::team_lora_by_mean, true);
  check_mixture(MixtureCase::team_lora_by_last, true);
  check_mixture(MixtureCase::team_lora_by_task, true);
}

TEST_CASE("routers that choose make the host's choices, exact ties included") {
  check_mixture(MixtureCase::top_2);
  check_mixture(MixtureCase::sigmoid);
  check_mixture(MixtureCase::arrival);
}

TEST_CASE("routers that draw and routers that sort") {
  check_mixture(MixtureCase::top_p, true);
  check_mixture(MixtureCase::drawn, true);
  check_mixture(MixtureCase::priority, true);
}
