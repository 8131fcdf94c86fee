// The instrument measured by itself: work whose cost is known, so that what it should show is known too.
//
//   move      a loop y += x, whose time is the memory twin's, from the second-level cache to main memory
//   fma       multiply-adds in registers by Eigen's packets, whose rate is the probe's; flop per cycle, where a cycle is
//             measured by a chain of dependent integer operations
//   double_T  LoRA on twice the tokens against LoRA
//
// A row says whether it came out as it must.
#include <loramix/adapter/lora.hpp>

#include "rows.hpp"

namespace bench {
namespace {

using lm::bench::span_of;

void verdict(benchmark::State& state, const char* what, double got, double low, double high) {
  state.counters[what] = got;
  state.counters["as expected"] = got >= low && got <= high ? 1 : 0;
  char text[160];
  std::snprintf(text, sizeof text, "%s: %s %.3f, must be in [%.2f, %.2f]",
                got >= low && got <= high ? "as expected" : "NOT AS EXPECTED", what, got, low, high);
  state.SetLabel(text);
}

void report(benchmark::State& state, const lm::bench::Measurement& m, double flop, double bytes) {
  for (auto _ : state) state.SetIterationTime(m.time.median);
  state.counters["flop/s"] = flop / m.time.median;
  state.counters["bytes/s"] = bytes / m.time.median;
  state.counters["floor/time"] = m.floor.median;
  state.counters["floor/time spread"] = m.floor.spread;
  state.counters["fma flop/s"] = m.fma_rate;
  state.counters["disturbed"] = m.disturbed;
  state.counters["rounds"] = m.time.rounds;
}

void move(benchmark::State& state, Index kilobytes, Index threads) {
  const Backend be = backend(threads);
  const Index rows = kilobytes / 2, cols = 256;  // x and y of 1 KB rows
  lm::Matrix<float> x(rows, cols), y(rows, cols);
  lm::bench::fill_uniform(x.view(), 1);
  const Index part = std::max<Index>(4, std::min<Index>(256, rows / (4 * threads)));
  const auto work = [&] {
    be.run((rows + part - 1) / part, [&](Index job, Index) {
      const Index begin = job * part, n = std::min(part, rows - begin);
      const float* const from = x.data() + begin * cols;
      float* const to = y.data() + begin * cols;
      for (Index i = 0; i < n * cols; ++i) to[i] += from[i];
    });
  };
  const lm::bench::Traffic traffic{{span_of(x.view())}, {span_of(y.view())}};
  const auto m = lm::bench::measure(work, lm::bench::Floor::of<float>(be, {{0, {traffic}}}));
  report(state, m, 0, static_cast<double>(traffic.bytes()));
  verdict(state, "floor/time", m.floor.median, 0.8, 1.2);
}

// Seconds per cycle, as seen by x ^= x << a, x ^= x >> b, …: 2 cycles each, one after the other, on any machine.
double cycle_seconds() {
  volatile std::uint64_t sink = 88172645463325252u;
  const long steps = 200000;
  double best = 1;
  for (int repeat = 0; repeat < 10; ++repeat) {
    const double s = lm::bench::detail::seconds_of(
        [&] {
          std::uint64_t x = sink;
          for (long i = 0; i < steps; ++i) x ^= x << 13, x ^= x >> 7, x ^= x << 17;
          sink = x;
        },
        1);
    best = std::min(best, s / static_cast<double>(6 * steps));
  }
  return best;
}

void fma(benchmark::State& state, Index threads) {
  using Packet = Eigen::internal::packet_traits<float>::type;
  constexpr int width = Eigen::internal::packet_traits<float>::size, chains = 10;
  const Backend be = backend(threads);
  const Index jobs = 32 * threads, steps = 20000;
  volatile float ratio = 0.998f, step = 0.002f;
  std::vector<float> sums(static_cast<std::size_t>(jobs));
  const auto work = [&] {
    be.run(jobs, [&](Index job, Index) {
      using namespace Eigen::internal;
      const float a_value = ratio, b_value = step;
      const Packet a = pset1<Packet>(a_value), b = pset1<Packet>(b_value);
      const auto start = [](float v) { return pset1<Packet>(v); };  // all different: equal chains would be merged
      Packet c0 = start(0), c1 = start(1), c2 = start(2), c3 = start(3), c4 = start(4);
      Packet c5 = start(5), c6 = start(6), c7 = start(7), c8 = start(8), c9 = start(9);
      for (Index i = 0; i < steps; ++i) {
        c0 = pmadd(c0, a, b), c1 = pmadd(c1, a, b), c2 = pmadd(c2, a, b), c3 = pmadd(c3, a, b), c4 = pmadd(c4, a, b);
        c5 = pmadd(c5, a, b), c6 = pmadd(c6, a, b), c7 = pmadd(c7, a, b), c8 = pmadd(c8, a, b), c9 = pmadd(c9, a, b);
      }
      const Packet low = padd(padd(padd(c0, c1), padd(c2, c3)), c4), high = padd(padd(padd(c5, c6), padd(c7, c8)), c9);
      sums[static_cast<std::size_t>(job)] = predux(padd(low, high));
    });
  };
  const double flop = 2.0 * chains * width * static_cast<double>(steps * jobs);
  const auto m = lm::bench::measure(work, lm::bench::Floor::of<float>(be, {{flop, {{}}}}));
  report(state, m, flop, 0);
  const double per_cycle = m.fma_rate * cycle_seconds() / static_cast<double>(threads);
  verdict(state, "floor/time", m.floor.median, 0.9, 1.1);
  state.counters["fma flop/cycle"] = per_cycle;
  // Two multiply-add units of the packet's width are as much as any machine has had.
  if (per_cycle > 4.4 * std::max(width, 16)) state.SkipWithError("FMA probe above any ceiling: it does not compute");
}

void double_tokens(benchmark::State& state, Index threads) {
  const Backend be = backend(threads);
  const lm::bench::CaseOptions shape{.tokens = 256, .d_in = 256, .d_out = 256, .total_rank = 64};
  lm::bench::CaseOptions twice = shape;
  twice.tokens = 512;
  lm::bench::Case<lm::Lora<float>> c(be, shape), c2(be, twice);
  const auto m = lm::bench::measure(c.work(true, true), c.floor(true, true),
                                    {{"A/A", c.work(true, true)}, {"2T", c2.work(true, true)}});
  const lm::Cost cost = c.adapter().cost(shape.tokens);
  report(state, m, cost.forward_flop + cost.backward_flop, cost.forward_bytes + cost.backward_bytes);
  state.counters["A/A"] = m.others[0].second.median;
  state.counters["A/A spread"] = m.others[0].second.spread;
  verdict(state, "time(2T)/time(T)", m.others[1].second.median, 1.7, 2.3);
}

void add(const std::string& name, std::function<void(benchmark::State&)> run) {
  benchmark::RegisterBenchmark(("instrument/" + name).c_str(), std::move(run))
      ->UseManualTime()
      ->Iterations(1)
      ->Unit(benchmark::kMillisecond);
}

}  // namespace

void register_instrument() {
  for (const Index threads : {1, 2}) {
    const std::string axis = "/threads:" + std::to_string(threads);
    for (const Index kilobytes : {1024, 16384, 131072}) {
      add("move/KB:" + std::to_string(kilobytes) + axis,
          [=](benchmark::State& state) { move(state, kilobytes, threads); });
    }
    add("fma" + axis, [=](benchmark::State& state) { fma(state, threads); });
    add("double_T" + axis, [=](benchmark::State& state) { double_tokens(state, threads); });
  }
}

}  // namespace bench
