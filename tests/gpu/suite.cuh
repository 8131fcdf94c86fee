// Any adapter on the device: launched directly, then captured in a CUDA graph and replayed.
#pragma once

#include <utility>

#include <loramix/bench/layer.hpp>
#include <loramix/gpu/adapter.cuh>

#include "gpu/captured.cuh"
#include "gpu/forbidden_calls.hpp"
#include "gpu/suite_step.hpp"
#include "suite/forms.hpp"

namespace loramix_test {

/// Values as T, which holds them exactly, and back.
template <class T>
std::vector<T> stored(const std::vector<float>& values) {
  std::vector<T> narrow;
  for (const float v : values) narrow.push_back(lm::narrow<T>(v));
  return narrow;
}
template <class T>
std::vector<float> widened(const std::vector<T>& values) {
  std::vector<float> wide;
  for (const T v : values) wide.push_back(lm::widen<float>(v));
  return wide;
}

template <class Host>
class OnDevice {
  static constexpr lm::Space device = lm::Space::device;
  using A = lm::gpu::device_t<Host>;
  using X = typename A::precision::activation;
  using Layer = lm::bench::Layer<A>;
  using View = lm::MatrixView<X, device>;
  using Options = lm::ForwardOptions<device>;

 public:
  OnDevice(GpuHarness& gpu, const typename A::Config& config, const DeviceStep& step)
      : gpu_(gpu), adapter_(config), gradient_(config), layer_(adapter_, step.tokens) {
    const lm::gpu::Backend be = gpu.backend();
    std::size_t next = 0;
    Layer::visit(layer_, [&](const char*, auto view) {
      const auto values = stored<X>(step.frozen[next++]);
      lm::gpu::copy(lm::MatrixView<const X>(values.data(), view.rows, view.cols), view);
    });
    layer_.start(be, adapter_);
    gpu.wait();
    const auto parameters = stored<typename A::element>(step.parameters);
    lm::gpu::copy(lm::VectorView<const typename A::element>(parameters.data(), adapter_.parameters().size),
                  adapter_.parameters());
    x_ = {gpu.upload(stored<X>(step.x)), step.tokens, layer_.in()};
    dy_ = {gpu.upload(stored<X>(step.dy)), step.rows, layer_.out()};
    y_ = {gpu.upload(std::vector<X>(step.dy.size())), step.rows, layer_.out()};
    dx_ = {gpu.upload(std::vector<X>(step.x.size())), step.tokens, layer_.in()};
    dp_ = gpu.upload(step.dp);
    dlogits_ = gpu.upload(step.dlogits);
    options_.key = {step.seed, step.site, step.step, step.first_token};
    options_.into = lm::Into::set;
    const auto sequences = static_cast<Index>(step.labels.size());
    options_.sequences = lm::Groups<device>::by_segment(gpu.upload(step.offsets), sequences);
    options_.tasks = lm::Groups<device>::by_id(gpu.upload(step.tasks), told_tasks);
    options_.labels = {gpu.upload(step.labels), sequences};
    options_.valid = {gpu.upload(step.valid), step.tokens};
    losses_ = step.dp.size();
    const Index there = layer_.workspace_bytes(be, adapter_, step.tokens, lm::Pass::forward);
    const Index back = layer_.workspace_bytes(be, adapter_, step.tokens, lm::Pass::backward);
    work_ = gpu.arena(there > back ? there : back);
    reserve_ = gpu.arena(layer_.reserve_bytes(adapter_, step.tokens));
  }

  /// Enqueues the step; everything is assigned.
  void run() {
    const lm::gpu::Backend be = gpu_.backend();
    lm::Arena<device> reserve = reserve_;
    Options options = options_;
    options.save = &reserve;
    auto saved = layer_.forward(be, adapter_, x_, y_, work_, options);
    if constexpr (requires { saved.scores; }) {
      ids_ = saved.scores.ids;
      if (losses_ != 0) {  // what a loss does
        enqueue_copy(saved.scores.dp.data, dp_);
        enqueue_copy(saved.scores.dlogits.data, dlogits_);
      }
    }
    layer_.backward(be, adapter_, saved, x_, dy_, dx_, gradient_, work_, {lm::Into::set, lm::Into::set});
  }
  DeviceResults results() {
    DeviceResults r;
    r.y = widened(get(y_.data, y_.rows * y_.cols));
    r.dx = widened(get(dx_.data, dx_.rows * dx_.cols));
    r.gradient = get(gradient_.parameters().data, gradient_.parameters().size);
    r.ids = get(ids_.data, ids_.rows * ids_.cols);
    return r;
  }

 private:
  void enqueue_copy(float* to, const float* from) {
    lm::gpu::check_cuda("cudaMemcpyAsync",
                        cudaMemcpyAsync(to, from, losses_ * sizeof(float), cudaMemcpyDeviceToDevice, gpu_.stream()));
  }
  template <class T>
  auto get(const T* from, Index n) {
    std::vector<std::remove_const_t<T>> values(static_cast<std::size_t>(n));
    if (n != 0) gpu_.download(from, values);
    return values;
  }

  GpuHarness& gpu_;
  A adapter_;
  lm::gradient_t<A> gradient_;
  Layer layer_;
  View x_, dy_, y_, dx_;
  const float *dp_ = nullptr, *dlogits_ = nullptr;
  Options options_;
  std::size_t losses_ = 0;
  lm::Arena<device> work_, reserve_;
  lm::MatrixView<const std::int32_t, device> ids_{};
};

template <class Host>
DeviceResults run_on_device(const DeviceStep& step, std::size_t form) {
  auto config = suite_config<Host>();
  const auto chosen = forms(config)[form];
  chosen.change(config);
  GpuHarness gpu;
  gpu.tuning.fused = !step.composed;
  DeviceResults found;
  {
    OnDevice<Host> there(gpu, config, step);
    const int before = forbidden_calls();
    there.run();
    const int after = forbidden_calls();
    found = there.results();
    found.forbidden = after - before;
    const Graph graph(gpu.stream(), [&] { there.run(); });
    found.same_bits_replayed = true;
    for (int replay = 0; replay < 2; ++replay) {
      graph.launch(gpu.stream());
      const DeviceResults again = there.results();
      found.same_bits_replayed = found.same_bits_replayed && again.y == found.y && again.dx == found.dx &&
                                 again.gradient == found.gradient && again.ids == found.ids;
    }
  }
  found.clean = gpu.release();
  return found;
}

/// An adapter of the list as the suite runs it: AdaLora's λ is a gate, so beside 16-bit activations its weights are float.
template <class A>
struct in_suite {
  using type = A;
};
template <class X>
  requires lm::is_16bit<X>
struct in_suite<lm::AdaLora<X>> {
  using type = lm::AdaLora<lm::Precision<X, float>>;
};

template <std::size_t Part, class... A>
std::vector<DeviceRun> device_runs_of(adapters::List<A...>) {
  std::vector<DeviceRun> runs;
  const auto add = [&](auto same, auto index) {
    using B = typename in_suite<typename decltype(same)::type>::type;
    if constexpr (decltype(index)::value % device_parts == Part) {
      if constexpr (lm::gpu::device_t<B>::space == lm::Space::device) {
        const auto all = forms(suite_config<B>());
        for (std::size_t f = 0; f < all.size(); ++f) runs.push_back({suite_name<B>(all[f].name), &run_on_device<B>, f});
      }
    }
  };
  const auto each = [&]<std::size_t... I>(std::index_sequence<I...>) {
    (add(std::type_identity<A>{}, std::integral_constant<std::size_t, I>{}), ...);
  };
  each(std::index_sequence_for<A...>());
  return runs;
}

template <Stored S, std::size_t Part>
std::vector<DeviceRun> device_part() {  // qualified calls: no look-up that completes every type of a list
  if constexpr (S == Stored::float32)
    return loramix_test::device_runs_of<Part>(adapters::All<float>());
  else if constexpr (S == Stored::bfloat16)
    return loramix_test::device_runs_of<Part>(adapters::All<lm::bfloat16>());
  else
    return loramix_test::device_runs_of<Part>(adapters::All<lm::half>());
}

}  // namespace loramix_test
