/// Stochastic gradient descent with momentum, for an adapter (Sgd) and for any flat parameters (sgd_step).
///
/// Computes:    d = g + wd·w;  b = μb + d;  w −= lr·b  (Sutskever et al. 2013, as PyTorch writes it; b from 0, and 0 below
///              the normal numbers). Weights of 16 bits have a float master copy, as in train/adamw.hpp.
/// Reads:       g [n], the gradient.
/// Writes:      w [n], the weights; b [n] and the master [n].
/// Errors:      shape, null, alias; lr or decay negative or not finite; μ outside [0, 1); groups: train/groups.hpp. All
///              before any write.
/// Cost:        6 flop and 5 memory accesses per weight; no allocation in a step. State: one value per weight, none with
///              μ = 0; one more for 16-bit weights.
/// Determinism: every weight by itself: the same bits for any number of threads. A CUDA graph repeats the lr that it was
///              captured with.
/// Example:     tests/train/sgd.cpp:  lm::Sgd opt(lora, {.lr = 0.1, .momentum = 0.9});  opt.step(be, lora, grad);
#pragma once
#include <loramix/ops/rows.hpp>
#include <loramix/train/clip.hpp>
#include <loramix/train/groups.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// The numbers of one step.
struct SgdStep {
  double lr = 0.1;
  double momentum = 0;
  double weight_decay = 0;
};

namespace detail {

/// Row body: chunk `row` of the flat buffers.
template <class W, class G, class M, Space S>
struct SgdRows {
  VectorView<W, S> weights;
  VectorView<const G, S> gradient;
  VectorView<M, S> b, master;  // b: empty without momentum; master: empty where M is W
  M lr, momentum, decay;
  const Clip* guard;

  LORAMIX_HD void element(Index i) const {
    M w;
    if constexpr (is_16bit<W>)
      w = master_of(master[i], weights[i]);
    else
      w = weights[i];
    M d = narrow<M>(gradient[i]) + decay * w;
    if (b.data != nullptr) {
      d = flushed(d + momentum * b[i]);
      b[i] = d;
    }
    w -= lr * d;
    if constexpr (is_16bit<W>) master[i] = w;
    weights[i] = narrow<W>(w);
  }

  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index row) const {
    if (guard != nullptr && !guard->finite) return;
    const Index begin = row * flat_chunk, left = weights.size - begin;
    team.each(left < flat_chunk ? left : flat_chunk, [&](Index i) { element(begin + i); });
  }
};

}  // namespace detail

/// One step of flat parameters w [n] with gradient g [n]; b [n], zeros at first, or empty without momentum. 16-bit
/// weights need their float `master` [n], zeros at first. `guard`, from clip_norm: nothing is done if it says not finite.
template <class Backend, class W, class G, Space S>
void sgd_step(const Backend& be, VectorView<W, S> w, VectorView<G, S> g, VectorView<detail::master_t<W>, S> b,
              const SgdStep& with, VectorView<detail::master_t<W>, S> master = {}, const Clip* guard = nullptr) {
  using M = detail::master_t<W>;
  const char* const op = "sgd_step";
  check::view(op, "w", w);
  detail::check_beside(op, "g", g, w);
  if (!b.empty() || with.momentum != 0) detail::check_beside(op, "b", b, w);
  if constexpr (is_16bit<W>) detail::check_beside(op, "master", master, w);
  detail::check_number(op, "lr", with.lr);
  detail::check_number(op, "weight_decay", with.weight_decay);
  detail::check_number(op, "momentum", with.momentum, 1);
  const detail::SgdRows<W, std::remove_const_t<G>, M, S> body{.weights = w,
                                                              .gradient = g,
                                                              .b = b,
                                                              .master = master,
                                                              .lr = static_cast<M>(with.lr),
                                                              .momentum = static_cast<M>(with.momentum),
                                                              .decay = static_cast<M>(with.weight_decay),
                                                              .guard = guard};
  for_rows<S>(be, detail::flat_rows(w.size), body);
}

/// What an Sgd is made with.
struct SgdOptions {
  double lr = 0.1;
  double momentum = 0;
  double weight_decay = 0;
  std::vector<GroupRule> groups = {};
};

/// An adapter's optimiser: owns momentum and masters, knows the groups.
template <Adapter A>
class Sgd {
 public:
  using State = detail::master_t<typename A::element>;

  explicit Sgd(const A& adapter, const SgdOptions& options = {})
      : ranges_(detail::flat_ranges("Sgd", adapter, options.groups, options.weight_decay)),
        with_{options.lr, options.momentum, 0},
        layout_(detail::layout_of(adapter)),
        size_(adapter.parameters().size),
        b_(options.momentum != 0 ? size_ : 0),
        master_(is_16bit<typename A::element> ? size_ : 0) {
    lr(options.lr);
    detail::check_number("Sgd", "momentum", options.momentum, 1);
  }

  /// The learning rate from the next step on, as a schedule says.
  void lr(double value) {
    detail::check_number("Sgd", "lr", value);
    with_.lr = value;
  }
  double lr() const { return with_.lr; }

  /// One step; none with a `guard` that says not finite.
  template <class Backend>
  void step(const Backend& be, A& adapter, const gradient_t<A>& gradient, const Clip* guard = nullptr) {
    detail::check_step("Sgd", adapter, gradient, size_, layout_);
    const auto weights = adapter.parameters();
    const auto slopes = gradient.parameters();
    for (const detail::FlatRange& range : ranges_) {
      if (range.frozen) continue;
      const SgdStep with{with_.lr * range.lr_ratio, with_.momentum, range.weight_decay};
      const auto part = [&range](auto flat) { return flat.empty() ? flat : flat.part(range.begin, range.size); };
      sgd_step(be, part(weights), part(slopes), part(b_.view()), with, part(master_.view()), guard);
    }
  }

  /// The state [parameters().size], or empty, for checkpoints.
  VectorView<State, A::space> momentum() { return b_.view(); }
  VectorView<State, A::space> master() { return master_.view(); }

 private:
  std::vector<detail::FlatRange> ranges_;
  SgdStep with_;
  std::uint64_t layout_;
  Index size_;
  Buffer<State, A::space> b_, master_;
};

}  // namespace LORAMIX_ABI
}  // namespace loramix
