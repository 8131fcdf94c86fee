// How a row of a family is run: interleaved rounds by loramix/bench/floor.hpp, reported through Google Benchmark.
//
//   time          median over rounds, as the row's (manual) time
//   floor/time    median over rounds; `floor/time spread`: interquartile range
//   NAME/ours     how much longer a baseline takes: median of per-round ratios; `NAME/ours min` beside it
//   A/A           the work against itself, its spread: differences below it mean nothing
#pragma once
#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include <benchmark/benchmark.h>

#include <loramix/bench/fixture.hpp>
#include <loramix/core/thread_pool.hpp>
#include <loramix/cpu/cpu.hpp>

#include "baselines.hpp"

namespace bench {

enum class Passes { forward, backward, train };
inline const char* name_of(Passes pass) {
  return pass == Passes::forward ? "forward" : pass == Passes::backward ? "backward" : "train";
}

using Backend = lm::cpu::Backend<lm::ThreadPool::PoolExecutor>;

// Pools live as long as the program: one per number of threads.
inline Backend backend(Index threads) {
  static lm::ThreadPool one(1), two(2), all(std::max(1u, std::thread::hardware_concurrency()));
  return Backend{(threads == 1 ? one : threads == 2 ? two : all).executor()};
}

// The axes every row is named by.
struct Axes {
  Index T, d_in, d_out, R, E = 1;
  Passes pass = Passes::forward;
  Index threads = 1;
  const char* scalar = "float";
  const char* note = "";  // the shape's id in PEERS 4.8

  bool forward() const { return pass != Passes::backward; }
  bool backward() const { return pass != Passes::forward; }
  bool train() const { return pass == Passes::train; }
  std::string name(const std::string& family) const {
    const auto axis = [](const char* label, Index v) { return std::string("/") + label + ":" + std::to_string(v); };
    return family + "/" + name_of(pass) + axis("T", T) + axis("d_in", d_in) + axis("d_out", d_out) + axis("R", R) +
           axis("E", E) + axis("threads", threads) + "/scalar:" + scalar +
           (*note == '\0' ? "" : std::string("/") + note);
  }
};

// The row's passes; a backward alone is that of a forward that ran before.
template <class B, class T>
std::function<void()> calls(const Axes& axes, const Backend& be, std::shared_ptr<B> baseline,
                            std::vector<Operands<T>> ring, lm::bench::RingPlace place = {}) {
  if (!axes.forward()) baseline->forward(be, ring[0]);
  return [=] {
    const Operands<T>& o = ring[place.next(ring.size())];
    if (axes.forward()) baseline->forward(be, o);
    if (axes.backward()) baseline->backward(be, o);
  };
}

// Both add the same to the same: y, or dx, dA, dB, or all of them. The largest difference over the largest value.
template <class T>
double disagreement(const Axes& axes, const Operands<T>& o, const std::function<void()>& a,
                    const std::function<void()>& b) {
  const auto zeroed = [&](const std::function<void()>& f) {
    eigen(o.y).setZero();
    if (axes.backward()) eigen(o.dx).setZero(), eigen(o.dA).setZero(), eigen(o.dB).setZero();
    f();
    using Copy = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic>;
    std::vector<Copy> copies;
    if (axes.forward()) copies.emplace_back(eigen(o.y));
    if (axes.backward()) copies.insert(copies.end(), {Copy(eigen(o.dx)), Copy(eigen(o.dA)), Copy(eigen(o.dB))});
    return copies;
  };
  const auto of_a = zeroed(a), of_b = zeroed(b);
  double worst = 0;
  for (std::size_t i = 0; i < of_a.size(); ++i) {
    const double largest = of_a[i].cwiseAbs().maxCoeff(), off = (of_a[i] - of_b[i]).cwiseAbs().maxCoeff();
    worst = std::max(worst, largest > 0 && std::isfinite(off) ? off / largest : INFINITY);
  }
  return worst;
}

// A baseline that must give what the work gives, or not (another function, for comparison only).
struct Baseline {
  std::string name;
  std::function<void()> call;
  bool same = true;
};

// How thoroughly this run measures: set once, by main.
struct Thoroughness {
  lm::bench::RoundOptions rounds;
  std::vector<std::string> beside;  // names of baselines; none: all

  bool wants(const Baseline& b) const {
    return beside.empty() || std::find(beside.begin(), beside.end(), b.name) != beside.end();
  }
};
inline Thoroughness& thoroughness() {
  static Thoroughness of_this_run;
  return of_this_run;
}

// Times one row and reports it.
inline void time_row(benchmark::State& state, std::function<void()> work, const lm::bench::Floor& floor,
                     const std::vector<Baseline>& baselines,
                     const std::function<void(const lm::bench::Measurement&)>& count) {
  std::vector<lm::bench::Contender> others{{"A/A", work}};
  for (const Baseline& b : baselines) {
    if (thoroughness().wants(b)) others.push_back({b.name, b.call});
  }
  const lm::bench::Measurement m = lm::bench::measure(work, floor, others, thoroughness().rounds);
  for (auto _ : state) state.SetIterationTime(m.time.median);
  count(m);
  state.counters["rounds"] = m.time.rounds;
  state.counters["disturbed"] = m.disturbed;
  state.counters["time min"] = m.time.min;
  state.counters["floor/time spread"] = m.floor.spread;
  state.counters["fma flop/s"] = m.fma_rate;
  for (const auto& [name, ratio] : m.others) {
    if (name == "A/A") {
      state.counters["A/A"] = ratio.median;
      state.counters["A/A spread"] = ratio.spread;
    } else {
      state.counters[name + "/ours"] = ratio.median;
      state.counters[name + "/ours min"] = ratio.min;
    }
  }
}

// The same, once every baseline that computes the same agrees; the row is an error where one does not.
template <class T>
void run_row(benchmark::State& state, const Axes& axes, const Operands<T>& operands, std::function<void()> work,
             const lm::bench::Floor& floor, const std::vector<Baseline>& baselines,
             const std::function<void(const lm::bench::Measurement&)>& count) {
  for (const Baseline& b : baselines) {
    const double off = b.same && thoroughness().wants(b) ? disagreement(axes, operands, work, b.call) : 0;
    if (!(off < 1e-3)) {
      state.SkipWithError((b.name + " disagrees with the work by " + std::to_string(off)).c_str());
      return;
    }
  }
  time_row(state, std::move(work), floor, baselines, count);
}

// Registers one row, timed by run_row.
inline void add_row(const std::string& family, const Axes& axes, std::function<void(benchmark::State&)> run) {
  benchmark::RegisterBenchmark(axes.name(family).c_str(), std::move(run))
      ->UseManualTime()
      ->Iterations(1)
      ->Unit(benchmark::kMillisecond);
}

// Each family registers its rows.
void register_instrument();
void register_classes();
void register_shapes();
void register_stages();
void register_adapters();

}  // namespace bench
