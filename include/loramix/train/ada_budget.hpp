/// AdaLoRA's rank budget over all layers: importance, pruning, and the loss that keeps the factors orthogonal.
///
/// Computes:    measure: I = |w ∂w|, Ī ← β1 Ī + (1−β1) I, then Ū ← β2 Ū + (1−β2)|I − Ī| with the new Ī, both from 0.
///              prune:   S = Ī ∘ Ū, score_j = S(λ_j) + mean S(A_j) + mean S(B_j); the ⌊b(n)⌋ best over all
///                       layers stay, ties go to the lower (layer, rank), NaN is worst; λ of the others becomes 0:
///                       its gradient stays, it may return.
///              b(n) = b_0 for n < n_i, b_T for n ≥ N − n_f, else b_T + (b_0 − b_T)(1 − (n − n_i)/(N − n_f − n_i))³.
///              orthogonality: mean over layers of ‖BᵀB − I‖_F + ‖AAᵀ − I‖_F (or squared), gradient 0 at 0.
/// Source:      Zhang et al. 2023 (arXiv 2303.10512), equations 4, 7 to 10, 19; MATH.md section 4. PEFT averages the
///              loss over 2L matrices: half our value.
/// Reads:       layers' A [r, d_in], B [d_out, r], λ [1, r], and their gradients, of task and orthogonality.
/// Writes:      λ of pruned ranks; on the host also each layer's active_rank; the loss [1].
/// Adds to:     gradients of A and B, weight times the loss's; the value is without its weight.
/// Errors:      n_i + n_f > N, an interval below 1, budgets below 0 or b_T > b_0, layers that are not those it was made
///              for, gradients that are not theirs: before any write.
/// Cost:        a few flop per parameter and step; prune (Σr)² comparisons; the loss 4·r²·(d_in + d_out) flop and r² +
///              1 values of workspace. The constructor allocates, nothing else does; nothing waits for the device.
/// Determinism: sums in a fixed order; the same ranks whatever the threads.
/// Example:     tests/adapter/ada_lora.cpp
#pragma once
#include <cmath>
#include <span>
#include <vector>

#include <loramix/adapter/ada_lora.hpp>
#include <loramix/ops/reparam.hpp>
#include <loramix/train/clip.hpp>
#include <loramix/train/groups.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// When and how far ranks are pruned; steps count from 0, budgets are ranks over all layers.
struct AdaBudgetOptions {
  Index total_steps = 0;      // N
  Index initial_steps = 0;    // n_i
  Index final_steps = 0;      // n_f
  Index interval = 1;         // Δn
  double initial_budget = 0;  // b_0
  double final_budget = 0;    // b_T
  double beta1 = 0.85;
  double beta2 = 0.85;
};

/// ⌊b(n)⌋.
inline Index budget_at(const AdaBudgetOptions& o, Index n) {
  const auto floored = [](double b) { return static_cast<Index>(std::floor(b)); };
  if (n < o.initial_steps) return floored(o.initial_budget);
  if (n >= o.total_steps - o.final_steps) return floored(o.final_budget);
  const double left = 1 - static_cast<double>(n - o.initial_steps) /
                              static_cast<double>(o.total_steps - o.final_steps - o.initial_steps);
  return floored(o.final_budget + (o.initial_budget - o.final_budget) * left * left * left);
}

namespace detail {

/// Row body: the two averages of a chunk of a flat buffer.
template <class W, class G, class Acc, Space S>
struct AdaMeasure {
  VectorView<const W, S> weights;   // [n]
  VectorView<const G, S> gradient;  // [n]
  VectorView<Acc, S> importance, uncertainty;
  Acc beta1, beta2;
  const Clip* guard;
  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index row) const {
    if (guard != nullptr && !guard->finite) return;
    const Index begin = row * flat_chunk, left = weights.size - begin;
    team.each(left < flat_chunk ? left : flat_chunk, [&](Index k) {
      const Index i = begin + k;
      const Acc product = widen<Acc>(weights[i]) * widen<Acc>(gradient[i]);
      const Acc now = product < Acc(0) ? -product : product;
      importance[i] = beta1 * importance[i] + (Acc(1) - beta1) * now;
      const Acc gap = now - importance[i];
      uncertainty[i] = beta2 * uncertainty[i] + (Acc(1) - beta2) * (gap < Acc(0) ? -gap : gap);
    });
  }
};

/// Row body: score of rank j of one layer; views lie in its averages as the parameters in its buffer.
template <class Acc, Space S>
struct AdaScore {
  MatrixView<const Acc, S> a[2], b[2], lambda[2];  // [r, d_in], [r, d_out] (Bᵀ), [1, r]; importance, uncertainty
  VectorView<Acc, S> scores;                       // [r]
  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index j) const {
    const Acc in = team.sum(a[0].cols, [&](Index c) { return a[0](j, c) * a[1](j, c); });
    const Acc out = team.sum(b[0].cols, [&](Index c) { return b[0](j, c) * b[1](j, c); });
    team.once([&] {
      const Acc mean_in = a[0].cols == 0 ? Acc(0) : in / Acc(a[0].cols);
      const Acc mean_out = b[0].cols == 0 ? Acc(0) : out / Acc(b[0].cols);
      scores[j] = lambda[0](0, j) * lambda[1](0, j) + mean_in + mean_out;
    });
  }
};

/// Row body: keeps rank first + j of one layer if fewer than `budget` of all ranks are better.
template <class W, class Acc, Space S>
struct AdaPrune {
  VectorView<const Acc, S> scores;  // [Σr]
  Index first, budget;
  MatrixView<W, S> lambda;           // [1, r] of this layer
  VectorView<std::uint8_t, S> kept;  // [Σr]
  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index j) const {
    const Index mine = first + j;
    const Acc score = scores[mine];
    const Index better = team.sum(scores.size, [&](Index i) {
      const Acc other = scores[i];
      const bool number = other == other, more = number && (!(score == score) || other > score);
      const bool tied = other == score || (!number && !(score == score));
      return Index{more || (tied && i < mine)};
    });
    team.once([&] {
      kept[mine] = better < budget;
      if (better >= budget) lambda(0, j) = narrow<W>(0.0);
    });
  }
};

/// Row body: M_jk = ⟨row j, row k⟩ − δ_jk, row = j·r + k.
template <class W, class Acc, Space S>
struct GramLessIdentity {
  MatrixView<const W, S> rows;  // [r, n]
  MatrixView<Acc, S> gram;      // [r, r]
  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index row) const {
    const Index j = row / gram.cols, k = row % gram.cols;
    const Acc dot = team.sum(rows.cols, [&](Index c) { return widen<Acc>(rows(j, c)) * widen<Acc>(rows(k, c)); });
    team.once([&] { gram(j, k) = dot - Acc(j == k ? 1 : 0); });
  }
};

/// Row body of one row: norm ← ‖M‖²_F, value[0] += share · (‖M‖ or ‖M‖²).
template <class Acc, Space S>
struct GramNorm {
  MatrixView<const Acc, S> gram;
  VectorView<Acc, S> norm, value;  // [1]
  Acc share;
  bool squared;
  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index) const {
    const Acc squares = team.sum(gram.rows * gram.cols, [&](Index i) { return gram.data[i] * gram.data[i]; });
    using std::sqrt;
    team.once([&] {
      norm[0] = sqrt(squares);
      value[0] += share * (squared ? squares : norm[0]);
    });
  }
};

/// Row body: d row j += coefficient · Σ_k M_jk row k, coefficient = 2w/‖M‖ (0 at 0), or 4w squared.
template <class W, class G, class Acc, Space S>
struct GramGradient {
  MatrixView<const W, S> rows;    // [r, n]
  MatrixView<const Acc, S> gram;  // [r, r]
  VectorView<const Acc, S> norm;  // [1]
  MatrixView<G, S> gradient;      // [r, n]
  Acc weight;
  bool squared;
  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index row) const {
    const Acc by = squared ? Acc(4) * weight : norm[0] == Acc(0) ? Acc(0) : Acc(2) * weight / norm[0];
    each_output(team, row, rows.cols, [&](Index j, Index c) {
      Acc sum = Acc(0);
      for (Index k = 0; k < rows.rows; ++k) sum += gram(j, k) * widen<Acc>(rows(k, c));
      gradient(j, c) = narrow<G>(widen<Acc>(gradient(j, c)) + by * sum);
    });
  }
};

/// Row body of one row: value[0] = 0.
template <class Acc, Space S>
struct ClearValue {
  VectorView<Acc, S> value;
  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index) const {
    team.once([&] { value[0] = Acc(0); });
  }
};

}  // namespace detail

/// What decides which ranks of some layers live. Layers are given in the same order every time.
template <class A>
class AdaBudget {
 public:
  using Acc = typename A::precision::accumulation;
  static constexpr Space space = A::space;

  AdaBudget(std::span<A* const> layers, const AdaBudgetOptions& options) : options_(options) {
    const char* const op = "AdaBudget";
    check::at_least(op, "initial_steps", options.initial_steps, 0);
    check::at_least(op, "final_steps", options.final_steps, 0);
    check::at_least(op, "total_steps", options.total_steps, options.initial_steps + options.final_steps);
    check::at_least(op, "interval", options.interval, 1);
    detail::check_number(op, "final_budget", options.final_budget);
    detail::check_number(op, "initial_budget", options.initial_budget);
    detail::check_number(op, "beta1", options.beta1, 1);
    detail::check_number(op, "beta2", options.beta2, 1);
    if (options.final_budget > options.initial_budget) {
      fail(check::detail::about(ErrorCode::value, op, "final_budget")
           << " of " << static_cast<Index>(options.final_budget) << " is above initial_budget, which is "
           << static_cast<Index>(options.initial_budget));
    }
    for (const A* layer : layers) {
      const Index size = layer->parameters().size;
      layers_.push_back({Buffer<Acc, space>(size), Buffer<Acc, space>(size), ranks_, detail::layout_of(*layer)});
      ranks_ += layer->config().rank;
    }
    scores_ = Buffer<Acc, space>(ranks_);
    kept_ = Buffer<std::uint8_t, space>(ranks_);
  }

  /// Every step, with the gradients of the whole loss and the weights they belong to. Give `guard` what clip_norm returned: one
  /// gradient that is not finite would stay in the averages for good; with a guard that says so nothing changes.
  template <class Backend>
  void measure(const Backend& be, std::span<A* const> layers, std::span<gradient_t<A>* const> gradients,
               const Clip* guard = nullptr) {
    check_layers("measure", layers);
    check::same("measure", "gradients", "size", size_of(gradients), "the number of layers", size_of(layers));
    for (std::size_t i = 0; i < layers.size(); ++i) {  // all of them before the first average is written
      detail::check_gradient_of("measure", *layers[i], *gradients[i]);
    }
    for (std::size_t i = 0; i < layers.size(); ++i) {
      const VectorView<const typename A::element, space> weights = layers[i]->parameters();
      using Body = detail::AdaMeasure<typename A::element, typename A::precision::gradient, Acc, space>;
      for_rows<space>(be, detail::flat_rows(weights.size),
                      Body{weights, gradients[i]->parameters(), layers_[i].importance.view(),
                           layers_[i].uncertainty.view(), Acc(options_.beta1), Acc(options_.beta2), guard});
    }
  }

  /// After the optimiser's step n: prunes if it is time to, and says whether it was.
  template <class Backend>
  bool prune(const Backend& be, std::span<A* const> layers, Index n) {
    check_layers("prune", layers);
    if (n < options_.initial_steps || (n - options_.initial_steps) % options_.interval != 0) return false;
    for (std::size_t i = 0; i < layers.size(); ++i) {
      const Index rank = layers[i]->config().rank;
      detail::AdaScore<Acc, space> body;
      body.scores = scores_.view().part(layers_[i].first, rank);
      const Buffer<Acc, space>* const averages[] = {&layers_[i].importance, &layers_[i].uncertainty};
      for (int k = 0; k < 2; ++k) {
        const auto at = [&](auto view) {  // the place of a parameter, in an average
          return MatrixView<const Acc, space>{averages[k]->data() + (view.data - layers[i]->parameters().data),
                                              view.rows, view.cols};
        };
        body.a[k] = at(layers[i]->A());
        body.b[k] = at(layers[i]->B().transposed());
        body.lambda[k] = at(layers[i]->lambda());
      }
      for_rows<space>(be, rank, body);
    }
    const Index budget = budget_at(options_, n);
    for (std::size_t i = 0; i < layers.size(); ++i) {
      const Index first = layers_[i].first, rank = layers[i]->config().rank;
      for_rows<space>(be, rank,
                      detail::AdaPrune<typename A::element, Acc, space>{scores_.view(), first, budget,
                                                                        layers[i]->lambda(), kept_.view()});
      if constexpr (space == Space::host) {
        Index alive = 0;
        for (Index j = 0; j < rank; ++j) alive += kept_[first + j];
        layers[i]->set_active_rank(alive);
      }
    }
    return true;
  }

  /// [Σr] as of the last prune. On the device a caller with per_active_rank copies kept() and calls set_active_rank.
  VectorView<const Acc, space> scores() const { return scores_.view(); }
  VectorView<const std::uint8_t, space> kept() const { return kept_.view(); }
  Index budget(Index n) const { return budget_at(options_, n); }
  /// All that training goes on from, to be saved and restored: the averages of layer i [parameters().size].
  VectorView<Acc, space> importance(Index layer) {
    return layers_.at(static_cast<std::size_t>(layer)).importance.view();
  }
  VectorView<Acc, space> uncertainty(Index layer) {
    return layers_.at(static_cast<std::size_t>(layer)).uncertainty.view();
  }

 private:
  struct Layer {
    Buffer<Acc, space> importance, uncertainty;
    Index first;
    std::uint64_t layout;
  };
  template <class Spans>
  static Index size_of(const Spans& spans) {
    return static_cast<Index>(spans.size());
  }
  void check_layers(const char* op, std::span<A* const> layers) const {
    check::same(op, "layers", "size", size_of(layers), "the number this budget was made for", size_of(layers_));
    for (std::size_t i = 0; i < layers.size(); ++i) {
      check::same(op, "a layer", "size", layers[i]->parameters().size, "the size of the one it was made for",
                  layers_[i].importance.size());
      if (detail::layout_of(*layers[i]) == layers_[i].layout) continue;
      fail(check::detail::about(ErrorCode::shape, op, "layer")
           << " " << static_cast<Index>(i) << " has parameters of other shapes than the one this budget was made for");
    }
  }

  AdaBudgetOptions options_;
  std::vector<Layer> layers_;
  Buffer<Acc, space> scores_;
  Buffer<std::uint8_t, space> kept_;
  Index ranks_ = 0;
};

/// The loss's weight in the gradients (0.5 as in PEFT), and its form.
struct OrthogonalityOptions {
  double weight = 0.5;
  bool squared = false;
};

/// Bytes of workspace of orthogonality_loss for layers of at most `rank` ranks.
template <class A>
Index orthogonality_bytes(Index rank) {
  using Acc = typename A::precision::accumulation;
  return Arena<A::space>::with_alignment(carved_bytes<A::space>([&](Arena<A::space>& arena) {
    arena.template matrix<Acc>(rank, rank);
    arena.template vector<Acc>(1);
  }));
}

/// Writes the loss [1]; adds to the gradients of A and B.
template <class Backend, class A>
void orthogonality_loss(const Backend& be, std::span<A* const> layers, std::span<gradient_t<A>* const> gradients,
                        OrthogonalityOptions options, VectorView<typename A::precision::accumulation, A::space> value,
                        Arena<A::space> work) {
  using Acc = typename A::precision::accumulation;
  using W = typename A::element;
  using G = typename A::precision::gradient;
  const char* const op = "orthogonality_loss";
  check::view(op, "value", value);
  check::same(op, "value", "size", value.size, "one", 1);
  check::same(op, "gradients", "size", static_cast<Index>(gradients.size()), "the number of layers",
              static_cast<Index>(layers.size()));
  detail::check_number(op, "weight", options.weight);
  Index rank = 0;
  for (std::size_t i = 0; i < layers.size(); ++i) {
    detail::check_gradient_of(op, *layers[i], *gradients[i]);
    if (layers[i]->config().rank > rank) rank = layers[i]->config().rank;
  }
  const Index bytes = orthogonality_bytes<A>(rank);
  work.require(op, "work", bytes == 0 ? 0 : bytes - Arena<A::space>::alignment);
  const auto memory = work.template matrix<Acc>(rank, rank);
  const auto norm = work.template vector<Acc>(1);

  const double share = layers.empty() ? 0 : 1 / static_cast<double>(layers.size());
  for_rows<A::space>(be, 1, detail::ClearValue<Acc, A::space>{value});
  const auto one = [&](MatrixView<const W, A::space> rows, MatrixView<G, A::space> gradient) {
    const MatrixView<Acc, A::space> gram{memory.data, rows.rows, rows.rows};
    for_rows<A::space>(be, rows.rows * rows.rows, detail::GramLessIdentity<W, Acc, A::space>{rows, gram});
    for_rows<A::space>(be, 1, detail::GramNorm<Acc, A::space>{gram, norm, value, Acc(share), options.squared});
    for_rows<A::space>(be, rows.rows * detail::reparam_blocks(rows.cols),
                       detail::GramGradient<W, G, Acc, A::space>{rows, gram, norm, gradient,
                                                                 Acc(share * options.weight), options.squared});
  };
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const A& layer = *layers[i];
    one(layer.B().transposed(), gradients[i]->B().transposed());
    one(layer.A(), gradients[i]->A());
  }
}

}  // namespace LORAMIX_ABI
}  // namespace loramix
