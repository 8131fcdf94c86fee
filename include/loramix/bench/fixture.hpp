/// A fixture for Google Benchmark: any adapter that is one gated product, the user's own too, with everything it needs
/// around it. Needs Google Benchmark (CMake: loramix::bench) and a CPU backend.
///
/// Computes:    forward: y += ΔY; backward: dx, and the parameters' gradient, += (adapter/forward.hpp). report: counters
///                flop/s, bytes/s   adapter.cost(tokens) over the median time
///                floor/time        1 is the limit (bench/floor.hpp); median of 30 rounds (15 over 50 ms) in which the
///                                  same passes, the FMA probe and the memory twin are timed side by side
///                disturbed         share of samples in which the process was preempted: 0 on a quiet machine
///                scratch           bytes of workspace; with backward also reserve, what forward leaves for it
///              and, as label, the path the backend chose and what bounds the floor.
/// Parameters:  x [T, d_in], y [T, d_out], dy, dx, arenas, and the adapter at Adapter::Config::of(shape), or as given;
///              seeded, with B drawn (it starts as zero).
/// Errors:      as forward and backward. Case is for host adapters.
/// Cost:        beside the work a timed iteration makes two arenas and counts.
/// Determinism: contents are those of (shape, seed).
/// Example:     examples/user_benchmark
#pragma once
#include <cstring>
#include <string>
#include <type_traits>

#include <benchmark/benchmark.h>

#include <loramix/adapter/explain.hpp>
#include <loramix/adapter/initialise.hpp>
#include <loramix/bench/floor.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace bench {

/// A Case's shape, and what kind of use it stands for.
struct CaseOptions {
  Index tokens = 0;
  Index d_in = 0;
  Index d_out = 0;
  Index total_rank = 0;
  Index experts = 1;
  std::uint64_t seed = 7;
  bool inference = false;  // forward saves nothing, and there is no backward
  Index copies = 1;        // adapters gone round, call by call, so that weights are cold; inference only
};

/// v ← uniform in (−bound, bound), from a counter.
template <class T, Major M>
void fill_uniform(MatrixView<T, Space::host, M> v, std::uint64_t seed, double bound = 1) {
  std::uint64_t counter = loramix::detail::splitmix64(seed);
  for (Index i = 0; i < v.rows; ++i) {
    for (Index j = 0; j < v.cols; ++j) {
      const double unit = static_cast<double>(loramix::detail::splitmix64(++counter) >> 11) * 0x1p-53;
      v(i, j) = narrow<T>(static_cast<accumulation_t<T>>(bound * (2 * unit - 1)));
    }
  }
}

/// See the top of this header.
template <ProductAdapter Adapter>
class Case {
  static_assert(Adapter::space == Space::host, "loramix: bench::Case is for host adapters");

 public:
  using Activation = typename Adapter::precision::activation;
  using Accumulation = typename Adapter::precision::accumulation;

  template <class Backend>
  Case(const Backend& be, const CaseOptions& o)
      : Case(be, o,
             Adapter(Adapter::Config::of(
                 {.d_in = o.d_in, .d_out = o.d_out, .total_rank = o.total_rank, .experts = o.experts}))) {
    for (Adapter& a : adapters_) start(a);
  }
  /// With an adapter that has its values already; of the shape only tokens count.
  template <class Backend>
  Case(const Backend& be, const CaseOptions& o, const Adapter& adapter)
      : options_(o),
        adapters_(static_cast<std::size_t>(o.copies), adapter),
        gradient_(zeros_like(adapter)),
        x_(o.tokens, adapter.A().cols),
        dx_(o.inference ? 0 : o.tokens, adapter.A().cols),
        y_(o.tokens, adapter.B().rows),
        dy_(o.inference ? 0 : o.tokens, adapter.B().rows) {
    check::at_least("Case", "copies", o.copies, 1);
    if (o.copies > 1 && !o.inference) {
      fail(check::detail::about(ErrorCode::value, "Case", "copies") << " are for .inference = true");
    }
    fill_uniform(x_.view(), o.seed);
    fill_uniform(y_.view(), o.seed + 1);
    fill_uniform(dy_.view(), o.seed + 2);
    const Index forward = workspace_bytes(be, adapter, o.tokens);
    const Index backward = o.inference ? 0 : workspace_bytes(be, adapter, o.tokens, Pass::backward);
    work_ = Buffer<std::byte>(forward > backward ? forward : backward);
    reserve_ = Buffer<std::byte>(o.inference ? 0 : reserve_bytes(adapter, o.tokens));
    forward_ = [this, be] { run_forward(be); };
    backward_ = [this, be] { run_backward(be); };
    floor_ = [this, be](bool with_forward, bool with_backward) {
      return Floor::of<Accumulation>(be, passes(with_forward, with_backward));
    };
    path_ = explain(be, adapter, o.tokens).facts.path;
  }
  Case(const Case&) = delete;
  Case& operator=(const Case&) = delete;

  void forward() {
    ++forwards_;
    forward_();
  }
  /// Of the last forward; it may be called again and again.
  void backward() {
    ++backwards_;
    backward_();
  }

  /// Counters and label of the passes that were called.
  void report(benchmark::State& state) {
    const bool forward = forwards_ != 0 || backwards_ == 0, backward = backwards_ != 0;
    const Measurement m = measure(work(forward, backward), floor(forward, backward));
    count(state, m, forward, backward);
  }

  /// The pieces of report, for benchmarks that set more beside the work.
  std::function<void()> work(bool forward, bool backward) {
    return [this, forward, backward] {
      if (forward) forward_();
      if (backward) backward_();
    };
  }
  Floor floor(bool forward, bool backward) { return floor_(forward, backward); }
  void count(benchmark::State& state, const Measurement& m, bool forward, bool backward) const {
    const Cost cost = adapters_[0].cost(options_.tokens);
    const double flop = (forward ? cost.forward_flop : 0) + (backward ? cost.backward_flop : 0);
    const double bytes = (forward ? cost.forward_bytes : 0) + (backward ? cost.backward_bytes : 0);
    state.counters["flop/s"] = flop / m.time.median;
    state.counters["bytes/s"] = bytes / m.time.median;
    state.counters["floor/time"] = m.floor.median;
    state.counters["disturbed"] = m.disturbed;
    state.counters["scratch"] = static_cast<double>(work_.size());
    if (!options_.inference) state.counters["reserve"] = static_cast<double>(reserve_.size());
    const char* const bound = m.flop_share > 0.5 ? "floor: flop" : "floor: memory";
    state.SetLabel(path_ + "; " + bound);
  }

  Adapter& adapter(Index copy = 0) { return adapters_[static_cast<std::size_t>(copy)]; }
  gradient_t<Adapter>& gradient() { return gradient_; }
  MatrixView<Activation> x() { return x_.view(); }    // [T, d_in]
  MatrixView<Activation> y() { return y_.view(); }    // [T, d_out]
  MatrixView<Activation> dx() { return dx_.view(); }  // [T, d_in]
  MatrixView<Activation> dy() { return dy_.view(); }  // [T, d_out]
  const std::string& path() const { return path_; }

 private:
  void start(Adapter& adapter) {
    if (&adapter != &adapters_[0]) {
      adapter = adapters_[0];
      return;
    }
    initialise(adapter, {.seed = options_.seed, .site = "bench"});
    Adapter::visit(adapter, [this](const char*, auto view, ParameterGroup parameters) {
      if (std::strcmp(parameters.name, group::B.name) == 0) fill_uniform(view, options_.seed + 3, 0.1);
    });
  }

  template <class Backend>
  void run_forward(const Backend& be) {
    const Adapter& current = adapters_[next_];
    next_ = next_ + 1 == adapters_.size() ? 0 : next_ + 1;
    ForwardOptions<Space::host> options;
    if (current.dropout() > 0) options.key = {.seed = options_.seed, .step = step_++};
    if (options_.inference) {
      loramix::forward(be, current, x_.view(), y_.view(), Arena<>{work_}, options);
      return;
    }
    Arena<> reserve{reserve_};
    options.save = &reserve;
    saved_ = loramix::forward(be, current, x_.view(), y_.view(), Arena<>{work_}, options);
  }
  template <class Backend>
  void run_backward(const Backend& be) {
    if (!saved_.origin.live) run_forward(be);
    if (saved_.origin.stamp.cell != nullptr) saved_.origin.stamp.set();  // of the last forward, again and again
    Saved<Adapter> saved = saved_;                                       // backward spends it
    loramix::backward(be, adapters_[0], saved, x_.view(), dy_.view(), dx_.view(), gradient_, Arena<>{work_});
  }

  std::vector<PassCost> passes(bool forward, bool backward) {
    const Cost cost = adapters_[0].cost(options_.tokens);
    std::vector<PassCost> all;
    if (forward) {
      all.push_back({cost.forward_flop, {}});
      for (Adapter& a : adapters_) {
        all.back().traffic.push_back({{span_of(a.parameters()), span_of(x_.view())}, {span_of(y_.view())}});
      }
    }
    if (backward) {
      all.push_back({cost.backward_flop,
                     {{{span_of(adapters_[0].parameters()), span_of(x_.view()), span_of(dy_.view())},
                       {span_of(dx_.view()), span_of(gradient_.parameters())}}}});
    }
    return all;
  }

  CaseOptions options_;
  std::vector<Adapter> adapters_;
  gradient_t<Adapter> gradient_;
  Matrix<Activation> x_, dx_, y_, dy_;
  Buffer<std::byte> work_, reserve_;
  Saved<Adapter> saved_;
  std::size_t next_ = 0;
  std::uint64_t step_ = 0;
  std::int64_t forwards_ = 0, backwards_ = 0;
  std::function<void()> forward_, backward_;
  std::function<Floor(bool, bool)> floor_;
  std::string path_;
};

}  // namespace bench
}  // namespace LORAMIX_ABI
}  // namespace loramix
