// Teams: every width sums in its fixed order, gives every thread the same bits and leaves nothing undone.
#include "gpu/harness.cuh"

using namespace loramix_test;

namespace {

template <class T>
struct TeamResults {
  T sum, maximum, after_each;
  int runs_of_once;
  bool agree;
};

/// One team per block. `values` has n elements; `out` has one entry, `scratch` n.
template <class Tm, class T>
__global__ void reduce_kernel(const T* values, Index n, T* scratch, TeamResults<T>* out) {
  const Tm team;
  team.once([=] { *out = {}; });
  team.each(n, [=](Index i) { scratch[i] = values[i] + T(1); });
  const T sum = team.sum(n, [=](Index i) { return values[i]; });
  const T maximum = team.maximum(n, [=](Index i) { return values[i]; });
  // Reads what another thread wrote inside each.
  const T others = team.sum(n, [=](Index i) { return scratch[n - 1 - i]; });
  team.once([=] {
    out->sum = sum;
    out->maximum = maximum;
    out->after_each = others;
    out->runs_of_once += 1;
    out->agree = true;
  });
  if (!(out->sum == sum) || !(out->maximum == maximum || maximum != maximum)) out->agree = false;
}

/// The same tree on the host: thread i gathers i, i + width, …; halves are added across a warp, then warps in order.
template <class T>
T tree_sum(const lm::Buffer<T>& values, int width) {
  T of_warp[32] = {};
  for (int warp = 0; warp < width / 32; ++warp) {
    T lane[64] = {};
    for (int i = 0; i < 32; ++i) {
      for (Index v = warp * 32 + i; v < values.size(); v += width) lane[i] += values[v];
    }
    for (int distance = 16; distance > 0; distance /= 2) {
      for (int i = 0; i < distance; ++i) lane[i] = lane[i] + lane[i + distance];
    }
    of_warp[warp] = lane[0];
  }
  T total = of_warp[0];
  for (int warp = 1; warp < width / 32; ++warp) total += of_warp[warp];
  return total;
}

template <class Tm, class T>
TeamResults<T> run_team(const lm::Buffer<T>& values) {
  lm::Buffer<T, Space::device> device(values.size()), scratch(values.size());
  lm::Buffer<TeamResults<T>, Space::device> out(1);
  lm::gpu::copy(values.view(), device.view());
  reduce_kernel<Tm><<<1, Tm::width>>>(device.data(), device.size(), scratch.data(), out.data());
  lm::gpu::check_launch("reduce_kernel");
  TeamResults<T> results;
  lm::gpu::copy(out.view(), lm::VectorView<TeamResults<T>>(&results, 1));
  return results;
}

template <class Team_, class T>
struct Combination {
  using Tm = Team_;
  using Value = T;
};

}  // namespace

TEST_CASE_TEMPLATE("a team reduces in its fixed order", C, Combination<lm::gpu::WarpTeam, float>,
                   Combination<lm::gpu::WarpTeam, double>, Combination<lm::gpu::BlockTeam<32>, float>,
                   Combination<lm::gpu::BlockTeam<128>, float>, Combination<lm::gpu::BlockTeam<1024>, double>) {
  using Tm = typename C::Tm;
  using T = typename C::Value;
  for (Index n : {1, 31, 32, 33, 257, 1500}) {
    CAPTURE(n);
    lm::Buffer<T> values(n), plus_one(n);
    const Dense random = random_matrix<T>(1, n, 1);
    T largest = T(-10);
    for (Index i = 0; i < n; ++i) {
      values[i] = static_cast<T>(random(0, i));
      plus_one[n - 1 - i] = values[i] + T(1);
      if (values[i] > largest) largest = values[i];
    }
    const TeamResults<T> got = run_team<Tm>(values);
    CHECK(got.sum == tree_sum(values, Tm::width));
    CHECK(got.after_each == tree_sum(plus_one, Tm::width));
    CHECK(got.maximum == largest);
    CHECK(got.runs_of_once == 1);
    CHECK(got.agree);

    values[n / 2] = std::numeric_limits<T>::quiet_NaN();
    CHECK(std::isnan(run_team<Tm>(values).maximum));
  }
}
