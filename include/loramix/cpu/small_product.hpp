/// Row bodies that are products of small matrices, in register tiles: what re-parametrised weights, scores of tasks and DoRA's
/// norms cost.
///
/// Computes:    MixRanks and detail::SmallProduct: out[j, :] (+)= Σ_k left[j, k] right[k, :];
///              RankProducts: out[j, k] (+)= ⟨row j, row k⟩; DoraNorms: its two sums over ranks; for float, bfloat16 and half
///              summed in float.
/// Reads:       what the bodies read (ops/reparam.hpp, ops/row_norm.hpp, ops/small_product.hpp).
/// Adds to:     what they add to.
/// Errors:      none: the bodies were checked.
/// Cost:        no scratch; the bodies' flop at the speed of register tiles.
/// Determinism: k ascends in one chain per element; dot products sum lanes in one fixed order. Path::composed runs the bodies.
/// Example:     tests/cpu/small_product.cpp
#pragma once
#include <loramix/cpu/kernels.hpp>
#include <loramix/cpu/rows.hpp>
#include <loramix/ops/reparam.hpp>
#include <loramix/ops/row_norm.hpp>
#include <loramix/ops/small_product.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace cpu {
namespace detail {

/// a(m, k) = w[j + m, k], widened.
template <class W, Major M>
struct RowsOf {
  MatrixView<const W, Space::host, M> w;
  Index j;
  [[gnu::always_inline]] float at(int m, Index k) const { return widen<float>(w(j + m, k)); }
};

/// out (+)= left right: few rows of many columns.
template <class L, Major M, class R, class Out>
struct FewRows {
  MatrixView<const L, Space::host, M> left;  // [rows, n]
  MatrixView<const R> right;                 // [n, columns]
  MatrixView<Out> out;                       // [rows, columns]
  Into into;

  static constexpr int packets = RegisterTile::wide, rows = RegisterTile::rows_of(packets);
  static constexpr Index job_columns = 256;

  template <class E>
  void run(const Backend<E>& be) const {
    be.run(blocks_of(out.cols, job_columns), [this](Index job, Index) {
      const Index begin = job * job_columns, end = smaller(out.cols, begin + job_columns);
      in_steps<rows>(out.rows, [&](auto m, Index j) {
        Index c = begin;
        for (; c + packets * width <= end; c += packets * width) tile<m>(j, c);
        over_packets(
            end - c, [&](Index i, const auto& lanes) __attribute__((always_inline)) { packet<m>(j, c + i, lanes); });
      });
    });
  }

 private:
  template <int T>
  [[gnu::flatten, gnu::noinline]] void tile(Index j, Index c) const {
    Tile<T, packets> sum;
    sum.clear();
    outer(right.rows, RowsOf<L, M>{left, j}, Panel<R>{right.data + c, right.stride}, sum);
    sum.each([&](int m, int n, Packet v) __attribute__((always_inline)) {
      add_or_set(out.row(j + m) + c + n * width, v, into, WholePacket{});
    });
  }
  template <int T, class Lanes>
  [[gnu::flatten, gnu::noinline]] void packet(Index j, Index c, const Lanes& lanes) const {
    const RowsOf<L, M> a{left, j};
    Packet sum[T];
    unroll<T>([&](int m) __attribute__((always_inline)) { sum[m] = splat(0); });
    for (Index k = 0; k < right.rows; ++k) {
      const Packet b = lanes.load(right.row(k) + c);
      unroll<T>([&](int m) __attribute__((always_inline)) { sum[m] = fma(splat(a.at(m, k)), b, sum[m]); });
    }
    unroll<T>([&](int m) __attribute__((always_inline)) { add_or_set(out.row(j + m) + c, sum[m], into, lanes); });
  }
};

/// out[j, k] (+)= ⟨left[j, :], right[k, :]⟩: long rows, few of them.
template <class L, class R, class Out>
struct DotsOfRows {
  MatrixView<const L> left;   // [rows, n]
  MatrixView<const R> right;  // [columns, n]
  MatrixView<Out> out;        // [rows, columns]
  Into into;

  static constexpr int rows = RegisterTile::dot_rows, columns = RegisterTile::dot_columns;

  template <class E>
  void run(const Backend<E>& be) const {
    be.run(blocks_of(out.rows, rows), [this](Index job, Index) {
      in_steps<columns>(out.cols, [&](auto n, Index k) {
        in_steps<rows>(smaller(rows, out.rows - job * rows), [&](auto m, Index j) { tile<m, n>(job * rows + j, k); });
      });
    });
  }

 private:
  template <int M, int N>
  [[gnu::flatten, gnu::noinline]] void tile(Index j, Index k) const {
    DotRows<L, M> from;
    for (int m = 0; m < M; ++m) from.p[m] = left.row(j + m);
    Tile<M, N> sums;
    sums.clear();
    dot(left.cols, from, WeightRows<R>{right.row(k), right.stride}, sums);
    sums.sum_to(out.row(j) + k, out.stride, N, 1, into);
  }
};

/// DoRA's norms of a panel of rows at a time: B's columns are consecutive where its rows lie a row of B apart.
template <class Base, class W>
struct NormsOfRows {
  DoraNorms<Base, W, float, Space::host> op;

  static constexpr int packets = RegisterTile::wide, ranks = RegisterTile::rows_of(packets);
  static constexpr Index panel = packets * width;

  template <class E>
  void run(const Backend<E>& be) const {
    be.run(blocks_of(op.norms.size, panel), [this](Index job, Index) {
      const Index begin = job * panel, n = smaller(panel, op.norms.size - begin), r = op.A.rows;
      float cross[panel] = {}, square[panel] = {};
      for (Index k = 0; k < r; ++k) {
        for (Index i = 0; i < n; ++i) cross[i] += op.mixed(begin + i, k) * widen<float>(op.B(begin + i, k));
      }
      in_steps<ranks>(r, [&](auto m, Index k) {
        if (n == panel) return tile<m, packets>(k, begin, WholePacket{}, square);
        over_packets(n, [&](Index i, const auto& lanes) { tile<m, 1>(k, begin + i, lanes, square + i); });
      });
      for (Index i = 0; i < n; ++i) op.finish(SerialTeam{}, begin + i, cross[i], square[i]);
    });
  }

 private:
  /// Bᵀ from a row of B on.
  template <class Lanes>
  struct Columns {
    MatrixView<const W> ranks;
    Index begin;
    Lanes lanes;
    [[gnu::always_inline]] Packet packet(Index k, Index n) const {
      return lanes.load(ranks.row(k) + begin + n * width);
    }
  };
  /// square[i] += Σ of (A Aᵀ Bᵀ)[k, i] · Bᵀ[k, i] over T ranks from k on, for N packets of rows i of B.
  template <int T, int N, class Lanes>
  [[gnu::flatten, gnu::noinline]] void tile(Index k, Index begin, const Lanes& lanes, float* square) const {
    const Columns<Lanes> b{op.B.transposed(), begin, lanes};
    Tile<T, N> sum;
    sum.clear();
    outer(op.A.rows, RowsOf<float, Major::row>{op.gram, k}, b, sum);
    Packet total[N];
    unroll<N>([&](int n) __attribute__((always_inline)) { total[n] = load(square + n * width); });
    sum.each([&](int m, int n, Packet v)
                 __attribute__((always_inline)) { total[n] = fma(v, b.packet(k + m, n), total[n]); });
    unroll<N>([&](int n) __attribute__((always_inline)) { store(square + n * width, total[n]); });
  }
};

template <class... T>
inline constexpr bool all_stored = (is_stored<std::remove_const_t<T>> && ...);

/// The product on packets, or where the tuning says so the body, row by row.
template <class E, class Body, class Product>
void run_product(const Backend<E>& be, const Rows<Body, Space::host>& op, const Product& product) {
  if (be.tuning.path == Path::composed) return run_rows(be, op);
  product.run(be);
}

}  // namespace detail

template <class E, class In, class W, class Out, Major M>
  requires detail::all_stored<In, W, Out>
void execute_impl(const Backend<E>& be, const Rows<MixRanks<In, W, float, Out, Space::host, M>, Space::host>& op,
                  Arena<>) {
  const auto& b = op.body;
  detail::run_product(be, op, detail::FewRows<W, M, In, Out>{b.mixer, b.in.transposed(), b.out.transposed(), b.into});
}

template <class E, class L, class W, class Out>
  requires detail::all_stored<L, W, Out>
void execute_impl(const Backend<E>& be, const Rows<RankProducts<L, W, float, Out, Space::host>, Space::host>& op,
                  Arena<>) {
  const auto& b = op.body;
  detail::run_product(be, op, detail::DotsOfRows<L, W, Out>{b.left.transposed(), b.right.transposed(), b.out, b.into});
}

template <class E, class Base, class W>
  requires detail::all_stored<Base, W>
void execute_impl(const Backend<E>& be, const Rows<DoraNorms<Base, W, float, Space::host>, Space::host>& op, Arena<>) {
  detail::run_product(be, op, detail::NormsOfRows<Base, W>{op.body});
}

template <class E, class W, class G, Major M>
  requires detail::all_stored<W, G>
void execute_impl(const Backend<E>& be,
                  const Rows<loramix::detail::SmallProduct<float, W, G, Space::host, M>, Space::host>& op, Arena<>) {
  const auto& b = op.body;
  const MatrixView<const std::remove_const_t<W>> right = b.right;
  detail::run_product(be, op, detail::FewRows<float, M, std::remove_const_t<W>, G>{b.left, right, b.out, b.into});
}

}  // namespace cpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
