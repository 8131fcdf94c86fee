// What is more than one product: dropout, double, the stages of a MixLoRA block, DoRA's norms.
#include <loramix/adapter/lora.hpp>
#include <loramix/adapter/mix_lora_forward.hpp>
#include <loramix/ops/row_norm.hpp>

#include "rows.hpp"

namespace bench {
namespace {

constexpr auto both = {Passes::forward, Passes::train};

lm::bench::CaseOptions options_of(const Axes& a) {
  return {.tokens = a.T, .d_in = a.d_in, .d_out = a.d_out, .total_rank = a.R, .inference = !a.backward()};
}

// A step of LoRA that keeps the mask of its dropout as bits from forward to backward.
class MaskedStep {
 public:
  MaskedStep(const Backend& be, const Axes& a, const lm::Lora<float>& adapter)
      : adapter_(adapter),
        gradient_(lm::zeros_like(adapter)),
        x_(a.T, a.d_in),
        y_(a.T, a.d_out),
        dy_(a.T, a.d_out),
        dx_(a.T, a.d_in),
        mask_(a.T, lm::mask_bytes(a.d_in)),
        work_(
            std::max(lm::workspace_bytes(be, adapter, a.T), lm::workspace_bytes(be, adapter, a.T, lm::Pass::backward))),
        kept_(lm::reserve_bytes(adapter, a.T)) {
    for (auto* m : {&x_, &y_, &dy_}) lm::bench::fill_uniform(m->view(), 1);
  }
  void operator()(const Backend& be) {
    lm::Arena<> reserve{kept_};
    const lm::Arena<> work{work_};
    auto saved = lm::forward(be, adapter_, x_.view(), y_.view(), work,
                             {.save = &reserve, .key = {.seed = 7, .step = step_++}, .mask = mask_.view()});
    lm::backward(be, adapter_, saved, x_.view(), dy_.view(), dx_.view(), gradient_, work);
  }

 private:
  lm::Lora<float> adapter_;
  lm::gradient_t<lm::Lora<float>> gradient_;
  lm::Matrix<float> x_, y_, dy_, dx_;
  lm::Matrix<std::uint8_t> mask_;
  lm::Buffer<std::byte> work_, kept_;
  std::uint64_t step_ = 0;
};

// LoRA with dropout beside LoRA without; in training with the mask kept as bits, beside drawing it again for each pass.
void dropout(benchmark::State& state, const Axes& axes) {
  const Backend be = backend(axes.threads);
  const lm::bench::CaseOptions options = options_of(axes);
  lm::LoraConfig config = lm::LoraConfig::of({.d_in = axes.d_in, .d_out = axes.d_out, .total_rank = axes.R});
  lm::Lora<float> plain(config);
  config.dropout = 0.1;
  lm::Lora<float> dropped(config);
  for (auto* adapter : {&plain, &dropped}) {
    lm::initialise(*adapter, {.seed = 7, .site = "bench"});
    lm::bench::fill_uniform(adapter->B(), 8, 0.1);
  }
  lm::bench::Case<lm::Lora<float>> drawn(be, options, dropped), none(be, options, plain);
  std::vector<Baseline> beside{{"no dropout", none.work(true, axes.backward()), false}};
  std::function<void()> work = drawn.work(true, axes.backward());
  if (axes.backward()) {
    beside.push_back({"drawn again", work, false});
    work = [be, step = std::make_shared<MaskedStep>(be, axes, dropped)] { (*step)(be); };
  }
  time_row(state, work, none.floor(true, axes.backward()), beside,
           [&](const lm::bench::Measurement& m) { none.count(state, m, true, axes.backward()); });
}

// LoRA in double beside careful Eigen.
void in_double(benchmark::State& state, const Axes& axes) {
  const Backend be = backend(axes.threads);
  lm::bench::Case<lm::Lora<double>> c(be, options_of(axes));
  const lm::Lora<double>& a = c.adapter();
  const Operands<double> o{c.x(), c.y(), a.A(), a.B(), c.dy(), c.dx(), c.gradient().A(), c.gradient().B(), a.scale()};
  const auto eigen = std::make_shared<EigenProduct<double>>(axes.T, axes.R, axes.R, nullptr);
  run_row<double>(state, axes, o, c.work(true, axes.backward()), c.floor(true, axes.backward()),
                  {{"eigen", calls<EigenProduct<double>, double>(axes, be, eigen, {o})}},
                  [&](const lm::bench::Measurement& m) { c.count(state, m, true, axes.backward()); });
}

// The three stages of a MixLoRA block without the engine's products, and the one product that peers do k times.
void mix_lora(benchmark::State& state, const Axes& axes) {
  const Backend be = backend(axes.threads);
  const Index T = axes.T, ff = axes.d_out;
  lm::MixLora<float> adapter(lm::MixLoraConfig::of({axes.d_in, ff, axes.R, axes.E}));
  lm::initialise(adapter, {.seed = 7, .site = "bench"});
  for (auto B : {adapter.B1(), adapter.B3(), adapter.B2()}) lm::bench::fill_uniform(B, 8, 0.1);
  auto gradient = lm::zeros_like(adapter);
  lm::Matrix<float> x(T, axes.d_in), y(T, axes.d_in), dy(T, axes.d_in), dx(T, axes.d_in);
  lm::Matrix<float> u(T, ff), v(T, ff), h(T, ff), dh(T, ff), du(T, ff), dv(T, ff);
  for (auto* m : {&x, &dy, &u, &v, &dh}) lm::bench::fill_uniform(m->view(), 9);
  lm::Buffer<std::byte> scratch(lm::workspace_bytes(be, adapter, T, lm::Pass::backward));
  lm::Buffer<std::byte> kept(lm::reserve_bytes(adapter, T));
  const auto work = [&] {
    const lm::Arena<> arena{scratch};
    lm::Arena<> reserve{kept};
    auto saved = lm::route(be, adapter, x.view(), reserve, arena);
    lm::mix(be, adapter, saved, u.view(), v.view(), h.view(), arena);
    lm::finish(be, adapter, saved, y.view(), arena);
    if (!axes.backward()) return;
    lm::finish_backward(be, adapter, saved, dy.view(), gradient, arena);
    lm::mix_backward(be, adapter, saved, u.view(), v.view(), dh.view(), du.view(), dv.view(), gradient, arena);
    lm::route_backward(be, adapter, saved, x.view(), dx.view(), gradient, arena);
  };
  using lm::bench::span_of;
  // Of Z₂, gate_proj and up_proj the ranks that a token's experts have count.
  const double open = static_cast<double>(adapter.config().rule.k) / static_cast<double>(axes.E);
  const double flop =
      2.0 * static_cast<double>(T) *
      (static_cast<double>(3 * axes.R * (axes.d_in + ff)) * open + static_cast<double>(axes.E * axes.d_in));
  std::vector<lm::bench::PassCost> passes{
      {flop,
       {{{span_of(adapter.parameters()), span_of(x.view()), span_of(u.view()), span_of(v.view())},
         {span_of(h.view()), span_of(y.view())}}}}};
  if (axes.backward()) {
    passes.push_back(
        {2 * flop,
         {{{span_of(adapter.parameters()), span_of(x.view()), span_of(u.view()), span_of(v.view()), span_of(dy.view()),
            span_of(dh.view())},
           {span_of(du.view()), span_of(dv.view()), span_of(dx.view()), span_of(gradient.parameters())}}}});
  }
  Operands<float> o{};
  o.x = h.view();
  const auto W2 = std::make_shared<BaseGemm<float>>(T, ff, axes.d_in);
  Axes forward = axes;
  forward.pass = Passes::forward;
  time_row(state, work, lm::bench::Floor::of<float>(be, passes),
           {{"base", calls<BaseGemm<float>, float>(forward, be, W2, {o}), false}},
           [&](const lm::bench::Measurement& m) {
             state.counters["flop/s"] = (axes.backward() ? 3 : 1) * flop / m.time.median;
             state.counters["floor/time"] = m.floor.median;
             state.SetLabel(m.flop_share > 0.5 ? "floor: flop" : "floor: memory");
           });
}

// ‖w_i + s (BA)_i‖ in rank space beside making the change.
void dora_norms(benchmark::State& state, const Axes& axes) {
  const Backend be = backend(axes.threads);
  const Index o = axes.d_out, r = axes.R;
  lm::Matrix<float> W(o, axes.d_in), A(r, axes.d_in), changed(o, axes.d_in);
  lm::Matrix<float, lm::Space::host, lm::Major::column> B(o, r);
  lm::bench::fill_uniform(W.view(), 1, 0.02), lm::bench::fill_uniform(A.view(), 2, 0.02),
      lm::bench::fill_uniform(B.view(), 3, 0.1);
  lm::Buffer<float> squares(o), norms(o), other(o);
  lm::row_squares(be, lm::RowSquares<float, float, lm::Space::host>{W.view(), squares.view()});
  const lm::DoraNorms<float, float, float, lm::Space::host> op{W.view(), squares.view(), A.view(), B.view(),
                                                               2.f,      norms.view()};
  lm::Buffer<std::byte> scratch(lm::Arena<>::with_alignment(lm::dora_norms_bytes(be, op)));
  const auto work = [&] { lm::dora_norms(be, op, lm::Arena<>{scratch}); };
  const auto make_change = [&] {
    be.run(axes.threads, [&](Index job, Index) {
      const Index begin = job * o / axes.threads, n = (job + 1) * o / axes.threads - begin;
      auto rows = eigen(changed.view().row_range(begin, n));
      rows = eigen(W.view().row_range(begin, n));
      rows.noalias() += 2.f * eigen(B.view().row_range(begin, n)) * eigen(A.view());
      for (Index i = 0; i < n; ++i) other[begin + i] = rows.row(i).norm();
    });
  };
  work(), make_change();
  for (Index i = 0; i < o; ++i) {
    if (!(std::abs(norms[i] - other[i]) <= 1e-3f * other[i])) return state.SkipWithError("the norms differ");
  }
  using lm::bench::span_of;
  const double flop = 2.0 * static_cast<double>(o * r * axes.d_in + r * r * (axes.d_in + o));
  const lm::bench::Traffic traffic{{span_of(W.view()), span_of(A.view()), span_of(B.view())}, {span_of(norms.view())}};
  time_row(state, work, lm::bench::Floor::of<float>(be, {{flop, {traffic}}}), {{"eigen", make_change, false}},
           [&](const lm::bench::Measurement& m) {
             state.counters["flop/s"] = flop / m.time.median;
             state.counters["floor/time"] = m.floor.median;
             state.SetLabel(m.flop_share > 0.5 ? "floor: flop" : "floor: memory");
           });
}

template <class F>
void add(const std::string& family, Axes axes, std::initializer_list<Passes> passes, const F& run) {
  for (const Passes pass : passes) {
    for (const Index n : {1, 2}) {
      axes.pass = pass, axes.threads = n;
      add_row(family, axes, [axes, run](benchmark::State& state) { run(state, axes); });
    }
  }
}

}  // namespace

void register_stages() {
  for (const Index T : {2048, 8192}) add("B10 dropout", {.T = T, .d_in = 4096, .d_out = 4096, .R = 16}, both, dropout);
  add("B6 stages", {.T = 512, .d_in = 4096, .d_out = 11008, .R = 128, .E = 8}, both, mix_lora);
  for (const Index d_out : {4096, 11008}) {
    for (const Index r : {8, 64})
      add("B15 norms", {.T = 0, .d_in = 4096, .d_out = d_out, .R = r}, {Passes::forward}, dora_norms);
  }
  add("double", {.T = 256, .d_in = 1024, .d_out = 1024, .R = 16, .scalar = "double"}, both, in_double);
}

}  // namespace bench
