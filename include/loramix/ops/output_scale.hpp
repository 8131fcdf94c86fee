/// The output scale: one factor per column, after everything is added and before the engine adds its bias.
///
/// Computes:    y (+)= c ∘ (in + Δ), or with `less_in` (c − 1) ∘ in + c ∘ Δ, which is that less in       (forward)
///              dc_i (+)= f_i Σ_t dy ∘ (in + Δ); passed (+)= c ∘ dy, or (c − 1) ∘ dy with `less_in`      (backward)
/// Source:      MATH.md section 1, "Output scale"; IA3's l, DoRA's m/n (f = 1/n: n is constant).
/// Reads:       c [n], in [T, n] (may be y itself, and passed may be dy), Δ [T, n] or empty (0); backward: sum [T, n],
///              dy [T, n], f [n] or empty.
/// Writes:      y [T, n]; sum = in + Δ [T, n] where wanted. Into::add adds to y.
/// Adds to:     dc [1, n], passed [T, n] or empty; Into::set assigns.
/// Errors:      shape, stride, null, alias, overflow; small workspace.
/// Cost:        a few flop per element, one pass; backward T·n accumulation values of scratch where dc is wanted.
/// Determinism: rows are independent, one rounding per element; dc sums tokens in ColumnSum's order.
/// Example:     tests/adapter/dora.cpp
#pragma once
#include <loramix/core/scalars.hpp>
#include <loramix/ops/column_sum.hpp>
#include <loramix/ops/rows.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

namespace detail {
/// The same elements at the same places: an op that goes element by element may work in place.
template <class T, class U, Space S>
bool one_view(MatrixView<T, S> a, MatrixView<U, S> b) {
  return static_cast<const void*>(a.data) == static_cast<const void*>(b.data) && sizeof(T) == sizeof(U) &&
         (a.stride == b.stride || a.rows <= 1);
}

/// Row body: out[t, :] = in[t, :] in the type of out.
template <class In, class Acc, Space S>
struct WidenRow {
  MatrixView<const In, S> in;  // [T, n]
  MatrixView<Acc, S> out;      // [T, n]
  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index t) const {
    team.each(out.cols, [&](Index i) { out(t, i) = widen<Acc>(in(t, i)); });
  }
};
}  // namespace detail

/// Forward, one row at a time.
template <class In, class C, class Acc, class Y, Space S>
struct OutputScale {
  static constexpr const char* name = "output_scale";
  VectorView<const C, S> c;        // [n]
  MatrixView<const In, S> in;      // [T, n]
  MatrixView<const Acc, S> delta;  // [T, n] or empty
  MatrixView<Y, S> y;              // [T, n]
  MatrixView<Acc, S> sum{};        // [T, n] or empty
  bool less_in = false;
  Into into = Into::set;

  void check() const {
    check::view(name, "in", in);
    check::same(name, "c", "size", c.size, "the columns of in", in.cols);
    check::view(name, "c", c);
    check::shape(name, "y", y, "the number of tokens", in.rows, "the columns of in", in.cols);
    const auto beside = [&](const char* what, auto v) {
      check::view(name, what, v);
      if (v.data == nullptr) return;
      check::shape(name, what, v, "the number of tokens", in.rows, "the columns of in", in.cols);
      check::disjoint(name, "y", y, what, v);
    };
    beside("delta", delta);
    beside("sum", sum);
    check::disjoint(name, "y", y, "c", MatrixView<const C, S>{c.data, 1, c.size});
    if (!detail::one_view(y, in)) check::disjoint(name, "y", y, "in", in);
    if (sum.data != nullptr) {
      check::disjoint(name, "sum", sum, "in", in);
      check::disjoint(name, "sum", sum, "delta", delta);
    }
  }

  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index t) const {
    const In* const base = in.row(t);
    const C* const by = c.data;
    if (delta.data == nullptr) {
      if (sum.data != nullptr) {
        team.each(y.cols, [to = sum.row(t), base](Index i) { to[i] = widen<Acc>(base[i]); });
      }
      const Acc less = less_in ? Acc(1) : Acc(0);
      detail::put_row(team, y, t, into, [=](Index i) {
        return (widen<Acc>(by[i]) - less) * widen<Acc>(base[i]) + Acc(0);  // 0 rather than −0 where c is 1
      });
      return;
    }
    const Acc* const added = delta.row(t);
    if (sum.data != nullptr) {
      team.each(y.cols, [to = sum.row(t), base, added](Index i) { to[i] = widen<Acc>(base[i]) + added[i]; });
    }
    if (less_in) {
      detail::put_row(team, y, t, into, [=](Index i) {
        const Acc factor = widen<Acc>(by[i]);
        return (factor - Acc(1)) * widen<Acc>(base[i]) + factor * added[i];
      });
    } else {
      detail::put_row(team, y, t, into, [=](Index i) { return widen<Acc>(by[i]) * (widen<Acc>(base[i]) + added[i]); });
    }
  }
};

/// Backward, one row at a time: what is passed on, and what each token adds to dc.
template <class C, class Acc, class Y, class Passed, Space S>
struct OutputScaleBackward {
  static constexpr const char* name = "output_scale_backward";
  VectorView<const C, S> c;        // [n]
  MatrixView<const Acc, S> sum;    // [T, n] or empty where dc is not wanted
  MatrixView<const Y, S> dy;       // [T, n]
  MatrixView<Passed, S> passed{};  // [T, n] or empty
  Into into = Into::set;           // passed
  bool less_in = false;
  VectorView<const Acc, S> factor{};  // [n] or empty: 1
  MatrixView<Acc, S> terms{};         // [T, n] scratch

  void check() const {
    check::view(name, "dy", dy);
    check::same(name, "c", "size", c.size, "the columns of dy", dy.cols);
    check::view(name, "c", c);
    check::view(name, "factor", factor);
    check::view(name, "sum", sum);
    check::view(name, "passed", passed);
    if (factor.data != nullptr) check::same(name, "factor", "size", factor.size, "the columns of dy", dy.cols);
    if (sum.data != nullptr)
      check::shape(name, "sum", sum, "the number of tokens", dy.rows, "the columns of dy", dy.cols);
    if (passed.data == nullptr) return;
    check::shape(name, "passed", passed, "the number of tokens", dy.rows, "the columns of dy", dy.cols);
    if (!detail::one_view(passed, dy)) check::disjoint(name, "passed", passed, "dy", dy);
    check::disjoint(name, "passed", passed, "sum", sum);
    check::disjoint(name, "passed", passed, "c", MatrixView<const C, S>{c.data, 1, c.size});
  }

  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index t) const {
    const Y* const d = dy.row(t);
    if (terms.data != nullptr) {
      const Acc *const s = sum.row(t), *const by = factor.data;
      Acc* const to = terms.row(t);
      if (by == nullptr) {
        team.each(dy.cols, [=](Index i) { to[i] = widen<Acc>(d[i]) * s[i]; });
      } else {
        team.each(dy.cols, [=](Index i) { to[i] = widen<Acc>(d[i]) * s[i] * by[i]; });
      }
    }
    if (passed.data == nullptr) return;
    const Acc less = less_in ? Acc(1) : Acc(0);
    detail::put_row(team, passed, t, into,
                    [=, by = c.data](Index i) { return (widen<Acc>(by[i]) - less) * widen<Acc>(d[i]); });
  }
};

/// Checks, then runs.
template <class Backend, class In, class C, class Acc, class Y, Space S>
void output_scale(const Backend& be, const OutputScale<In, C, Acc, Y, S>& op) {
  op.check();
  for_rows<S>(be, op.in.rows, op);
}

/// Bytes of the backward inside an arena (Arena::with_alignment gives those of a buffer) at `tokens` tokens of n columns.
template <class Acc, Space S>
Index output_scale_backward_bytes(Index tokens, Index n) {
  return carved_bytes<S>([&](Arena<S>& arena) { arena.template matrix<Acc>(tokens, n); });
}

/// Checks, then runs; dc [1, n] may be empty.
template <class Backend, class C, class Acc, class Y, class Passed, class G, Space S>
void output_scale_backward(const Backend& be, OutputScaleBackward<C, Acc, Y, Passed, S> op, MatrixView<G, S> dc,
                           Into parameters, Arena<S> work) {
  op.check();
  check::view(op.name, "dc", dc);
  if (dc.data != nullptr) {
    check::shape(op.name, "sum", op.sum, "the number of tokens", op.dy.rows, "the columns of dy", op.dy.cols);
    check::shape(op.name, "dc", dc, "one", 1, "the columns of dy", op.dy.cols);
    check::disjoint(op.name, "dc", dc, "dy", op.dy);
    check::disjoint(op.name, "dc", dc, "passed", op.passed);
    check::disjoint(op.name, "dc", dc, "sum", op.sum);
    work.require(op.name, "work", output_scale_backward_bytes<Acc, S>(op.dy.rows, op.dy.cols));
    op.terms = work.template matrix<Acc>(op.dy.rows, op.dy.cols);
  }
  for_rows<S>(be, op.dy.rows, op);
  if (dc.data != nullptr && !dc.empty()) execute(be, ColumnSum<Acc, G, S>{op.terms, {}, dc, parameters}, work);
}

}  // namespace LORAMIX_ABI
}  // namespace loramix
