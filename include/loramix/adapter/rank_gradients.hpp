/// Gradients of A and B that are scaled rank by rank before they are added: an adapter whose ranks learn at different rates.
///
/// Computes:    dA[j, :] (+)= ratio(j) · (the product's dA[j, :]), dB[:, j] likewise; nothing else is scaled. The adapter says
///              so with gradient_ratio() → {on, operator()(rank) → double}.
/// Source:      MoRE's lr_linear (MATH.md section 4).
/// Reads:       dA [R_a, d_in] and dB [d_out, R], rank-major, cut from the workspace of backward.
/// Adds to:     the gradient's A and B, or assigns with Into::set.
/// Errors:      none of its own. An adapter with side rows cannot use it.
/// Cost:        R·(d_in + d_out) values of workspace and additions.
/// Determinism: every value alone.
/// Example:     tests/adapter/more.cpp
#pragma once
#include <loramix/core/adapter.hpp>
#include <loramix/core/arena.hpp>
#include <loramix/ops/rows.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace detail {

/// Row body: out[j, :] (+)= ratio(j) in[j, :].
template <class Ratio, class T, Space S>
struct ScaleRow {
  Ratio ratio;
  MatrixView<const T, S> in;  // [R, n]
  MatrixView<T, S> out;       // [R, n]
  Into into;
  template <Team Tm>
  LORAMIX_HD void operator()(const Tm& team, Index j) const {
    const T by = static_cast<T>(ratio(j));
    team.each(out.cols, [&](Index c) { out(j, c) = into == Into::add ? out(j, c) + by * in(j, c) : by * in(j, c); });
  }
};

template <class A>
concept ScalesGradients = requires(const A& adapter) {
  adapter.gradient_ratio().on;
};

/// dA and dB before they are scaled; without an address where nothing is.
template <class A>
struct RankGradients {
  using G = typename A::precision::gradient;
  static constexpr Major major = decltype(std::declval<const A&>().B())::major;
  MatrixView<G, A::space> dA;
  MatrixView<G, A::space, major> dB;

  static RankGradients carve(Arena<A::space>& arena, const A& adapter) {
    RankGradients all;
    if constexpr (ScalesGradients<A>) {
      if (!adapter.gradient_ratio().on) return all;
      all.dA = arena.template matrix<G>(adapter.A().rows, adapter.A().cols);
      all.dB = arena.template matrix<G>(adapter.B().cols, adapter.B().rows).transposed();
    }
    return all;
  }
  /// Lets the two ops of backward write here instead of into the gradient.
  template <class Shrink, class Expand>
  void redirect(Shrink& shrink, Expand& expand) const {
    if (dA.data == nullptr) return;
    shrink.dA = dA;
    expand.dB = dB;
    shrink.parameters = expand.parameters = Into::set;
  }
  template <class Backend, class Gradient>
  void add_to(const Backend& be, const A& adapter, Gradient& grad, Into into) const {
    if constexpr (ScalesGradients<A>) {
      if (dA.data == nullptr) return;
      using Body = ScaleRow<decltype(adapter.gradient_ratio()), G, A::space>;
      for_rows<A::space>(be, dA.rows, Body{adapter.gradient_ratio(), dA, grad.A(), into});
      for_rows<A::space>(be, dB.cols, Body{adapter.gradient_ratio(), dB.transposed(), grad.B().transposed(), into});
    }
  }
};

}  // namespace detail
}  // namespace LORAMIX_ABI
}  // namespace loramix
