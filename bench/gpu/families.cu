// The benchmark's families on a GPU: LoRA, a dense mixture, top-2 and TeamLoRA, forward and training step, beside the path of
// library products and a loop over experts. Needs a GPU to say anything: `./dev bench --gpu`.
//
//   time            of one pass, from CUDA events around as many passes as fill 2 ms; the median of rounds
//   composed, loop  how many times as long those take, medians of the same rounds
//   bytes/s         adapter.cost(tokens) over the time
#include <algorithm>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include <benchmark/benchmark.h>
#include <cublas_v2.h>

#include <loramix/adapter/forward.hpp>
#include <loramix/adapter/lora.hpp>
#include <loramix/adapter/lora_moe.hpp>
#include <loramix/adapter/mola.hpp>
#include <loramix/adapter/team_lora.hpp>
#include <loramix/gpu/gpu.cuh>

namespace lm = loramix;
using lm::Index;

namespace {

constexpr lm::Space device = lm::Space::device;

struct Axes {
  Index T, d_in, d_out, R, E;
  bool train;
};

/// Stream, cuBLAS, events; one of them for the whole program.
class Gpu {
 public:
  Gpu() {
    lm::gpu::check_cuda("cudaStreamCreate", cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    lm::gpu::check_cuda("cudaEventCreate", cudaEventCreate(&begin_));
    lm::gpu::check_cuda("cudaEventCreate", cudaEventCreate(&end_));
    if (cublasCreate(&cublas_) != CUBLAS_STATUS_SUCCESS) std::fputs("cublasCreate failed\n", stderr);
  }
  lm::gpu::Backend backend(bool fused) {
    lm::gpu::Backend be{
        .stream = stream_, .cublas = cublas_, .blas_bytes = Index{32} << 20, .tickets = tickets_.address()};
    be.tuning = lm::gpu::tune(lm::gpu::machine_of(0));
    be.tuning.fused = fused;
    return be;
  }
  /// Seconds of one call, of `calls` in a row.
  double seconds(const std::function<void()>& work, int calls) {
    cudaEventRecord(begin_, stream_);
    for (int i = 0; i < calls; ++i) work();
    cudaEventRecord(end_, stream_);
    lm::gpu::check_cuda("cudaEventSynchronize", cudaEventSynchronize(end_));
    float milliseconds = 0;
    lm::gpu::check_cuda("cudaEventElapsedTime", cudaEventElapsedTime(&milliseconds, begin_, end_));
    return 1e-3 * static_cast<double>(milliseconds) / calls;
  }

 private:
  cudaStream_t stream_ = nullptr;
  cublasHandle_t cublas_ = nullptr;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
  lm::gpu::Tickets tickets_;
};
Gpu& gpu() {
  static Gpu one;
  return one;
}

/// Values between −1 and 1 that repeat after 251.
template <class T>
lm::Buffer<T, device> pattern(Index n) {
  std::vector<T> host(static_cast<std::size_t>(n));
  for (Index i = 0; i < n; ++i)
    host[static_cast<std::size_t>(i)] = lm::narrow<T>(static_cast<float>(i % 251 - 125) / 128);
  lm::Buffer<T, device> there(n);
  lm::gpu::copy(lm::VectorView<const T>(host.data(), n), there.view());
  return there;
}

/// An adapter of shape `axes` with all that a pass needs, on one of the two paths.
template <class A>
class Pass {
  using Adapter = lm::gpu::device_t<A>;
  using X = typename A::precision::activation;
  using View = lm::MatrixView<X, device>;

 public:
  Pass(const Axes& axes, bool fused)
      : axes_(axes),
        be_(gpu().backend(fused)),
        adapter_(A::Config::of({.d_in = axes.d_in, .d_out = axes.d_out, .total_rank = axes.R, .experts = axes.E})),
        gradient_(lm::zeros_like(adapter_)),
        x_(pattern<X>(axes.T * axes.d_in)),
        dx_(pattern<X>(axes.T * axes.d_in)),
        y_(pattern<X>(axes.T * axes.d_out)),
        dy_(pattern<X>(axes.T * axes.d_out)),
        work_(lm::workspace_bytes(be_, adapter_, axes.T, lm::Pass::backward)),
        kept_(lm::reserve_bytes(adapter_, axes.T)) {
    const auto weights = pattern<typename A::element>(adapter_.parameters().size);
    lm::gpu::copy(weights.view(), adapter_.parameters());
  }
  void run() {
    const View x(x_.data(), axes_.T, axes_.d_in), dx(dx_.data(), axes_.T, axes_.d_in);
    const View y(y_.data(), axes_.T, axes_.d_out), dy(dy_.data(), axes_.T, axes_.d_out);
    const lm::Arena<device> work{work_};
    lm::Arena<device> reserve{kept_};
    auto saved =
        lm::forward(be_, adapter_, x, y, work, {.save = axes_.train ? &reserve : nullptr, .dropout_off = true});
    if (axes_.train) lm::backward(be_, adapter_, saved, x, dy, dx, gradient_, work);
  }
  lm::Cost cost() const { return adapter_.cost(axes_.T); }

 private:
  Axes axes_;
  lm::gpu::Backend be_;
  Adapter adapter_;
  lm::gradient_t<Adapter> gradient_;
  lm::Buffer<X, device> x_, dx_, y_, dy_;
  lm::Buffer<std::byte, device> work_, kept_;
};

double median(std::vector<double> v) {
  std::nth_element(v.begin(), v.begin() + static_cast<std::ptrdiff_t>(v.size() / 2), v.end());
  return v[v.size() / 2];
}

/// One LoRA per expert, one after the other, on library products; the router's cost is left out, and so is gathering.
template <class A, class One>
void row(benchmark::State& state, const Axes& axes) {
  Pass<A> fused(axes, true), composed(axes, false);
  Axes of_one = axes;
  of_one.R /= axes.E;
  of_one.E = 1;
  Pass<One> expert(of_one, false);
  const std::function<void()> works[] = {[&] { fused.run(); }, [&] { composed.run(); },
                                         [&] {
                                           for (Index e = 0; e < axes.E; ++e) expert.run();
                                         }};
  int calls[3];
  for (int i = 0; i < 3; ++i) {
    works[i]();  // warm
    const double once = gpu().seconds(works[i], 1);
    calls[i] = static_cast<int>(std::clamp(2e-3 / once, 1.0, 1000.0));
  }
  std::vector<double> ours, ratio[2];
  for (auto _ : state) {
    double s[3];
    for (int i = 0; i < 3; ++i) s[i] = gpu().seconds(works[i], calls[i]);
    ours.push_back(s[0]);
    for (int i = 0; i < 2; ++i) ratio[i].push_back(s[i + 1] / s[0]);
    state.SetIterationTime(s[0]);
  }
  const lm::Cost cost = fused.cost();
  const double time = median(ours);
  state.counters["flop/s"] = (cost.forward_flop + (axes.train ? cost.backward_flop : 0)) / time;
  state.counters["bytes/s"] = (cost.forward_bytes + (axes.train ? cost.backward_bytes : 0)) / time;
  state.counters["composed/ours"] = median(ratio[0]);
  state.counters["loop/ours"] = median(ratio[1]);
}

template <class P>
void add(const char* scalar) {
  struct Shape {
    Index d_in, d_out, R;
  };
  for (const Shape shape : {Shape{4096, 4096, 16}, {4096, 4096, 64}, {4096, 11008, 128}}) {
    for (const Index T : {1, 16, 256, 2048}) {
      for (const bool train : {false, true}) {
        const auto name = [&](const char* family) {
          return std::string(family) + (train ? "/train/" : "/forward/") + scalar + "/T:" + std::to_string(T) +
                 "/d_in:" + std::to_string(shape.d_in) + "/d_out:" + std::to_string(shape.d_out) +
                 "/R:" + std::to_string(shape.R);
        };
        const auto one = [&](const char* family, auto* run, Index experts) {
          const Axes axes{T, shape.d_in, shape.d_out, shape.R, experts, train};
          benchmark::RegisterBenchmark(name(family).c_str(), [run, axes](benchmark::State& state) { run(state, axes); })
              ->UseManualTime()
              ->Iterations(30)
              ->Unit(benchmark::kMicrosecond);
        };
        one("lora", &row<lm::Lora<P>, lm::Lora<P>>, 1);
        one("dense", &row<lm::LoraMoe<P>, lm::Lora<P>>, 8);
        one("top2", &row<lm::Mola<P>, lm::Lora<P>>, 8);
        one("team", &row<lm::TeamLora<P>, lm::Lora<P>>, 4);
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::puts("GPU: not run (no GPU)");
    return 77;
  }
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  cudaDeviceProp properties{};
  lm::gpu::check_cuda("cudaGetDeviceProperties", cudaGetDeviceProperties(&properties, 0));
  benchmark::AddCustomContext("gpu", properties.name);
  add<lm::bfloat16>("bfloat16");
  add<float>("float");
  add<lm::half>("half");
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
