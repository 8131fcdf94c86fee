/// Weights in the order in which a contraction over features reads them.
///
/// Computes:    panels of a block [ranks, n] of a weight: for every panel of ranks, n rows of the panel's ranks side by side,
///              16-bit values widened, zeros behind the last rank. Panels are 4, 2 or 1 packets wide, the widest first.
/// Reads:       W [R, d] in either order.
/// Writes:      panels [n · ranks rounded up to packets].
/// Errors:      none.
/// Cost:        one pass over W; a quarter of a cycle per value where a rank's values are consecutive.
/// Determinism: a copy.
/// Example:     cpu/contract.hpp
#pragma once
#include <bit>

#include <loramix/cpu/backend.hpp>
#include <loramix/cpu/kernels.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace cpu {
namespace detail {

/// Floats from row to row of a block of rows in L1: a line more than they take, for rows of whole pages share a set.
constexpr Index pitch(Index columns) { return round_up(columns, width) + width; }

/// f(packets of the panel, a constant; its first rank) for every panel of `ranks`.
template <int Packets = RegisterTile::wide, class F>
[[gnu::always_inline]] inline void for_panels(Index ranks, F&& f, Index begin = 0) {
  constexpr Index wide = Packets * width;
  if constexpr (Packets == 1) {
    for (; begin < ranks; begin += wide) f(std::integral_constant<int, 1>{}, begin);
  } else {
    for (; begin + wide - width < ranks; begin += wide) f(std::integral_constant<int, Packets>{}, begin);
    for_panels<Packets / 2>(ranks, f, begin);
  }
}

/// to[k · step + j] = w(r + j, k0 + k) for k in [0, n), j in [0, width); ranks from R on are zero.
template <class W>
void pack_packet(MatrixView<const W> w, Index r, Index k0, Index n, float* to, Index step) {
  const Index ranks = w.rows - r;
  Index k = 0;
  for (; k + width <= n; k += width) {
    const W* const from = w.row(r) + k0 + k;
    Packet block[width];
    unroll<width>([&](int j) __attribute__((always_inline)) {
      block[j] = j < ranks ? load(from + j * w.stride) : splat(0);
      if (j < ranks) prefetch(from + j * w.stride + 8 * width);
    });
    transpose(block);
    unroll<width>([&](int j) __attribute__((always_inline)) { store(to + (k + j) * step, block[j]); });
  }
  for (; k < n; ++k) {  // the last columns
    for (Index j = 0; j < width; ++j) to[k * step + j] = j < ranks ? widen<float>(w(r + j, k0 + k)) : 0.f;
  }
}
template <class W>
void pack_packet(MatrixView<const W, Space::host, Major::column> w, Index r, Index k0, Index n, float* to, Index step) {
  const Index ranks = smaller(width, w.rows - r);
  for (Index k = 0; k < n; ++k) {
    const W* const from = &w(r, k0 + k);
    store(to + k * step, ranks == width ? load(from) : load_part(from, ranks));
  }
}

/// Weights, and others below them that begin at a whole packet: what is contracted with the same x in one pass.
template <class W, Major M>
struct Stacked {
  MatrixView<const W, Space::host, M> first;
  MatrixView<const W, Space::host, M> second{};

  Index begin_of_second() const { return round_up(first.rows, width); }
  Index ranks() const { return second.rows == 0 ? first.rows : begin_of_second() + second.rows; }
  Index columns() const { return first.cols; }
  /// The last n ranks, of the second where there are any.
  MatrixView<const W, Space::host, M> last(Index n) const {
    const auto& of = second.rows == 0 ? first : second;
    return of.row_range(of.rows - n, n);
  }
};

/// The panels of ranks [r, r + ranks) × columns [k, k + n), one behind the other.
template <class W, Major M>
void pack(const Stacked<W, M>& w, Index r, Index ranks, Index k, Index n, float* panels) {
  const Index second = w.begin_of_second();
  for_panels(ranks, [&](auto packets, Index begin) {
    for (int i = 0; i < packets; ++i) {
      const Index rank = r + begin + i * width;
      pack_packet(rank < second ? w.first : w.second, rank < second ? rank : rank - second, k, n,
                  panels + begin * n + i * width, packets * width);
    }
  });
}

/// Rows that `dot` takes for n: one wide tile with zeros rather than narrow ones, each of which reads x.
constexpr Index woven_rows(Index n) {
  return n == 0 ? 0 : Index{1} << std::bit_width(static_cast<std::uint64_t>(n - 1));
}
/// WovenRows of w, columns [k, k + n); zeros behind the last row and column.
template <class W>
void weave(MatrixView<const W> w, Index k, Index n, float* to, Index rows) {
  for (Index j = 0; j < rows; ++j, to += width) {
    const W* const from = j < w.rows ? w.row(j) + k : nullptr;
    over_packets(
        n, [&](Index i, auto lanes) __attribute__((always_inline)) {
          store(to + i * rows, from == nullptr ? splat(0) : lanes.load(from + i));
        });
  }
}

/// Columns of a panel of weights in rank-major order.
inline constexpr Index column_panel = RegisterTile::wide * width;

/// to[c / column_panel · step + r · column_panel + c mod column_panel] = scale · w(r, c0 + c); zeros in what is left of the
/// last panel.
template <class W>
void copy_panels(MatrixView<const W> w, Index c0, Index columns, float* to, Index step, float scale = 1) {
  const Packet factor = splat(scale);
  for (Index r = 0; columns > 0 && r < w.rows; ++r, to += column_panel) {
    const W* const from = w.row(r) + c0;
    Index c = 0;
    for (; c + column_panel <= columns; c += column_panel) {
      float* const line = to + c / column_panel * step;
      unroll<RegisterTile::wide>([&](int j) __attribute__((always_inline)) {
        store(line + j * width, mul(factor, load(from + c + j * width)));
      });
    }
    float* const line = to + c / column_panel * step;
    for (Index j = 0; c < columns && j < column_panel; ++j)
      line[j] = c + j < columns ? scale * widen<float>(from[c + j]) : 0.f;
  }
}
template <class W>
void copy_panels(MatrixView<const W, Space::host, Major::column> w, Index c0, Index columns, float* to, Index step,
                 float scale = 1) {
  const Packet factor = splat(scale);
  for (Index c = 0; c < round_up(columns, column_panel); c += width) {
    float* const line = to + c / column_panel * step + c % column_panel;
    Index r = 0;
    for (; c + width <= columns && r + width <= w.rows; r += width) {
      Packet block[width];
      unroll<width>([&](int j) __attribute__((always_inline)) { block[j] = load(&w(r, c0 + c + j)); });
      transpose(block);
      unroll<width>([&](int i) __attribute__((always_inline)) {
        store(line + (r + i) * column_panel, mul(factor, block[i]));
      });
    }
    for (; r < w.rows; ++r) {  // the last ranks, the last columns
      for (Index j = 0; j < width; ++j)
        line[r * column_panel + j] = c + j < columns ? scale * widen<float>(w(r, c0 + c + j)) : 0.f;
    }
  }
}

}  // namespace detail
}  // namespace cpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
