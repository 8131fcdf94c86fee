// Memory: sizes are exact, monotone and independent of data; a training step allocates nothing; one reserve serves
// many layers; one adapter serves many threads.
#include <atomic>
#include <thread>

#include "adapter/kinds.hpp"
#include "support/allocations.hpp"

#include <loramix/train/adamw.hpp>

namespace loramix_test {
namespace {

TEST_CASE_TEMPLATE("size queries grow with the tokens and do not look at the data", K, LORAMIX_TEST_KINDS(float)) {
  using A = typename K::Adapter;
  const lm::cpu::Backend be;
  A adapter(K::config()), poisoned(K::config());
  poison(poisoned);
  Index last[4] = {};
  for (const Index tokens : {0, 1, 2, 3, 5, 17, 63, 64, 65, 128, 1000, 4096, 100000}) {
    const auto sizes = [&](const A& a) {
      return std::vector<Index>{lm::workspace_bytes(be, a, tokens),
                                lm::workspace_bytes(be, a, tokens, lm::Pass::backward), lm::reserve_bytes(a, tokens),
                                lm::reserve_bytes(a, tokens, lm::Keep::recompute)};
    };
    const auto now = sizes(adapter);
    CHECK(now == sizes(poisoned));
    for (std::size_t i = 0; i < 4; ++i) {
      CHECK(now[i] >= last[i]);
      last[i] = now[i];
    }
  }
  CHECK(last[0] > 0);
  CHECK(last[1] > last[0]);
  CHECK(last[3] <= last[2]);
  check_error(lm::ErrorCode::value, {"workspace_bytes", "tokens", "-1"}, [&] { lm::workspace_bytes(be, adapter, -1); });
}

/// A step at `tokens` in memory sized for `most` tokens, at every alignment.
TEST_CASE_TEMPLATE("memory of exactly the size asked for is enough, at any address, for fewer tokens too", K,
                   LORAMIX_TEST_KINDS(float)) {
  using A = typename K::Adapter;
  Batch<A> b(K::config(), 70);
  const lm::cpu::Backend be;
  const Index forward = lm::workspace_bytes(be, b.adapter, 70);
  const Index backward = lm::workspace_bytes(be, b.adapter, 70, lm::Pass::backward);
  for (const lm::Keep keep : {lm::Keep::z, lm::Keep::recompute}) {
    const Index kept = lm::reserve_bytes(b.adapter, 70, keep);
    for (const Index tokens : {70, 64, 1}) {
      for (const Index shift : {0, 1, 63}) {
        std::vector<std::byte> f(static_cast<std::size_t>(forward + shift + 1), std::byte{0xff});
        std::vector<std::byte> g(static_cast<std::size_t>(backward + shift + 1), std::byte{0xff});
        std::vector<std::byte> k(static_cast<std::size_t>(kept + shift + 1), std::byte{0xff});
        lm::Arena<> reserve{k.data() + shift, kept};
        const auto x = lm::MatrixView<const float>(b.x).row_range(0, tokens);
        const auto dy = lm::MatrixView<const float>(b.dy).row_range(0, tokens);
        lm::Matrix<float> y(tokens, K::config().d_out), dx(tokens, K::config().d_in), want = y;
        auto grad = lm::zeros_like(b.adapter);
        auto saved = lm::forward(be, b.adapter, x, y, {f.data() + shift, forward},
                                 {.save = &reserve, .key = b.key, .keep = keep});
        lm::backward(be, b.adapter, saved, x, dy, dx, grad, {g.data() + shift, backward});
        lm::forward(be, b.adapter, x, want, b.work.arena(), {.key = b.key});
        REQUIRE(same_bits(y, want));
        for (const auto* bytes : {&f, &g, &k}) REQUIRE(bytes->back() == std::byte{0xff});
        if (tokens == 70) CHECK(reserve.used() == (kept == 0 ? 0 : kept - 64));
      }
    }
  }
}

TEST_CASE_TEMPLATE("a training step allocates nothing", K, LORAMIX_TEST_KINDS(float), LoraKind<lm::bfloat16>,
                   FusedKind<lm::bfloat16>, MixtureKind<double>) {
  using A = typename K::Adapter;
  using X = typename A::precision::activation;
  Batch<A> b(K::config(), 200);
  auto y = b.zeros_y(), dx = b.zeros_dx();
  auto grad = lm::zeros_like(b.adapter);
  lm::ThreadPool pool(2);
  const lm::cpu::Backend be{pool.executor()};
  Memory work(lm::workspace_bytes(be, b.adapter, 200, lm::Pass::backward) + lm::workspace_bytes(be, b.adapter, 200));
  lm::AdamW opt(b.adapter, {.lr = 1e-3, .weight_decay = 0.1, .groups = {{"B", {.lr_ratio = 16}}}});
  const auto step = [&] {
    lm::Arena<> reserve = b.memory.arena();
    auto saved = lm::forward(be, b.adapter, b.x, y, work.arena(), {.save = &reserve, .key = b.key});
    lm::backward(be, b.adapter, saved, lm::MatrixView<const X>(b.x), b.dy, dx, grad, work.arena());
    if (lm::clip_norm(be, grad, 1.0).finite) opt.step(be, b.adapter, grad);
    lm::zero(be, grad);
  };
  const auto packed = lm::prepack(be, b.adapter);
  step();
  const Index before = allocations();
  step();
  lm::forward(be, packed, b.x, y, work.arena());
  lm::workspace_bytes(be, b.adapter, 200);
  CHECK(allocations() == before);
  { Memory one(1); }
  CHECK(allocations() > before);  // the count counts
}

TEST_CASE("layers share one reserve, and run backward in reverse") {
  constexpr Index tokens = 9, layers = 3;
  using A = lm::Lora<double>;
  const lm::LoraConfig config{.d_in = 13, .d_out = 13, .rank = 5, .dropout = 0.5};
  const lm::cpu::Backend be;
  Random random(1);
  std::vector<A> adapters(layers, A(config));
  std::vector<lm::Matrix<double>> x;
  for (A& adapter : adapters) fill_parameters(adapter, random);
  for (Index i = 0; i <= layers; ++i) x.push_back(random_matrix<double>(tokens, 13, random));
  Memory work(2 * lm::workspace_bytes(be, adapters[0], tokens, lm::Pass::backward));

  const auto gradients = [&](bool shared) {
    Memory memory(layers * lm::reserve_bytes(adapters[0], tokens));
    lm::Arena<> reserve = memory.arena();
    std::vector<Memory> own(layers, Memory(lm::reserve_bytes(adapters[0], tokens)));
    std::vector<lm::Arena<>> arenas;
    for (Memory& m : own) arenas.push_back(m.arena());
    std::vector<lm::Saved<A>> saved;
    for (std::size_t i = 0; i < layers; ++i) {
      lm::Matrix<double> y(tokens, 13);
      saved.push_back(lm::forward(be, adapters[i], x[i], y, work.arena(),
                                  {.save = shared ? &reserve : &arenas[i], .key = {.seed = 1, .site = i}}));
    }
    std::vector<lm::gradient_t<A>> grads;
    for (std::size_t i = layers; i-- > 0;) {
      grads.push_back(lm::zeros_like(adapters[i]));
      lm::backward(be, adapters[i], saved[i], x[i], x[layers], {}, grads.back(), work.arena());
    }
    return grads;
  };
  const auto shared = gradients(true), alone = gradients(false);
  for (std::size_t i = 0; i < layers; ++i) CHECK(same_parameters(shared[i], alone[i]));
  CHECK_FALSE(same_parameters(shared[0], shared[1]));
}

TEST_CASE_TEMPLATE("one adapter, one pack, many threads", K, LoraKind<float>, FusedKind<float>, MixtureKind<float>) {
  Batch<typename K::Adapter> b(K::config(), 33);
  const auto packed = lm::prepack(b.be, b.adapter);
  auto want = b.zeros_y();
  b.forward(want);
  std::atomic<int> right{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      const lm::cpu::Backend be;
      Memory work(lm::workspace_bytes(be, b.adapter, 33));
      for (int run = 0; run < 20; ++run) {
        lm::Matrix<float> y(33, K::config().d_out);
        if ((run + i) % 2 == 0)
          lm::forward(be, packed, b.x, y, work.arena());
        else
          lm::forward(be, b.adapter, b.x, y, work.arena());
        right += same_bits(y, want);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(right == 80);
}

}  // namespace
}  // namespace loramix_test
