/// Out of rank space into features: the fused product of expand, and of shrink's backward.
///
/// Computes:    y[t, c] (+)= scale · Σ_r left[t, r] · W[r, c], with an optional second pair of factors (side rows) and dropout
///              of the first: dX (+)= (dU A) ∘ keep/(1 − p̄) + dH side.
/// Reads:       left [T, R], W [R, d] in either order; the second pair [T, n], [n, d].
/// Adds to:     y [T, d], or assigns: one rounding per element.
/// Errors:      none: ops/expand.hpp and ops/shrink.hpp check.
/// Cost:        one pass over y. Blocks of weights copied so that they lie together in L2; rank by rank and
///              T ≤ 64: as they lie.
/// Determinism: a row of y depends on its rows of `left` only, and not on threads.
/// Example:     ops/expand.hpp
#pragma once
#include <loramix/cpu/dropout.hpp>
#include <loramix/cpu/panels.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace cpu {
namespace detail {

/// One product out of rank space.
template <class W, Major M>
struct RankFactor {
  MatrixView<const float> left;           // [T, R]
  MatrixView<const W, Space::host, M> w;  // [R, d]
};

/// Where panels of weights lie, from one column on. `Scaled`: the scale of y is in those of the first product.
template <class Weight, bool Scaled>
struct PanelsOfWeights {
  const Weight *first, *second;
  Index first_step, second_step;  // from rank to rank
  Index next;                     // from panel to panel
  [[gnu::always_inline]] PanelsOfWeights at(Index panels) const {
    const auto moved = [by = panels * next](const Weight* p) { return p == nullptr ? nullptr : p + by; };
    return {moved(first), moved(second), first_step, second_step, next};
  }
};

template <class Y, class W, Major M>
struct Spread {
  RankFactor<W, M> first;
  RankFactor<W, M> second;  // of no ranks, or side rows
  Dropout dropout;          // of the first
  float scale;
  Into into;
  MatrixView<Y> y;                     // [T, d]
  const std::uint8_t* idle = nullptr;  // [T] 1: nothing is added to this row of y

  static constexpr int packets = RegisterTile::wide;
  static constexpr int rows = RegisterTile::rows_of(packets);
  static constexpr Index panel = column_panel;

  Index ranks() const { return first.w.rows + second.w.rows; }

  /// Weights in rank-major order as they lie, from column c on.
  PanelsOfWeights<W, false> lying(Index c) const {
    const auto from = [c](const auto& w) { return w.rows == 0 ? nullptr : w.data + c; };
    return {from(first.w), from(second.w), first.w.stride, second.w.stride, panel};
  }

  static Index scratch(Index ranks, Index sweep) {
    return larger(stream_values, elements(ranks, sweep) + mask_values(sweep));
  }

  /// Tokens [t0, t0 + n) × columns [c0, c0 + columns), at most one sweep.
  void run_packed(Index t0, Index n, Index c0, Index columns, float* scratch) const;

  /// All tokens × columns [c0, c0 + columns) of weights in rank-major order, as they lie: panel by panel.
  void run_natural(Index c0, Index columns, float* scratch) const requires(M == Major::row);

  /// The same for a token or two or three: a few ranks at a time over long pieces of their rows, which come in streams.
  void run_streams(Index c0, Index columns, float* scratch) const requires(M == Major::row);
  bool in_streams() const { return y.rows < few_tokens && first.w.rows != 0 && second.w.rows == 0 && !dropout.on(); }

  /// Adds a row of n columns to y, or assigns it.
  [[gnu::noinline]] void part(Index t, Index c, Index n, const float* row) const {
    if (idle != nullptr && idle[t] != 0) return;
    Y* const to = y.row(t) + c;
    over_packets(
        n, [&](Index j, auto lanes) __attribute__((always_inline)) { add_or_set(to + j, load(row + j), into, lanes); });
  }
  /// Whether tiles of so many ranks are short beside the rows of y that they are added to, and those are in no L2.
  bool waits_for_y(Index open_ranks) const {
    return into == Into::add && open_ranks <= 32 && y.rows > some_tokens && elements(y.rows, y.cols) > 1 << 20;
  }
  /// The packets of row t that come four panels behind column c.
  template <int N>
  [[gnu::always_inline]] void ask_for_y(Index t, Index c) const {
    const Y* const later = y.row(t) + c + 4 * panel;
    unroll<N>([&](int j) __attribute__((always_inline)) { prefetch(later + j * width); });
  }

 private:
  static constexpr Index stream_values = 4096;  // sums of a piece: half of L1
  static constexpr int stream_ranks = RegisterTile::many ? 8 : 4;

  static Index mask_values(Index sweep) { return rows * keep_bytes(sweep) / 4 + width; }
  /// Columns whose weights meet all tokens before the next ones come, which are asked for meanwhile: a quarter of L1, or a
  /// panel.
  static Index natural_block(Index ranks) { return larger(1, 2048 / larger(1, ranks) / panel) * panel; }

  /// T tokens from t on × columns from c on, panel by panel in one loop: a call for each panel costs as much as a tile of few
  /// ranks. `keep`: dropout's bits from column c on, a row of them for each token. `Ask`: for weights `ahead` columns further.
  template <int T, bool Ask, class Weight, bool Scaled>
  [[gnu::flatten, gnu::noinline]] void tiles(Index t, Index c, Index columns,
                                             const PanelsOfWeights<Weight, Scaled>& from, const std::uint8_t* keep,
                                             Index keep_pitch, Index ahead) const {
    constexpr int N = packets;
    const bool waits = waits_for_y(ranks());
    PanelsOfWeights<Weight, Scaled> weights = from;
    for (; columns > 0; columns -= panel, c += panel, keep += panel / 8, weights = weights.at(1)) {
      Tile<T, N> sum;
      sum.clear();
      if (waits) unroll<T>([&](int i) __attribute__((always_inline)) { ask_for_y<N>(t + i, c); });
      const auto ask = [&](Index r) __attribute__((always_inline)) {
        if constexpr (Ask)
          unroll<N>([&](int j) __attribute__((always_inline)) {
            prefetch(weights.first + r * weights.first_step + ahead + j * width);
          });
      };
      outer(first.w.rows, Rows3<T>(first.left.row(t), first.left.stride),
            Panel<Weight>{weights.first, weights.first_step}, sum, ask);
      if constexpr (!Scaled) {
        const Packet factor = splat(factor_of(dropout, scale));
        sum.set([&](int, int, Packet v) __attribute__((always_inline)) { return mul(factor, v); });
      }
      if (dropout.on()) {
        sum.set([&](int i, int j, Packet v)
                    __attribute__((always_inline)) { return keep_lanes(v, keep + i * keep_pitch, j * width); });
      }
      if (second.w.rows != 0) {
        outer(second.w.rows, Rows3<T>(second.left.row(t), second.left.stride),
              Panel<Weight>{weights.second, weights.second_step}, sum);
      }
      if (columns >= panel) {
        whole(t, c, sum);
      } else {
        float block[T * N * width];
        sum.store_to(block, N * width);
        for (int i = 0; i < T; ++i) part(t + i, c, columns, block + i * N * width);
      }
    }
  }
  /// T tokens from t on × n columns from c on: adds ranks [r, r + N) to the sums, and the sums of all to y.
  template <int T, int N>
  [[gnu::flatten, gnu::noinline]] void stream(Index t, Index r, Index c, Index n, float* sums) const {
    const MatrixView<const W, Space::host, M> w = first.w;
    const bool begins = r == 0, ends = r + N == w.rows;
    constexpr Index pitch = stream_values / T;
    const Packet factor = splat(scale);
    Packet left[T][N];
    unroll<T>([&](int i) __attribute__((always_inline)) {
      unroll<N>([&](int j) __attribute__((always_inline)) { left[i][j] = splat(first.left(t + i, r + j)); });
    });
    const W* const from = &w(r, c);
    // U packets of a row together: a line of one row at a time leaves L2 waiting.
    const auto step = [&](auto packets_of_row, Index k, auto lanes) __attribute__((always_inline)) {
      constexpr int U = packets_of_row;
      Tile<T, U> sum;
      sum.set([&](int i, int u, Packet) __attribute__((always_inline)) {
        return begins ? splat(0) : load(sums + i * pitch + k + u * width);
      });
      unroll<N>([&](int j) __attribute__((always_inline)) {
        Packet b[U];
        unroll<U>([&](int u)
                      __attribute__((always_inline)) { b[u] = lanes.load(from + j * w.stride + k + u * width); });
        sum.set([&](int i, int u, Packet v) __attribute__((always_inline)) { return fma(left[i][j], b[u], v); });
      });
      unroll<T>([&](int i) __attribute__((always_inline)) {
        if (ends && idle != nullptr && idle[t + i] != 0) return;
        unroll<U>([&](int u) __attribute__((always_inline)) {
          const Index at = k + u * width;
          if (!ends) return store(sums + i * pitch + at, sum.c[i][u]);
          // Added with a rounding of its own, as a panel is.
          add_or_set(y.row(t + i) + c + at, mul(factor, sum.c[i][u]), into, lanes);
        });
      });
    };
    constexpr int together = 4 / T;
    Index k = 0;
    for (; k + together * width <= n; k += together * width)
      step(std::integral_constant<int, together>{}, k, WholePacket{});
    over_packets(
        n - k, [&, begin = k ](Index i, auto lanes)
                   __attribute__((always_inline)) { step(std::integral_constant<int, 1>{}, begin + i, lanes); });
  }
  /// Adds a tile to y, or assigns it.
  template <int T, int N>
  [[gnu::always_inline]] void whole(Index t, Index c, const Tile<T, N>& sum) const {
    Y* const to = y.row(t) + c;
    const Index stride = y.stride;
    const std::uint8_t* const skip = idle == nullptr ? nullptr : idle + t;
    const auto write = [&](const auto& f) __attribute__((always_inline)) {
      unroll<T>([&](int i) __attribute__((always_inline)) {
        if (skip != nullptr && skip[i] != 0) return;
        unroll<N>([&](int j) __attribute__((always_inline)) { f(to + i * stride + j * width, sum.c[i][j]); });
      });
    };
    if (into == Into::add)
      write([](Y * p, Packet v) __attribute__((always_inline)) { store(p, add(load(p), v)); });
    else
      write([](Y * p, Packet v) __attribute__((always_inline)) { store(p, v); });
  }
};

template <class Y, class W, Major M>
void Spread<Y, W, M>::run_packed(Index t0, Index n, Index c0, Index columns, float* scratch) const {
  const Index step = panel * ranks(), pitch = keep_bytes(columns);
  copy_panels(first.w, c0, columns, scratch, step, factor_of(dropout, scale));
  copy_panels(second.w, c0, columns, scratch + panel * first.w.rows, step);
  const PanelsOfWeights<float, true> weights{scratch, scratch + panel * first.w.rows, panel, panel, step};
  std::uint8_t* const keep = reinterpret_cast<std::uint8_t*>(scratch + blocks_of(columns, panel) * step);
  in_steps<rows>(n, [&](auto m, Index i) {
    const Index t = t0 + i;
    for (Index j = 0; dropout.on() && j < m; ++j) keep_bits(dropout, t + j, c0, columns, keep + j * pitch);
    tiles<m, false>(t, c0, columns, weights, keep, pitch, 0);
  });
}

template <class Y, class W, Major M>
void Spread<Y, W, M>::run_natural(Index c0, Index columns, float* scratch) const requires(M == Major::row) {
  const Index step = panel * ranks(), block = natural_block(ranks()), whole = columns / panel * panel;
  std::uint8_t* const keep = reinterpret_cast<std::uint8_t*>(scratch + step);
  const auto down_tokens = [&](Index c, Index n, bool more, const auto& weights) {
    const Index pitch = keep_bytes(n);
    in_steps<rows>(y.rows, [&](auto m, Index t) {
      for (Index j = 0; dropout.on() && j < m; ++j) keep_bits(dropout, t + j, c, n, keep + j * pitch);
      if (t == 0 && more)
        tiles<m, true>(t, c, n, weights, keep, pitch, block);
      else
        tiles<m, false>(t, c, n, weights, keep, pitch, block);
    });
  };
  for (Index c = 0; c < whole; c += block) {
    const bool more = c + block < whole;
    down_tokens(c0 + c, more ? block : whole - c, more, lying(c0 + c));
  }
  if (whole == columns) return;
  // A copy of its own for the last panel, so that no load runs past a row.
  const Index c = c0 + whole, n = columns - whole;
  copy_panels(first.w, c, n, scratch, step);
  copy_panels(second.w, c, n, scratch + panel * first.w.rows, step);
  down_tokens(c, n, false, PanelsOfWeights<float, false>{scratch, scratch + panel * first.w.rows, panel, panel, step});
}

template <class Y, class W, Major M>
void Spread<Y, W, M>::run_streams(Index c0, Index columns, float* scratch) const requires(M == Major::row) {
  in_steps<2>(y.rows, [&](auto m, Index t) {
    constexpr Index piece = stream_values / m;
    for (Index c = 0; c < columns; c += piece) {
      in_steps<stream_ranks>(
          first.w.rows, [&](auto n, Index r) { stream<m, n>(t, r, c0 + c, smaller(piece, columns - c), scratch); });
    }
  });
}

}  // namespace detail
}  // namespace cpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
