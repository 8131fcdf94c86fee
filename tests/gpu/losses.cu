// Losses, telemetry and rank-space Shapley values on the device: the same bodies by warps, against the bodies on the host
// (tests/ops/losses.cpp holds those against literal sums) and, for Shapley, against sums over outputs.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include <loramix/adapter/mola.hpp>
#include <loramix/ops/losses.hpp>
#include <loramix/ops/shapley.hpp>

#include "gpu/harness.cuh"
#include "support/seed.hpp"

namespace lm = loramix;
using namespace loramix_test;
using lm::Index, lm::Space;

namespace {

/// Runs row bodies and column sums on the host: what cpu/rows.hpp does, without the headers a .cu may not include.
struct HostRows {};
template <class Body>
Index scratch_impl(const HostRows&, const lm::Rows<Body, Space::host>&) {
  return 0;
}
template <class Body>
void execute_impl(const HostRows&, const lm::Rows<Body, Space::host>& op, lm::Arena<>) {
  for (Index t = 0; t < op.rows; ++t) op.body(lm::SerialTeam{}, t);
}
template <class Acc, class Out>
[[maybe_unused]] Index scratch_impl(const HostRows&, const lm::ColumnSum<Acc, Out, Space::host>&) {
  return 0;
}
template <class Acc, class Out>
void execute_impl(const HostRows&, const lm::ColumnSum<Acc, Out, Space::host>& op, lm::Arena<>) {
  for (Index g = 0; g < op.out.rows; ++g) {
    for (Index c = 0; c < op.out.cols; ++c) op.template block<1>(g, c, 1);
  }
}

/// Memory of either side: `keep` puts values there, `read` takes them back.
struct HostSide {
  static constexpr Space space = Space::host;
  HostRows backend() const { return {}; }
  template <class T>
  T* keep(const std::vector<T>& values) {
    return static_cast<T*>(std::memcpy(take(values.size() * sizeof(T)), values.data(), values.size() * sizeof(T)));
  }
  template <class T>
  void read(const T* from, std::vector<T>& values) const {
    std::copy_n(from, values.size(), values.begin());
  }
  lm::Arena<> work(Index bytes) { return {take(static_cast<std::size_t>(bytes)), bytes}; }
  void* take(std::size_t bytes) {
    memory.emplace_back(bytes + 8);
    return memory.back().data();
  }
  std::vector<std::vector<std::byte>> memory;
};
struct DeviceSide {
  static constexpr Space space = Space::device;
  lm::gpu::Backend backend() { return gpu.backend(); }
  template <class T>
  T* keep(const std::vector<T>& values) {
    return gpu.upload(values);
  }
  template <class T>
  void read(const T* from, std::vector<T>& values) {
    gpu.download(from, values);
  }
  lm::Arena<space> work(Index bytes) { return gpu.arena(bytes); }
  GpuHarness gpu;
};

constexpr Index T = 70, E = 5, d = 9, tasks = 3;

std::vector<float> random_values(Index n, std::uint64_t site) {
  std::mt19937_64 random(seed(site));
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<float> values(static_cast<std::size_t>(n));
  for (float& v : values) v = uniform(random);
  return values;
}

/// Every loss in turn: its value, then what all of them added.
template <class Side>
std::vector<float> all_losses(Side& side) {
  constexpr Space S = Side::space;
  std::vector<float> logits = random_values(T * E, 480), p(logits.size()), zeros(logits.size());
  std::vector<std::int32_t> chosen, labels, types{1, 0, 1};
  std::vector<std::uint8_t> valid;
  const float bad = std::numeric_limits<float>::quiet_NaN();
  for (std::size_t t = 0; t < T; ++t) {
    float sum = 0;
    for (std::size_t e = 0; e < E; ++e) sum += std::exp(logits[t * E + e]);
    for (std::size_t e = 0; e < E; ++e) p[t * E + e] = std::exp(logits[t * E + e]) / sum;
    valid.push_back(t % 7 != 3);
    if (t % 7 == 3) p[t * E] = logits[t * E] = bad;
    for (std::size_t s = 0; s < 2; ++s) chosen.push_back(static_cast<std::int32_t>((t * t + 3 * s) % E));
    labels.push_back(static_cast<std::int32_t>(t % 4) - 1);
  }
  const auto matrix = [&](const std::vector<float>& v, Index rows, Index cols) {
    return lm::MatrixView<float, S>{side.keep(v), rows, cols};
  };
  const lm::MatrixView<float, S> dp = matrix(zeros, T, E), dlogits = matrix(zeros, T, E), phi = matrix(logits, T, E);
  lm::Scores<float, S> scores{.logits = matrix(logits, T, E), .p = matrix(p, T, E), .dlogits = dlogits, .dp = dp};
  scores.chosen = {side.keep(chosen), T, 2};
  scores.valid = {side.keep(valid), T};
  const auto sequences = lm::Groups<S>::by_segment(side.keep(std::vector<Index>{0, 20, 21, T}), 3);
  const lm::VectorView<const std::int32_t, S> label{side.keep(labels), T}, type{side.keep(types), 3};
  const auto x = matrix(random_values(T * d, 481), T, d), e = matrix(random_values(tasks * d, 482), tasks, d),
             other = matrix(random_values(T * d, 483), T, d), dx = matrix(std::vector<float>(T * d), T, d),
             de = matrix(std::vector<float>(tasks * d), tasks, d);

  std::vector<float> out;
  float* const values = side.keep(std::vector<float>(10, bad));
  Index next = 0;
  const auto place = [&] { return lm::VectorView<float, S>{values + next++, 1}; };
  const auto work =
      side.work(lm::loss_workspace_bytes<float, S>(T, d, 3) + lm::contrastive_workspace_bytes<float, S>(3, tasks, d));
  const auto be = side.backend();
  lm::balance_loss(be, scores, {.form = lm::Balance::mixtral, .weight = 2, .value = place()}, work);
  lm::balance_loss(be, scores, {.form = lm::Balance::importance_cv2, .weight = 30, .value = place()}, work);
  lm::localised_loss(be, scores, {.weight = 3, .types = type, .sequences = sequences, .value = place()}, work);
  lm::sequence_balance_loss(be, scores, {.sequences = sequences, .value = place()}, work);
  lm::z_loss(be, scores, {.weight = 0.5, .value = place()}, work);
  lm::routing_loss(be, scores, {.labels = label, .value = place()}, work);
  lm::cross_entropy_loss(be, scores.logits, label, dlogits, {.valid = scores.valid, .value = place()}, work);
  lm::squared_error_loss(be, x, other, dx, {.valid = scores.valid, .value = place()}, work);
  lm::contrastive_loss(
      be, x, e, type, dx, de,
      {.temperature = 0.3, .mean = true, .sequences = sequences, .valid = scores.valid, .value = place()}, work);
  lm::shapley_loss(be, scores, phi, {.weight = 2, .value = place()}, work);
  lm::RouterTelemetry<float, S> seen(E);
  lm::telemetry(be, scores, seen, work);
  const auto append = [&](const float* from, Index n) {
    std::vector<float> part(static_cast<std::size_t>(n));
    side.read(from, part);
    out.insert(out.end(), part.begin(), part.end());
  };
  append(values, next);
  append(dp.data, T * E);
  append(dlogits.data, T * E);
  append(dx.data, T * d);
  append(de.data, tasks * d);
  append(seen.values().data, 2 * E + 7);
  return out;
}

}  // namespace

TEST_CASE("losses and telemetry are the host's, values in device memory") {
  HostSide host;
  DeviceSide device;
  const std::vector<float> want = all_losses(host), got = all_losses(device);
  REQUIRE(got.size() == want.size());
  int wrong = 0, zeros = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    wrong += !(std::abs(got[i] - want[i]) <= 1e-5f * std::abs(want[i]) + 1e-6f);
    zeros += want[i] == 0;
  }
  CHECK(wrong == 0);
  CHECK(zeros < 250);  // masked rows, and what no loss reads
  for (std::size_t i = 0; i < 10; ++i) CHECK_MESSAGE(want[i] > 0, i);
  CHECK(device.gpu.release());
}

TEST_CASE("rank-space Shapley values are those of the outputs") {
  GpuHarness gpu;
  constexpr Index tokens = 7, ranks = 6, experts = 3, d_out = 10;
  const auto u = random_values(tokens * ranks, 490), B = random_values(ranks * d_out, 491),
             q = random_values(tokens * d_out, 492), g = random_values(tokens * experts, 493);
  const auto at = [](const std::vector<float>& v, Index i) {
    return static_cast<double>(v[static_cast<std::size_t>(i)]);
  };
  lm::GateForm<float, Space::device> form =
      lm::TokenExperts<float, Space::device>{{gpu.upload(g), tokens, experts}}.form(tokens, ranks);
  const lm::MatrixView<const float, Space::device, lm::Major::column> up{gpu.upload(B), d_out, ranks};
  const lm::MatrixView<const float, Space::device> target{gpu.upload(q), tokens, d_out},
      rows{gpu.upload(u), tokens, ranks};
  const lm::MatrixView<float, Space::device> phi{gpu.upload(std::vector<float>(tokens * experts)), tokens, experts};
  lm::shapley_rows(gpu.backend(), rows, form, up, 2.0, target, -1.0, phi,
                   gpu.arena(lm::shapley_scratch_bytes<float>(gpu.backend(), up, target)));
  std::vector<float> got(tokens * experts);
  gpu.download(phi.data, got);
  for (Index t = 0; t < tokens; ++t) {
    for (Index e = 0; e < experts; ++e) {
      double want = 0;
      for (Index o = 0; o < d_out; ++o) {
        double all = 0, own = 0;
        for (Index j = 0; j < ranks; ++j) {
          const double h = 2 * at(g, t * experts + j / 2) * at(u, t * ranks + j) * at(B, j * d_out + o);
          all += h;
          own += j / 2 == e ? h : 0;
        }
        want += own * (2 * -at(q, t * d_out + o) - all);
      }
      CHECK(std::abs(at(got, t * experts + e) - want) <= 1e-4);
    }
  }
  CHECK(gpu.release());
}
