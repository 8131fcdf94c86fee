// Teams: every width sums in its fixed order, gives every thread the same bits and leaves nothing undone.
#include <cmath>
#include <random>

#include "gpu/harness.cuh"
#include "support/seed.hpp"

namespace lm = loramix;
using namespace loramix_test;
using lm::Index;

namespace {

template <class T>
struct TeamResults {
  T sum, maximum, of_others;
  int runs_of_once, disagree;
};

/// One team. values [n], scratch [n], out [1].
template <class Tm, class T>
__global__ void reduce_kernel(const T* values, Index n, T* scratch, TeamResults<T>* out) {
  const Tm team;
  team.once([=] { *out = {}; });
  team.each(n, [=](Index i) { scratch[i] = values[i] + T(1); });
  const T sum = team.sum(n, [=](Index i) { return values[i]; });
  // What other threads wrote inside each. Right after another sum: both use the same shared memory.
  const T of_others = team.sum(n, [=](Index i) { return scratch[n - 1 - i]; });
  const T maximum = team.maximum(n, [=](Index i) { return values[i]; });
  team.once([=] {
    out->sum = sum;
    out->maximum = maximum;
    out->of_others = of_others;
    out->runs_of_once += 1;
  });
  const bool same = sum == out->sum && (maximum == out->maximum || maximum != maximum);
  if (!same) atomicAdd(&out->disagree, 1);
}

/// The tree of gpu/team.cuh on the host: thread i gathers i, i + width, …; halves of a warp are added, then the warps in
/// order.
template <class T>
T tree_sum(const std::vector<T>& values, int width) {
  T total = T(0);
  for (int warp = 0; warp < width / 32; ++warp) {
    T lane[32] = {};
    for (int i = 0; i < 32; ++i) {
      for (std::size_t v = static_cast<std::size_t>(warp * 32 + i); v < values.size();
           v += static_cast<std::size_t>(width)) {
        lane[i] += values[v];
      }
    }
    for (int distance = 16; distance > 0; distance /= 2) {
      for (int i = 0; i < distance; ++i) lane[i] = lane[i] + lane[i + distance];
    }
    total = warp == 0 ? lane[0] : total + lane[0];
  }
  return total;
}

template <class Tm, class T>
TeamResults<T> run_team(GpuHarness& gpu, const std::vector<T>& values) {
  std::vector<TeamResults<T>> results(1);
  TeamResults<T>* const out = gpu.upload(results);
  reduce_kernel<Tm><<<1, Tm::width, 0, gpu.stream()>>>(gpu.upload(values), static_cast<Index>(values.size()),
                                                       gpu.upload(values), out);
  lm::gpu::check_cuda("reduce_kernel", cudaGetLastError());
  gpu.download(out, results);
  return results[0];
}

template <class Team_, class T>
struct Pair {
  using Tm = Team_;
  using Value = T;
};

}  // namespace

TEST_CASE_TEMPLATE("a team reduces in its fixed order", C, Pair<lm::gpu::WarpTeam, float>,
                   Pair<lm::gpu::WarpTeam, double>, Pair<lm::gpu::BlockTeam<32>, float>,
                   Pair<lm::gpu::BlockTeam<128>, float>, Pair<lm::gpu::BlockTeam<1024>, double>) {
  using Tm = typename C::Tm;
  using T = typename C::Value;
  GpuHarness gpu;
  std::mt19937_64 random(seed(1));
  std::uniform_real_distribution<T> uniform(-1, 1);
  for (const std::size_t n : {1u, 31u, 32u, 33u, 257u, 1500u}) {
    CAPTURE(n);
    std::vector<T> values(n), others(n);
    T largest = T(-2);
    for (std::size_t i = 0; i < n; ++i) {
      values[i] = uniform(random);
      others[n - 1 - i] = values[i] + T(1);
      largest = values[i] > largest ? values[i] : largest;
    }
    const TeamResults<T> got = run_team<Tm>(gpu, values);
    CHECK(got.sum == tree_sum(values, Tm::width));
    CHECK(got.of_others == tree_sum(others, Tm::width));
    CHECK(got.maximum == largest);
    CHECK(got.runs_of_once == 1);
    CHECK(got.disagree == 0);

    values[n / 2] = std::numeric_limits<T>::quiet_NaN();
    CHECK(std::isnan(run_team<Tm>(gpu, values).maximum));
    CHECK(gpu.release());
  }
}

namespace {

/// out [n], counts [n]: values [n, size], a row each.
template <class Tm>
__global__ void sums_kernel(const float* values, Index n, Index size, float* out, int* counts) {
  const Tm team;
  team.sums(
      n, size, [=](Index g, Index i) { return values[g * size + i]; },
      [=](Index g, float sum) {
        out[g] = sum;
        counts[g] += 1;
      });
}

}  // namespace

TEST_CASE_TEMPLATE("sums of groups: the bits of sum, each put once", Tm, lm::gpu::WarpTeam, lm::gpu::BlockTeam<64>) {
  GpuHarness gpu;
  std::mt19937_64 random(seed(2));
  std::uniform_real_distribution<float> uniform(-1, 1);
  for (const std::size_t size : {0u, 1u, 2u, 3u, 8u, 21u, 32u, 33u, 100u}) {
    for (const std::size_t n : {1u, 2u, 8u, 33u, 70u}) {
      CAPTURE(size);
      CAPTURE(n);
      std::vector<float> values(n * size), sums(n, -7.0f);
      std::vector<int> counts(n, 0);
      for (float& value : values) value = uniform(random);
      float* const out = gpu.upload(sums);
      int* const put = gpu.upload(counts);
      sums_kernel<Tm><<<1, Tm::width, 0, gpu.stream()>>>(gpu.upload(values), static_cast<Index>(n),
                                                         static_cast<Index>(size), out, put);
      lm::gpu::check_cuda("sums_kernel", cudaGetLastError());
      gpu.download(out, sums);
      gpu.download(put, counts);
      for (std::size_t g = 0; g < n; ++g) {
        const auto row = values.begin() + static_cast<std::ptrdiff_t>(g * size);
        CHECK(sums[g] == tree_sum(std::vector<float>(row, row + static_cast<std::ptrdiff_t>(size)), Tm::width));
        CHECK(counts[g] == 1);
      }
      CHECK(gpu.release());
    }
  }
}
