// The optimisers and clipping on the device: the row bodies of train/ by warps, against the same bodies on the host.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include <loramix/adapter/lora.hpp>
#include <loramix/adapter/team_lora.hpp>
#include <loramix/train/adamw.hpp>
#include <loramix/train/sgd.hpp>

#include "gpu/forbidden_calls.hpp"
#include "gpu/harness.cuh"
#include "support/seed.hpp"

namespace lm = loramix;
using namespace loramix_test;
using lm::Index, lm::Space;

namespace {

/// Runs row bodies on the host: what cpu/rows.hpp does, without the headers that a .cu may not include.
struct HostRows {};
template <class Body>
Index scratch_impl(const HostRows&, const lm::Rows<Body, Space::host>&) {
  return 0;
}
template <class Body>
void execute_impl(const HostRows&, const lm::Rows<Body, Space::host>& op, lm::Arena<>) {
  for (Index t = 0; t < op.rows; ++t) op.body(lm::SerialTeam{}, t);
}

template <class T>
std::vector<T> normals(Index n, std::uint64_t site) {
  std::mt19937_64 random(seed(site));
  std::normal_distribution<float> normal;
  std::vector<T> values(static_cast<std::size_t>(n));
  for (T& v : values) v = lm::narrow<T>(normal(random));
  return values;
}

template <class T>
void copy_in(const std::vector<T>& from, lm::VectorView<T, Space::device> to) {
  lm::gpu::copy(lm::VectorView<const T>(from.data(), to.size), to);
}
template <class T>
std::vector<T> copy_out(lm::VectorView<T, Space::device> from) {
  std::vector<T> to(static_cast<std::size_t>(from.size));
  lm::gpu::copy(from, lm::VectorView<T>(to.data(), from.size));
  return to;
}

/// The device multiplies and adds in one rounding where the host rounds twice.
template <class W>
bool close(W a, W b) {
  const float x = lm::narrow<float>(a), y = lm::narrow<float>(b);
  return std::abs(x - y) <= (lm::is_16bit<W> ? 0x1p-7f : 1e-5f) * std::abs(y) + 1e-6f;
}

template <class W, template <class> class Optimiser, class Options>
void check_steps(const Options& options) {
  using Host = lm::Lora<W>;
  using Device = lm::Lora<W, Space::device>;
  GpuHarness gpu;
  const lm::LoraConfig config{.d_in = 90, .d_out = 41, .rank = 5};
  Host host(config);
  Device device(config);
  const Index n = host.parameters().size;
  const std::vector<W> start = normals<W>(n, 1);
  std::copy_n(start.data(), n, host.parameters().data);
  copy_in(start, device.parameters());
  auto host_gradient = lm::zeros_like(host);
  auto gradient = lm::zeros_like(device);
  Optimiser<Host> host_optimiser(host, options);
  Optimiser<Device> optimiser(device, options);
  for (std::uint64_t t = 0; t < 5; ++t) {
    const std::vector<float> g = normals<float>(n, 10 + t);
    std::copy_n(g.data(), n, host_gradient.parameters().data);
    copy_in(g, gradient.parameters());
    host_optimiser.step(HostRows{}, host, host_gradient);
    optimiser.step(gpu.backend(), device, gradient);
    gpu.wait();
  }
  const std::vector<W> got = copy_out(device.parameters());
  int wrong = 0, moved = 0;
  for (Index i = 0; i < n; ++i) {
    wrong += !close(got[static_cast<std::size_t>(i)], host.parameters()[i]);
    moved += !(got[static_cast<std::size_t>(i)] == start[static_cast<std::size_t>(i)]);
  }
  CHECK(wrong == 0);
  CHECK(moved > n / 2);
  CHECK(gpu.release());
}

}  // namespace

TEST_CASE_TEMPLATE("AdamW and SGD step on the device as on the host", W, float, lm::bfloat16) {
  check_steps<W, lm::AdamW>(lm::AdamWOptions{.lr = 1e-2, .weight_decay = 0.1, .groups = {{"B", {.lr_ratio = 4}}}});
  check_steps<W, lm::Sgd>(lm::SgdOptions{.lr = 1e-2, .momentum = 0.9, .weight_decay = 0.1});
}

TEST_CASE("AdamW on the device is one launch, whatever groups an adapter has") {
  GpuHarness gpu;
  using Team = lm::TeamLora<lm::bfloat16, Space::device>;
  Team team({.d_in = 40, .d_out = 24, .experts = 3, .rank = 2});
  const auto gradient = lm::zeros_like(team);
  lm::AdamW optimiser(team, lm::AdamWOptions{.weight_decay = 0.1, .groups = {{"B", {.lr_ratio = 4}}}});
  const int before = launches();
  optimiser.step(gpu.backend(), team, gradient);
  CHECK(launches() - before == 1);
  gpu.wait();
  CHECK(gpu.release());
}

TEST_CASE("clip_norm on the device: the norm, the scaling, and a guard that needs no synchronisation") {
  GpuHarness gpu;
  using View = lm::VectorView<float, Space::device>;
  const auto be = gpu.backend();
  std::vector<float> a = normals<float>(70'001, 1), b = normals<float>(255, 2);
  double squares = 0;
  for (const float v : a) squares += static_cast<double>(v) * v;
  for (const float v : b) squares += static_cast<double>(v) * v;
  const Index na = static_cast<Index>(a.size()), nb = static_cast<Index>(b.size());
  const auto clip = [&](double max_norm, std::vector<float>& first, std::vector<float>& second) {
    const View views[] = {{gpu.upload(first), na}, {gpu.upload(second), nb}};
    lm::Clip* const result = gpu.upload(std::vector<lm::Clip>(1));
    lm::clip_norm(be, std::span<const View>(views), max_norm, {result, 1}, gpu.arena(lm::clip_bytes<Space::device>()));
    std::vector<float> w(static_cast<std::size_t>(nb), 1.0f), m(w.size()), v(w.size());
    float* const weights = gpu.upload(w);
    lm::adamw_step(be, View{weights, nb}, views[1], View{gpu.upload(m), nb}, View{gpu.upload(v), nb}, {.lr = 0.5}, {},
                   result);
    std::vector<lm::Clip> found(1);
    gpu.download(result, found);
    gpu.download(views[0].data, first);
    gpu.download(views[1].data, second);
    gpu.download(weights, w);
    return std::pair(found[0], w[0] != 1.0f);
  };

  std::vector<float> a_cut = a, b_cut = b;
  const auto [cut, stepped] = clip(1.5, a_cut, b_cut);
  CHECK(cut.finite);
  CHECK(stepped);
  CHECK(std::abs(cut.norm - std::sqrt(squares)) <= 1e-12 * cut.norm);
  CHECK(std::abs(cut.scale - 1.5 / cut.norm) <= 1e-15);
  int wrong = 0;
  for (std::size_t i = 0; i < a.size(); ++i)
    wrong += a_cut[i] != static_cast<float>(cut.scale * static_cast<double>(a[i]));
  for (std::size_t i = 0; i < b.size(); ++i)
    wrong += b_cut[i] != static_cast<float>(cut.scale * static_cast<double>(b[i]));
  CHECK(wrong == 0);

  b[254] = std::numeric_limits<float>::infinity();
  std::vector<float> a_kept = a, b_kept = b;
  const auto [bad, stepped_anyway] = clip(1.5, a_kept, b_kept);
  CHECK(!bad.finite);
  CHECK(!stepped_anyway);
  CHECK(a_kept == a);
  CHECK(b_kept == b);

  float* const g = gpu.upload(a);
  lm::zero(be, View{g, na});
  gpu.download(g, a);
  CHECK(a == std::vector<float>(a.size()));
  CHECK(gpu.release());
}
