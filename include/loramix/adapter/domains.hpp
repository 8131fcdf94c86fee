/// What is done with the domains of a MoA: decisions, adding, removing, training one alone, merging one.
///
/// Computes:    route: the router's argmax of every sequence, alone. decide: one decision per sequence from those of all layers
///              (vote of the layers, the last layer's, the first's; ties to the lower expert). Inference by
///                vote, last   a pass in which every layer uses its own argmax and route says which; decide; a second pass
///                             with the decisions as labels of every layer
///                first        route in the first layer, its decisions as labels of the others
///                per layer    no labels
///                forced       the caller's ids as labels
///              add_domain: the new expert, a router row that is the mean of the old ones, bias 0. remove_domain: expert e goes,
///              higher ids move down. domain and set_domain: stage 1 again for one expert ("refit"): train the LoRA alone
///              and put it back. merge_domain: W + s B_e A_e, as adapter/merge.hpp.
/// Source:      MATH.md section 4 (MoA); policies and starting values are ours.
/// Reads:       the adapter; x [T, d_in]; decisions [layers, sequences], −1 = none.
/// Writes:      ids [sequences]; the adapter (new memory: what forward saved before is of another adapter).
/// Errors:      an expert out of range; a LoRA of another shape, rank or scale; no place left for a domain (reserve_domains
///              makes room); the last domain removed; shapes. All before any write.
/// Cost:        route 2·T·E·d_in flop, within workspace_bytes of the adapter; the others copy the parameters once.
/// Determinism: add_domain leaves old parameters, old logits and outputs of sequences that go to old experts bit-identical:
///              every shape stays. reserve_domains changes shapes: the same parameters, outputs equal up to rounding.
/// Example:     tests/adapter/moa.cpp
#pragma once
#include <loramix/adapter/forward.hpp>
#include <loramix/adapter/merge.hpp>
#include <loramix/adapter/moa.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// Which layer decides.
enum class Decision { vote, last, first };

namespace detail {

inline void check_domain(const char* op, Index domain, Index experts) {
  if (domain >= 0 && domain < experts) return;
  fail(check::detail::about(ErrorCode::value, op, "domain") << " is " << domain << ", but there are " << experts);
}

/// Row body: the decision for sequence b.
template <Space S>
struct DecideRow {
  MatrixView<const std::int32_t, S> decisions;  // [layers, sequences]
  Index experts;
  Decision decision;
  VectorView<std::int32_t, S> ids;

  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index b) const {
    team.once([&] {
      if (decision != Decision::vote) {
        ids[b] = decisions(decision == Decision::first ? Index{0} : decisions.rows - 1, b);
        return;
      }
      Index best = -1, most = 0;
      for (Index e = 0; e < experts; ++e) {
        Index votes = 0;
        for (Index l = 0; l < decisions.rows; ++l) votes += decisions(l, b) == e ? 1 : 0;
        if (votes > most) best = e, most = votes;
      }
      ids[b] = static_cast<std::int32_t>(best);
    });
  }
};

/// The same MoA with `config`'s experts and places; expert e is the old expert from(e), or zeros where that is −1.
template <class M, class From>
M rearranged(const M& moa, const MoaConfig& config, const From& from) {
  M next(config);
  const Index r = config.rank;
  for (Index e = 0; e < config.experts; ++e) {
    const Index old = from(e);
    if (old < 0) continue;
    copy_rows(moa.A().row_range(old * r, r), next.A().row_range(e * r, r));
    copy_rows(moa.B().transposed().row_range(old * r, r), next.B().transposed().row_range(e * r, r));
    if (!config.router) continue;
    copy_rows(moa.gate().router.row_range(old, 1), next.gate().router.row_range(e, 1));
    next.gate().bias(0, e) = moa.gate().bias(0, old);
  }
  return next;
}

}  // namespace detail

/// The router's own choice of every sequence, whatever labels the call has.
template <class Backend, ProductAdapter M>
void route(const Backend& be, const M& moa, MatrixView<const typename M::precision::activation, M::space> x,
           VectorView<std::int32_t, M::space> ids, Arena<M::space> work, const ForwardOptions<M::space>& options = {}) {
  constexpr Space S = M::space;
  using Types = detail::ProductOf<M>;
  const char* const op = "route";
  const auto gate = moa.gate();
  check::view(op, "x", x);
  check::view(op, "ids", ids);
  if (!gate.routed()) fail(check::detail::about(ErrorCode::value, op, "the adapter") << " has no router");
  const GateCall<S> call{x.rows, {options.sequences, {}, {}, options.valid}, no_draws};
  gate.check(op, call);
  check::same(op, "ids", "size", ids.size, "the number of sequences", SequenceRows<S>{call}.count());
  detail::check_optional(op, "valid", options.valid, "the number of tokens", x.rows);
  work.require(op, "work", detail::without_alignment<M>(workspace_bytes(be, moa, x.rows)));
  const auto h = work.template matrix<typename Types::Score>(x.rows, gate.router.rows);
  auto state = gate.carve(work, x.rows, false);
  state.ids = ids;
  const auto u = work.template matrix<typename Types::Acc>(x.rows, 0);
  execute(be, typename Types::ShrinkOp{moa.A().row_range(0, 0), gate.side(), x, {}, u, h}, work);
  detail::run_gate(be, gate, h, state, call, work);
}

/// One decision per sequence from those of all layers, −1 where no layer made one.
template <class Backend, Space S>
void decide(const Backend& be, Decision decision, MatrixView<const std::int32_t, S> decisions, Index experts,
            VectorView<std::int32_t, S> ids) {
  check::view("decide", "decisions", decisions);
  check::view("decide", "ids", ids);
  check::at_least("decide", "the number of layers", decisions.rows, 1);
  check::same("decide", "ids", "size", ids.size, "the number of sequences", decisions.cols);
  check::disjoint("decide", "ids", MatrixView<std::int32_t, S>{ids.data, 1, ids.size}, "decisions", decisions);
  for_rows<S>(be, ids.size, detail::DecideRow<S>{decisions, experts, decision, ids});
}

/// Expert e as a LoRA of its own: what stage 1 trains.
template <class P, class T>
Lora<P, Space::host, T> domain(const Moa<P, Space::host, T>& moa, Index e) {
  const MoaConfig& c = moa.config();
  detail::check_domain("domain", e, c.experts);
  Lora<P, Space::host, T> lora({c.d_in, c.d_out, c.rank, c.alpha, c.dropout});
  detail::copy_rows(moa.A().row_range(e * c.rank, c.rank), lora.A());
  detail::copy_rows(moa.B().transposed().row_range(e * c.rank, c.rank), lora.B().transposed());
  return lora;
}

/// Puts a LoRA in the place of expert e; nothing else changes.
template <class P, class T>
void set_domain(Moa<P, Space::host, T>& moa, Index e, const Lora<P, Space::host, T>& lora) {
  detail::check_domain("set_domain", e, moa.config().experts);
  detail::copy_expert("set_domain", lora, moa, e);
}

/// The same parameters with room for `places` domains.
template <class P, class T>
void reserve_domains(Moa<P, Space::host, T>& moa, Index places) {
  MoaConfig config = moa.config();
  check::at_least("reserve_domains", "places", places, config.experts);
  config.places = places;
  moa = detail::rearranged(moa, config, [](Index e) { return e; });
}

/// Appends an expert.
template <class P, class T>
void add_domain(Moa<P, Space::host, T>& moa, const Lora<P, Space::host, T>& lora) {
  MoaConfig config = moa.config();
  const Index added = config.experts++;
  if (added == moa.config().room()) {
    fail(check::detail::about(ErrorCode::value, "add_domain", "places")
         << " are " << added << " and all taken: reserve_domains makes room, and changes the order of sums");
  }
  Moa<P, Space::host, T> next = detail::rearranged(moa, config, [&](Index e) { return e < added ? e : Index{-1}; });
  detail::copy_expert("add_domain", lora, next, added);
  for (Index c = 0; config.router && c < config.d_in; ++c) {
    double sum = 0;
    for (Index e = 0; e < added; ++e) sum += widen<double>(moa.gate().router(e, c));
    next.gate().router(added, c) = narrow<T>(sum / static_cast<double>(added));
  }
  moa = std::move(next);
}

/// Takes expert e out; the places stay.
template <class P, class T>
void remove_domain(Moa<P, Space::host, T>& moa, Index e) {
  MoaConfig config = moa.config();
  detail::check_domain("remove_domain", e, config.experts);
  check::at_least("remove_domain", "the number of domains left", config.experts - 1, 1);
  config.places = config.room();
  --config.experts;
  moa = detail::rearranged(moa, config, [e](Index i) { return i < e ? i : i + 1; });
}

/// Makes everything in a gradient zero but expert e's A and B: an optimiser without decay then trains that expert alone.
template <class P, class T>
void keep_domain(Moa<P, Space::host, T>& gradient, Index e) {
  const MoaConfig& c = gradient.config();
  detail::check_domain("keep_domain", e, c.experts);
  const auto zero = [](auto view) {
    for (Index i = 0; i < view.rows; ++i) {
      for (Index j = 0; j < view.cols; ++j) view(i, j) = T{};
    }
  };
  const Index begin = e * c.rank, end = begin + c.rank, R = gradient.ranks();
  zero(gradient.A().row_range(0, begin));
  zero(gradient.A().row_range(end, R - end));
  zero(gradient.B().col_range(0, begin));
  zero(gradient.B().col_range(end, R - end));
  zero(gradient.gate().router);
  zero(gradient.gate().bias);
}

/// Folds expert e into `weights` [d_out, d_in].
template <class Backend, class P, class T, class W>
Merged<W> merge_domain(const Backend& be, const Moa<P, Space::host, T>& moa, Index e, MatrixView<W> weights) {
  return merge(be, domain(moa, e), weights);
}

}  // namespace LORAMIX_ABI
}  // namespace loramix
