/// AdamW, for an adapter (AdamW) and for any flat parameters (adamw_step).
///
/// Computes:    m = β₁m + (1−β₁)g;  v = β₂v + (1−β₂)g²;  w −= lr·wd·w;  w −= lr·m̂/(√v̂ + ε) with m̂ = m/(1−β₁ᵗ),
///              v̂ = v/(1−β₂ᵗ), t from 1 (MATH.md section 5; Loshchilov & Hutter 2019, algorithm 2). Moments below the
///              normal numbers are 0. Weights of 16 bits have a float master copy: it is updated, the weight is its
///              rounding. A weight that somebody else has written in between (a loaded file, a pruned rank) replaces
///              its master.
/// Reads:       g [n], the gradient.
/// Writes:      w [n], the weights; m, v and the master [n].
/// Errors:      shape, null, alias; lr or decay negative or not finite; ε not above 0 and finite in the moments' type: it is
///              all that is divided by where gradients are 0; β outside [0, 1); t below 1; groups: train/groups.hpp. All
///              before any write.
/// Cost:        about 15 flop and 7 memory accesses per weight; no allocation in a step, on the device one launch for all
///              groups of an adapter. State: 2 values per weight (3 with 16-bit weights), of the accumulation type, owned by
///              the AdamW in the adapter's space.
/// Determinism: every weight by itself: the same bits for any number of threads. A CUDA graph repeats the lr and t that
///              it was captured with: keep steps out of it.
/// Example:     tests/train/adamw.cpp:  lm::AdamW opt(lora, {.lr = 2e-4, .groups = {{"B", {.lr_ratio = 16}}}});
///                                      opt.lr(schedule(step));  opt.step(be, lora, grad);
#pragma once
#include <cmath>

#include <loramix/ops/rows.hpp>
#include <loramix/train/clip.hpp>
#include <loramix/train/groups.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// The numbers of one step.
struct AdamWStep {
  double lr = 1e-3;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double weight_decay = 0;
  Index t = 1;  // this step's number, from 1
};

namespace detail {

/// A part of flat buffers that is stepped in one way; its chunks are rows from `row` on.
template <class M>
struct AdamWPart {
  Index begin, size, row;
  M lr, decay;
};

/// Row body: chunks of the parts of flat buffers, one launch for as many parts as an adapter usually has.
template <class W, class G, class M, Space S>
struct AdamWRows {
  static constexpr int most_parts = 16;
  VectorView<W, S> weights;
  VectorView<const G, S> gradient;
  VectorView<M, S> m, v, master;  // master: empty where M is W
  M beta1, one_less_beta1, beta2, one_less_beta2, eps, correct1, correct2;
  const Clip* guard;
  AdamWPart<M> parts[most_parts] = {};
  int count = 0;

  Index rows() const { return count == 0 ? 0 : parts[count - 1].row + flat_rows(parts[count - 1].size); }
  void add(Index begin, Index size, double lr, double weight_decay) {
    parts[count] = {begin, size, rows(), static_cast<M>(lr), static_cast<M>(lr * weight_decay)};
    ++count;
  }

  LORAMIX_HD void element(Index i, M lr, M decay) const {
    const M g = narrow<M>(gradient[i]);
    M w;
    if constexpr (is_16bit<W>)
      w = master_of(master[i], weights[i]);
    else
      w = weights[i];
    const M mi = flushed(beta1 * m[i] + one_less_beta1 * g), vi = flushed(beta2 * v[i] + one_less_beta2 * (g * g));
    m[i] = mi;
    v[i] = vi;
    w -= decay * w;
    w -= lr * (mi * correct1) / (std::sqrt(vi * correct2) + eps);
    if constexpr (is_16bit<W>) master[i] = w;
    weights[i] = narrow<W>(w);
  }

  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index row) const {
    if (guard != nullptr && !guard->finite) return;
    int p = 0;
    while (p + 1 < count && parts[p + 1].row <= row) ++p;
    const AdamWPart<M> part = parts[p];
    const Index from = (row - part.row) * flat_chunk, left = part.size - from;
    team.each(left < flat_chunk ? left : flat_chunk,
              [&](Index i) { element(part.begin + from + i, part.lr, part.decay); });
  }
};

/// A step without parts yet.
template <class W, class G, class M, Space S>
AdamWRows<W, std::remove_const_t<G>, M, S> adamw_rows(VectorView<W, S> w, VectorView<G, S> g, VectorView<M, S> m,
                                                      VectorView<M, S> v, const AdamWStep& with,
                                                      VectorView<M, S> master, const Clip* guard) {
  static_assert(std::is_same_v<M, master_t<W>>, "loramix: moments are of the weights' type, float for 16-bit weights");
  const char* const op = "adamw_step";
  check::view(op, "w", w);
  check_beside(op, "g", g, w);
  check_beside(op, "m", m, w);
  check_beside(op, "v", v, w);
  check::disjoint(op, "m", as_matrix(m), "v", as_matrix(v));
  if constexpr (is_16bit<W>) check_beside(op, "master", master, w);
  check_number(op, "lr", with.lr);
  check_number(op, "weight_decay", with.weight_decay);
  check::above_zero(op, "eps", static_cast<M>(with.eps));
  check_number(op, "beta1", with.beta1, 1);
  check_number(op, "beta2", with.beta2, 1);
  check::at_least(op, "t", with.t, 1);
  const double t = static_cast<double>(with.t);
  return {.weights = w,
          .gradient = g,
          .m = m,
          .v = v,
          .master = master,
          .beta1 = static_cast<M>(with.beta1),
          .one_less_beta1 = static_cast<M>(1 - with.beta1),
          .beta2 = static_cast<M>(with.beta2),
          .one_less_beta2 = static_cast<M>(1 - with.beta2),
          .eps = static_cast<M>(with.eps),
          .correct1 = static_cast<M>(1 / (1 - std::pow(with.beta1, t))),
          .correct2 = static_cast<M>(1 / (1 - std::pow(with.beta2, t))),
          .guard = guard};
}

}  // namespace detail

/// One step of flat parameters w [n] with gradient g [n] and moments m, v [n] of zeros at first. 16-bit weights need
/// their float `master` [n], zeros at first. `guard` [1], from clip_norm: nothing is done if it says not finite.
template <class Backend, class W, class G, class M, Space S>
void adamw_step(const Backend& be, VectorView<W, S> w, VectorView<G, S> g, VectorView<M, S> m, VectorView<M, S> v,
                const AdamWStep& with, VectorView<M, S> master = {}, const Clip* guard = nullptr) {
  auto body = detail::adamw_rows(w, g, m, v, with, master, guard);
  body.add(0, w.size, with.lr, with.weight_decay);
  for_rows<S>(be, body.rows(), body);
}

/// What an AdamW is made with.
struct AdamWOptions {
  double lr = 1e-3;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double weight_decay = 0;
  std::vector<GroupRule> groups = {};
};

/// An adapter's optimiser: owns the moments and masters, knows the groups, counts the steps.
template <Adapter A>
class AdamW {
 public:
  using State = detail::master_t<typename A::element>;

  explicit AdamW(const A& adapter, const AdamWOptions& options = {})
      : ranges_(detail::flat_ranges("AdamW", adapter, options.groups, options.weight_decay)),
        with_{options.lr, options.beta1, options.beta2, options.eps, 0, 0},
        layout_(detail::layout_of(adapter)),
        m_(adapter.parameters().size),
        v_(adapter.parameters().size),
        master_(is_16bit<typename A::element> ? adapter.parameters().size : 0) {
    lr(options.lr);
    detail::check_number("AdamW", "beta1", options.beta1, 1);
    detail::check_number("AdamW", "beta2", options.beta2, 1);
    check::above_zero("AdamW", "eps", static_cast<State>(options.eps));
  }

  /// The learning rate from the next step on, as a schedule says.
  void lr(double value) {
    detail::check_number("AdamW", "lr", value);
    with_.lr = value;
  }
  double lr() const { return with_.lr; }

  /// One step. With a `guard` that says not finite nothing but the count of steps changes.
  template <class Backend>
  void step(const Backend& be, A& adapter, const gradient_t<A>& gradient, const Clip* guard = nullptr) {
    detail::check_step("AdamW", adapter, gradient, m_.size(), layout_);
    ++with_.t;
    const auto start = detail::adamw_rows(adapter.parameters(), gradient.parameters(), m_.view(), v_.view(), with_,
                                          master_.view(), guard);
    auto body = start;
    const auto launch = [&] {
      for_rows<A::space>(be, body.rows(), body);
      body = start;
    };
    for (const detail::FlatRange& range : ranges_) {
      if (range.frozen) continue;
      if (body.count == body.most_parts) launch();
      body.add(range.begin, range.size, with_.lr * range.lr_ratio, range.weight_decay);
    }
    launch();
  }

  /// Steps taken, and the state [parameters().size], for checkpoints: restore all of it to go on.
  Index steps() const { return with_.t; }
  void steps(Index taken) {
    check::at_least("AdamW", "steps", taken, 0);
    with_.t = taken;
  }
  VectorView<State, A::space> m() { return m_.view(); }
  VectorView<State, A::space> v() { return v_.view(); }
  VectorView<State, A::space> master() { return master_.view(); }

 private:
  std::vector<detail::FlatRange> ranges_;
  AdamWStep with_;
  std::uint64_t layout_;
  Buffer<State, A::space> m_, v_, master_;
};

}  // namespace LORAMIX_ABI
}  // namespace loramix
