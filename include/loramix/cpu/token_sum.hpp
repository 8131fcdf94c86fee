/// Sums over tokens: the gradients of A and B, in their own order.
///
/// Computes:    out[r, c] (+)= scale · Σ_t left[t, r] · x̂[t, c]
/// Reads:       left [T, R], x [T, d] (widened, with dropout applied, block by block).
/// Adds to:     out [R, d] in either order, or assigns.
/// Errors:      none: ops/expand.hpp and ops/shrink.hpp check.
/// Cost:        one pass over x for every `ranks_of_job` ranks.
/// Determinism: tokens in order inside one job: the number of threads changes nothing.
/// Example:     ops/shrink.hpp
#pragma once
#include <algorithm>

#include <loramix/cpu/contract.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace cpu {
namespace detail {

template <class X, class G, Major M>
struct TokenSum {
  MatrixView<const float> left;  // [T, R]
  Input<X> x;
  float scale;
  Into into;
  MatrixView<G, Space::host, M> out;  // [R, d]
  Tuning tuning;
  // Sums over the same x̂ in the same pass, their ranks behind the others.
  MatrixView<const float> second_left{};   // [T, n]
  MatrixView<G, Space::host, M> second{};  // [n, d]

  Index ranks() const { return out.rows + second.rows; }

  static constexpr int packets = RegisterTile::sum_packets;
  static constexpr int rows = RegisterTile::sum_rows;
  static constexpr Index panel = packets * width;  // columns
  static constexpr Index panels = 2 * panel;       // a multiple of 8 columns too
  static constexpr Index ranks_of_job = 160;
  static constexpr Index few_ranks = 32;  // up to here x is read where it lies

  static Index ranks_of(Index ranks) { return round_up(smaller(ranks, ranks_of_job), rows); }
  /// Columns of a job: as many as keep its sums in L2, and of what is copied those of a page.
  static Index sweep_of(const Tuning& tuning, Index ranks, Index columns, bool direct) {
    const Index sums = tuning.weights / larger(1, ranks_of(ranks));
    const Index most = direct && ranks <= few_ranks ? sums : smaller(sums, 1024);
    return larger(1, smaller(most, round_up(columns, panels)) / panels) * panels;
  }
  /// Tokens whose products are added up in registers. Rows of x that are read where they lie share few sets of L1.
  static Index tokens_of(const Tuning& tuning, Index ranks) {
    return ranks > few_ranks ? tuning.tokens_per_sum : larger(1, tuning.tokens_per_sum / 2);
  }
  static Index scratch(const Tuning& tuning, Index ranks, Index columns, bool direct) {
    const Index sweep = sweep_of(tuning, ranks, columns, direct);
    const Index block = direct ? panel : sweep + 8 * width, most = ranks_of(ranks);
    return most * sweep + tuning.tokens_per_sum * (block + most);
  }
  Index sweep() const { return sweep_of(tuning, ranks(), out.cols, x.direct()); }

  /// Ranks [r0, r0 + ranks) × columns [c0, c0 + columns), at most one job's.
  void run(Index r0, Index ranks, Index c0, Index columns, float* scratch) const;

 private:
  /// to[i][j] = left(t + i, r + j): what a tile reads lies together.
  void gather(Index t, Index n, Index r, Index ranks, float* to) const {
    const Index here = smaller(ranks, larger(0, out.rows - r));
    for (Index i = 0; i < n; ++i, to += rows) {
      if (here > 0) std::copy_n(left.row(t + i) + r, here, to);
      if (here < ranks) std::copy_n(second_left.row(t + i) + (r + here - out.rows), ranks - here, to + here);
    }
  }
  G& at(Index r, Index c) const { return r < out.rows ? out(r, c) : second(r - out.rows, c); }
  /// block[i][j] = x[t + i][c + j], zeros from `wide` on.
  void copy(Index t, Index n, Index c, Index wide, float* block) const {
    for (Index i = 0; i < n; ++i, block += panel) {
      const X* const from = x.rows.row(t + i) + c;
      if (wide == panel) {
        unroll<packets>([&](auto j) { store(block + j * width, load(from + j * width)); });
        continue;
      }
      for (Index j = 0; j < panel; j += width) {
        const Index rest = wide - j;
        store(block + j, rest >= width ? load(from + j) : rest > 0 ? load_part(from + j, rest) : splat(0));
      }
    }
  }
  /// All panels of columns [c0, c0 + columns): block[panel][i][j] = x̂[t + i][…].
  void convert(Index t, Index n, Index c0, Index columns, float* block) const {
    float* const row = block + blocks_of(columns, panel) * panel * n;
    for (Index i = 0; i < n; ++i) {
      x.convert(t + i, c0, columns, row);
      for (Index j = columns; j < round_up(columns, panel); ++j) row[j] = 0;
      for (Index c = 0; c < columns; c += panel) {
        for (Index j = 0; j < panel; j += width) store(block + c * n + i * panel + j, load(row + c + j));
      }
    }
  }

  template <int R, int N>
  [[gnu::flatten, gnu::noinline]] void tile(Index t, Index n, Index r, Index c, Index wide, const float* left_of,
                                            const float* from, Index step, float* sums, Index sums_stride) const {
    Tile<R, N> sum;
    if (t == 0)
      sum.clear();
    else
      sum.load_from(sums, sums_stride);
    outer(n, Columns{left_of, rows}, Panel<float>{from, step}, sum);
    if (t + n < left.rows) {
      sum.store_to(sums, sums_stride);
      return;
    }
    const Packet factor = splat(scale);
    if constexpr (M == Major::row && std::is_same_v<G, float>) {
      if (wide == N * width) {
        unroll<R>([&](auto i) {
          float* const row = &at(r + i, c);
          unroll<N>([&](auto j) {
            float* const to = row + j * width;
            store(to, into == Into::add ? fma(factor, sum.c[i][j], load(to)) : mul(factor, sum.c[i][j]));
          });
        });
        return;
      }
    }
    float values[R][N * width];
    sum.each([&](int i, int j, Packet v) { store(values[i] + j * width, mul(factor, v)); });
    for (Index i = 0; i < R; ++i) {
      for (Index j = 0; j < wide; ++j) {
        G& cell = at(r + i, c + j);
        cell = narrow<G>(into == Into::add ? widen<float>(cell) + values[i][j] : values[i][j]);
      }
    }
  }
};

template <class X, class G, Major M>
void TokenSum<X, G, M>::run(Index r0, Index ranks, Index c0, Index columns, float* scratch) const {
  const Index tokens = left.rows, step = tokens_of(tuning, ranks), stride = sweep();
  float* const lefts = scratch + round_up(ranks, rows) * stride;
  float* const block = lefts + round_up(ranks, rows) * step;
  for (Index t = 0; t == 0 || t < tokens; t += step) {
    const Index n = smaller(step, tokens - t);
    for (Index r = 0; r < ranks; r += rows) gather(t, n, r0 + r, smaller(rows, ranks - r), lefts + r * n);
    if (!x.direct()) convert(t, n, c0, columns, block);
    for (Index c = 0; c < columns; c += panel) {
      const Index wide = smaller(panel, columns - c);
      const float* from = block + (x.direct() ? 0 : c / panel * n * panel);
      Index from_step = panel;
      if constexpr (std::is_same_v<X, float>) {
        if (x.direct() && ranks <= few_ranks && wide == panel && n > 0) {
          from = x.rows.row(t) + c0 + c;
          from_step = x.rows.stride;
        } else if (x.direct()) {
          copy(t, n, c0 + c, wide, block);
        }
      }
      in_steps<rows>(ranks, [&](auto m, Index r) {
        tile<m, packets>(t, n, r0 + r, c0 + c, wide, lefts + r / rows * rows * n + r % rows, from, from_step,
                         scratch + r * stride + c, stride);
      });
    }
  }
}

}  // namespace detail
}  // namespace cpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
