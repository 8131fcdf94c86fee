// LoRA: shapes B1, B2 (as one LoRA of its total rank) and B16 of PEERS 4.8, the T classes, and double.
#include <loramix/adapter/lora.hpp>

#include "rows.hpp"

namespace bench {
namespace {

template <class T>
void lora_row(benchmark::State& state, const Axes& axes, Index copies) {
  using Adapter = lm::Lora<T>;
  const Backend be = backend(axes.threads);
  lm::bench::Case<Adapter> c(be, {.tokens = axes.T,
                                  .d_in = axes.d_in,
                                  .d_out = axes.d_out,
                                  .total_rank = axes.R,
                                  .inference = !axes.train(),
                                  .copies = copies});
  std::vector<Operands<T>> ring;
  for (Index i = 0; i < copies; ++i) {
    const Adapter& a = c.adapter(i);
    ring.push_back({c.x(), c.y(), a.A(), a.B(), c.dy(), c.dx(), c.gradient().A(), c.gradient().B(), T(a.scale())});
  }
  std::vector<Baseline> baselines{{"eigen", calls(axes, be, std::make_shared<EigenProduct<T>>(axes.T, axes.R), ring)}};
  Assignment<T> all{.rank_begin = 0, .ranks = axes.R, .tokens = {}, .weights = {}, .contiguous = true};
  for (Index t = 0; t < axes.T; ++t) all.tokens.push_back(t);
  const auto loop = std::make_shared<ExpertLoop<T>>(ring[0], std::vector<Assignment<T>>{all});
  baselines.push_back({"loop", calls(axes, be, loop, ring)});
  const auto base = std::make_shared<BaseGemm<T>>(axes.T, axes.d_in, axes.d_out);
  baselines.push_back({"base", calls(axes, be, base, ring), false});
  run_row<T>(state, axes, ring[0], c.work(true, axes.train()), c.floor(true, axes.train()), std::move(baselines),
             [&](const lm::bench::Measurement& m) { c.count(state, m, true, axes.train()); });
}

void add(Axes axes, std::initializer_list<Index> threads, std::initializer_list<Passes> passes, Index copies = 1) {
  for (const Passes pass : passes) {
    for (const Index n : threads) {
      axes.pass = pass, axes.threads = n;
      add_row("lora", axes, [axes, copies](benchmark::State& state) {
        if (std::string(axes.scalar) == "double")
          lora_row<double>(state, axes, copies);
        else
          lora_row<float>(state, axes, copies);
      });
    }
  }
}

}  // namespace

void register_lora() {
  const auto both = {Passes::forward, Passes::train};
  const auto forward = {Passes::forward};
  add({.T = 512, .d_in = 4096, .d_out = 4096, .R = 8, .note = "B1"}, {2}, both);
  add({.T = 512, .d_in = 4096, .d_out = 4096, .R = 16, .note = "B1"}, {1, 2}, both);
  add({.T = 512, .d_in = 4096, .d_out = 4096, .R = 64, .note = "B1"}, {2}, both);
  add({.T = 512, .d_in = 4096, .d_out = 11008, .R = 128, .note = "B2"}, {2}, both);
  add({.T = 16, .d_in = 4096, .d_out = 4096, .R = 16}, {1, 2}, both);
  add({.T = 2048, .d_in = 4096, .d_out = 4096, .R = 16}, {2}, both);
  // Decoding: 1,400 adapters of 512 KB gone round, so that weights are cold (SPEED: only they count at T = 1).
  add({.T = 1, .d_in = 4096, .d_out = 4096, .R = 16, .note = "B16/cold"}, {1, 2}, forward, 1400);
  add({.T = 256, .d_in = 1024, .d_out = 1024, .R = 16, .scalar = "double"}, {1}, both);
}

}  // namespace bench
