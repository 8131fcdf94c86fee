// The block-level halves in kernels of a user's: gpu::block::expand on top of sums of its own, gpu::block::shrink, against
// literal sums.
#include <cmath>
#include <random>

#include <loramix/gate/gates.hpp>
#include <loramix/gpu/block.cuh>

#include "gpu/harness.cuh"
#include "support/seed.hpp"

namespace lm = loramix;
using namespace loramix_test;
using lm::Index;
namespace block = lm::gpu::block;

namespace {

constexpr lm::Space device = lm::Space::device;

template <class T>
std::vector<T> draw(Index n, std::uint64_t site) {
  std::mt19937_64 random(seed(site));
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<T> values(static_cast<std::size_t>(n));
  for (T& v : values) v = lm::narrow<T>(uniform(random));
  return values;
}
template <class T>
double at(const std::vector<T>& v, Index i) {
  return static_cast<double>(lm::narrow<float>(v[static_cast<std::size_t>(i)]));
}

/// y = 1 + 1.5 (U ∘ g) Bᵀ: a GEMM whose sums are all 1, and the adapter in its epilogue.
template <class W, lm::Major M>
__global__ void ones_and_adapter(block::Ranks ranks, block::Matrix<W, M> B, lm::MatrixView<float, device> y) {
  extern __shared__ __align__(128) unsigned char shared[];
  const Index token = Index{blockIdx.x} * 64, column = Index{blockIdx.y} * blockDim.x;
  block::Accumulator sums;
  sums.clear();
  block::each(sums, [](int, int, float& sum) { sum = 1; });
  block::expand(ranks, B, 1.5f, token, column, sums, shared);
  block::each(sums, [&](int row, int c, float& sum) {
    if (token + row < y.rows && column + c < y.cols) y(token + row, column + c) = sum;
  });
}

template <class X, class W>
__global__ void __launch_bounds__(256)
    shrink_here(block::Matrix<X, lm::Major::row> x, block::Matrix<W, lm::Major::row> A,
                lm::MatrixView<float, device> u) {
  extern __shared__ __align__(128) unsigned char shared[];
  const Index token = Index{blockIdx.x} * 64;
  block::shrink(
      x, A, token, [&](int row, int rank, float sum) { u(token + row, rank) = sum; }, shared);
}

/// |got − want| against the sum of absolute terms, n products of `eps` each.
void check_sum(double got, double want, double absolute, double eps, int& wrong) {
  wrong += !(std::abs(got - want) <= eps * absolute);
}

template <class W, lm::Major M>
void check_expand(Index tokens, Index ranks, Index width, int warps, bool top_two) {
  CAPTURE(tokens);
  CAPTURE(ranks);
  GpuHarness gpu;
  constexpr Index experts = 3;
  const auto u = draw<float>(tokens * ranks, 1), weights = draw<float>(tokens * 2, 2);
  const auto B = draw<W>(width * ranks, 3);
  std::vector<std::int32_t> ids;
  for (Index t = 0; t < tokens; ++t) {
    ids.push_back(static_cast<std::int32_t>(t % 3));
    ids.push_back(static_cast<std::int32_t>(t % 5 == 0 ? -1 : (t + 1) % 3));
  }
  lm::GateForm<float, device> form;
  form.tokens = tokens;
  form.ranks = ranks;
  if (top_two) {
    form.experts = experts;
    form.ids = {gpu.upload(ids), tokens, 2};
    form.id_weights = {gpu.upload(weights), tokens, 2};
  }
  const lm::MatrixView<float, device> there{gpu.upload(u), tokens, ranks};
  const lm::MatrixView<const W, device, M> Bv{gpu.upload(B), width, ranks};
  std::vector<float> y(static_cast<std::size_t>(tokens * width));
  const lm::MatrixView<float, device> yv{gpu.upload(y), tokens, width};
  const Index bytes = block::expand_bytes<W, M>(warps, ranks);
  const auto source = top_two ? block::ranks_of(there, form) : block::ranks_of(there);
  const dim3 grid(static_cast<unsigned>((tokens + 63) / 64),
                  static_cast<unsigned>((width + 32 * warps - 1) / (32 * warps)));
  lm::gpu::check_cuda("cudaFuncSetAttribute",
                      cudaFuncSetAttribute(ones_and_adapter<W, M>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(bytes)));
  ones_and_adapter<W, M>
      <<<grid, 32 * warps, static_cast<std::size_t>(bytes), gpu.stream()>>>(source, block::matrix_of(Bv), yv);
  gpu.download(yv.data, y);
  int wrong = 0;
  double largest = 0;
  for (Index t = 0; t < tokens; ++t) {
    for (Index o = 0; o < width; ++o) {
      double want = 1, absolute = 1;
      for (Index j = 0; j < ranks; ++j) {
        double g = 1;
        if (top_two) {
          g = 0;
          for (Index k = 0; k < 2; ++k) {
            if (ids[static_cast<std::size_t>(2 * t + k)] == j / (ranks / experts)) g = at(weights, 2 * t + k);
          }
        }
        const double b = at(B, M == lm::Major::row ? o * ranks + j : j * width + o);
        want += 1.5 * at(u, t * ranks + j) * g * b;
        absolute += std::abs(1.5 * at(u, t * ranks + j) * g * b);
      }
      largest = std::fmax(largest, std::abs(want - 1));
      // Each addition rounds or, on tensor cores, truncates to float; half's terms hold 2⁻²².
      check_sum(at(y, t * width + o), want, absolute, static_cast<double>(ranks + 8) * 0x1p-22, wrong);
    }
  }
  CHECK(wrong == 0);
  CHECK(largest > 0.5);
  CHECK(gpu.release());
}

template <class X, class W>
void check_shrink(Index tokens, Index ranks, Index width) {
  CAPTURE(tokens);
  CAPTURE(ranks);
  GpuHarness gpu;
  const auto x = draw<X>(tokens * width, 4);
  const auto A = draw<W>(ranks * width, 5);
  std::vector<float> u(static_cast<std::size_t>(tokens * ranks));
  const lm::MatrixView<float, device> uv{gpu.upload(u), tokens, ranks};
  const lm::MatrixView<const X, device> xv{gpu.upload(x), tokens, width};
  const lm::MatrixView<const W, device> Av{gpu.upload(A), ranks, width};
  const Index bytes = block::shrink_bytes<X, W>(ranks);
  lm::gpu::check_cuda(
      "cudaFuncSetAttribute",
      cudaFuncSetAttribute(shrink_here<X, W>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  shrink_here<X, W><<<static_cast<unsigned>((tokens + 63) / 64), 256, static_cast<std::size_t>(bytes), gpu.stream()>>>(
      block::matrix_of(xv), block::matrix_of(Av), uv);
  gpu.download(uv.data, u);
  int wrong = 0;
  for (Index t = 0; t < tokens; ++t) {
    for (Index j = 0; j < ranks; ++j) {
      double want = 0, absolute = 0;
      for (Index i = 0; i < width; ++i) {
        want += at(x, t * width + i) * at(A, j * width + i);
        absolute += std::abs(at(x, t * width + i) * at(A, j * width + i));
      }
      check_sum(at(u, t * ranks + j), want, absolute, static_cast<double>(width + 8) * 0x1p-22, wrong);
    }
  }
  CHECK(wrong == 0);
  CHECK(gpu.release());
}

}  // namespace

TEST_CASE_TEMPLATE("block::expand adds the adapter to sums of a kernel's own", W, float, lm::bfloat16, lm::half) {
  check_expand<W, lm::Major::column>(70, 18, 150, 4, true);
  check_expand<W, lm::Major::column>(3, 16, 33, 1, false);
  check_expand<W, lm::Major::row>(65, 21, 260, 8, true);
}

TEST_CASE("block::shrink leaves a block's tile of U where it is told to") {
  check_shrink<float, float>(70, 18, 150);
  check_shrink<lm::bfloat16, lm::bfloat16>(5, 70, 200);
  check_shrink<lm::half, lm::half>(64, 3, 64);
  check_shrink<lm::bfloat16, float>(66, 130, 72);
  check_shrink<float, float>(2, 300, 40);
}
