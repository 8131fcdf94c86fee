// Memory: a whole training step allocates nothing; one reserve serves many layers; one adapter serves many threads.
#include <atomic>
#include <thread>

#include "adapter/kinds.hpp"
#include "support/allocations.hpp"

#include <loramix/train/adamw.hpp>

namespace loramix_test {
namespace {

TEST_CASE_TEMPLATE("a training step with its optimiser allocates nothing, in 16 bits neither", K, LoraKind<float>,
                   FusedKind<lm::bfloat16>) {
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
  take_memory();
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
