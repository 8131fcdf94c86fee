// One expert per sequence on the device: MoA's step against the CPU and as a graph, and mixed ranks with rank_offsets in
// device memory.
#include <cmath>
#include <random>
#include <utility>

#include <loramix/adapter/domains.hpp>

#include "gpu/captured.cuh"
#include "gpu/domain_step.hpp"
#include "gpu/harness.cuh"
#include "support/seed.hpp"

namespace lm = loramix;
using namespace loramix_test;
using lm::Index;

namespace {

constexpr lm::Space device = lm::Space::device;

std::vector<float> draw(Index n, std::uint64_t site) {
  std::mt19937_64 random(seed(site));
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<float> values(static_cast<std::size_t>(n));
  for (float& v : values) v = uniform(random);
  return values;
}

/// Sums of at most n terms of size 4, in another order.
void check_close(const char* what, const std::vector<float>& got, const std::vector<float>& want, float n) {
  REQUIRE(got.size() == want.size());
  float largest = 0, difference = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    largest = std::fmax(largest, std::fabs(want[i]));
    difference = std::fmax(difference, got[i] == got[i] ? std::fabs(got[i] - want[i]) : INFINITY);
  }
  CAPTURE(std::string(what));
  CHECK(largest > 0);
  CHECK(difference <= n * 4 * n * 6e-8f);
}

}  // namespace

TEST_CASE_TEMPLATE("MoA on the device is MoA on the host, launched and in a graph", Last, std::false_type,
                   std::true_type) {
  using Adapter = lm::Moa<float, device>;
  using S = DomainStep;
  GpuHarness gpu;
  Adapter moa({.d_in = S::d_in,
               .d_out = S::d_out,
               .experts = S::experts,
               .rank = S::rank,
               .dropout = S::dropout,
               .places = S::places,
               .pooling = Last::value ? lm::Pooling::last : lm::Pooling::mean,
               .straight_through = true});
  const Index n = moa.parameters().size;
  const DomainStep step{Last::value,
                        draw(n, 1),
                        draw(S::tokens * S::d_in, 2),
                        draw(S::tokens * S::d_out, 3),
                        draw(S::sequences * S::experts, 4),
                        {0, 0, 5, 5, 12, 13, 21, 23},
                        {2, 0, -1, 1, -1, -1, -1},
                        {1, 1, 0, 1, 0, 1, 1, 1, 1, 0, 0, 1, 0, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1}};
  const DomainStepResults want = domain_step_on_host(step);

  auto gradient = lm::zeros_like(moa);
  lm::gpu::copy(lm::VectorView<const float>(step.parameters.data(), n), moa.parameters());
  const lm::MatrixView<const float, device> x{gpu.upload(step.x), S::tokens, S::d_in},
      dy{gpu.upload(step.dy), S::tokens, S::d_out};
  const lm::MatrixView<float, device> y{gpu.upload(std::vector<float>(want.y.size())), S::tokens, S::d_out},
      dx{gpu.upload(std::vector<float>(want.dx.size())), S::tokens, S::d_in};
  const lm::VectorView<const float, device> dp{gpu.upload(step.dp), S::sequences * S::experts};
  std::int32_t* const ids = gpu.upload(std::vector<std::int32_t>(S::sequences));
  const Index* const offsets = gpu.upload(std::vector<Index>(step.offsets.begin(), step.offsets.end()));
  const std::int32_t* const labels = gpu.upload(step.labels);
  const std::uint8_t* const valid = gpu.upload(step.valid);
  const lm::gpu::Backend be = gpu.backend();
  const Index there = lm::workspace_bytes(be, moa, S::tokens),
              back = lm::workspace_bytes(be, moa, S::tokens, lm::Pass::backward);
  auto work = gpu.arena(there > back ? there : back), memory = gpu.arena(lm::reserve_bytes(moa, S::tokens));
  const auto run = [&] {
    memory.reset();
    lm::ForwardOptions<device> options{.save = &memory,
                                       .key = {.seed = 7, .step = 2},
                                       .into = lm::Into::set,
                                       .sequences = lm::Groups<device>::by_segment(offsets, S::sequences),
                                       .labels = {labels, S::sequences},
                                       .valid = {valid, S::tokens}};
    auto saved = lm::forward(be, moa, x, y, work, options);
    const auto& scores = saved.scores;
    lm::gpu::check_cuda("cudaMemcpyAsync", cudaMemcpyAsync(scores.dp.data, dp.data, step.dp.size() * sizeof(float),
                                                           cudaMemcpyDeviceToDevice, gpu.stream()));
    lm::backward(be, moa, saved, x, dy, dx, gradient, work, {.parameters = lm::Into::set, .input = lm::Into::set});
    lm::route(be, moa, x, {ids, S::sequences}, work, options);
  };
  const auto check = [&] {
    DomainStepResults got{want.y, want.dx, want.gradient, want.ids};
    gpu.download(y.data, got.y);
    gpu.download(dx.data, got.dx);
    gpu.download(gradient.parameters().data, got.gradient);
    gpu.download(ids, got.ids);
    check_close("y", got.y, want.y, S::d_in * S::rank);
    check_close("dx", got.dx, want.dx, S::d_out * S::rank);
    check_close("gradient", got.gradient, want.gradient, S::tokens * S::d_out);
    for (std::size_t b = 0; b < S::sequences; ++b) {  // route knows no labels
      if (step.labels[b] < 0) CHECK(got.ids[b] == want.ids[b]);
    }
    return got;
  };
  run();
  const DomainStepResults direct = check();
  const Graph graph(gpu.stream(), run);
  for (int replay = 0; replay < 2; ++replay) {
    graph.launch(gpu.stream());
    const DomainStepResults again = check();
    CHECK(again.y == direct.y);
    CHECK(again.dx == direct.dx);
    CHECK(again.gradient == direct.gradient);
  }
  CHECK(gpu.release());
}

TEST_CASE("decisions of layers on the device") {
  GpuHarness gpu;
  const std::int32_t* const decisions = gpu.upload(std::vector<std::int32_t>{2, 1, -1, 1, 2, -1, 2, 1, 0, 1, 0, 3});
  std::vector<std::int32_t> got(3);
  std::int32_t* const ids = gpu.upload(got);
  lm::decide(gpu.backend(), lm::Decision::vote, lm::MatrixView<const std::int32_t, device>{decisions, 4, 3}, 4,
             lm::VectorView<std::int32_t, device>{ids, 3});
  gpu.download(ids, got);
  CHECK(got == std::vector<std::int32_t>{1, 1, 0});
  CHECK(gpu.release());
}

TEST_CASE("mixed ranks: rank_offsets and scales in device memory, forward and backward against literal sums") {
  GpuHarness gpu;
  constexpr Index T = 9, R = 11, E = 4, out = 13;
  const std::vector<Index> offsets{0, 3, 3, 10, 11};
  const std::vector<std::int32_t> ids{0, 2, -1, 3, 2, 1, 0, -1, 2};
  const std::vector<float> u = draw(T * R, 1), B = draw(R * out, 2), dy = draw(T * out, 3), y0 = draw(T * out, 4),
                           scale{.5f, .5f, .5f, 2, 2, 2, 2, 2, 2, 2, 3};
  using Score = float;
  const lm::OneExpert<Score, device> one{{gpu.upload(ids), T}, {}, E, gpu.upload(offsets)};
  const lm::RankScale<Score, device> by_rank{{gpu.upload(scale), R}};
  const auto form = lm::GateProduct(one, by_rank).form(T, R);
  const lm::MatrixView<const float, device> u_view{gpu.upload(u), T, R}, dy_view{gpu.upload(dy), T, out};
  const lm::MatrixView<const float, device, lm::Major::column> B_view{gpu.upload(B), out, R};
  const lm::MatrixView<float, device> y{gpu.upload(y0), T, out}, du{gpu.upload(u), T, R};
  const lm::MatrixView<float, device, lm::Major::column> dB{gpu.upload(std::vector<float>(B.size())), out, R};
  const lm::Expand<float, float, float, Score, device, lm::Major::column> expand{u_view, form, B_view, 1, y};
  const lm::ExpandBackward<float, float, float, Score, float, device, lm::Major::column> back{
      u_view, form, B_view, 1, dy_view, du, dB, {}, lm::Into::set};
  const lm::gpu::Backend be = gpu.backend();
  const Index a = lm::scratch_bytes(be, expand), b = lm::scratch_bytes(be, back);
  const auto work = gpu.arena(a > b ? a : b);
  const Graph graph(gpu.stream(), [&] {
    lm::execute(be, expand, work);
    lm::execute(be, back, work);
  });
  graph.launch(gpu.stream());

  std::vector<float> want_y = y0, want_du(u.size()), want_dB(B.size()), got_y = y0, got_du = u, got_dB = B;
  for (Index t = 0; t < T; ++t) {
    const std::int32_t e = ids[static_cast<std::size_t>(t)];
    for (Index j = e < 0 ? R : offsets[static_cast<std::size_t>(e)];
         e >= 0 && j < offsets[static_cast<std::size_t>(e) + 1]; ++j) {
      for (Index o = 0; o < out; ++o) {
        const auto to = static_cast<std::size_t>(t * out + o), rank = static_cast<std::size_t>(j * out + o),
                   tj = static_cast<std::size_t>(t * R + j);
        const float s = scale[static_cast<std::size_t>(j)];
        want_y[to] += u[tj] * s * B[rank];
        want_du[tj] += dy[to] * B[rank] * s;
        want_dB[rank] += dy[to] * u[tj] * s;
      }
    }
  }
  gpu.download(y.data, got_y);
  gpu.download(du.data, got_du);
  gpu.download(dB.data, got_dB);
  check_close("y", got_y, want_y, R);
  check_close("du", got_du, want_du, out);
  check_close("dB", got_dB, want_dB, T);
  CHECK(gpu.release());
}
