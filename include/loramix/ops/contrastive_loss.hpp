/// MoRE's contrastive loss between a layer's input and its task embeddings.
///
/// Computes:    mean over sequences with label ≥ 0 and a valid token of CE(cos(h_i, e_τ)/temperature over all tasks τ,
///              label), h_i = x at the first valid token of sequence i, or the mean over its valid tokens; not detached. A
///              zero vector has cos 0 and gradient 0.
/// Source:      MATH.md section 5; MoRE's code (first token, temperature 0.05). The mean is an option of ours.
/// Reads:       x [T, d], embeddings [n_tasks, d], labels [sequences], sequences by segment (default: every row is one),
///              valid [T].
/// Writes:      the value (ops/loss.hpp).
/// Adds to:     dx [T, d], dembeddings [n_tasks, d]; either may be empty.
/// Errors:      shapes, null, aliases; a temperature, or its inverse, that is not above 0 and finite in the type of the sums;
///              sequences not by segment; on the host labels ≥ n_tasks; small workspace.
/// Cost:        O(sequences·n_tasks·d); contrastive_workspace_bytes.
/// Determinism: ops/loss.hpp
/// Example:     tests/ops/losses.cpp
#pragma once
#include <loramix/ops/logit_loss.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// Options of contrastive_loss; the paper's weight is 0.1, and the caller's business.
template <class Acc, Space S = Space::host>
struct ContrastiveOptions {
  double weight = 1;
  double temperature = 0.05;
  bool mean = false;                          // h: the mean over valid tokens
  Groups<S> sequences{};                      // segments
  VectorView<const std::uint8_t, S> valid{};  // [T]
  VectorView<Acc, S> value{};                 // [1]
};

namespace detail {

template <class Acc, Space S>
struct ContrastiveScratch {
  MatrixView<Acc, S> h;      // [N, d] ĥ: of norm 1, or 0
  MatrixView<Acc, S> facts;  // [N, 2] 1/‖h‖ (0 of a zero vector), tokens that it is the mean of
  VectorView<Acc, S> e;      // [n] 1/‖e‖
  MatrixView<Acc, S> cos;    // [N, n]
  MatrixView<Acc, S> dcos;   // [N, n] softmax − onehot
  LossScratch<Acc, S> loss;  // terms [N, 2]
};
template <class Acc, Space S>
ContrastiveScratch<Acc, S> carve_contrastive(Arena<S>& arena, Index sequences, Index tasks, Index d) {
  ContrastiveScratch<Acc, S> s;
  s.h = arena.template matrix<Acc>(sequences, d);
  s.facts = arena.template matrix<Acc>(sequences, 2);
  s.e = arena.template vector<Acc>(tasks);
  s.cos = arena.template matrix<Acc>(sequences, tasks);
  s.dcos = arena.template matrix<Acc>(sequences, tasks);
  s.loss = carve_loss<Acc>(arena, sequences, 1, 2, 0);
  return s;
}

/// 1/‖v‖, 0 of a zero vector.
template <class Acc, Team Tm, class V>
LORAMIX_HD Acc inverse_norm(const Tm& team, Index n, const V& v) {
  using std::sqrt;
  const Acc squares = team.sum(n, [&](Index j) { return v(j) * v(j); });
  return squares == Acc(0) ? Acc(0) : Acc(1) / Acc(sqrt(squares));
}

/// The tokens of a sequence.
template <Space S>
struct Segment {
  Index begin, count;
  LORAMIX_HD Segment(const Groups<S>& groups, Index i, Index tokens) : begin(i), count(1) {
    if (groups.offsets == nullptr) return;
    begin = groups.offsets[i] < 0 ? 0 : groups.offsets[i];  // device offsets were not checked
    const Index end = groups.offsets[i + 1] > tokens ? tokens : groups.offsets[i + 1];
    count = end > begin ? end - begin : Index{0};
  }
};

template <class X, class W, class G, class Acc, Space S>
struct Contrastive {
  MatrixView<const X, S> x;
  MatrixView<const W, S> embeddings;
  VectorView<const std::int32_t, S> labels;
  ContrastiveOptions<Acc, S> options;
  MatrixView<X, S> dx;
  MatrixView<G, S> dembeddings;
  ContrastiveScratch<Acc, S> s;

  /// Row body over tasks.
  struct Norms {
    Contrastive c;
    template <Team Tm>
    LORAMIX_HD void operator()(const Tm& team, Index task) const {
      const Acc inverse =
          inverse_norm<Acc>(team, c.embeddings.cols, [&](Index j) { return widen<Acc>(c.embeddings(task, j)); });
      team.once([&] { c.s.e[task] = inverse; });
    }
  };

  /// Row body over sequences: ĥ, cosines, softmax − onehot and the cross-entropy.
  struct Forward {
    Contrastive c;
    template <Team Tm>
    LORAMIX_HD void operator()(const Tm& team, Index i) const {
      using std::exp;
      using std::log;
      const Index d = c.x.cols, tasks = c.embeddings.rows;
      const Segment<S> of(c.options.sequences, i, c.x.rows);
      const auto in = [&](Index k) { return counts(c.options.valid, of.begin + k); };
      const Index valid = team.sum(of.count, [&](Index k) { return in(k) ? Index{1} : Index{0}; });
      const Index label = c.labels[i];
      if (valid == 0 || label < 0 || label >= tasks) {
        team.each(2, [&](Index j) { c.s.loss.terms(i, j) = c.s.facts(i, j) = Acc(0); });
        team.each(d, [&](Index j) { c.s.h(i, j) = Acc(0); });
        team.each(tasks, [&](Index task) { c.s.cos(i, task) = c.s.dcos(i, task) = Acc(0); });
        return;
      }
      const Index first = -team.maximum(of.count, [&](Index k) { return in(k) ? -k : -of.count; });
      const Index taken = c.options.mean ? of.count - first : Index{1};
      const Acc share = c.options.mean ? Acc(1) / Acc(valid) : Acc(1);
      team.each(d, [&](Index j) {
        Acc sum = Acc(0);
        for (Index k = first; k < first + taken; ++k) sum += in(k) ? widen<Acc>(c.x(of.begin + k, j)) : Acc(0);
        c.s.h(i, j) = share * sum;
      });
      const Acc inverse = inverse_norm<Acc>(team, d, [&](Index j) { return c.s.h(i, j); });
      team.each(d, [&](Index j) { c.s.h(i, j) *= inverse; });
      for (Index task = 0; task < tasks; ++task) {
        const Acc dot = team.sum(d, [&](Index j) { return c.s.h(i, j) * widen<Acc>(c.embeddings(task, j)); });
        team.once([&] { c.s.cos(i, task) = dot * c.s.e[task]; });
      }
      const Acc cold = Acc(1) / Acc(c.options.temperature);
      const Acc top = team.maximum(tasks, [&](Index task) { return c.s.cos(i, task); }) * cold;
      const Acc sum = team.sum(tasks, [&](Index task) { return Acc(exp(c.s.cos(i, task) * cold - top)); });
      team.each(tasks, [&](Index task) {
        const Acc p = Acc(exp(c.s.cos(i, task) * cold - top)) / sum;
        c.s.dcos(i, task) = (p - (task == label ? Acc(1) : Acc(0))) * cold;
      });
      team.once([&] {
        c.s.facts(i, 0) = inverse;
        c.s.facts(i, 1) = Acc(valid);
        c.s.loss.terms(i, 0) = top + Acc(log(sum)) - c.s.cos(i, label) * cold;
        c.s.loss.terms(i, 1) = Acc(1);
      });
    }
  };

  /// weight / sequences that count.
  LORAMIX_HD Acc each() const { return Acc(options.weight) / s.loss.sums(0, 1); }

  /// Row body over sequences: dx of the tokens that made h.
  struct InputSlopes {
    Contrastive c;
    template <Team Tm>
    LORAMIX_HD void operator()(const Tm& team, Index i) const {
      if (c.s.loss.terms(i, 1) == Acc(0)) return;
      const Segment<S> of(c.options.sequences, i, c.x.rows);
      const auto in = [&](Index k) { return counts(c.options.valid, of.begin + k); };
      const Acc share = c.each() * c.s.facts(i, 0) / (c.options.mean ? c.s.facts(i, 1) : Acc(1));
      team.each(c.x.cols, [&](Index j) {
        Acc slope = Acc(0);
        for (Index task = 0; task < c.embeddings.rows; ++task) {
          const Acc e = widen<Acc>(c.embeddings(task, j)) * c.s.e[task];
          slope += c.s.dcos(i, task) * (e - c.s.cos(i, task) * c.s.h(i, j));
        }
        bool more = true;
        for (Index k = 0; k < of.count && more; ++k) {
          if (!in(k)) continue;
          X& place = c.dx(of.begin + k, j);
          place = narrow<X>(widen<Acc>(place) + share * slope);
          more = c.options.mean;
        }
      });
    }
  };

  /// Row body over tasks: their embeddings' gradient, sequences in order.
  struct EmbeddingSlopes {
    Contrastive c;
    template <Team Tm>
    LORAMIX_HD void operator()(const Tm& team, Index task) const {
      if (!(c.s.loss.sums(0, 1) > Acc(0))) return;
      const Acc inverse = c.s.e[task], scale = c.each() * inverse;
      team.each(c.x.cols, [&](Index j) {
        const Acc e = widen<Acc>(c.embeddings(task, j)) * inverse;
        Acc slope = Acc(0);
        for (Index i = 0; i < c.labels.size; ++i) {
          slope += c.s.dcos(i, task) * (c.s.h(i, j) - c.s.cos(i, task) * e);
        }
        G& place = c.dembeddings(task, j);
        place = narrow<G>(widen<Acc>(place) + scale * slope);
      });
    }
  };
};

}  // namespace detail

/// Bytes of workspace that contrastive_loss takes.
template <class Acc, Space S = Space::host>
Index contrastive_workspace_bytes(Index sequences, Index tasks, Index d) {
  return Arena<S>::with_alignment(
      carved_bytes<S>([&](Arena<S>& a) { detail::carve_contrastive<Acc>(a, sequences, tasks, d); }));
}

/// Adds to dx and dembeddings.
template <class Backend, class XC, class WC, class X, class G, Space S>
loss_value_t<accumulation_t<X>, S> contrastive_loss(const Backend& be, MatrixView<XC, S> x,
                                                    MatrixView<WC, S> embeddings,
                                                    VectorView<const std::int32_t, S> labels, MatrixView<X, S> dx,
                                                    MatrixView<G, S> dembeddings,
                                                    const ContrastiveOptions<accumulation_t<X>, S>& options,
                                                    Arena<S> work) {
  using Acc = accumulation_t<X>;
  using W = std::remove_const_t<WC>;
  const char* const op = "contrastive_loss";
  const Groups<S>& sequences = options.sequences;
  check::view(op, "x", x);
  check::shape(op, "embeddings", embeddings, "the number of tasks", embeddings.rows, "the columns of x", x.cols);
  check::at_least(op, "the number of tasks", embeddings.rows, 1);
  const Acc temperature = static_cast<Acc>(options.temperature);
  check::above_zero(op, "temperature", temperature);
  check::above_zero(op, "1 / temperature", Acc(1) / temperature);
  if (!sequences.per_token() && (sequences.offsets == nullptr || sequences.of_segment != nullptr)) {
    fail(check::detail::about(ErrorCode::value, op, "sequences") << " must be segments, each its own");
  }
  const Index n = detail::check_sequences<Acc>(op, sequences, x.rows);
  detail::check_labels(op, labels, n, embeddings.rows);
  detail::check_mask(op, options.valid, x.rows);
  detail::check_value_place(op, options.value);
  check::view(op, "dx", dx);
  check::view(op, "dembeddings", dembeddings);
  if (dx.data != nullptr) {
    check::shape(op, "dx", dx, "the rows of x", x.rows, "the columns of x", x.cols);
    check::disjoint(op, "dx", dx, "x", x);
    check::disjoint(op, "dx", dx, "embeddings", embeddings);
    check::disjoint(op, "dx", dx, "dembeddings", dembeddings);
  }
  if (dembeddings.data != nullptr) {
    check::shape(op, "dembeddings", dembeddings, "the number of tasks", embeddings.rows, "the columns of x", x.cols);
    check::disjoint(op, "dembeddings", dembeddings, "x", x);
    check::disjoint(op, "dembeddings", dembeddings, "embeddings", embeddings);
  }
  work.require(op, "work",
               carved_bytes<S>([&](Arena<S>& a) { detail::carve_contrastive<Acc>(a, n, embeddings.rows, x.cols); }));
  using Bodies = detail::Contrastive<X, W, G, Acc, S>;
  const Bodies all{x,
                   embeddings,
                   labels,
                   options,
                   dx,
                   dembeddings,
                   detail::carve_contrastive<Acc>(work, n, embeddings.rows, x.cols)};
  for_rows<S>(be, embeddings.rows, typename Bodies::Norms{all});
  for_rows<S>(be, n, typename Bodies::Forward{all});
  detail::sum_terms(be, all.s.loss);
  const auto place = detail::value_place(all.s.loss, options.value);
  for_rows<S>(be, 1, detail::MeanValue<Acc, S>{all.s.loss.sums, Acc(1), place});
  if (options.weight != 0) {
    if (dx.data != nullptr) for_rows<S>(be, n, typename Bodies::InputSlopes{all});
    if (dembeddings.data != nullptr) for_rows<S>(be, embeddings.rows, typename Bodies::EmbeddingSlopes{all});
  }
  return detail::returned(place, options.value);
}

}  // namespace LORAMIX_ABI
}  // namespace loramix
