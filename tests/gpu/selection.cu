// Gates that close most ranks: what a tile of tokens has open nowhere is not read, and nothing else changes.
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <utility>

#include <loramix/adapter/explain.hpp>
#include <loramix/adapter/forward.hpp>
#include <loramix/adapter/mola.hpp>
#include <loramix/gate/gates.hpp>

#include "conformance/harness.hpp"
#include "gpu/forbidden_calls.hpp"
#include "gpu/harness.cuh"
#include "support/seed.hpp"

namespace lm = loramix;
using namespace loramix_test;
using lm::Index;

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

/// Four experts of 32 ranks, three segments of 70, 64 and 30 tokens; only experts 1 and 3 are asked for. What the others weigh
/// is NaN: any use of it would show.
template <class T>
struct Segments {
  static constexpr Index tokens = 164, d_in = 200, d_out = 72, rank = 32, experts = 4, ranks = rank * experts;
  struct Results {
    std::vector<float> u, du, dA, dB;
    std::vector<T> y, dx;
  };
  static bool used(Index j) { return j / rank % 2 == 1; }

  static Results run(GpuHarness& gpu, bool poisoned) {
    auto A = draw<T>(ranks * d_in, 1), B = draw<T>(ranks * d_out, 2);  // both rank by rank
    const T nan = lm::narrow<T>(std::numeric_limits<float>::quiet_NaN());
    for (Index j = 0; j < ranks; ++j) {
      for (Index c = 0; poisoned && !used(j) && c < d_in; ++c) A[static_cast<std::size_t>(j * d_in + c)] = nan;
      for (Index c = 0; poisoned && !used(j) && c < d_out; ++c) B[static_cast<std::size_t>(j * d_out + c)] = nan;
    }
    const std::vector<Index> offsets{0, 70, 134, tokens};
    const std::vector<std::int32_t> ids{1, 3, 1};
    lm::GateForm<float, device> gate;
    gate.tokens = tokens;
    gate.ranks = ranks;
    gate.experts = experts;
    gate.ids = {gpu.upload(ids), 3, 1};
    gate.id_groups = lm::Groups<device>::by_segment(gpu.upload(offsets), 3);
    Results r{std::vector<float>(tokens * ranks), std::vector<float>(tokens * ranks), std::vector<float>(ranks * d_in),
              std::vector<float>(ranks * d_out),  std::vector<T>(tokens * d_out),     std::vector<T>(tokens * d_in)};
    const lm::MatrixView<const T, device> a{gpu.upload(A), ranks, d_in},
        x{gpu.upload(draw<T>(tokens * d_in, 3)), tokens, d_in},
        dy{gpu.upload(draw<T>(tokens * d_out, 4)), tokens, d_out};
    const lm::MatrixView<const T, device, lm::Major::column> b{gpu.upload(B), d_out, ranks};
    const lm::MatrixView<float, device> u{gpu.upload(r.u), tokens, ranks}, du{gpu.upload(r.du), tokens, ranks},
        dA{gpu.upload(r.dA), ranks, d_in};
    const lm::MatrixView<float, device, lm::Major::column> dB{gpu.upload(r.dB), d_out, ranks};
    const lm::MatrixView<T, device> y{gpu.upload(r.y), tokens, d_out}, dx{gpu.upload(r.dx), tokens, d_in};
    loramix_test::run(gpu, lm::Shrink<T, T, float, float, device>{a, {}, x, {}, u, {}, gate});
    loramix_test::run(gpu,
                      lm::Expand<float, T, T, float, device, lm::Major::column>{u, gate, b, 1.5f, y, lm::Into::set});
    loramix_test::run(
        gpu, lm::ExpandBackward<float, T, T, float, float, device, lm::Major::column>{u, gate, b, 1.5f, dy, du, dB});
    loramix_test::run(gpu, lm::ShrinkBackward<T, T, float, float, float, device>{
                               a, {}, x, {}, du, {}, dA, {}, dx, lm::Into::add, lm::Into::set, gate});
    gpu.download(u.data, r.u);
    gpu.download(du.data, r.du);
    gpu.download(dA.data, r.dA);
    gpu.download(dB.data, r.dB);
    gpu.download(y.data, r.y);
    gpu.download(dx.data, r.dx);
    return r;
  }
};

template <class V>
bool same_bits(const V& a, const V& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0;
}

}  // namespace

TEST_CASE_TEMPLATE("one expert per segment: what no token of a tile asks for is not read", T, float, lm::bfloat16) {
  GpuHarness gpu;
  const auto want = Segments<T>::run(gpu, false);
  const auto got = Segments<T>::run(gpu, true);
  CHECK(same_bits(got.y, want.y));
  CHECK(same_bits(got.dx, want.dx));
  CHECK(same_bits(got.dA, want.dA));
  CHECK(same_bits(got.dB, want.dB));
  CHECK(same_bits(got.u, want.u));
  CHECK(same_bits(got.du, want.du));
  Index zeros = 0, others = 0;
  for (Index j = 0; j < Segments<T>::ranks; ++j) {
    const float of_A = want.dA[static_cast<std::size_t>(j * Segments<T>::d_in)],
                of_B = want.dB[static_cast<std::size_t>(j * Segments<T>::d_out)];
    (Segments<T>::used(j) ? others : zeros) +=
        (of_A == 0) == !Segments<T>::used(j) && (of_B == 0) == !Segments<T>::used(j);
  }
  CHECK(zeros == Segments<T>::ranks / 2);
  CHECK(others == Segments<T>::ranks / 2);
  CHECK(gpu.release());
}

namespace {

/// A top-2 mixture of more ranks than are dense.
struct Grouped {
  using T = lm::bfloat16;
  using Adapter = lm::Mola<T>::rebind<T, device>;
  static constexpr Index tokens = 70, d_in = 96, d_out = 72;
  struct Run {
    std::vector<T> y, dx;
    std::vector<float> gradient;
    int forward, backward;
  };

  GpuHarness gpu;
  Adapter adapter;
  std::vector<T> x = draw<T>(tokens * d_in, 8), dy = draw<T>(tokens * d_out, 9);

  Grouped(Index experts, Index rank)
      : adapter({.d_in = d_in, .d_out = d_out, .experts = experts, .rank = rank, .alpha = 16, .dropout = 0.25}) {
    const auto values = draw<T>(adapter.parameters().size, 7);
    lm::gpu::copy(lm::VectorView<const T>(values.data(), adapter.parameters().size), adapter.parameters());
  }
  Run run(const lm::gpu::Tuning& tuning) {
    gpu.tuning = tuning;
    const lm::gpu::Backend be = gpu.backend();
    auto gradient = lm::zeros_like(adapter);
    Run r{std::vector<T>(tokens * d_out), std::vector<T>(tokens * d_in),
          std::vector<float>(static_cast<std::size_t>(gradient.parameters().size)), 0, 0};
    const lm::MatrixView<const T, device> in{gpu.upload(x), tokens, d_in}, out{gpu.upload(dy), tokens, d_out};
    const lm::MatrixView<T, device> y{gpu.upload(r.y), tokens, d_out}, dx{gpu.upload(r.dx), tokens, d_in};
    const auto work = gpu.arena(lm::workspace_bytes(be, adapter, tokens, lm::Pass::backward));
    auto reserve = gpu.arena(lm::reserve_bytes(adapter, tokens));
    const int start = launches();
    auto saved = lm::forward(be, adapter, in, y, work, {.save = &reserve, .key = {.seed = 3}});
    r.forward = launches() - start;
    lm::backward(be, adapter, saved, in, out, dx, gradient, work);
    r.backward = launches() - start - r.forward;
    gpu.download(y.data, r.y);
    gpu.download(dx.data, r.dx);
    gpu.download(gradient.parameters().data, r.gradient);
    return r;
  }
};

}  // namespace

TEST_CASE("more ranks than are dense: the router first, one launch more, grouped by expert, the same numbers") {
  for (const auto& [experts, rank] : {std::pair<Index, Index>{33, 8}, {20, 32}}) {
    CAPTURE(experts);
    Grouped test(experts, rank);
    const auto shared = test.run({.machine = {.multiprocessors = 1000}, .block_bytes = 1});  // sums, among blocks
    const auto dense = test.run({.dense_ranks = 1000}), grouped = test.run({}), composed = test.run({.fused = false});
    const auto path = [&] { return std::string(lm::explain(test.gpu.backend(), test.adapter, 70).facts.path); };
    CHECK(path().find("composed") != std::string::npos);
    test.gpu.tuning = {};
    CHECK(path().find("grouped") != std::string::npos);
    test.gpu.tuning.dense_ranks = 1000;
    CHECK(path().find("grouped") == std::string::npos);
    CHECK(dense.forward == 2);
    CHECK(grouped.forward == 3);
    CHECK(dense.backward == 4);
    CHECK(grouped.backward == 4);
    // The router's rows are summed by themselves, in another order: weights and their gradients differ by some 96 roundings, what
    // is stored in 16 bits by one more.
    const auto check_near = [](const auto& got, const auto& want, double rounding) {
      double largest = 0, worst = 0;
      for (std::size_t i = 0; i < want.size(); ++i) {
        const double w = static_cast<double>(lm::widen<float>(want[i])),
                     g = static_cast<double>(lm::widen<float>(got[i]));
        largest = std::fmax(largest, std::abs(w));
        const double off = std::abs(g - w) - rounding * std::abs(w);
        if (!(off <= worst)) worst = off;
      }
      CHECK(largest > 0.1);
      CHECK(worst <= 96 * 0x1p-22 * largest);
    };
    for (const Grouped::Run* want : {&dense, &composed}) {
      for (const Grouped::Run* got : {&grouped, &shared}) {
        check_near(got->y, want->y, 0x1p-7);
        check_near(got->dx, want->dx, 0x1p-7);
        check_near(got->gradient, want->gradient, 0);
      }
    }
    CHECK(test.gpu.release());
  }
}

TEST_CASE("grouped by expert, what other tokens choose changes no bit of a token") {
  for (const auto& [experts, rank] : {std::pair<Index, Index>{33, 8}, {20, 32}}) {
    CAPTURE(experts);
    Grouped test(experts, rank);
    const auto before = test.run({});
    const auto others = draw<Grouped::T>(Grouped::tokens * Grouped::d_in, 18);
    const auto kept = [](Index t) { return t % 5 == 2; };
    for (Index i = 0; i < Grouped::tokens * Grouped::d_in; ++i) {
      if (!kept(i / Grouped::d_in)) test.x[static_cast<std::size_t>(i)] = others[static_cast<std::size_t>(i)];
    }
    const auto after = test.run({});
    Index different = 0;
    for (Index i = 0; i < Grouped::tokens * Grouped::d_out; ++i) {
      const bool same = before.y[static_cast<std::size_t>(i)] == after.y[static_cast<std::size_t>(i)];
      if (kept(i / Grouped::d_out)) CHECK(same);
      different += !same;
    }
    for (Index i = 0; i < Grouped::tokens * Grouped::d_in; ++i) {
      if (kept(i / Grouped::d_in))
        CHECK(before.dx[static_cast<std::size_t>(i)] == after.dx[static_cast<std::size_t>(i)]);
    }
    CHECK(different > Grouped::tokens * Grouped::d_out / 2);
    const auto again = test.run({});
    CHECK(same_bits(again.y, after.y));
    CHECK(same_bits(again.dx, after.dx));
    CHECK(same_bits(again.gradient, after.gradient));
    CHECK(test.gpu.release());
  }
}
