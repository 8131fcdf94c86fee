// One expert per sequence on the device: routing and decisions, and mixed ranks with rank_offsets in device memory.
#include <algorithm>
#include <cmath>
#include <random>
#include <utility>

#include <loramix/adapter/domains.hpp>

#include "gpu/captured.cuh"
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

TEST_CASE("route on the device makes the decisions of forward, in a graph too, whatever the labels") {
  constexpr Index T = 23, sequences = 7;
  GpuHarness gpu;
  const lm::gpu::Backend be = gpu.backend();
  lm::Moa<float, device> moa({.d_in = 40, .d_out = 24, .experts = 3, .rank = 4, .places = 4});
  lm::gpu::copy(lm::VectorView<const float>(draw(moa.parameters().size, 1).data(), moa.parameters().size),
                moa.parameters());
  const lm::MatrixView<float, device> x{gpu.upload(draw(T * 40, 2)), T, 40}, y{gpu.upload(draw(T * 24, 3)), T, 24};
  lm::ForwardOptions<device> options;
  options.sequences =
      lm::Groups<device>::by_segment(gpu.upload(std::vector<Index>{0, 3, 3, 7, 12, 13, 20, T}), sequences);
  std::vector<std::int32_t> got(sequences, -7);
  std::int32_t* const ids = gpu.upload(got);
  auto reserve = gpu.arena(lm::reserve_bytes(moa, T));
  const auto work = gpu.arena(lm::workspace_bytes(be, moa, T));
  options.save = &reserve;
  const auto saved = lm::forward(be, moa, x, y, work, options);
  std::vector<std::int32_t> want(sequences);
  gpu.download(saved.scores.ids.data, want);
  options.labels = {gpu.upload(std::vector<std::int32_t>(sequences, 2)), sequences};
  const Graph graph(gpu.stream(), [&] { lm::route(be, moa, x, {ids, sequences}, work, options); });
  graph.launch(gpu.stream());
  gpu.download(ids, got);
  CHECK(got == want);
  CHECK(*std::max_element(want.begin(), want.end()) > *std::min_element(want.begin(), want.end()));
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
