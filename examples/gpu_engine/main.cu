// An inference engine on a GPU: its own stream, its own CUDA graph, its own GEMM. The adapter comes in twice: beside the GEMM as
// two launches of loramix, and inside it, as the GEMM's epilogue.
#include <cmath>
#include <cstdio>
#include <vector>

#include <loramix/adapter/forward.hpp>
#include <loramix/adapter/initialise.hpp>
#include <loramix/adapter/lora.hpp>
#include <loramix/gpu/block.cuh>
#include <loramix/gpu/gpu.cuh>

#include "engine.cuh"

namespace lm = loramix;
namespace block = lm::gpu::block;
using lm::Index;

namespace {

using Element = lm::bfloat16;
constexpr lm::Space device = lm::Space::device;
constexpr Index tokens = 70, hidden = 96, wide = 300, rank = 24;
using Rows = lm::MatrixView<const Element, device>;

// [epilogue]
/// y = x Wᵀ, and + scale (U ∘ g) Bᵀ before the sums are rounded: y is written once, and never read.
template <bool adapted>
__global__ void __launch_bounds__(engine::threads)
    linear(Rows x, Rows W, lm::MatrixView<Element, device> y, block::Ranks ranks,
           block::Matrix<Element, lm::Major::column> B, float scale) {
  extern __shared__ __align__(128) unsigned char shared[];
  const Index token = Index{blockIdx.x} * 64, column = Index{blockIdx.y} * engine::threads;
  block::Accumulator sums;
  engine::multiply(x, W, token, column, sums, shared);  // the engine's own main loop
  if constexpr (adapted) block::expand(ranks, B, scale, token, column, sums, shared);
  block::each(sums, [&](int row, int c, float sum) {
    if (token + row < y.rows && column + c < y.cols) y(token + row, column + c) = lm::narrow<Element>(sum);
  });
}
// [/epilogue]

template <bool adapted>
void launch_linear(cudaStream_t stream, Rows x, Rows W, lm::MatrixView<Element, device> y, block::Ranks ranks,
                   block::Matrix<Element, lm::Major::column> B, float scale) {
  const dim3 grid(static_cast<unsigned>((y.rows + 63) / 64),
                  static_cast<unsigned>((y.cols + engine::threads - 1) / engine::threads));
  const Index expand = block::expand_bytes<Element, lm::Major::column>(engine::threads / 32, rank);
  const Index shared = expand > engine::shared_bytes ? expand : engine::shared_bytes;
  linear<adapted><<<grid, engine::threads, static_cast<std::size_t>(shared), stream>>>(x, W, y, ranks, B, scale);
  lm::gpu::check_cuda("linear", cudaGetLastError());
}

struct Numbers {
  std::vector<Element> host;
  lm::Matrix<Element, device> there;
  Numbers(Index rows, Index cols, unsigned state, float bound) : there(rows, cols) {
    for (Index i = 0; i < rows * cols; ++i) {
      state = state * 1664525u + 1013904223u;
      host.push_back(lm::narrow<Element>(bound * (static_cast<float>(state >> 8) * 0x1p-23f - 1)));
    }
    upload();
  }
  void upload() { lm::gpu::copy(lm::MatrixView<const Element>(host.data(), there.rows(), there.cols()), there.view()); }
};

/// The largest difference from x Wᵀ + s (x Aᵀ) Bᵀ, in units of what its roundings to 16 bits may make.
double error_of(const lm::Matrix<Element, device>& y, const Numbers& x, const Numbers& W,
                const lm::Lora<Element>& lora) {
  lm::Matrix<Element> got(tokens, wide);
  lm::gpu::copy(y.view(), got.view());
  double largest = 0;
  for (Index t = 0; t < tokens; ++t) {
    double u[rank] = {};
    const auto at = [&](Index i) { return lm::widen<double>(x.host[static_cast<std::size_t>(t * hidden + i)]); };
    for (Index j = 0; j < rank; ++j) {
      for (Index i = 0; i < hidden; ++i) u[j] += at(i) * lm::widen<double>(lora.A()(j, i));
    }
    for (Index o = 0; o < wide; ++o) {
      double base = 0, delta = 0;
      for (Index i = 0; i < hidden; ++i)
        base += at(i) * lm::widen<double>(W.host[static_cast<std::size_t>(o * hidden + i)]);
      for (Index j = 0; j < rank; ++j) delta += lora.scale() * u[j] * lm::widen<double>(lora.B()(o, j));
      const double allowed = (std::abs(base) + std::abs(base + delta)) * 0x1p-8 + 1e-4;
      const double error = std::abs(lm::widen<double>(got(t, o)) - base - delta) / allowed;
      if (!(error <= largest)) largest = error;
    }
  }
  return largest;
}

}  // namespace

int main() {
  Numbers x(tokens, hidden, 1, 1), W(wide, hidden, 2, 0.1f), B(rank, wide, 3, 0.1f);
  lm::Lora<Element> lora({.d_in = hidden, .d_out = wide, .rank = rank, .alpha = 2 * rank});
  lm::initialise(lora, {.seed = 7, .site = "layers.0.mlp.up_proj"});
  for (Index j = 0; j < rank; ++j) {
    for (Index o = 0; o < wide; ++o) lora.B()(o, j) = B.host[static_cast<std::size_t>(j * wide + o)];
  }

  // [stream]
  engine::Stream stream;
  lm::gpu::Tickets tickets;  // one per stream
  const lm::gpu::Backend be{
      .stream = stream.get(), .tickets = tickets.address(), .tuning = lm::gpu::tune(lm::gpu::machine_of(0))};
  const auto there = lm::gpu::to_device(lora);
  lm::Buffer<std::byte, device> scratch(lm::workspace_bytes(be, there, tokens));
  // [/stream]
  lm::Matrix<Element, device> beside(tokens, wide), inside(tokens, wide);
  lm::Matrix<float, device> u(tokens, rank);
  const auto in = std::as_const(x.there).view();
  const auto weights = std::as_const(W.there).view();
  const auto up = block::matrix_of(there.B());
  const auto ranks = block::ranks_of(std::as_const(u).view());
  const float scale = static_cast<float>(there.scale());

  // [graph]
  engine::Graph graph(stream, [&] {
    launch_linear<false>(stream.get(), in, weights, beside.view(), ranks, up, scale);
    lm::forward(be, there, in, beside.view(), lm::Arena<device>{scratch});  // y += delta: two launches
  });
  // [/graph]
  // [epilogue-graph]
  engine::Graph fused(stream, [&] {
    lm::execute(be, lm::make_shrink(there.A(), in, u.view()), lm::Arena<device>{scratch});  // U: R values per token
    launch_linear<true>(stream.get(), in, weights, inside.view(), ranks, up, scale);
  });
  // [/epilogue-graph]

  double worst = 0;
  for (unsigned batch = 0; batch < 2; ++batch) {  // the graphs read where they were told to: new tokens, same addresses
    if (batch == 1) {
      for (Element& v : x.host) v = lm::narrow<Element>(-0.5f * lm::widen<float>(v) + 0.1f);
      x.upload();
    }
    graph.launch(stream);
    fused.launch(stream);
    stream.wait();
    const double apart = error_of(beside, x, W, lora), epilogue = error_of(inside, x, W, lora);
    std::printf("batch %u: error of what rounding may make: beside the GEMM %.2f, in its epilogue %.2f\n", batch, apart,
                epilogue);
    worst = std::fmax(worst, std::fmax(apart, epilogue));
    if (!(apart <= 1 && epilogue <= 1)) return 1;
  }
  return worst > 0 ? 0 : 1;
}
