/// A fixture for Google Benchmark: any adapter, the user's own too, with everything it needs around it. Needs Google
/// Benchmark (CMake: loramix::bench) and a CPU backend.
///
/// Computes:    forward: y += ΔY; backward: dx, and the parameters' gradient, += (adapter/forward.hpp). report: counters
///                flop/s, bytes/s   adapter.cost(tokens) over the median time
///                floor/time        1 is the limit (bench/floor.hpp); median of 30 rounds (15 over 50 ms) in which the
///                                  same passes, the FMA probe and the memory twin are timed side by side
///                disturbed         share of samples in which the process was preempted: 0 on a quiet machine
///                scratch           bytes of workspace; with backward also reserve, what forward leaves for it
///              and, as label, the path the backend chose and what bounds the floor.
/// Parameters:  x [T, d_in], y [T, d_out], dy, dx, arenas, and the adapter at Adapter::Config::of(shape), or as given;
///              seeded, and drawn where it starts as zero. Tokens belong to `groups` sequences of one task, domain or served
///              adapter each. Frozen weights that an adapter reads (bench/layer.hpp) are multiplied inside the work.
/// Errors:      as forward and backward. Case is for host adapters.
/// Cost:        beside the work a timed iteration makes two arenas and counts.
/// Determinism: contents are those of (shape, seed).
/// Example:     examples/user_benchmark
#pragma once
#include <memory>
#include <string>
#include <type_traits>

#include <benchmark/benchmark.h>

#include <loramix/adapter/explain.hpp>
#include <loramix/adapter/initialise.hpp>
#include <loramix/bench/floor.hpp>
#include <loramix/bench/layer.hpp>

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
  Index groups = 8;  // tasks, domains or served adapters, of which every sequence has one
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
template <class Adapter>
class Case {
  static_assert(Adapter::space == Space::host, "loramix: bench::Case is for host adapters");

 public:
  using Activation = typename Adapter::precision::activation;
  using Accumulation = typename Adapter::precision::accumulation;

  template <class Backend>
  Case(const Backend& be, const CaseOptions& o)
      : Case(be, o,
             Adapter(configured<Adapter>(
                 {.d_in = o.d_in, .d_out = o.d_out, .total_rank = o.total_rank, .experts = o.experts}, o.groups))) {
    start(be);
  }
  /// With an adapter that has its values already; of the shape only tokens count.
  template <class Backend>
  Case(const Backend& be, const CaseOptions& o, const Adapter& adapter)
      : options_(o),
        adapters_(static_cast<std::size_t>(o.copies), adapter),
        gradient_(zeros_like(adapter)),
        layer_(adapter, o.tokens),
        offsets_(groups_of(adapter) + 1),
        ids_(groups_of(adapter)),
        x_(o.tokens, layer_.in()),
        dx_(o.inference ? 0 : o.tokens, layer_.in()),
        y_(layer_.out_rows(adapter, o.tokens, ids_.size()), layer_.out()),
        dy_(o.inference ? 0 : y_.rows(), layer_.out()) {
    check::at_least("Case", "copies", o.copies, 1);
    if (o.copies > 1 && !o.inference) {
      fail(check::detail::about(ErrorCode::value, "Case", "copies") << " are for .inference = true");
    }
    fill_uniform(x_.view(), o.seed);
    fill_uniform(y_.view(), o.seed + 1);
    fill_uniform(dy_.view(), o.seed + 2);
    Layer<Adapter>::visit(layer_, [&o](const char*, auto view) { fill_uniform(view, o.seed + 4, 0.1); });
    for (Index g = 0; g < ids_.size(); ++g) {  // in an order of their own
      offsets_[g] = g * o.tokens / ids_.size();
      ids_[g] = static_cast<std::int32_t>((g * 3 + 1) % ids_.size());
    }
    offsets_[ids_.size()] = o.tokens;
    const Index forward = layer_.workspace_bytes(be, adapter, o.tokens);
    const Index backward = o.inference ? 0 : layer_.workspace_bytes(be, adapter, o.tokens, Pass::backward);
    work_ = Buffer<std::byte>(forward > backward ? forward : backward);
    reserve_ = Buffer<std::byte>(o.inference ? 0 : layer_.reserve_bytes(adapter, o.tokens));
    run_on(be);
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
    const Cost cost = all_cost();
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

  /// What the batch says of its tokens.
  ForwardOptions<Space::host> options() const {
    ForwardOptions<Space::host> told;
    told.sequences = Groups<>::by_segment(offsets_.data(), ids_.size());
    told.tasks = Groups<>::by_segment(offsets_.data(), ids_.size(), ids_.data(), ids_.size());
    told.labels = ids_.view();
    return told;
  }
  Adapter& adapter(Index copy = 0) { return adapters_[static_cast<std::size_t>(copy)]; }
  gradient_t<Adapter>& gradient() { return gradient_; }
  MatrixView<Activation> x() { return x_.view(); }    // [T, d_in]
  MatrixView<Activation> y() { return y_.view(); }    // [T, d_out]
  MatrixView<Activation> dx() { return dx_.view(); }  // [T, d_in]
  MatrixView<Activation> dy() { return dy_.view(); }  // [T, d_out]
  const std::string& path() const { return path_; }

 private:
  /// How many tasks, domains or adapters the batch names: as many as the adapter knows.
  Index groups_of(const Adapter& adapter) const {
    if constexpr (requires { adapter.slots(); })
      return adapter.slots();
    else if constexpr (requires { adapter.config().places; })
      return adapter.config().experts;
    else if constexpr (requires { adapter.config().tasks; })
      return adapter.config().tasks > 0 ? adapter.config().tasks : options_.groups;
    else
      return options_.groups;
  }
  /// As initialise() leaves it, but for what starts as zero: that is drawn.
  template <class Backend>
  void start(const Backend& be) {
    Adapter& adapter = adapters_[0];
    if constexpr (requires(Fill & fill) { adapter.start(fill); }) {
      initialise(adapter, {.seed = options_.seed, .site = "bench"});
    }
    layer_.start(be, adapter);
    Adapter::visit(adapter, [this](const char*, auto view, ParameterGroup) {
      bool zero = true;
      for (Index i = 0; i < view.rows * view.cols; ++i) zero = zero && widen<Accumulation>(view.data[i]) == 0;
      if (zero) fill_uniform(view, options_.seed + 3, 0.1);
    });
    for (Adapter& other : adapters_) other = adapter;
  }

  template <class Backend>
  void run_on(const Backend& be) {
    const auto call = [this, be](Arena<>* save) {
      const Adapter& current = adapters_[place_.next(adapters_.size())];
      auto told = options();
      if (current.dropout() > 0) told.key = {.seed = options_.seed, .step = step_++};
      told.save = save;
      return layer_.forward(be, current, x_.view(), y_.view(), Arena<>{work_}, told);
    };
    using Saved = decltype(call(nullptr));
    const auto saved = std::make_shared<Saved>();
    const auto saving = [this, call, saved] {
      Arena<> reserve{reserve_};
      *saved = call(&reserve);
      saved_ = true;
    };
    forward_ = [this, call, saving] {
      if (options_.inference)
        call(nullptr);
      else
        saving();
    };
    backward_ = [this, be, saving, saved] {
      if (!saved_) saving();
      if constexpr (requires { saved->origin.stamp; }) {
        if (saved->origin.stamp.cell != nullptr) saved->origin.stamp.set();  // of the last forward, again and again
      }
      Saved copy = *saved;  // backward spends it
      layer_.backward(be, adapters_[0], copy, x_.view(), dy_.view(), dx_.view(), gradient_, Arena<>{work_}, {});
    };
  }

  Cost all_cost() const {
    return loramix::detail::sum_of({adapters_[0].cost(options_.tokens), layer_.frozen_cost(options_.tokens)});
  }
  std::vector<PassCost> passes(bool forward, bool backward) {
    const Cost cost = all_cost();
    const auto read = [this](Adapter& adapter, auto... more) {
      std::vector spans{span_of(adapter.parameters()), span_of(x_.view()), more...};
      Layer<Adapter>::visit(layer_, [&spans](const char*, auto view) { spans.push_back(span_of(view)); });
      return spans;
    };
    std::vector<PassCost> all;
    if (forward) {
      all.push_back({cost.forward_flop, {}, place_});
      for (Adapter& a : adapters_) all.back().traffic.push_back({read(a), {span_of(y_.view())}});
    }
    if (backward) {
      all.push_back(
          {cost.backward_flop,
           {{read(adapters_[0], span_of(dy_.view())), {span_of(dx_.view()), span_of(gradient_.parameters())}}}});
    }
    return all;
  }

  CaseOptions options_;
  std::vector<Adapter> adapters_;
  gradient_t<Adapter> gradient_;
  Layer<Adapter> layer_;
  Buffer<Index> offsets_;
  Buffer<std::int32_t> ids_;
  Matrix<Activation> x_, dx_, y_, dy_;
  Buffer<std::byte> work_, reserve_;
  bool saved_ = false;
  RingPlace place_;  // in adapters_
  std::uint64_t step_ = 0;
  std::int64_t forwards_ = 0, backwards_ = 0;
  std::function<void()> forward_, backward_;
  std::function<Floor(bool, bool)> floor_;
  std::string path_;
};

}  // namespace bench
}  // namespace LORAMIX_ABI
}  // namespace loramix
