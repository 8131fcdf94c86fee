/// From features into rank space: the fused contraction of shrink, and of expand's backward.
///
/// Computes:    out[t, r] = scale · Σ_k x̂[t, k] · W[r, k]
/// Reads:       x [T, d] (widened, with dropout applied, block by block), W [R, d].
/// Writes:      out [T, R], assigned.
/// Errors:      none: ops/shrink.hpp and ops/expand.hpp check.
/// Cost:        one pass over x. More than half a packet of ranks: packed weights, register tiles of tokens × ranks,
///              sweeps as wide as `Tuning::weights` allow. Of weights rank by rank dot products: fewer, up to half a packet
///              behind the last whole one where x lies, and all of T ≤ 64.
/// Determinism: an output depends on its row of x only, and not on threads.
/// Example:     ops/shrink.hpp
#pragma once

#include <loramix/cpu/dropout.hpp>
#include <loramix/cpu/panels.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace cpu {
namespace detail {

/// What is contracted: rows of activations, as they are or with dropout. Kernels read x ∘ keep; its 1 / (1 − p̄) is in what
/// they multiply their sums by (factor_of).
template <class X>
struct Input {
  MatrixView<const X> rows;
  Dropout dropout{};

  /// Whether kernels may read the rows where they lie.
  bool direct() const { return std::is_same_v<X, float> && !dropout.on(); }
  /// Whether they may if they apply dropout's bits to what they load (KeptPanel, KeptRows).
  bool direct_under_bits() const { return std::is_same_v<X, float> && (!dropout.on() || keeps_while_loading); }
  /// Row t, columns [k, k + n), as floats, 0 where they are dropped; k is a multiple of 8, `out` has room for whole packets.
  void convert(Index t, Index k, Index n, float* out) const {
    const X* const from = rows.row(t) + k;
    if (dropout.on()) return drop(dropout, t, k, n, from, out);
    widen_row(from, n, out);
  }
  /// The same, as it lies or converted into `room`.
  const float* row(Index t, Index k, Index n, float* room) const {
    if constexpr (std::is_same_v<X, float>) {
      if (direct()) return rows.row(t) + k;
    }
    convert(t, k, n, room);
    return room;
  }
};

/// `count` tiles of T tokens × N ranks, one below the other: sums [·, N] (+)= factor · dot products of rows of x, `n` values each.
/// `ask(p)` comes before the packet at p is read.
template <int T, int N, class X, class Ask>
[[gnu::flatten, gnu::noinline]] void dot_tiles(Index count, Index n, const X* x, Index stride, const WovenRows w,
                                               float factor, Into into, float* sums, Index of_sums, const Ask ask) {
  for (; count > 0; --count, x += T * stride, sums += T * of_sums) {
    DotRows<X, T> from;
    for (int m = 0; m < T; ++m) from.p[m] = x + m * stride;
    Tile<T, N> c;
    c.clear();
    dot(
        n, from, w, c, [&](Index k) __attribute__((always_inline)) {
          if constexpr (!std::is_same_v<Ask, NoHint>)
            unroll<T>([&](int m) __attribute__((always_inline)) { ask(from.p[m] + k); });
        });
    c.sum_to(sums, of_sums, N, factor, into);
  }
}
/// Runs f<M>(t, count of steps of M tokens) over n tokens that meet a copy of the weights in L1, which costs one token as little
/// as each of two: where the widest tile has three, there is none of two.
template <class F>
[[gnu::always_inline]] inline void in_runs_of_copy(Index n, F&& f) {
  in_runs<RegisterTile::dot_rows>(n, [&](auto m, Index t, Index count) {
    constexpr int tokens = m == 2 && RegisterTile::dot_rows > 2 ? 1 : m;
    f(std::integral_constant<int, tokens>{}, t, count * m / tokens);
  });
}
/// sums [T, w.rows] (+)= factor · x wᵀ, for at most a tile's ranks.
template <class X, class Ask>
void dot_all(const MatrixView<const X>& x, const WovenRows& w, float factor, Into into, float* sums, Index of_sums,
             const Ask& ask) {
  in_runs_of_copy(x.rows, [&](auto m, Index t, Index count) {
    in_steps<RegisterTile::dot_columns>(w.rows, [&](auto ranks, Index) {
      dot_tiles<m, ranks>(count, x.cols, x.row(t), x.stride, w, factor, into, sums + t * of_sums, of_sums, ask);
    });
  });
}

/// sums [T, N packets] (+)= rows · panel over n columns, assigned if they are the first; two lines of what comes next are asked
/// for at every `Every`-th. Of no scalar but float: all contractions share it.
template <int T, int N, int Every, class Rows, class P>
[[gnu::flatten, gnu::noinline]] void contraction_tile(Index n, const Rows rows, const P panel, float* sums,
                                                      Index stride, bool first, RowWalk& next) {
  Tile<T, N> c;
  if (first)
    c.clear();
  else
    c.load_from(sums, stride);
  RowWalk walk = next;
  outer(
      n, rows, panel, c, [&](Index k) __attribute__((always_inline)) { walk.template step<Every>(k); });
  next = walk;
  c.store_to(sums, stride);
}

/// A contraction on packed weights: sweeps of columns, whose panels stay in L2 while the tokens go by.
template <class X, class W, Major M>
struct PanelContraction {
  Input<X> x;
  Stacked<W, M> w;  // [R, d]
  Index sweep;
  float scale;
  MatrixView<float> out;       // [T, R]
  MatrixView<float> second{};  // [T, n] of the second weights

  /// Tokens that go by together: rows of the widest tiles, and of two of the others.
  static constexpr Index group = RegisterTile::rows_of(1);
  /// The same up to two packets of ranks: rows that lie whole pages apart share one set of L1, of 8 or 12 ways.
  static constexpr Index narrow_group = 8, narrow = 2 * width;
  static constexpr Index most_ranks = 256;
  static constexpr Index most_sums = 1 << 18;  // a megabyte
  static constexpr Index converted = 256;      // columns

  /// How the work is cut: into ranks where there are few tokens, for a rank is packed by one job then, and into tokens for lanes
  /// that are left; or, where those jobs were uneven, into pieces of the tokens for all lanes, which pack a rank each.
  struct Jobs {
    Index ranks, rank_jobs;
    Cut tokens;
    Jobs(Index all_tokens, Index all_ranks, Index lanes)
        : Jobs(all_tokens, all_ranks, best(all_tokens, all_ranks, larger(1, lanes))) {}
    Index count() const { return rank_jobs * tokens.jobs; }

   private:
    struct Pieces {
      Index ranks, tokens;  // ranks of one, and how many of tokens
    };
    Jobs(Index all_tokens, Index all_ranks, Pieces pieces)
        : ranks(pieces.ranks),
          rank_jobs(blocks_of(all_ranks, ranks)),
          tokens(all_tokens, pieces.tokens, larger(1, most_sums / ranks / group) * group, group) {}

    static Pieces best(Index tokens, Index ranks, Index lanes) {
      constexpr Index few = 512, wide = RegisterTile::wide * width, least = 2 * width;
      constexpr Index packing = 8;  // tokens that a rank could meet while it is packed
      const Index all = larger(width, round_up(ranks, width));
      const auto cost = [&](Pieces p) {  // of jobs in turns, without those of a few ranks, or of all if that is more
        const Index of_rank = round_up(blocks_of(tokens, p.tokens), group) + packing;
        const Index turns = blocks_of(elements((all + p.ranks / 2 - 1) / p.ranks, p.tokens), lanes);
        return larger(elements(elements(turns, p.ranks), of_rank), elements(elements(all, p.tokens), of_rank) / lanes);
      };
      const Index fewest = larger(1, blocks_of(ranks, most_ranks));
      Pieces found{};
      for (Index parts = tokens <= few ? larger(fewest, smaller(lanes, ranks / least)) : fewest; parts >= fewest;
           --parts) {
        const Index of_job = round_up(blocks_of(ranks, parts), parts == 1 ? wide : width);
        for (const Index pieces : {blocks_of(lanes, parts), lanes}) {
          const Pieces p{smaller(all, larger(width, of_job)), pieces};
          if (found.ranks == 0 || cost(p) < cost(found)) found = p;
        }
      }
      return found;
    }
  };

  /// The ranks of the largest job, and the columns of a sweep.
  static Index ranks_of(Index ranks) { return smaller(most_ranks, round_up(ranks, width)); }
  static Index sweep_of(const Tuning& tuning, Index ranks, Index depth) {
    return packed_sweep_of(tuning, ranks_of(ranks), depth);
  }

  /// Floats of a lane for any number of tokens up to this.
  static Index scratch(const Tuning& tuning, Index tokens, Index ranks, Index depth, bool direct) {
    const Index columns = pitch(sweep_of(tuning, ranks, depth)), most = ranks_of(ranks);
    const Index sums = smaller(most * round_up(tokens, group), most_sums);
    return sums + most * columns + (direct ? 0 : group * pitch(converted));
  }

  void run(const Jobs& jobs, Index job, float* scratch) const;

 private:
  void write(const float* sums, Index n, float* to) const {
    const float factor = factor_of(x.dropout, scale);
    Index j = 0;
    for (; j + width <= n; j += width) store(to + j, mul(splat(factor), load(sums + j)));
    for (; j < n; ++j) to[j] = factor * sums[j];
  }

  /// g tokens from t on × columns [k, k + n): the first `packed` of `padded` sums. What is converted is converted in blocks that
  /// stay in L1.
  void tokens_by(Index t, Index g, Index k, Index n, const float* panels, Index packed, Index padded, float* sums,
                 float* block) const {
    const Index step = x.direct() ? n : converted;
    for (Index c = 0; c < n; c += step) {
      const Index columns = smaller(step, n - c);
      const float* rows = block;
      Index stride = pitch(converted);
      if (x.direct()) {
        if constexpr (std::is_same_v<X, float>) rows = x.rows.row(t) + k;
        stride = x.rows.stride;
      } else {
        for (Index i = 0; i < g; ++i) x.convert(t + i, k + c, columns, block + i * stride);
      }
      RowWalk next = behind(t, g, k, k + c + columns);
      for_panels(packed, [&](auto packets, Index begin) {
        const auto run = [&](auto m, Index i) {
          contraction_tile<m, packets, 2>(columns, Rows3<m>(rows + i * stride, stride),
                                          Panel<float>{panels + begin * n + c * packets * width, packets * width},
                                          sums + i * padded + begin, padded, k + c == 0, next);
        };
        constexpr int most = RegisterTile::rows_of(packets);
        if (padded > narrow)
          in_steps<most>(g, run);
        else
          in_steps<smaller(most, narrow_group)>(g, run);
      });
    }
  }
  /// Ranks behind the last whole packet that are summed by dot products: at most half a packet, of weights and rows of x whose
  /// values follow each other.
  Index ranks_behind() const {
    const Index behind = w.ranks() % width;
    return M == Major::row && x.direct() && behind <= width / 2 ? behind : 0;
  }
  static_assert(width / 2 <= RegisterTile::dot_columns);
  /// The same g tokens and columns: those ranks.
  void rest_by(Index t, Index g, Index k, Index n, const WovenRows& rows, float* sums, Index padded) const {
    dot_all(x.rows.block(t, g, k, n), rows, 1.f, k == 0 ? Into::set : Into::add, sums, padded, NoHint{});
  }
  /// What is converted next: the same tokens' columns from c on, or the next tokens' from k on.
  RowWalk behind(Index t, Index g, Index k, Index c) const {
    if (x.direct()) return {};
    const Index end = smaller(k + sweep, w.columns());
    if (c >= end) t += g, c = k;
    return {x.rows.row(t) + c, x.rows.stride, smaller(g, x.rows.rows - t), smaller(converted, end - c)};
  }
};

template <class X, class W, Major M>
void PanelContraction<X, W, M>::run(const Jobs& jobs, Index job, float* scratch) const {
  const Index r = job % jobs.rank_jobs * jobs.ranks, t0 = jobs.tokens.begin(job / jobs.rank_jobs);
  const Index ranks = smaller(jobs.ranks, w.ranks() - r), padded = round_up(ranks, width);
  const Index rest = r + ranks == w.ranks() ? ranks_behind() : 0, woven = woven_rows(rest),
              packed = padded - (rest == 0 ? 0 : width);
  const Index n = jobs.tokens.count(job / jobs.rank_jobs);
  float* const sums = scratch;
  float* const panels = sums + n * padded;
  for (Index k = 0; k < w.columns(); k += sweep) {
    const Index columns = smaller(sweep, w.columns() - k);
    float* const last = panels + packed * columns;
    pack(w, r, ranks - rest, k, columns, panels);
    if constexpr (M == Major::row) {
      if (rest != 0) weave(w.last(rest), k, columns, last, woven);
    }
    const Index step = padded > narrow ? group : narrow_group;
    for (Index t = 0; t < n; t += step) {
      const Index g = smaller(step, n - t);
      tokens_by(t0 + t, g, k, columns, panels, packed, padded, sums + t * padded, panels + padded * columns);
      if constexpr (std::is_same_v<X, float>) {
        if (rest != 0) rest_by(t0 + t, g, k, columns, {last, woven}, sums + t * padded + packed, padded);
      }
    }
  }
  const Index begin_of_second = w.begin_of_second();
  for (Index t = 0; t < n; ++t) {
    const float* const from = sums + t * padded;
    if (r < out.cols) write(from, smaller(ranks, out.cols - r), out.row(t0 + t) + r);
    const Index skipped = larger(0, begin_of_second - r);
    if (skipped < ranks) write(from + skipped, ranks - skipped, second.row(t0 + t) + r + skipped - begin_of_second);
  }
}

/// A contraction by dot products: few ranks, or few tokens. Weights are read as they lie, or, where more than a few tokens
/// meet them, from a copy in L1, woven into one stream.
template <class X, class W>
struct DotContraction {
  Input<X> x;
  MatrixView<const W> w;  // [R, d]
  Index sweep;
  float scale;
  MatrixView<float> out;  // [T, R]

  static constexpr int tile_ranks = RegisterTile::dot_columns;
  static constexpr int tile_tokens = RegisterTile::dot_rows;
  static constexpr Index most = 126;         // tokens in a job
  static constexpr Index least_of_copy = 8;  // tokens
  static constexpr Index copied = 512;       // columns of the copy: half of L1

  /// Columns of a sweep over `tokens`.
  static Index sweep_of(const Tuning& tuning, Index tokens) {
    const Index columns = detail::sweep_of(tuning);
    if (tokens >= least_of_copy) return smaller(copied, columns);
    return elements(larger(1, few_tokens / larger(1, tokens)), columns);
  }
  /// Floats of a lane, for any number of tokens.
  static Index scratch(const Tuning& tuning, Index depth) {
    return most * tile_ranks * width + tile_ranks * pitch(smaller(copied, depth)) +
           tile_tokens * pitch(smaller(sweep_of(tuning, 1), depth));
  }

  /// Tokens [t0, t0 + n), ranks [r, r + ranks), at most `tile_ranks`.
  void run(Index t0, Index n, Index r, Index ranks, float* scratch) const;

 private:
  /// `count` tiles of M tokens, from t on, × N ranks × columns [k, k + length).
  template <int M, int N, class Weights>
  [[gnu::flatten, gnu::noinline]] void tiles(Index count, Index t, Index k, Index length, Index r,
                                             const Weights weights, float* sums, float* block, RowWalk& next) const {
    for (; count > 0; --count, t += M, sums += M * tile_ranks * width)
      tile<M, N>(t, k, length, r, weights, sums, block, next);
  }
  template <int M, int N, class Weights>
  [[gnu::always_inline]] void tile(Index t, Index k, Index length, Index r, const Weights& weights, float* sums,
                                   float* block, RowWalk& next) const {
    Tile<M, N> c;
    if (k == 0)
      c.clear();
    else
      c.load_from(sums, N * width);
    const auto multiply = [&](const auto& from) __attribute__((always_inline)) {
      if constexpr (!Weights::woven) {
        dot(length, from, weights, c);
      } else if (x.rows.rows > some_tokens) {  // rows of x are what comes from far; of few, weights
        dot(
            length, from, weights, c,
            [&, ahead = tile_tokens * x.rows.stride ](Index i) __attribute__((always_inline)) {
              unroll<M>([&](int m) __attribute__((always_inline)) { prefetch(from.p[m] + i + ahead); });
            });
      } else {
        RowWalk walk = next;
        dot(
            length, from, weights, c, [&](Index i) __attribute__((always_inline)) { walk.template step<width>(i); });
        next = walk;
      }
    };
    with_rows<M, Weights::woven>(t, k, length, block, multiply);
    if (k + sweep < w.cols)
      c.store_to(sums, N * width);
    else
      c.sum_to(out.row(t) + r, out.stride, out.cols - r, factor_of(x.dropout, scale), Into::set);
  }
  /// f(rows): M rows of x from t on, columns [k, k + length), for `dot`: as they lie, under the bits of dropout, or converted in
  /// `block`. Every way to read them is compiled into every tile; the few tokens that meet no copy have one less.
  template <int M, bool MeetsCopy, class F>
  [[gnu::always_inline]] void with_rows(Index t, Index k, Index length, float* block, F&& f) const {
    if constexpr (!std::is_same_v<X, float>) {
      if (!x.dropout.on()) {
        DotRows<X, M> from;
        for (int m = 0; m < M; ++m) from.p[m] = x.rows.row(t + m) + k;
        return f(from);
      }
    } else if constexpr (keeps_while_loading && MeetsCopy) {
      if (x.dropout.on()) {
        KeptRows<M> from;
        std::uint8_t* bits = reinterpret_cast<std::uint8_t*>(block);
        for (int m = 0; m < M; ++m, bits += keep_bytes(length)) {
          keep_bits(x.dropout, t + m, k, length, bits);
          from.p[m] = x.rows.row(t + m) + k;
          from.bits[m] = bits;
        }
        return f(from);
      }
    }
    DotRows<float, M> from;  // unrolled: addresses that a loop with a branch fills stay in memory
    unroll<M>([&](int m)
                  __attribute__((always_inline)) { from.p[m] = x.row(t + m, k, length, block + m * pitch(length)); });
    f(from);
  }
};

template <class X, class W>
void DotContraction<X, W>::run(Index t0, Index n, Index r, Index ranks, float* scratch) const {
  const Index depth = w.cols;
  float* const copy = scratch + most * tile_ranks * width;
  float* const block = copy + tile_ranks * pitch(smaller(copied, depth));
  for (Index k = 0; k < depth; k += sweep) {
    const Index length = smaller(sweep, depth - k);
    RowWalk next{};
    const auto multiply = [&](const auto& weights, Index of) {
      in_steps<tile_ranks>(of, [&](auto c, Index j) {
        const auto run = [&](auto m, Index t, Index count) {
          tiles<m, c>(count, t0 + t, k, length, r + j, weights.from(j), scratch + (t * tile_ranks + j * m) * width,
                      block, next);
        };
        if constexpr (std::is_same_v<decltype(weights), const WovenRows&>)
          in_runs_of_copy(n, run);
        else
          in_runs<tile_tokens>(n, run);
      });
    };
    if (n < least_of_copy) {
      multiply(WeightRows<W>{w.row(r) + k, w.stride}, ranks);
      continue;
    }
    const Index padded = woven_rows(ranks);
    weave(w.row_range(r, ranks), k, length, copy, padded);
    if (k + sweep < depth) next = {w.row(r) + k + sweep, w.stride, ranks, smaller(sweep, depth - k - sweep)};
    multiply(WovenRows{copy, padded}, padded);
  }
}

}  // namespace detail
}  // namespace cpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
