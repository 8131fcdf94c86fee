#include "product.hpp"

#include <loramix/cpu/amx.hpp>

namespace bench {
namespace {

// Copied weights that a token gather may take, in floats.
constexpr Index most_gathered = Index{1} << 24;

std::vector<Baseline> baselines(const ProductRow& row, const Backend& be, Product<float>& product) {
  const Axes& a = row.axes;
  const GateData& gate = product.gate();
  std::vector<Operands<float>> ring;
  for (Index i = 0; i < product.copies(); ++i) ring.push_back(product.operands(i));
  const Operands<float>& o = ring[0];
  std::vector<Baseline> all;
  // Side rows are in our pass over x, and in nobody else's: with them, others compute something else.
  const bool same = row.side == 0;
  if (static_cast<double>(a.T) * static_cast<double>(a.R) <
      0x1p26) {  // dense in rank space: not for a thousand adapters
    auto dense =
        row.gate == Gate::open ? nullptr : std::make_shared<lm::Matrix<float>>(dense_gate(a.T, a.R, gate.experts));
    auto eigen = std::make_shared<EigenProduct<float>>(a.T, a.R, o.A.rows, dense.get());
    all.push_back({"eigen",
                   [dense, call = calls<EigenProduct<float>, float>(a, be, eigen, ring, product.place())] { call(); },
                   same});
  }
  all.push_back({"loop",
                 calls<ExpertLoop<float>, float>(a, be, std::make_shared<ExpertLoop<float>>(o, gate.experts), ring,
                                                 product.place()),
                 same});
  if (gate.selects && !a.backward() && TokenGather<float>::elements(o, gate.experts) <= most_gathered) {
    all.push_back({"gather",
                   calls<TokenGather<float>, float>(a, be, std::make_shared<TokenGather<float>>(a.T, o, gate.experts),
                                                    ring, product.place()),
                   same});
  }
  if (gate.selects && all[0].name == "eigen") {
    Backend masked = be;
    masked.tuning.grouping = lm::cpu::Grouping::dense;
    all.push_back({"masked", product.work(masked), same});
  }
  if (a.T <= 64) {
    Backend fixed = be;
    fixed.tuning.order = lm::cpu::Order::fixed;
    all.push_back({"fixed", product.work(fixed), same});
  }
  if (row.gate != Gate::open && row.gate != Gate::shared && all[0].name == "eigen") {
    all.push_back({"lora", product.work(be, true), false});
  }
  if (row.side != 0) all.push_back({"lora without side rows", product.work(be, true, false), false});
  if (!row.brief) {
    all.push_back({"base",
                   calls<BaseGemm<float>, float>(a, be, std::make_shared<BaseGemm<float>>(a.T, a.d_in, a.d_out), ring,
                                                 product.place()),
                   false});
  }
  return all;
}

template <class X, class B>
void run(benchmark::State& state, const ProductRow& row, const B& be) {
  Product<X> product(row);
  if (row.axes.pass == Passes::backward) product.forward_once(be);
  const std::vector<lm::bench::PassCost> passes = product.passes();
  const auto work = product.work(be);
  const auto count = [&](const lm::bench::Measurement& m) {
    double flop = 0, bytes = 0;
    for (const auto& pass : passes) flop += pass.flop, bytes += static_cast<double>(pass.traffic[0].bytes());
    state.counters["flop/s"] = flop / m.time.median;
    state.counters["bytes/s"] = bytes / m.time.median;
    state.counters["floor/time"] = m.floor.median;
    state.counters["scratch"] = static_cast<double>(product.scratch());
    state.counters["open"] = product.gate().active;
    state.SetLabel(m.flop_share > 0.5 ? "floor: flop" : "floor: memory");
  };
  const auto floor = lm::bench::Floor::of<float>(be, passes);
  if constexpr (std::is_same_v<X, float>) {
    std::vector<Baseline> beside = baselines(row, be, product);
    if (row.gate == Gate::prefix) {
      beside.push_back({"twin", lm::bench::MemoryTwin(be, passes[0].traffic, passes[0].place), false});
    }
    run_row<float>(state, row.axes, product.operands(), work, floor, beside, count);
  } else {  // beside the same in float: Eigen's own 16-bit products are not careful
    const Backend packets = backend(row.axes.threads);
    Product<float> other(row);
    if (row.axes.pass == Passes::backward) other.forward_once(packets);
    time_row(state, work, floor, {{"float", other.work(packets), false}}, count);
  }
}

}  // namespace

void add_product(const std::string& family, ProductRow row, std::initializer_list<Index> threads,
                 std::initializer_list<Passes> passes) {
  for (const Passes pass : passes) {
    for (const Index n : threads) {
      row.axes.pass = pass, row.axes.threads = n;
      add_row(family, row.axes, [row](benchmark::State& state) {
        const Backend be = backend(row.axes.threads);
        const std::string scalar = row.axes.scalar;
        if (scalar == "float") return run<float>(state, row, be);
        if (scalar == "bfloat16") return run<lm::bfloat16>(state, row, be);
        const lm::cpu::AmxBackend tiles{be.executor};
        if (tiles.granted) return run<lm::bfloat16>(state, row, tiles);
        for (auto _ : state) state.SetIterationTime(0);
        state.SetLabel("not run: no AMX");
      });
    }
  }
}

}  // namespace bench
