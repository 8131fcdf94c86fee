// Adapters on tiles for bfloat16: the same bits whatever the threads and the batch. Not run where the machine has none.
#include <loramix/cpu/amx.hpp>

#include <cmath>

#include <loramix/adapter/mola.hpp>
#include <loramix/core/thread_pool.hpp>

#include "adapter/kinds.hpp"

namespace loramix_test {
namespace {

namespace cpu = lm::cpu;

bool has_tiles() {
  if (!cpu::request_amx()) MESSAGE("not run: this machine has no AMX, or its system does not lend it");
  return cpu::request_amx();
}

struct Step {
  lm::Matrix<lm::bfloat16> y, dx;
  std::vector<float> gradient;
};
template <class Backend>
Step step(const Backend& be, Index tokens, double dropout, Index d_in = 151, Index d_out = 133, Index rank = 11) {
  using A = lm::Mola<lm::Precision<lm::bfloat16, lm::bfloat16>>;
  Batch<A> b({.d_in = d_in, .d_out = d_out, .experts = 4, .rank = rank, .alpha = 3, .dropout = dropout}, tokens);
  Step out{b.zeros_y(), b.zeros_dx(), {}};
  auto grad = lm::zeros_like(b.adapter);
  lm::Buffer<std::byte> work(lm::workspace_bytes(be, b.adapter, tokens, lm::Pass::backward)),
      kept(lm::reserve_bytes(b.adapter, tokens));
  lm::Arena<> reserve{kept};
  auto saved =
      lm::forward(be, b.adapter, b.x.view(), out.y.view(), lm::Arena<>{work}, {.save = &reserve, .key = b.key});
  lm::backward(be, b.adapter, saved, b.x.view(), b.dy.view(), out.dx.view(), grad, lm::Arena<>{work});
  const auto flat = grad.parameters();
  for (Index i = 0; i < flat.size; ++i) out.gradient.push_back(lm::widen<float>(flat.data[i]));
  return out;
}

}  // namespace

TEST_CASE("tiles are taken by many tokens, and where they are granted") {
  cpu::AmxBackend be;
  CHECK(be.tiles(65) == cpu::request_amx());
  CHECK_FALSE(be.tiles(64));
  be.tuning.order = cpu::Order::fixed;
  CHECK(be.tiles(1) == cpu::request_amx());
  be.tuning.path = cpu::Path::composed;
  CHECK_FALSE(be.tiles(65));
  be = {};
  be.granted = false;
  CHECK_FALSE(be.tiles(65));
  const Step with = step(be, 70, 0.5), packets = step(cpu::Backend{}, 70, 0.5);
  CHECK(same_bits(with.y, packets.y));
  CHECK(same_bits(with.dx, packets.dx));
  CHECK(with.gradient == packets.gradient);
}

TEST_CASE("tiles: more tokens, columns and ranks than one job or one chunk holds, against packets") {
  if (!has_tiles()) return;
  for (const double dropout : {0.0, 0.5}) {
    const Step tiles = step(cpu::AmxBackend{}, 600, dropout, 617, 1098, 70);
    const Step packets = step(cpu::Backend{}, 600, dropout, 617, 1098, 70);
    double difference = 0, size = 0;
    for (std::size_t i = 0; i < packets.gradient.size(); ++i) {
      difference += std::pow(static_cast<double>(tiles.gradient[i]) - static_cast<double>(packets.gradient[i]), 2);
      size += std::pow(static_cast<double>(packets.gradient[i]), 2);
    }
    CHECK(size > 0);
    CHECK(difference <= 0x1p-14 * size);  // each loses at most 2⁻⁸ in storage; a chunk or job left out loses far more
  }
}

TEST_CASE("tiles: the same bits for 1, 2 and 3 threads") {
  if (!has_tiles()) return;
  for (const double dropout : {0.0, 0.5}) {
    const Step one = step(cpu::AmxBackend{}, 197, dropout);
    bool differs = false;
    for (const float v : one.gradient) differs = differs || v != 0;
    CHECK(differs);
    for (const int threads : {2, 3}) {
      lm::ThreadPool pool(threads);
      const Step more = step(cpu::AmxBackend{pool.executor()}, 197, dropout);
      CHECK(same_bits(one.y, more.y));
      CHECK(same_bits(one.dx, more.dx));
      CHECK(one.gradient == more.gradient);
    }
  }
}

TEST_CASE("tiles: a token's row does not depend on the batch it is in") {
  if (!has_tiles()) return;
  // The last 26 of 90 are copied, of 131 read where they lie: ranks in half a tile, one, two, and more, which are always copied.
  for (const Index rank : {3, 6, 13, 20}) {
    CAPTURE(rank);
    const Step small = step(cpu::AmxBackend{}, 90, 0.0, 151, 133, rank);
    const Step large = step(cpu::AmxBackend{}, 131, 0.0, 151, 133, rank);
    Index same = 0;
    for (Index t = 0; t < 90; ++t) {
      for (Index o = 0; o < 133; ++o) same += small.y(t, o).bits == large.y(t, o).bits;
    }
    CHECK(same == 90 * 133);
  }
}

TEST_CASE("tiles: memory for many tokens serves few, which take the packets") {
  cpu::AmxBackend<> be;
  be.granted = true;  // nothing runs: a workspace is a matter of sizes
  const lm::Mola<lm::Precision<lm::bfloat16, lm::bfloat16>> mola(
      {.d_in = 1024, .d_out = 1024, .experts = 8, .rank = 16});
  for (const lm::Pass pass : {lm::Pass::forward, lm::Pass::backward}) {
    const Index all = lm::workspace_bytes(be, mola, 100, pass);
    for (const Index few : {1, 4, 5, 10, 64, 65, 99}) CHECK(lm::workspace_bytes(be, mola, few, pass) <= all);
  }
}

}  // namespace loramix_test
