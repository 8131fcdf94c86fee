// Every adapter of the list at one shape, beside LoRA of the same total rank, the base product, and, where it is one gated
// product, careful Eigen: the same products on the same operands with the gate's values given, so that what a gate costs
// shows. DoRA and the MixLoRA block multiply frozen weights themselves; their LoRA column holds as many base products.
#include <loramix/adapter/lora.hpp>

#include <adapters/list.hpp>

#include "rows.hpp"

namespace bench {
namespace {

constexpr Index groups = 8;

// A gated product with a router's rows: U = X Aᵀ, H = X sideᵀ, Y += s (U ∘ g) Bᵀ, and its gradients with dH given.
class EigenMixture {
 public:
  EigenMixture(lm::Matrix<float> gate, View<const float> side, View<float> dside, lm::Matrix<float> dh, Index columns)
      : gate_(std::move(gate)),
        dh_(std::move(dh)),
        side_(side),
        dside_(dside),
        u_(gate_.rows(), columns),
        du_(gate_.rows(), columns),
        gated_(gate_.rows(), gate_.cols()),
        wide_(gate_.rows(), gate_.cols()),
        h_(gate_.rows(), side.rows) {}

  void forward(const Backend& be, const Operands<float>& o) {
    product<Backend, float>(be, false, u_, 1, o.x, o.A.transposed());
    if (side_.rows != 0) product<Backend, float>(be, false, h_, 1, o.x, side_.transposed());
    const View<float> u = u_, gated = gated_;
    rows(be, [&](Index begin, Index n) {
      for (Index c = 0; c < gate_.cols(); c += u.cols) {  // as often as A is shared
        eigen(gated.block(begin, n, c, u.cols)) =
            eigen(u.row_range(begin, n)).cwiseProduct(eigen(gate_.view().block(begin, n, c, u.cols)));
      }
    });
    product<Backend, float>(be, true, o.y, o.scale, View<const float>(gated_), o.B.transposed());
  }
  void backward(const Backend& be, const Operands<float>& o) {
    product<Backend, float>(be, false, wide_, o.scale, o.dy, o.B);
    product<Backend, float>(be, true, o.dB.transposed(), o.scale, View<const float>(gated_).transposed(), o.dy);
    const View<float> u = u_, du = du_, wide = wide_;
    rows(be, [&](Index begin, Index n) {
      eigen(du.row_range(begin, n)).setZero();
      for (Index c = 0; c < gate_.cols(); c += u.cols) {
        auto part = eigen(wide.block(begin, n, c, u.cols));
        dgate_ = dgate_ + part.cwiseProduct(eigen(u.row_range(begin, n))).sum();  // stands for dg: a pass over [T, R]
        eigen(du.row_range(begin, n)) += part.cwiseProduct(eigen(gate_.view().block(begin, n, c, u.cols)));
      }
    });
    product<Backend, float>(be, true, o.dA, 1, View<const float>(du_).transposed(), o.x);
    product<Backend, float>(be, true, o.dx, 1, View<const float>(du_), o.A);
    if (side_.rows == 0) return;
    product<Backend, float>(be, true, dside_, 1, std::as_const(dh_).view().transposed(), o.x);
    product<Backend, float>(be, true, o.dx, 1, std::as_const(dh_).view(), side_);
  }

 private:
  template <class F>
  void rows(const Backend& be, const F& f) const {
    const Index all = gate_.rows(), part = (all + be.lanes() - 1) / be.lanes();
    be.run(be.lanes(), [&](Index job, Index) {
      const Index begin = std::min(all, job * part);
      f(begin, std::min(part, all - begin));
    });
  }
  lm::Matrix<float> gate_, dh_;
  View<const float> side_;
  View<float> dside_;
  Scratch<float> u_, du_, gated_, wide_, h_;
  std::atomic<float> dgate_{0};
};

// One step of a product adapter on the side: g as it was, dense, and the router's dH.
template <class A>
std::shared_ptr<EigenMixture> eigen_of(const Backend& be, lm::bench::Case<A>& c, bool train) {
  const A& adapter = std::as_const(c.adapter());
  const Index T = c.x().rows, R = adapter.B().cols;
  lm::Matrix<float> y(T, adapter.B().rows);
  lm::Buffer<std::byte> work(
      std::max(lm::workspace_bytes(be, adapter, T), lm::workspace_bytes(be, adapter, T, lm::Pass::backward))),
      kept(lm::reserve_bytes(adapter, T));
  lm::Arena<> reserve{kept};
  lm::ForwardOptions<lm::Space::host> options = c.options();
  options.save = &reserve;
  auto saved = lm::forward(be, adapter, c.x(), y, lm::Arena<>{work}, options);
  const auto form = lm::detail::ProductOf<A>::form(adapter.gate(), saved.state, saved.call, R);
  lm::Matrix<float> gate(T, R);
  for (Index t = 0; t < T; ++t) {
    const lm::GateRow<float, float, lm::Space::host> row(form, t);
    for (Index j = 0; j < R; ++j) {
      const Index e = form.expert_of(j);
      gate(t, j) = row.open(j, e) ? row.factor(j, e) : 0.0f;
    }
  }
  const View<const float> side = lm::detail::ProductOf<A>::side(adapter.gate());
  lm::Matrix<float> dh(T, side.rows);
  View<float> dside;
  if constexpr (lm::detail::ProductOf<A>::computed) {
    if (train && side.rows != 0) {
      auto grad = lm::zeros_like(adapter);
      lm::backward(be, adapter, saved, c.x(), c.dy(), {}, grad, lm::Arena<>{work});
      for (Index t = 0; t < T; ++t) {
        for (Index e = 0; e < side.rows; ++e) dh(t, e) = saved.dh(t, e);
      }
      dside = lm::detail::side_of(c.gradient());
    }
  }
  return std::make_shared<EigenMixture>(std::move(gate), side, dside, std::move(dh), adapter.A().rows);
}

template <class A>
void adapter_row(benchmark::State& state, const Axes& axes) {
  const Backend be = backend(axes.threads);
  const lm::bench::CaseOptions options{.tokens = axes.T,
                                       .d_in = axes.d_in,
                                       .d_out = axes.d_out,
                                       .total_rank = axes.R,
                                       .experts = axes.E,
                                       .groups = groups,
                                       .inference = !axes.train()};
  lm::bench::Case<A> c(be, options);
  lm::bench::Case<lm::Lora<float>> lora(be, options);
  auto& l = lora.adapter();
  const Operands<float> of_lora{lora.x(),        lora.y(),  std::as_const(l).A(), std::as_const(l).B(),
                                lora.dy(),       lora.dx(), lora.gradient().A(),  lora.gradient().B(),
                                float(l.scale())};
  const auto base = calls<BaseGemm<float>, float>(
      axes, be, std::make_shared<BaseGemm<float>>(axes.T, axes.d_in, axes.d_out), {of_lora});
  const int products = lm::MixLoraAdapter<A> ? 3 : lm::DoraAdapter<A> ? 1 : 0;
  const auto beside = [work = lora.work(true, axes.train()), base, products]() mutable {
    for (int i = 0; i < std::max(products, 1); ++i) work();
    for (int i = 0; i < products; ++i) base();
  };
  std::vector<Baseline> baselines{{"lora", beside, false}, {"base", base, false}};
  Operands<float> o = of_lora;
  if constexpr (lm::ProductAdapter<A>) {
    auto& adapter = c.adapter();
    o = {c.x(),
         c.y(),
         std::as_const(adapter).A(),
         std::as_const(adapter).B(),
         c.dy(),
         c.dx(),
         c.gradient().A(),
         c.gradient().B(),
         float(adapter.scale())};
    baselines.insert(baselines.begin(),
                     {"eigen", calls<EigenMixture, float>(axes, be, eigen_of(be, c, axes.train()), {o})});
  }
  run_row<float>(state, axes, o, c.work(true, axes.train()), c.floor(true, axes.train()), std::move(baselines),
                 [&](const lm::bench::Measurement& m) { c.count(state, m, true, axes.train()); });
}

}  // namespace

void register_adapters() {
  adapters::for_each(adapters::All<float>(), []<class A>() {
    for (const Passes pass : {Passes::forward, Passes::train}) {
      const Axes axes{.T = 512, .d_in = 1024, .d_out = 1024, .R = 64, .E = groups, .pass = pass, .threads = 2};
      add_row(std::string("adapters/") + A::kind, axes,
              [axes](benchmark::State& state) { adapter_row<A>(state, axes); });
    }
  });
}

}  // namespace bench
