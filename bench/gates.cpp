// Gates at the level of ops: shrink and expand with a gate that is given, at shapes of PEERS 4.8, beside LoRA of the
// same total rank. The floor counts active ranks only.
#include <numeric>

#include <loramix/adapter/lora.hpp>
#include <loramix/ops/expand.hpp>
#include <loramix/ops/shrink.hpp>

#include "rows.hpp"

namespace bench {
namespace {

enum class Kind { dense, top2, one_expert, prefix };

// The gate of a row: its slots, the form over them, and the same as baselines want it.
struct GateData {
  lm::Matrix<float> weights, dweights;  // [T, E] or [T, 2]
  lm::Matrix<std::int32_t> ids;         // [T, 2]
  lm::Buffer<std::int32_t> groups;      // [T] or [segments]: prefixes, ids
  std::vector<Index> offsets;           // [segments + 1]
  lm::GateForm<float> form;
  lm::GateGradient<float> gradient;
  std::vector<Assignment<float>> experts;
  double active = 0;  // mean share of ranks that are open
};

std::uint64_t draw(std::uint64_t i) { return lm::detail::splitmix64(i ^ 0x5eedu); }
float draw_weight(Index t, Index k) {
  return 0.1f + static_cast<float>(draw(static_cast<std::uint64_t>(t * 64 + k)) >> 40) * 0x1p-24f;
}

void make_gate(Kind kind, const Axes& axes, GateData& g) {
  const Index T = axes.T, E = axes.E, r = axes.R / axes.E;
  for (Index e = 0; e < E && kind != Kind::prefix; ++e) g.experts.push_back({e * r, r, {}, {}, false});
  const auto give = [&](Index e, Index t, float w) {
    g.experts[static_cast<std::size_t>(e)].tokens.push_back(t);
    g.experts[static_cast<std::size_t>(e)].weights.push_back(w);
  };
  if (kind == Kind::dense) {
    g.weights = lm::Matrix<float>(T, E), g.dweights = lm::Matrix<float>(T, E);
    for (Index t = 0; t < T; ++t) {
      for (Index e = 0; e < E; ++e) give(e, t, g.weights(t, e) = draw_weight(t, e));
    }
    for (auto& e : g.experts) e.contiguous = true;
    g.form = lm::TokenExperts<float>{g.weights.view()}.form(T, axes.R);
    g.gradient.weights = g.dweights;
    g.active = 1;
  } else if (kind == Kind::top2) {
    g.weights = lm::Matrix<float>(T, 2), g.dweights = lm::Matrix<float>(T, 2), g.ids = lm::Matrix<std::int32_t>(T, 2);
    for (Index t = 0; t < T; ++t) {
      const Index first = static_cast<Index>(draw(static_cast<std::uint64_t>(t)) >> 33) % E;
      const Index second = (first + 1 + static_cast<Index>(draw(static_cast<std::uint64_t>(~t)) >> 33) % (E - 1)) % E;
      for (const Index k : {0, 1}) {
        const Index e = k == 0 ? first : second;
        g.ids(t, k) = static_cast<std::int32_t>(e);
        give(e, t, g.weights(t, k) = draw_weight(t, k));
      }
    }
    g.form = lm::TopKExperts<float>{g.ids.view(), g.weights.view(), E}.form(T, axes.R);
    g.gradient.id_weights = g.dweights;
    g.active = 2.0 / static_cast<double>(E);
  } else if (kind == Kind::one_expert) {  // a segment per expert, in an order of their own
    g.groups = lm::Buffer<std::int32_t>(E);
    for (Index s = 0; s <= E; ++s) g.offsets.push_back(s * T / E);
    for (Index s = 0; s < E; ++s) {
      const Index e = (s * 3 + 1) % E;
      g.groups[s] = static_cast<std::int32_t>(e);
      auto& expert = g.experts[static_cast<std::size_t>(e)];
      for (Index t = g.offsets[static_cast<std::size_t>(s)]; t < g.offsets[static_cast<std::size_t>(s) + 1]; ++t) {
        expert.tokens.push_back(t);
      }
      expert.contiguous = true;
    }
    g.form = lm::OneExpert<float>{g.groups.view(), lm::Groups<>::by_segment(g.offsets.data(), E), E}.form(T, axes.R);
    g.active = 1.0 / static_cast<double>(E);
  } else {  // a prefix per token; one "expert" per length
    g.groups = lm::Buffer<std::int32_t>(T);
    for (Index p = 1; p <= axes.R; ++p) g.experts.push_back({0, p, {}, {}, false});
    for (Index t = 0; t < T; ++t) {
      const Index p = 1 + static_cast<Index>(draw(static_cast<std::uint64_t>(t)) >> 33) % axes.R;
      g.groups[t] = static_cast<std::int32_t>(p);
      g.experts[static_cast<std::size_t>(p - 1)].tokens.push_back(t);
      g.active += static_cast<double>(p) / static_cast<double>(axes.R * T);
    }
    g.form = lm::RankPrefix<float>{g.groups.view()}.form(T, axes.R);
  }
}

void gate_row(benchmark::State& state, Kind kind, const Axes& axes) {
  constexpr lm::Space host = lm::Space::host;
  constexpr lm::Major rank_major = lm::Major::column;
  const Backend be = backend(axes.threads);
  const Index T = axes.T;
  // LoRA of the same total rank: a contender, and the owner of everything shared.
  lm::bench::Case<lm::Lora<float>> lora(
      be, {.tokens = T, .d_in = axes.d_in, .d_out = axes.d_out, .total_rank = axes.R, .inference = !axes.train()});
  auto& adapter = lora.adapter();
  auto& gradient = lora.gradient();
  const Operands<float> o{
      lora.x(),     lora.y(),     std::as_const(adapter).A(), std::as_const(adapter).B(), lora.dy(), lora.dx(),
      gradient.A(), gradient.B(), float(adapter.scale())};
  GateData gate;
  make_gate(kind, axes, gate);

  lm::Matrix<float> u(T, axes.R), du(T, axes.R);
  const lm::Shrink<float, float, float, float, host> shrink{o.A, {}, o.x, {}, u, {}};
  const lm::Expand<float, float, float, float, host, rank_major> expand{u, gate.form, o.B, o.scale, o.y};
  lm::ExpandBackward<float, float, float, float, float, host, rank_major> expand_backward{
      u, gate.form, o.B, o.scale, o.dy, du, o.dB, gate.gradient};
  expand_backward.gate_values = lm::Into::set;
  const lm::ShrinkBackward<float, float, float, float, float, host> shrink_backward{o.A, {},   o.x, {},  du,
                                                                                    {},  o.dA, {},  o.dx};
  Index bytes = std::max(scratch_bytes(be, shrink), scratch_bytes(be, expand));
  if (axes.train()) {
    bytes = std::max({bytes, scratch_bytes(be, expand_backward), scratch_bytes(be, shrink_backward)});
  }
  lm::Buffer<std::byte> scratch(lm::Arena<>::with_alignment(bytes));
  const auto work = [&] {
    const lm::Arena<> arena{scratch};
    lm::execute(be, shrink, arena);
    lm::execute(be, expand, arena);
    if (!axes.train()) return;
    lm::execute(be, expand_backward, arena);
    lm::execute(be, shrink_backward, arena);
  };

  using lm::bench::span_of;
  const double flop = 2.0 * static_cast<double>(T * axes.R * (axes.d_in + axes.d_out)) * gate.active;
  const lm::bench::Traffic forward{{span_of(o.A), span_of(o.B), span_of(o.x)}, {span_of(o.y)}};
  const lm::bench::Traffic backward{{span_of(o.A), span_of(o.B), span_of(o.x), span_of(o.dy)},
                                    {span_of(o.dx), span_of(o.dA), span_of(o.dB)}};
  std::vector<lm::bench::PassCost> passes{{flop, {forward}}};
  if (axes.train()) passes.push_back({2 * flop, {backward}});

  const lm::Matrix<float> dense = dense_gate(T, axes.R, gate.experts);
  std::vector<Baseline> baselines{
      {"eigen",
       calls<EigenProduct<float>, float>(axes, be, std::make_shared<EigenProduct<float>>(T, axes.R, &dense), {o})},
      {"loop", calls<ExpertLoop<float>, float>(axes, be, std::make_shared<ExpertLoop<float>>(o, gate.experts), {o})},
      {"lora", lora.work(true, axes.train()), false},
      {"base",
       calls<BaseGemm<float>, float>(axes, be, std::make_shared<BaseGemm<float>>(T, axes.d_in, axes.d_out), {o}),
       false}};
  run_row<float>(state, axes, o, work, lm::bench::Floor::of<float>(be, passes), std::move(baselines),
                 [&](const lm::bench::Measurement& m) {
                   double all_flop = 0, all_bytes = 0;
                   for (const auto& pass : passes) {
                     all_flop += pass.flop, all_bytes += static_cast<double>(pass.traffic[0].bytes());
                   }
                   state.counters["flop/s"] = all_flop / m.time.median;
                   state.counters["bytes/s"] = all_bytes / m.time.median;
                   state.counters["floor/time"] = m.floor.median;
                   state.counters["scratch"] = static_cast<double>(bytes);
                   state.SetLabel(lora.path() + (m.flop_share > 0.5 ? "; floor: flop" : "; floor: memory"));
                 });
}

void add(const char* family, Kind kind, Axes axes, Index threads, std::initializer_list<Passes> passes) {
  axes.threads = threads;
  for (const Passes pass : passes) {
    axes.pass = pass;
    add_row(family, axes, [kind, axes](benchmark::State& state) { gate_row(state, kind, axes); });
  }
}

}  // namespace

void register_gates() {
  const auto both = {Passes::forward, Passes::train};
  const auto forward = {Passes::forward};
  add("gate_dense", Kind::dense, {.T = 512, .d_in = 4096, .d_out = 11008, .R = 128, .E = 8, .note = "B2"}, 2, both);
  add("gate_dense", Kind::dense, {.T = 512, .d_in = 4096, .d_out = 4096, .R = 32, .E = 8, .note = "B4"}, 1, both);
  add("gate_top2", Kind::top2, {.T = 2048, .d_in = 4096, .d_out = 4096, .R = 64, .E = 8, .note = "B5"}, 2, both);
  add("gate_top2", Kind::top2, {.T = 1024, .d_in = 1024, .d_out = 1024, .R = 2048, .E = 16, .note = "B7"}, 2, forward);
  add("gate_one", Kind::one_expert, {.T = 512, .d_in = 4096, .d_out = 4096, .R = 64, .E = 8, .note = "B14"}, 1, both);
  add("gate_prefix", Kind::prefix, {.T = 4096, .d_in = 768, .d_out = 3072, .R = 8, .note = "B12"}, 1, both);
}

}  // namespace bench
