// A Subject of any adapter, on the CPU.
#pragma once
#include <algorithm>
#include <cmath>
#include <optional>
#include <type_traits>
#include <utility>

#include <loramix/adapter/explain.hpp>
#include <loramix/adapter/initialise.hpp>
#include <loramix/adapter/pack.hpp>
#include <loramix/bench/layer.hpp>
#include <loramix/core/thread_pool.hpp>
#include <loramix/cpu/cpu.hpp>

#include "suite/forms.hpp"
#include "suite/subject.hpp"

namespace loramix_test {

using SuiteBackend = lm::cpu::Backend<lm::ThreadPool::PoolExecutor>;

/// One, two or three threads: all calls of the suite are of one type of backend.
inline SuiteBackend suite_backend(int threads) {
  static lm::ThreadPool pools[] = {lm::ThreadPool(1), lm::ThreadPool(2), lm::ThreadPool(3)};
  return SuiteBackend{pools[threads - 1].executor()};
}

/// What a batch is told, as forward takes it.
template <class A>
lm::ForwardOptions<lm::Space::host> told_options(const A& adapter, const Told& told, const Call& call) {
  lm::ForwardOptions<lm::Space::host> options{
      .key = call.key, .keep = call.keep, .into = call.into, .dropout_off = call.dropout_off};
  options.sequences = lm::Groups<>::by_segment(told.offsets.data(), told.sequences());
  options.tasks = lm::Groups<>::by_id(told.tasks.data(), told_tasks);
  options.labels = {told.labels.data(), told.sequences()};
  options.valid = {told.valid.data(), static_cast<Index>(told.valid.size())};
  static_cast<void>(adapter);
  return options;
}

template <class A>
class Hosted final : public Subject<typename A::element> {
  using T = typename A::element;
  using Base = Subject<T>;
  using typename Base::Const;
  using typename Base::View;
  using Layer = lm::bench::Layer<A>;
  using Gradient = lm::gradient_t<A>;
  using Saved = decltype(std::declval<Layer&>().forward(std::declval<SuiteBackend>(), std::declval<const A&>(), Const{},
                                                        View{}, lm::Arena<>{}, lm::ForwardOptions<lm::Space::host>{}));
  static constexpr Index most_tokens = 200;

 public:
  Hosted(const typename A::Config& config, const Form<typename A::Config>& form)
      : form_(form), adapter_(config), gradient_(config), layer_(adapter_, most_tokens) {
    this->name = suite_name<A>(form.name);
    this->differences = form.differences;
    this->silent = form.silent;
    this->adds = !lm::MixLoraAdapter<A> && !requires { adapter_.output_rows(1, 1); };
    this->draws = adapter_.dropout() > 0;
    this->stamped = requires { saved_.origin.stamp; };
    this->by_token = !requires { config.places; }
    &&!requires { adapter_.output_rows(1, 1); };
    if constexpr (requires { config.rule.capacity; }) this->by_token = config.rule.capacity == 0;
    if constexpr (requires { config.reads; }) this->by_token = config.reads != lm::Reads::sequence;
  }

  std::unique_ptr<Base> another() const override { return std::make_unique<Hosted>(adapter_.config(), form_); }
  void start(std::uint64_t seed) override {
    if constexpr (requires(lm::Fill & fill) { adapter_.start(fill); }) lm::initialise(adapter_, {.seed = seed});
    layer_.start(suite_backend(1), adapter_);
  }
  std::vector<Tensor<T>> parameters() override { return tensors<A>(adapter_); }
  std::vector<Tensor<T>> gradient() override { return tensors<Gradient>(gradient_); }
  std::vector<Tensor<T>> frozen() override { return tensors<Layer>(layer_); }
  lm::VectorView<T> flat() override { return adapter_.parameters(); }
  lm::VectorView<T> flat_gradient() override { return gradient_.parameters(); }
  lm::Cost cost(Index tokens) const override { return adapter_.cost(tokens); }

  Index in() const override { return layer_.in(); }
  Index out() const override { return layer_.out(); }
  Index out_rows(const Told& told, Index tokens) const override {
    return layer_.out_rows(adapter_, tokens, told.sequences());
  }
  Index workspace_bytes(Index tokens, lm::Pass pass, int threads) const override {
    return layer_.workspace_bytes(suite_backend(threads), adapter_, tokens, pass);
  }
  Index reserve_bytes(Index tokens, lm::Keep keep) const override {
    return layer_.reserve_bytes(adapter_, tokens, keep);
  }

  void forward(Const x, View y, const Told& told, lm::Arena<> work, lm::Arena<>* save, const Call& call) override {
    auto options = told_options(adapter_, told, call);
    options.save = save;
    Saved saved = layer_.forward(suite_backend(call.threads), adapter_, x, y, work, options);
    if (save != nullptr) saved_ = saved;
  }
  void backward(Const x, Const dy, View dx, lm::Arena<> work, lm::BackwardOptions options, bool parameters,
                int threads) override {
    const SuiteBackend be = suite_backend(threads);
    if (parameters)
      layer_.backward(be, adapter_, saved_, x, dy, dx, gradient_, work, options);
    else
      layer_.backward(be, adapter_, saved_, x, dy, dx, lm::frozen, work, options);
  }
  void backward_of_copy(Const x, Const dy, View dx, lm::Arena<> work) override {
    Saved copy = saved_;
    layer_.backward(suite_backend(1), adapter_, copy, x, dy, dx, gradient_, work, {});
  }
  void take_saved(Base& other) override { saved_ = static_cast<Hosted&>(other).saved_; }

  Seen<T> scores() const override {
    if constexpr (requires { saved_.scores; })
      return saved_.scores;
    else
      return {};
  }
  bool clear_choices() const override;
  void remember(const Told& told) override;
  void hold(View y, const Told& told) const override;

  Index forward_packed(Const x, View y, const Told& told, const Call& call) override {
    if constexpr (requires { requires !A::has_pack; }) {
      return -1;
    } else {
      const SuiteBackend be = suite_backend(call.threads);
      const auto packed = [&] {
        if constexpr (lm::DoraAdapter<A>)
          return lm::prepack(be, adapter_, layer_.base());
        else
          return lm::prepack(be, adapter_);
      }();
      packed.require_current(adapter_);
      const Index bytes = layer_.workspace_bytes(be, packed.values(), x.rows);
      lm::Buffer<std::byte> memory(bytes);
      const lm::Arena<> work{memory.data(), bytes};
      const auto options = told_options(adapter_, told, call);
      if constexpr (lm::DoraAdapter<A>)
        lm::forward(be, packed, layer_.base(), x, y, work, options);
      else if constexpr (lm::MixLoraAdapter<A>)  // its stages' packs are in tests/adapter/packs.cpp
        layer_.forward(be, packed.values(), x, y, work, options);
      else
        lm::forward(be, packed, x, y, work, options);
      return bytes;
    }
  }
  bool explained(Index tokens, std::FILE* to) const override {
    lm::print(lm::explain(suite_backend(1), adapter_, tokens), to);
    return true;
  }

 private:
  template <class Visited, class Self>
  static std::vector<Tensor<T>> tensors(Self& self) {
    std::vector<Tensor<T>> all;
    const auto add = [&](const char* name, auto view, const char* group) {
      all.push_back({name, group, view.data, view.rows, view.cols, decltype(view)::major == lm::Major::column});
    };
    if constexpr (std::is_same_v<Visited, Layer>)
      Visited::visit(self, [&](const char* name, auto view) { add(name, view, "frozen"); });
    else
      Visited::visit(self, [&](const char* name, auto view, lm::ParameterGroup group) { add(name, view, group.name); });
    return all;
  }
  /// The factor 1 + p_c − stop(p_c) of every row of scores, or of its logits: where p comes from, and how it stands.
  std::vector<double> straight_through() const;

  Form<typename A::Config> form_;
  A adapter_;
  Gradient gradient_;
  Layer layer_;
  Saved saved_{};
  std::vector<double> remembered_;
};

template <class A>
bool Hosted<A>::clear_choices() const {
  const Seen<T> s = scores();
  const bool chosen = s.chosen.data != nullptr;
  if (!chosen && s.ids.data == nullptr) return true;
  bool clear = true;
  std::vector<double> weights;
  for (Index t = 0; t < s.logits.rows; ++t) {
    double sum = 0;
    for (Index e = 0; e < s.logits.cols; ++e) {
      for (Index f = 0; f < e; ++f) {
        clear = clear && std::abs(static_cast<double>(s.logits(t, e)) - static_cast<double>(s.logits(t, f))) > 2e-3;
      }
    }
    if constexpr (requires { adapter_.config().rule.top_p; }) {
      for (Index i = 0; i < s.chosen.cols && s.chosen(t, i) >= 0; ++i) {
        sum += static_cast<double>(s.p(t, s.chosen(t, i)));
        weights.push_back(static_cast<double>(s.weights(t, i)));
        clear = clear && std::abs(sum - adapter_.config().rule.top_p) > 1e-3;
      }
    }
  }
  std::sort(weights.begin(), weights.end());  // places go by weight
  for (std::size_t i = 1; i < weights.size(); ++i) {
    clear = clear && (weights[i] == 1 || weights[i] > weights[i - 1] + 1e-4);
  }
  return clear;
}

template <class A>
std::vector<double> Hosted<A>::straight_through() const {
  std::vector<double> stands;
  const Seen<T> s = scores();
  bool raw = false, on = false;
  if constexpr (requires { adapter_.gate().straight_through; }) on = adapter_.gate().straight_through;
  if constexpr (requires { adapter_.gate().rule.straight_through; }) {
    raw = adapter_.gate().rule.straight_through == lm::StraightThrough::raw_logit;
    on = adapter_.gate().rule.straight_through != lm::StraightThrough::none;
  }
  for (Index row = 0; on && row < s.p.rows; ++row) {
    const Index c = s.ids(row, 0);
    stands.push_back(c < 0 ? 0 : static_cast<double>(raw ? s.logits(row, c) : s.p(row, c)));
  }
  return stands;
}

template <class A>
void Hosted<A>::remember(const Told&) {
  if constexpr (lm::DoraAdapter<A>) {
    remembered_.clear();
    for (Index o = 0; o < saved_.inverse.size; ++o) remembered_.push_back(static_cast<double>(saved_.inverse[o]));
  } else {
    remembered_ = straight_through();
  }
}

template <class A>
void Hosted<A>::hold(View y, const Told& told) const {
  if constexpr (lm::DoraAdapter<A>) {  // ΔY = (m/n) ∘ sum − X Wᵀ, with the remembered n
    for (Index t = 0; t < y.rows; ++t) {
      for (Index o = 0; o < y.cols; ++o) {
        const double of_n = remembered_[static_cast<std::size_t>(o)] / static_cast<double>(saved_.inverse[o]);
        y(t, o) += static_cast<T>((of_n - 1) * static_cast<double>(saved_.ratio[o] * saved_.sum(t, o)));
      }
    }
  } else {
    const std::vector<double> now = straight_through();
    for (Index t = 0; t < y.rows && !now.empty(); ++t) {
      Index row = told.tasks[static_cast<std::size_t>(t)];
      if constexpr (requires { adapter_.config().places; }) {
        row = lm::Groups<>::by_segment(told.offsets.data(), told.sequences()).segment_of(t);
        if (told.labels[static_cast<std::size_t>(row)] >= 0) continue;  // the label has no multiplier
      }
      if (row < 0) continue;
      const auto i = static_cast<std::size_t>(row);
      for (Index o = 0; o < y.cols; ++o) y(t, o) *= static_cast<T>(1 + now[i] - remembered_[i]);
    }
  }
}

template <class A>
std::unique_ptr<Subject<typename A::element>> make_hosted(std::size_t form) {
  auto config = suite_config<A>();
  const auto chosen = forms(config)[form];
  chosen.change(config);
  return std::make_unique<Hosted<A>>(config, chosen);
}

/// A list's adapters Part, Part + suite_parts, …
template <class T, std::size_t Part, class... A>
std::vector<Maker<T>> makers_of(adapters::List<A...>) {
  std::vector<Maker<T>> makers;
  const auto add = [&]<class B, std::size_t I>() {
    if constexpr (I % suite_parts == Part) {
      const auto all = forms(suite_config<B>());
      for (std::size_t f = 0; f < all.size(); ++f) {
        makers.push_back({suite_name<B>(all[f].name), &make_hosted<B>, f});
      }
    }
  };
  [&]<std::size_t... I>(std::index_sequence<I...>) { (add.template operator()<A, I>(), ...); }
  (std::index_sequence_for<A...>());
  return makers;
}

template <class T, std::size_t Part>
std::vector<Maker<T>> part() {
  return makers_of<T, Part>(adapters::All<T>());
}

}  // namespace loramix_test
