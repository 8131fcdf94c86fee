// A benchmark of one's own adapter, with the installed fixture, beside LoRA of the same total rank.
#include <cmath>
#include <vector>

#include <benchmark/benchmark.h>

#include <loramix/adapter/lora.hpp>
#include <loramix/bench/fixture.hpp>
#include <loramix/core/thread_pool.hpp>
#include <loramix/cpu/cpu.hpp>

namespace lm = loramix;

namespace mine {

// LoRA whose rank j is scaled by the fixed 1/√(j+1): all that is needed is what Lora has, and another gate.
template <class P = float, lm::Space S = lm::Space::host, class T = typename lm::precision_t<P>::weight>
class HarmonicLora : public lm::Lora<P, S, T> {
 public:
  using Base = lm::Lora<P, S, T>;
  using Score = typename Base::precision::score;
  template <class U, lm::Space V = S>
  using rebind = HarmonicLora<P, V, U>;
  static constexpr const char* kind = "harmonic_lora";

  explicit HarmonicLora(const lm::LoraConfig& config) : Base(config), law_(config.rank) {
    for (lm::Index j = 0; j < law_.size(); ++j) law_[j] = Score(1 / std::sqrt(1.0 + static_cast<double>(j)));
  }
  lm::RankScale<Score, S> gate() const { return {law_.view()}; }

 private:
  lm::Buffer<Score, S> law_;  // [R]
};

}  // namespace mine

template <class Adapter>
static void layer(benchmark::State& st) {
  static lm::ThreadPool pool(std::thread::hardware_concurrency());
  const lm::cpu::Backend be{pool.executor()};
  lm::bench::Case<Adapter> c(
      be, {.tokens = st.range(0), .d_in = 1024, .d_out = 2752, .total_rank = 64, .experts = st.range(1)});
  for (auto _ : st) {
    c.forward();
    c.backward();
  }
  c.report(st);  // flop/s, bytes/s, floor/time, chosen path
}

static void shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"T", "E"})->Args({16, 1})->Args({256, 1})->UseRealTime()->Unit(benchmark::kMillisecond);
}
BENCHMARK(layer<lm::Lora<float>>)->Apply(shapes);
BENCHMARK(layer<mine::HarmonicLora<float>>)->Apply(shapes);
BENCHMARK_MAIN();
