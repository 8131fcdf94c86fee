/// Weighted sums of adapters as one LoRA, and LoRAs of smaller rank.
///
/// Computes:    weighted_sum: ΔW = Σ_i w_i s_i B_i diag(g_i) A_i, exact by concatenation: A = the A_i one below the other, B =
///              the w_i s_i B_i diag(g_i) side by side, s = 1; g_i a rank scale (AdaLoRA's λ) or 1. Weights may be negative,
///              ranks and scales differ. (Adding the A_i and the B_i element by element, as PEFT's "linear" does, has cross
///              terms B_i A_j.)
///              truncate: the nearest ΔW of a smaller rank, by ops/svd.hpp: B = P √σ, A = √σ Qᵀ, s = 1. Its error in the
///              Frobenius norm is (Σ_{i>r} σ_i²)^½.
/// Source:      MATH.md section 4, last sentence; Eckart and Young 1936.
/// Reads:       A_i [r_i, d_in], B_i [d_out, r_i].
/// Writes:      a new LoRA, whose elements are rounded once from double.
/// Errors:      no adapters, shapes that differ, a rank below 0, weights, scales or parameters that are not finite. A gate
///              that depends on the token does not compile: there is no one ΔW.
/// Cost:        a copy; truncate as ops/svd.hpp. No d_out × d_in matrix.
/// Determinism: double, one order.
/// Example:     tests/adapter/combine.cpp
#pragma once
#include <span>

#include <loramix/adapter/experts.hpp>
#include <loramix/adapter/merge.hpp>
#include <loramix/ops/svd.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// A term of a sum.
template <class A>
struct Weighted {
  const A* adapter;
  double weight = 1;
};

/// A LoRA of smaller rank, and what that cost.
template <class L>
struct Truncated {
  L lora;
  double error = 0;      // ‖ΔW − truncated ΔW‖_F, before rounding to L's elements
  Buffer<double> sigma;  // [min(d_out, d_in, rank before)] all singular values, falling
};

namespace detail {
/// The LoRA with an adapter's types.
template <class A>
struct lora_of {
  using type = Lora<typename A::precision, A::space, typename A::element>;
};
template <template <class, Space, class> class A, class P, Space S, class T>
struct lora_of<A<P, S, T>> {
  using type = Lora<P, S, T>;
};

template <class L>
L unscaled(Index d_in, Index d_out, Index rank) {
  return L({.d_in = d_in, .d_out = d_out, .rank = rank, .alpha = static_cast<double>(rank)});
}
}  // namespace detail

/// Σ weight · adapter as one LoRA of the sum of their ranks, without dropout.
template <ProductAdapter A>
  requires(A::space == Space::host)
typename detail::lora_of<A>::type weighted_sum(std::span<const Weighted<A>> terms) {
  using Gate = decltype(std::declval<const A&>().gate());
  using T = typename A::element;
  static_assert(Gate::facts.token_invariant,
                "loramix: this adapter's gate depends on the token: it has no one delta W to be summed");
  const char* const op = "weighted_sum";
  check::at_least(op, "the number of adapters", static_cast<Index>(terms.size()), 1);
  const Index d_in = terms[0].adapter->A().cols, d_out = terms[0].adapter->B().rows;
  Index ranks = 0;
  for (const Weighted<A>& term : terms) {
    const auto down = term.adapter->A();
    const auto up = term.adapter->B();
    check::same(op, "an adapter", "d_in", down.cols, "the first one's", d_in);
    check::same(op, "an adapter", "d_out", up.rows, "the first one's", d_out);
    if (!is_finite(term.weight) || !is_finite(term.adapter->scale())) {
      fail(check::detail::about(ErrorCode::value, op, "a weight or scale") << " is not finite");
    }
    detail::check_finite(op, "A", down);
    detail::check_finite(op, "B", up);
    detail::finite_rank_scale(op, *term.adapter);
    ranks += up.cols;
  }
  auto sum = detail::unscaled<typename detail::lora_of<A>::type>(d_in, d_out, ranks);
  Index first = 0;
  for (const Weighted<A>& term : terms) {
    const auto up = term.adapter->B();
    const auto g = term.adapter->gate().form(0, up.cols).rank_scale;
    detail::copy_rows(term.adapter->A(), sum.A().row_range(first, up.cols));
    for (Index j = 0; j < up.cols; ++j) {
      const double factor = term.weight * term.adapter->scale() * (g.data == nullptr ? 1.0 : widen<double>(g[j]));
      for (Index o = 0; o < d_out; ++o) sum.B()(o, first + j) = narrow<T>(factor * widen<double>(up(o, j)));
    }
    first += up.cols;
  }
  return sum;
}
template <ProductAdapter A>
auto weighted_sum(std::initializer_list<Weighted<A>> terms) {
  return weighted_sum(std::span<const Weighted<A>>(terms.begin(), terms.size()));
}

/// The nearest LoRA of at most `rank` ranks; of min(rank, d_out, d_in, ranks there are).
template <class P, class T>
Truncated<Lora<P, Space::host, T>> truncate(const Lora<P, Space::host, T>& lora, Index rank) {
  check::at_least("truncate", "rank", rank, 0);
  detail::check_finite("truncate", "A", lora.A());
  detail::check_finite("truncate", "B", lora.B());
  LowRankSvd svd = low_rank_svd(lora.B(), lora.A(), lora.scale());
  const Index k = svd.sigma.size(), r = rank < k ? rank : k;
  Truncated<Lora<P, Space::host, T>> out{
      detail::unscaled<Lora<P, Space::host, T>>(lora.config().d_in, lora.config().d_out, r), 0, {}};
  for (Index j = 0; j < r; ++j) {
    const double root = std::sqrt(svd.sigma[j]);
    for (Index o = 0; o < svd.left.rows(); ++o) out.lora.B()(o, j) = narrow<T>(root * svd.left(o, j));
    for (Index c = 0; c < svd.right.rows(); ++c) out.lora.A()(j, c) = narrow<T>(root * svd.right(c, j));
  }
  double squares = 0;
  for (Index j = k - 1; j >= r; --j) squares += svd.sigma[j] * svd.sigma[j];
  out.error = std::sqrt(squares);
  out.sigma = std::move(svd.sigma);
  return out;
}

}  // namespace LORAMIX_ABI
}  // namespace loramix
