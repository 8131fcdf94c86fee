// Row operations of any length, and token sums in the order that ops/column_sum.hpp promises, bit by bit.
#include <random>

#include "conformance/tensor.hpp"
#include "gpu/harness.cuh"
#include "support/seed.hpp"

namespace lm = loramix;
using namespace loramix_test;

namespace {

/// out[t] += the sum of 0 … t mod 5.
struct SumOfFew {
  lm::VectorView<int, lm::Space::device> out;
  template <lm::Team Tm>
  LORAMIX_HD void operator()(const Tm& team, lm::Index t) const {
    const int sum = static_cast<int>(team.sum(t % 5 + 1, [](lm::Index i) { return i; }));
    team.once([&] { out[t] += sum; });
  }
};

std::vector<float> random_values(Index n, std::uint64_t site) {
  std::mt19937_64 random(seed(site));
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<float> values(static_cast<std::size_t>(n));
  for (float& v : values) v = uniform(random);
  return values;
}

/// Σ over the tokens that `member` accepts: chunks of 256 tokens by themselves, then added in order.
template <class Member>
float chunked_sum(const std::vector<float>& values, Index tokens, Index cols, Index c, const Member& member) {
  float total = 0;
  for (Index begin = 0; begin < tokens; begin += 256) {
    float chunk = 0;
    for (Index t = begin; t < tokens && t < begin + 256; ++t) {
      if (member(t)) chunk += values[static_cast<std::size_t>(t * cols + c)];
    }
    total += chunk;
  }
  return total;
}

template <class Member>
void check_column_sum(GpuHarness& gpu, const lm::Groups<lm::Space::device>& groups, Index out_rows, Index tokens,
                      lm::Into into, const Member& member) {
  constexpr Index cols = 37;
  const std::vector<float> values = random_values(tokens * cols, 3);
  const std::vector<float> before = random_values(out_rows * cols, 4);
  float* const out = gpu.upload(before);
  lm::execute(gpu.backend(),
              lm::ColumnSum<float, float, lm::Space::device>{
                  {gpu.upload(values), tokens, cols}, groups, {out, out_rows, cols}, into},
              lm::Arena<lm::Space::device>{});
  std::vector<float> after(before.size());
  gpu.download(out, after);
  for (Index g = 0; g < out_rows; ++g) {
    for (Index c = 0; c < cols; ++c) {
      const std::size_t cell = static_cast<std::size_t>(g * cols + c);
      const float sum = chunked_sum(values, tokens, cols, c, [&](Index t) { return member(g, t); });
      CHECK_MESSAGE(after[cell] == (into == lm::Into::add ? before[cell] + sum : sum), "group ", g, " column ", c);
    }
  }
}

}  // namespace

TEST_CASE("a body runs once for every row") {
  GpuHarness gpu;
  // The last number is more than the grid has warps: teams take several rows.
  for (Index rows : {0, 1, 3, 4, 129, 262200}) {
    CAPTURE(rows);
    lm::Buffer<int, lm::Space::device> out(rows);
    lm::for_rows<lm::Space::device>(gpu.backend(), rows, SumOfFew{out.view()});
    gpu.wait();
    lm::Buffer<int> host(rows);
    lm::gpu::copy(out.view(), host.view());
    Index wrong = 0;
    for (Index t = 0; t < rows; ++t) wrong += host[t] != (t % 5) * (t % 5 + 1) / 2;
    CHECK(wrong == 0);
  }
}

TEST_CASE("token sums are chunks added in order") {
  GpuHarness gpu;
  using Groups = lm::Groups<lm::Space::device>;
  for (const lm::Into into : {lm::Into::add, lm::Into::set}) {
    for (const Index tokens : {0, 1, 255, 256, 700}) {
      CAPTURE(tokens);
      check_column_sum(gpu, Groups{}, 1, tokens, into, [](Index, Index) { return true; });

      std::vector<std::int32_t> ids(static_cast<std::size_t>(tokens));
      for (std::size_t t = 0; t < ids.size(); ++t) ids[t] = static_cast<std::int32_t>(t * 7 % 6) - 1;  // 4 is bad
      check_column_sum(gpu, Groups::by_id(gpu.upload(ids), 4), 4, tokens, into,
                       [&](Index g, Index t) { return ids[static_cast<std::size_t>(t)] == g; });

      const std::vector<Index> offsets{0, tokens / 3, tokens / 3, tokens};
      check_column_sum(gpu, Groups::by_segment(gpu.upload(offsets), 3), 3, tokens, into, [&](Index g, Index t) {
        return offsets[static_cast<std::size_t>(g)] <= t && t < offsets[static_cast<std::size_t>(g) + 1];
      });
      CHECK(gpu.release());
    }
  }
}

TEST_CASE("segments that leave the batch are cut off") {
  GpuHarness gpu;
  const std::vector<Index> offsets{-5, 2, 1 << 20};
  check_column_sum(gpu, lm::Groups<lm::Space::device>::by_segment(gpu.upload(offsets), 2), 2, 5, lm::Into::set,
                   [](Index g, Index t) { return g == 0 ? t < 2 : t >= 2; });
  CHECK(gpu.release());
}
