/// The three products for gates that close most experts: tokens are taken group by group (cpu/selection.hpp), by the
/// addresses of their rows. Sums over tokens copy a chunk of rows into panels, once for all of its groups, or, where that is
/// less, the rows of each list.
///
/// Computes:    what cpu/contract.hpp, cpu/spread.hpp and cpu/token_sum.hpp compute, for the open ranks only.
/// Reads:       as they do; U and dU of closed groups are neither read nor computed.
/// Writes:      U [T, R] with 0 in closed groups, and what it pleases behind a prefix within its last packet; y, dA, dB as they
///              do.
/// Errors:      none.
/// Cost:        the open ranks' multiply-adds, and for every list that a token is in one read and write of its row in L2: one
///              by pairs of experts, k by experts.
/// Determinism: a token's groups are summed in ascending order, whatever the other tokens chose.
/// Example:     ops/shrink.hpp
#pragma once
#include <algorithm>

#include <loramix/cpu/selection.hpp>
#include <loramix/cpu/spread.hpp>
#include <loramix/cpu/token_sum.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace cpu {
namespace detail {

/// Rows of a tile that is addressed row by row: as many as there are address registers for.
constexpr int listed_rows(int packets) { return smaller(RegisterTile::rows_of(packets), RegisterTile::many ? 8 : 6); }

/// out[t, open ranks] = scale · x̂ Wᵀ.
template <class X, class W, Major M>
struct GroupedContraction {
  Input<X> x;
  MatrixView<const W, Space::host, M> w;  // [R, d]
  const Selection* selection;
  Index sweep;
  float scale;
  MatrixView<float> out;  // [T, R]

  static constexpr int dot_rows = RegisterTile::dot_rows, dot_columns = RegisterTile::dot_columns;

  /// Whether the weights are read as they lie: where they are read once, and in sweeps where a tile would be one packet wide.
  static bool by_dots(const Tuning& tuning, const Selection& s) {
    return M == Major::row && (s.of_many() || class_of(tuning, s.tokens()) != TokenClass::many);
  }
  static bool swept_by_dots(const Selection& s) { return M == Major::row && s.most_ranks() <= width / 2; }
  /// By pairs where each expert is one packet: two of them make a tile; a wider expert has tiles of its own, and dot products
  /// take one expert at a time.
  static Selection::By listing(const Tuning& tuning, const GateForm<float>& gate) {
    if (many_experts(gate)) return M == Major::row ? Selection::By::one_of_many : Selection::By::expert;
    const Index most = most_ranks_of(gate);
    const bool dots = M == Major::row && most <= width / 2;
    return most <= width && !dots ? detail::listing(tuning, gate) : Selection::By::expert;
  }
  /// Columns of a sweep: a page, so that rows that several groups read stay in L2; where each is read once, as far as the
  /// packed weights stay there.
  static Index sweep_of(const Tuning& tuning, const Selection& s, Index depth, bool direct) {
    if (s.most() > 1 || !direct) return detail::sweep_of(tuning);
    return larger(detail::sweep_of(tuning), packed_sweep_of(tuning, packets_of(s) * width, depth));
  }
  /// For direct rows, and for others where `direct` does not promise that there are none.
  static Index scratch(const Tuning& tuning, const Selection& s, Index depth, bool direct) {
    const Index dots = most_dots * dot_columns * width;
    if (s.of_many()) return dots + most_dots * pitch(smaller(detail::sweep_of(tuning), depth));
    const Index sums = larger(sums_of(s), most_sums);
    const auto with = [&](bool rows_lie) {
      const Index columns = pitch(smaller(sweep_of(tuning, s, depth, rows_lie), depth));
      return (rows_lie ? 0 : s.chunk() * columns) + larger(dots, sums + packets_of(s) * width * columns);
    };
    return direct ? with(true) : larger(with(true), with(false));
  }
  /// Chunks of one job.
  static Index most_chunks(const Selection& s) { return larger(1, most_sums / larger(1, sums_of(s))); }

  /// Chunks [c0, c0 + n), sweep by sweep; of pairs the `part`-th of so many parts of each chunk's entries.
  void run_sweeps(Index c0, Index n, Index part, Index parts, float* scratch) const;

  /// Group g of chunk c by dot products; out is zero where it is not written.
  void run_dots(Index c, Index g, float* scratch) const;

 private:
  static constexpr Index most_sums = 1 << 18;                     // a megabyte
  static constexpr Index most_dots = Selection::chunk_by_expert;  // tokens of a list that meet 8 ranks before the next
  static constexpr Index in_block = 24;  // tokens of a list whose rows stay in L1: whole tiles of every width
  /// Packets of the panels before an expert's; of all.
  static Index packets_before(const Selection& s, Index expert) {
    Index packets = 0;
    for (Index e = 0; e < expert; ++e) packets += blocks_of(s.run_of(e).count, width);
    return packets;
  }
  static Index packets_of(const Selection& s) { return packets_before(s, s.experts()); }
  /// Values of an entry's sums: its runs one after the other, each from a whole packet on.
  static Index padded(const Selection& s) { return s.most_packets() * width; }
  static Index sums_of(const Selection& s) { return s.chunk() * s.most() * padded(s); }

  void pack_experts(Index k, Index n, float* panels) const {
    for (Index e = 0; e < selection->experts(); ++e) {
      const Selection::Run run = selection->run_of(e);
      const auto of_expert = w.row_range(run.begin, run.count);
      for (Index j = 0; j < run.count; j += width, panels += n * width) pack_packet(of_expert, j, k, n, panels, width);
    }
  }
  const float* panel_of(const Selection::Run& run, const float* panels, Index n) const {
    return panels + packets_before(*selection, run.expert) * width * n;
  }
  /// Entries of a chunk, those of one job. By experts all; by pairs each token has one entry.
  struct Entries {
    Index begin, end;
  };
  Entries entries_of(Index c, Index part, Index parts) const {
    const Index n = selection->tokens(c) * selection->most();
    return {n * part / parts, n * (part + 1) / parts};
  }
  /// f(token of the chunk) for the tokens of one job.
  template <class F>
  void each_token(Index c, const Entries& range, F&& f) const {
    if (!selection->in_pairs()) {
      for (Index i = 0; i < selection->tokens(c); ++i) f(i);
      return;
    }
    const Selection::Entry* const entries = selection->list(c, 0).entries;
    for (Index i = range.begin; i < range.end; ++i) f(Index{entries[i].token});
  }
  void convert(Index c, const Entries& range, Index k, Index n, float* block) const {
    if (x.direct()) return;
    each_token(c, range, [&](Index i) { x.convert(c * selection->chunk() + i, k, n, block + i * pitch(n)); });
  }
  /// A chunk's rows: where they lie, or what was converted.
  struct ChunkRows {
    const float* p;
    Index stride;
  };
  ChunkRows rows_of(Index c, Index k, Index n, const float* block) const {
    if constexpr (std::is_same_v<X, float>) {
      if (x.direct()) return {x.rows.row(c * selection->chunk()) + k, x.rows.stride};
    }
    return {block, pitch(n)};
  }
  void sweep_chunk(Index c, const Entries& range, Index k, Index n, const float* panels, const float* block,
                   float* sums, RowWalk& next) const {
    const ChunkRows rows = rows_of(c, k, n, block);
    const Index pitch_of_sums = padded(*selection);
    for (Index g = 0; g < selection->groups(); ++g) {
      const Selection::List list = selection->list(c, g).inside(range.begin, range.end);
      for (Index first = 0; first < list.count; first += in_block) {
        const Part part{rows,
                        list.entries + first,
                        smaller(in_block, list.count - first),
                        k,
                        n,
                        sums + (list.first_entry - range.begin + first) * pitch_of_sums};
        if (selection->in_pairs())
          sweep_pair(part, g, panels, next);
        else
          selection->each_run(
              g, [&](const Selection::Run& run) { sweep_run(part, run.count, panel_of(run, panels, n), next); });
      }
    }
  }
  /// Some tokens of a list, their rows in columns [k, k + n), their sums.
  struct Part {
    ChunkRows rows;
    const Selection::Entry* entries;
    Index count, k, n;
    float* sums;
  };
  template <int T, int N>
  void tiles(const Part& part, const PacketPanel& panel, Index begin, Index i, RowWalk& next) const {
    const Index pitch_of_sums = padded(*selection);
    in_steps<T>(
        part.count,
        [&](auto m, Index j) __attribute__((always_inline)) {
          const RowList<m> rows([&](int r) __attribute__((always_inline)) {
            return part.rows.p + part.entries[j + r].token * part.rows.stride;
          });
          contraction_tile<m, N, 8>(part.n, rows, panel, part.sums + j * pitch_of_sums + begin, pitch_of_sums,
                                    part.k == 0, next);
        },
        i);
  }
  void sweep_run(const Part& part, Index ranks, const float* panels, RowWalk& next) const {
    const Index pitch_of_sums = padded(*selection);
    const bool neighbours = part.entries[part.count - 1].token - part.entries[0].token == part.count - 1;
    for_panels(ranks, [&](auto packets, Index begin) {
      constexpr int most = listed_rows(packets);
      const PacketPanel panel{panels + begin * part.n, part.n * width};
      Index i = 0;
      for (; neighbours && i + most <= part.count; i += most) {
        contraction_tile<most, packets, 8>(
            part.n, Rows3<most>(part.rows.p + part.entries[i].token * part.rows.stride, part.rows.stride), panel,
            part.sums + i * pitch_of_sums + begin, pitch_of_sums, part.k == 0, next);
      }
      tiles<listed_rows(packets), packets>(part, panel, begin, i, next);
    });
  }
  /// The packets of both experts side by side.
  void sweep_pair(const Part& part, Index g, const float* panels, RowWalk& next) const {
    const float* from[2] = {};
    int n = 0;
    selection->each_run(g, [&](const Selection::Run& run) { from[n++] = panel_of(run, panels, part.n); });
    if (n == 2) return tiles<listed_rows(2), 2>(part, {from[0], from[1] - from[0]}, 0, 0, next);
    tiles<listed_rows(1), 1>(part, {from[0], 0}, 0, 0, next);
  }
  /// The same by dot products on the weights as they lie: columns [k, k + n).
  void dot_chunk(Index c, Index k, Index n, const float* block, float* sums, RowWalk& next) const {
    const ChunkRows rows = rows_of(c, k, n, block);
    const Index pitch_of_sums = padded(*selection);
    for (Index g = 0; g < selection->groups(); ++g) {
      const Selection::List list = selection->list(c, g);
      const Index begin = selection->rank_begin(g);
      in_steps<dot_columns>(selection->rank_count(g), [&](auto ranks, Index r) {
        in_steps<dot_rows>(list.count, [&](auto m, Index i) {
          dot_tile<m, ranks>(k, n, list.entries + i, rows.p, rows.stride, begin + r,
                             sums + (list.first_entry + i) * pitch_of_sums + r, pitch_of_sums, next);
        });
      });
    }
  }
  template <int T, int N>
  [[gnu::flatten, gnu::noinline]] void dot_tile(Index k, Index n, const Selection::Entry* entries, const float* rows,
                                                Index stride, Index r, float* sums, Index pitch_of_sums,
                                                RowWalk& next) const {
    if constexpr (M == Major::row) {
      constexpr Index step = 8 * width;  // columns between requests for what comes next
      RowWalk walk = next;
      Tile<T, N> tile;
      tile.clear();
      for (Index c = 0; c < n; c += step) {
        DotRows<float, T> from;
        for (int m = 0; m < T; ++m) from.p[m] = rows + entries[m].token * stride + c;
        unroll<T * 2>([&](int) __attribute__((always_inline)) { walk.template step<1>(0); });
        dot(smaller(step, n - c), from, WeightRows<W>{w.row(r) + k + c, w.stride}, tile);
      }
      next = walk;
      tile.sum_to(sums, pitch_of_sums, N, 1, k == 0 ? Into::set : Into::add);
    }
  }
  void write(Index c, const Entries& range, const float* sums) const {
    const Index t0 = c * selection->chunk(), pitch_of_sums = padded(*selection);
    const float factor = factor_of(x.dropout, scale);
    each_token(c, range, [&](Index i) { std::fill_n(out.row(t0 + i), out.cols, 0.f); });
    for (Index g = 0; g < selection->groups(); ++g) {
      const Selection::List list = selection->list(c, g).inside(range.begin, range.end);
      if (list.count == 0) continue;
      Index place = 0;
      selection->each_run(g, [&](const Selection::Run& run) {
        for (Index i = 0; i < list.count; ++i) {
          const float* const from = sums + (list.first_entry - range.begin + i) * pitch_of_sums + place;
          float* const to = out.row(t0 + list.entries[i].token) + run.begin;
          for (Index j = 0; j < run.count; ++j) to[j] = factor * from[j];
        }
        place += round_up(run.count, width);
      });
    }
  }

  template <int T, int N>
  [[gnu::flatten, gnu::noinline]] void dots(Index c, const Selection::List& list, Index i, Index k, Index n, Index r,
                                            float* sums, const float* block) const {
    Tile<T, N> tile;
    if (k == 0)
      tile.clear();
    else
      tile.load_from(sums, N * width);
    const auto token = [&](int m) __attribute__((always_inline)) {
      return c * selection->chunk() + list.entries[i + m].token;
    };
    if constexpr (M == Major::row) {
      if (x.dropout.on()) {
        DotRows<float, T> from;
        for (int m = 0; m < T; ++m) from.p[m] = block + (i + m) * pitch(n);
        dot(n, from, WeightRows<W>{w.row(r) + k, w.stride}, tile);
      } else {
        DotRows<X, T> from;
        for (int m = 0; m < T; ++m) from.p[m] = x.rows.row(token(m)) + k;
        dot(n, from, WeightRows<W>{w.row(r) + k, w.stride}, tile);
      }
    }
    if (k + sweep < w.cols)
      tile.store_to(sums, N * width);
    else
      tile.each_sums([&, factor = splat(factor_of(x.dropout, scale)) ](int m, int j,
                                                                       Packet totals) __attribute__((always_inline)) {
        add_or_set(out.row(token(m)) + r + j, totals, factor, Into::set, PartOfPacket{smaller(N, width)});
      });
  }
};

template <class X, class W, Major M>
void GroupedContraction<X, W, M>::run_sweeps(Index c0, Index n, Index part, Index parts, float* scratch) const {
  const Selection& s = *selection;
  const bool by_dots = swept_by_dots(s);
  const Index per_chunk = sums_of(s);
  float* const sums = scratch;
  float* const panels = sums + n * per_chunk;
  for (Index k = 0; k < w.cols; k += sweep) {
    const Index columns = smaller(sweep, w.cols - k);
    if (!by_dots) pack_experts(k, columns, panels);
    float* const block = panels + packets_of(s) * width * columns;
    for (Index c = c0; c < c0 + n; ++c) {
      const Entries range = entries_of(c, part, parts);
      convert(c, range, k, columns, block);
      RowWalk next{};
      if (x.direct() && c + 1 < c0 + n)
        next = {x.rows.row((c + 1) * selection->chunk()) + k, x.rows.stride, s.tokens(c + 1), columns};
      if (by_dots)
        dot_chunk(c, k, columns, block, sums + (c - c0) * per_chunk, next);
      else
        sweep_chunk(c, range, k, columns, panels, block, sums + (c - c0) * per_chunk, next);
    }
  }
  for (Index c = c0; c < c0 + n; ++c) write(c, entries_of(c, part, parts), sums + (c - c0) * per_chunk);
}

template <class X, class W, Major M>
void GroupedContraction<X, W, M>::run_dots(Index c, Index g, float* scratch) const {
  const Selection& s = *selection;
  const Selection::List all = s.list(c, g);
  float* const block = scratch + most_dots * dot_columns * width;
  const Index end = s.rank_begin(g) + s.rank_count(g);
  for (Index first = 0; first < all.count; first += most_dots) {
    const Selection::List list{all.entries + first, smaller(most_dots, all.count - first), all.first_entry + first};
    for (Index r = s.rank_begin(g); r < end; r += dot_columns) {
      for (Index k = 0; k < w.cols; k += sweep) {
        const Index columns = smaller(sweep, w.cols - k);
        if (x.dropout.on()) {
          for (Index i = 0; i < list.count; ++i) {
            x.convert(c * selection->chunk() + list.entries[i].token, k, columns, block + i * pitch(columns));
          }
        }
        in_steps<dot_rows>(list.count, [&](auto m, Index i) {
          in_steps<dot_columns>(smaller(dot_columns, end - r), [&](auto ranks, Index j) {
            dots<m, ranks>(c, list, i, k, columns, r + j, scratch + (i * dot_columns + j * m) * width, block);
          });
        });
      }
    }
  }
}

/// y (+)= scale · left W over the open ranks, and the second pair of factors over all of its ranks.
template <class Y, class W, Major M>
struct GroupedSpread {
  Spread<Y, W, M> all;
  const Selection* selection;

  using Base = Spread<Y, W, M>;
  static constexpr int packets = Base::packets, rows = Base::rows;
  static constexpr Index panel = column_panel;

  /// Whether weights are read as they lie, but for the last columns.
  static bool natural(const Tuning& tuning, const Selection& s) {
    return M == Major::row && (s.of_many() || class_of(tuning, s.tokens()) != TokenClass::many);
  }
  /// Columns of a sweep. A panel of sums goes along with a page of y where rows are met by several groups.
  static Index sweep_of(const Tuning& tuning, const Selection& s, Index ranks, Index columns) {
    const Index page = detail::sweep_of(tuning), packed = packed_sweep_of(tuning, ranks, columns);
    if (natural(tuning, s) && s.of_many()) return smaller(page, round_up(columns, 64));
    return s.most() > 1 || natural(tuning, s) ? smaller(page, packed) : packed;
  }
  /// Columns that are summed together: a panel, so that sums stay in L1. Of many experts more, for their weights come from far
  /// and in longer pieces sooner: as many as keep the sums in L2, or a whole sweep where so few tokens meet an expert that its
  /// weights are most of what is moved.
  static Index band_of(const Tuning& tuning, const Selection& s, Index sweep) {
    if (!s.of_many()) return panel;
    const Index whole = round_up(sweep, panel);
    if (s.tokens() <= tokens_of_whole(s)) return whole;
    return larger(1, smaller(whole, tuning.weights / s.chunk()) / panel) * panel;
  }
  static Index tokens_of_whole(const Selection& s) { return elements(s.groups(), s.most_ranks()) / (4 * s.most()); }
  static Index scratch(const Tuning& tuning, const Selection& s, Index ranks, Index columns) {
    const Index sweep = sweep_of(tuning, s, ranks, columns);
    const Index copied = natural(tuning, s) && s.of_many() ? panel : sweep;
    return elements(ranks, copied) + sums_of(tuning, s, sweep) + s.chunk() * (keep_bytes(sweep) / 4 + width);
  }

  /// Chunks [chunk, chunk + n) × columns [c0, c0 + columns), at most one sweep.
  void run(const Tuning& tuning, Index chunk, Index n, Index c0, Index columns, float* scratch) const;

 private:
  /// Sums of a band of this many tokens, or of fewer, whose bands may be so much wider that they have more.
  static Index sums_of(const Tuning& tuning, const Selection& s, Index sweep) {
    if (s.most() == 1) return 0;
    if (!s.of_many()) return s.chunk() * panel;
    const Index whole = round_up(sweep, panel);
    const Index wide = elements(smaller(s.chunk(), tokens_of_whole(s)), whole);
    return larger(wide, larger(s.chunk() * panel, smaller(elements(s.chunk(), whole), tuning.weights)));
  }

  /// A tile is added to y, or assigned: `wide` columns from c on, row m of it to token_of(m).
  template <int T, int N, class F>
  [[gnu::always_inline]] void put(const Tile<T, N>& sum, Index c, Index wide, const F& token_of) const {
    if (wide < N * width) {
      float block[T * N * width];
      sum.store_to(block, N * width);
      for (int m = 0; m < T; ++m) all.part(token_of(m), c, wide, block + m * N * width);
      return;
    }
    const auto each = [&](const auto& f) __attribute__((always_inline)) {
      unroll<T>([&](int m) __attribute__((always_inline)) {
        Y* const out = all.y.row(token_of(m)) + c;
        unroll<N>([&](int n) __attribute__((always_inline)) { f(out + n * width, sum.c[m][n]); });
      });
    };
    if (all.into == Into::add)
      each([](Y * out, Packet v) __attribute__((always_inline)) { store(out, add(load(out), v)); });
    else
      each([](Y * out, Packet v) __attribute__((always_inline)) { store(out, v); });
  }

  /// The tokens of one list, where no token is in two: sums leave the registers for y. `over_weights(f)`: f(first column,
  /// columns, weights) for those that lie in the same way.
  template <class F>
  void run_list(Index chunk, Index g, Index c0, const std::uint8_t* keep, Index keep_pitch,
                const F& over_weights) const {
    const Selection::List list = selection->list(chunk, g);
    const bool none = g == selection->groups();
    if (none && all.into == Into::add && all.second.w.rows == 0) return;
    ListRanks ranks{};
    Index n = 0;
    if (!none && list.count > 0)
      selection->each_run(g, [&](const Selection::Run& run) { (n++ == 0 ? ranks.first : ranks.second) = run; });
    in_steps<rows>(list.count, [&](auto m, Index i) {
      const Selection::Entry* const entries = list.entries + i;
      over_weights([&](Index j, Index columns, const auto& weights) {
        const Index t = chunk * selection->chunk();
        if constexpr (m == rows) {
          if (list.consecutive(i, m))
            return list_tiles<m, true>(ranks, entries, t, c0 + j, columns, keep + j / 8, keep_pitch, weights);
        }
        list_tiles<m, false>(ranks, entries, t, c0 + j, columns, keep + j / 8, keep_pitch, weights);
      });
    });
  }
  /// The ranks that a list's tokens reach.
  struct ListRanks {
    Selection::Run first, second;
  };
  /// T tokens of a list × columns from c on, panel by panel.
  template <int T, bool Consecutive, class Weight, bool Scaled>
  [[gnu::flatten, gnu::noinline]] void list_tiles(const ListRanks& ranks, const Selection::Entry* entries,
                                                  Index first_token, Index c, Index columns, const std::uint8_t* keep,
                                                  Index keep_pitch, const PanelsOfWeights<Weight, Scaled>& from) const {
    constexpr int N = packets;
    PanelsOfWeights<Weight, Scaled> weights = from;
    const auto token = [&](int m) __attribute__((always_inline)) { return first_token + entries[m].token; };
    const auto add_product = [&](Tile<T, N> & sum, const auto& factor, const Selection::Run& run, const Weight* w,
                                 Index step) __attribute__((always_inline)) {
      if constexpr (Consecutive) {
        outer(run.count, Rows3<T>(factor.left.row(token(0)) + run.begin, factor.left.stride),
              Panel<Weight>{w + run.begin * step, step}, sum);
      } else {
        outer(run.count,
              RowList<T>([&](int m) __attribute__((always_inline)) { return factor.left.row(token(m)) + run.begin; }),
              Panel<Weight>{w + run.begin * step, step}, sum);
      }
    };
    const bool ask = all.waits_for_y(ranks.first.count + ranks.second.count + all.second.w.rows);
    for (; columns > 0; columns -= panel, c += panel, keep += panel / 8, weights = weights.at(1)) {
      Tile<T, N> sum;
      sum.clear();
      if (ask) unroll<T>([&](int m) __attribute__((always_inline)) { all.template ask_for_y<N>(token(m), c); });
      add_product(sum, all.first, ranks.first, weights.first, weights.first_step);
      if (ranks.second.count != 0) add_product(sum, all.first, ranks.second, weights.first, weights.first_step);
      if constexpr (!Scaled) {
        const Packet factor = splat(factor_of(all.dropout, all.scale));
        sum.set([&](int, int, Packet v) __attribute__((always_inline)) { return mul(factor, v); });
      }
      if (all.dropout.on()) {
        sum.set([&](int i, int j, Packet v) __attribute__((always_inline)) {
          return keep_lanes(v, keep + entries[i].token * keep_pitch, j * width);
        });
      }
      if (all.second.w.rows != 0)
        add_product(sum, all.second, {0, 0, all.second.w.rows}, weights.second, weights.second_step);
      put(sum, c, smaller(panel, columns), token);
    }
  }

  /// Columns [c, c + columns) for the tokens of one chunk.
  struct Band {
    Index chunk, first_token, c, columns;
    const std::uint8_t* keep;
    Index keep_pitch;
    float* partial;  // [chunk, pitch]
    Index pitch;
    Index token(const Selection::Entry& e) const { return first_token + e.token; }
  };

  // What a token's groups give is summed in `partial`, without asking which of them is the first or the last: the answer
  // would be different for every token, and no processor guesses it. `next`: rows of y to come; of many experts, weights of the
  // group to come.
  template <class F>
  void run_band(const Band& band, RowWalk& next, const F& weights_of) const {
    const Index tokens = selection->tokens(band.chunk);
    for (Index i = 0; i < tokens * band.pitch; i += width) store(band.partial + i, splat(0));
    selection->each_group_in(band.chunk, [&](Index g, Index following) {
      const Selection::List list = selection->list(band.chunk, g);
      const Index r = selection->rank_begin(g), ranks = selection->rank_count(g);
      if constexpr (M == Major::row) {
        if (selection->of_many() && following < selection->groups()) {
          next = {all.first.w.row(selection->rank_begin(following)) + band.c, all.first.w.stride,
                  selection->rank_count(following), band.columns};
        }
      }
      for (Index j = 0; j < band.columns; j += panel) {
        weights_of(band.c + j, [&](const auto& w) {
          in_runs<rows>(list.count, [&](auto m, Index i, Index count) {
            tiles<m>(count, band, j, list.entries + i, r, ranks, w.first + r * w.first_step, w.first_step, next);
          });
        });
      }
    });
    for (Index j = 0; j < band.columns; j += panel) {
      if (all.second.w.rows != 0) {
        weights_of(band.c + j, [&](const auto& w) {
          in_steps<rows>(tokens, [&](auto m, Index i) { side_tile<m>(band, j, i, w.second, w.second_step); });
        });
      }
      finish(band, j);
    }
  }

  /// `count` tiles of T tokens each: their sums of the panel at a column of the band.
  template <int T, class Weight>
  [[gnu::flatten, gnu::noinline]] void tiles(Index count, const Band& band, Index column,
                                             const Selection::Entry* entries, Index r, Index ranks, const Weight* w,
                                             Index step, RowWalk& next) const {
    RowWalk walk = next;
    for (; count > 0; --count, entries += T) {
      const RowList<T> lefts([&](int m) __attribute__((always_inline)) {
        return all.first.left.row(band.token(entries[m])) + r;
      });
      float* sums[T];
      unroll<T>([&](int m) __attribute__((always_inline)) {
        sums[m] = band.partial + entries[m].token * band.pitch + column;
      });
      Tile<T, packets> sum;
      sum.clear();
      outer(
          ranks, lefts, Panel<Weight>{w, step},
          sum, [&](Index k) __attribute__((always_inline)) { walk.template step<2>(k); });
      sum.each([&](int m, int j, Packet v)
                   __attribute__((always_inline)) { store(sums[m] + j * width, add(load(sums[m] + j * width), v)); });
    }
    next = walk;
  }
  /// The second product, behind the first one's scale and dropout.
  template <int T, class Weight>
  [[gnu::flatten, gnu::noinline]] void side_tile(const Band& band, Index column, Index token, const Weight* w,
                                                 Index step) const {
    float* const sums = band.partial + token * band.pitch + column;
    const std::uint8_t* const keep = band.keep + column / 8;
    const Index t = band.first_token + token;
    Tile<T, packets> sum;
    sum.clear();
    outer(all.second.w.rows, Rows3<T>(all.second.left.row(t), all.second.left.stride), Panel<Weight>{w, step}, sum);
    sum.each([&](int m, int j, Packet v) __attribute__((always_inline)) {
      float* const to = sums + m * band.pitch + j * width;
      store(to, add(scaled(keep + (token + m) * band.keep_pitch, j, load(to)), v));
    });
  }
  /// v · scale, with dropout: what becomes of packet j of a panel of sums of the first product.
  [[gnu::always_inline]] Packet scaled(const std::uint8_t* keep, int j, Packet v) const {
    const Packet whole = mul(splat(factor_of(all.dropout, all.scale)), v);
    return all.dropout.on() ? keep_lanes(whole, keep, j * width) : whole;
  }
  /// y (+)= what was summed, for the panel that begins at `column` of a band.
  void finish(const Band& band, Index column) const {
    const bool side = all.second.w.rows != 0;
    const std::uint8_t* const keep = band.keep + column / 8;
    for (Index i = 0; i < selection->tokens(band.chunk); ++i) {
      const Index t = band.first_token + i;
      if (all.idle != nullptr && all.idle[t] != 0) continue;
      Tile<1, packets> sum;
      sum.load_from(band.partial + i * band.pitch + column, panel);
      if (!side) {
        sum.set([&](int, int j, Packet v)
                    __attribute__((always_inline)) { return scaled(keep + i * band.keep_pitch, j, v); });
      }
      put(
          sum, band.c + column,
          smaller(panel, band.columns - column), [t](int) __attribute__((always_inline)) { return t; });
    }
  }
};

template <class Y, class W, Major M>
void GroupedSpread<Y, W, M>::run(const Tuning& tuning, Index chunk, Index n, Index c0, Index columns,
                                 float* scratch) const {
  const bool natural = this->natural(tuning, *selection);
  const Index step = panel * all.ranks(), band = band_of(tuning, *selection, columns);
  const Index copied = natural ? columns / panel * panel : 0;  // columns before are read where they lie
  float* const weights = scratch;
  float* const partial = weights + blocks_of(columns - copied, panel) * step;
  std::uint8_t* const keep =
      reinterpret_cast<std::uint8_t*>(partial + (selection->most() == 1 ? 0 : selection->chunk() * band));
  const bool one_list = selection->most() == 1;
  const float scale = one_list ? factor_of(all.dropout, all.scale) : 1;  // of what is copied
  const auto copy_ranks = [&](Index r, Index ranks) {
    copy_panels(all.first.w.row_range(r, ranks), c0 + copied, columns - copied, weights + panel * r, step, scale);
  };
  const auto copies = [&](auto scaled) {
    return PanelsOfWeights<float, scaled>{weights, weights + panel * all.first.w.rows, panel, panel, step};
  };
  if (!selection->of_many()) copy_ranks(0, all.first.w.rows);
  copy_panels(all.second.w, c0 + copied, columns - copied, weights + panel * all.first.w.rows, step);
  for (Index c = chunk; c < chunk + n; ++c) {
    if (selection->of_many())  // those that somebody chose
      selection->each_group_in(c,
                               [&](Index g, Index) { copy_ranks(selection->rank_begin(g), selection->rank_count(g)); });
    if (all.dropout.on()) {
      for (Index i = 0; i < selection->tokens(c); ++i) {
        keep_bits(all.dropout, c * selection->chunk() + i, c0, columns, keep + i * keep_bytes(columns));
      }
    }
    if (one_list) {
      const auto over_weights = [&](const auto& f) {
        if (copied < columns) f(copied, columns - copied, copies(std::true_type{}));
        if constexpr (M == Major::row) {
          if (copied != 0) f(Index{0}, copied, all.lying(c0));
        }
      };
      const auto run = [&](Index g) { run_list(c, g, c0, keep, keep_bytes(columns), over_weights); };
      selection->each_group_in(c, [&](Index g, Index) { run(g); });
      run(selection->groups());
      continue;
    }
    // f(weights) of the panel that begins at a column of y.
    const auto weights_of = [&](Index column, const auto& f) {
      const Index j = column - c0;
      if (j >= copied) return f(copies(std::false_type{}).at((j - copied) / panel));
      if constexpr (M == Major::row) f(all.lying(c0).at(j / panel));
    };
    RowWalk next{};
    if (c + 1 < chunk + n)
      next = {all.y.row((c + 1) * selection->chunk()) + c0, all.y.stride, selection->tokens(c + 1), columns};
    for (Index j = 0; j < columns; j += band) {
      const Index wide = smaller(band, columns - j);
      run_band(
          {c, c * selection->chunk(), c0 + j, wide, keep + j / 8, keep_bytes(columns), partial, round_up(wide, panel)},
          next, weights_of);
    }
  }
}

/// out[r, c] (+)= scale · Σ of left[t, r] · x̂[t, c] over the tokens whose gate is open at r.
template <class X, class G, Major M>
struct GroupedTokenSum {
  MatrixView<const float> left;  // [T, R]
  Input<X> x;
  float scale;
  Into into;
  MatrixView<G, Space::host, M> out;  // [R, d]
  const Selection* selection;

  static constexpr int rows = SumPanel::rows;
  static constexpr Index panel = SumPanel::columns;
  static constexpr Index sweep = 1008;  // columns of a job: a multiple of every panel, and of 8
  static constexpr Index ranks_of_job = 256;

  /// Groups of one job: as many as have at most `ranks_of_job` ranks, one at least; all, where groups share ranks.
  static Index groups_of_job(Index most_ranks) { return larger(1, ranks_of_job / larger(1, most_ranks)); }
  static Index groups_of_job(const Selection& s) {
    return s.share_ranks() ? larger(1, s.groups()) : groups_of_job(s.most_ranks());
  }
  /// How tokens are to be listed: one by one of many, where a row of x is copied less often for each of its experts than for
  /// each job.
  static Selection::By listing(const GateForm<float>& gate) {
    const bool lists = blocks_of(gate.experts, groups_of_job(most_ranks_of(gate))) > gate.ids.cols;
    return gate.ids.cols != 0 && lists ? Selection::By::one_of_many : Selection::By::expert;
  }
  static Index scratch(const Selection& s) {
    const Index copied = s.of_many() ? most_in_sum : s.chunk();
    return larger(ranks_of_job, s.most_ranks()) * sweep + copied * (s.most() * round_up(s.most_ranks(), rows) + sweep) +
           sweep + 8 * width;
  }

  /// Groups [g0, g0 + groups) × columns [c0, c0 + columns), all tokens.
  void run(Index g0, Index groups, Index c0, Index columns, float* scratch) const;

 private:
  /// Tokens whose products are added up in registers: a list may be longer where its rows were copied. Rows that are read
  /// where they lie share few sets of L1. The number changes no bit.
  static constexpr Index most_in_sum = 96, most_in_place = 24;

  struct Job {
    Index g0, groups, c0, columns;
    Index r0, ranks;  // of these groups
    float* sums;      // [columns / panel][ranks][panel]
    float* scratch;
  };
  /// One panel's columns of a list's rows.
  struct Listed {
    const float* first;  // of the chunk
    const Selection::Entry* entries;
    [[gnu::always_inline]] Packet packet(Index k, Index n) const {
      return load(first + entries[k].token * panel + n * width);
    }
    [[gnu::always_inline]] void move(Index) {}  // down the ranks of one panel
  };

  /// Whether every list of the chunk is tokens in a row, and few ranks meet them: what is read once need not be copied.
  bool in_place(Index c, Index g0, Index groups) const {
    if (!x.direct() || selection->most() > 1) return false;
    for (Index g = g0; g < g0 + groups; ++g) {
      const Selection::List list = selection->list(c, g);
      if (list.count == 0) continue;
      if (selection->rank_count(g) > SumPanel::few_ranks || !list.consecutive(0, list.count)) return false;
    }
    return true;
  }
  /// Whether there is nothing to add to a group's ranks.
  bool idle(Index g) const {
    if (into != Into::add) return false;
    for (Index c = 0; c < selection->chunks(); ++c) {
      if (selection->list(c, g).count != 0) return false;
    }
    return true;
  }
  /// [ranks / rows][n][rows] of a list's tokens.
  void gather(Index t0, const Selection::List& list, Index begin, Index ranks, float* to) const {
    for (Index i = 0; i < list.count; ++i) {
      const float* const row = left.row(t0 + list.entries[i].token) + begin;
      Index r = 0;
      for (; r + rows <= ranks; r += rows) std::copy_n(row + r, rows, to + r * list.count + i * rows);
      std::copy_n(row + r, ranks - r, to + r * list.count + i * rows);
    }
  }
  /// Sums of group g in the panel at column j (+)= those of n tokens, their rows in `from`. `lefts`: what was gathered of a
  /// list of `count`, from the first of the n on.
  template <class B>
  void add_tokens(const Job& job, Index g, Index j, Index n, const float* lefts, Index count, const B& from) const {
    SumPanel::add_ranks(selection->rank_count(g), false, n, lefts, count, from,
                        sums_of(job, j, selection->rank_begin(g)), {});
  }
  static float* sums_of(const Job& job, Index j, Index r) { return job.sums + j * job.ranks + (r - job.r0) * panel; }
  void add_chunk(const Job& job, Index c) const;
  void add_lists(const Job& job, Index c) const;
};

/// A chunk's rows are copied once for all groups.
template <class X, class G, Major M>
void GroupedTokenSum<X, G, M>::add_chunk(const Job& job, Index c) const {
  const Selection& s = *selection;
  const Index t0 = c * s.chunk(), n = s.tokens(c), end = job.g0 + job.groups, columns = job.columns;
  const Index copied =
      in_place(c, job.g0, job.groups) ? columns / panel * panel : 0;  // columns before are read in place
  float* const lefts = job.scratch;
  float* const block = lefts + s.chunk() * s.most() * round_up(s.most_ranks(), rows);
  SumPanel::copy(
      x, [t0](Index i) { return t0 + i; }, n, job.c0 + copied, columns - copied, block, block + s.chunk() * sweep);
  float* to = lefts;
  for (Index g = job.g0; g < end; ++g) {
    const Selection::List list = s.list(c, g);
    gather(t0, list, s.rank_begin(g), s.rank_count(g), to);
    to += list.count * round_up(s.rank_count(g), rows);
  }
  // f(group, its list, what was gathered of it).
  const auto over_lists = [&](const auto& f) {
    const float* of_list = lefts;
    for (Index g = job.g0; g < end; ++g) {
      const Selection::List list = s.list(c, g);
      f(g, list, of_list);
      of_list += list.count * round_up(s.rank_count(g), rows);
    }
  };
  // Rows that are read where they lie: some of them, along; a block of copies: panel by panel.
  if constexpr (std::is_same_v<X, float>) {
    over_lists([&](Index g, const Selection::List& list, const float* of_list) {
      const Cut cut(copied == 0 ? 0 : list.count, 1, most_in_place, 1);
      for (Index part = 0; part < cut.jobs; ++part) {
        const Index i = cut.begin(part), t = t0 + list.entries[i].token;
        const Panel<float> from{x.rows.row(t) + job.c0, x.rows.stride};
        SumPanel::add_panels(copied / panel, s.rank_count(g), false, cut.count(part), of_list + i * rows, list.count,
                             from, sums_of(job, 0, s.rank_begin(g)), job.ranks * panel,
                             {from.p + 2 * panel, from.step, panel});
      }
    });
  }
  for (Index j = copied; j < columns; j += panel) {
    over_lists([&](Index g, const Selection::List& list, const float* of_list) {
      const Cut cut(list.count, 1, most_in_sum, 1);
      for (Index part = 0; part < cut.jobs; ++part) {
        const Index i = cut.begin(part);
        add_tokens(job, g, j, cut.count(part), of_list + i * rows, list.count,
                   Listed{block + (j - copied) * n, list.entries + i});
      }
    });
  }
}

/// Of many experts, whose groups meet few of a chunk's tokens: list by list.
template <class X, class G, Major M>
void GroupedTokenSum<X, G, M>::add_lists(const Job& job, Index c) const {
  const Selection& s = *selection;
  const Index t0 = c * s.chunk();
  float* const lefts = job.scratch;
  float* const block = lefts + most_in_sum * round_up(s.most_ranks(), rows);
  for (Index g = job.g0; g < job.g0 + job.groups; ++g) {
    const Selection::List list = s.list(c, g);
    const Cut cut(list.count, 1, most_in_sum, 1);
    for (Index i = 0; i < cut.jobs; ++i) {
      const Selection::List part = list.inside(list.first_entry + cut.begin(i), list.first_entry + cut.begin(i + 1));
      gather(t0, part, s.rank_begin(g), s.rank_count(g), lefts);
      SumPanel::copy(
          x, [&](Index k) { return t0 + part.entries[k].token; }, part.count, job.c0, job.columns, block,
          block + most_in_sum * sweep);
      for (Index j = 0; j < job.columns; j += panel)
        add_tokens(job, g, j, part.count, lefts, part.count, Panel<float>{block + j * part.count, panel});
    }
  }
}

template <class X, class G, Major M>
void GroupedTokenSum<X, G, M>::run(Index g0, Index groups, Index c0, Index columns, float* scratch) const {
  const Selection& s = *selection;
  while (s.share_ranks() && groups > 1 && idle(g0 + groups - 1)) --groups;  // ranks that no prefix reaches
  const Index r0 = s.rank_begin(g0), ranks = s.rank_begin(g0 + groups - 1) + s.rank_count(g0 + groups - 1) - r0;
  const Job job{g0, groups, c0, columns, r0, ranks, scratch, scratch + ranks * sweep};
  std::fill_n(job.sums, ranks * SumPanel::whole(columns), 0.f);
  for (Index c = 0; c < s.chunks(); ++c) s.of_many() ? add_lists(job, c) : add_chunk(job, c);
  const auto finish = [&, factor = factor_of(x.dropout, scale)](Index begin, Index count) {
    for (Index j = 0; j < columns; j += panel) {
      SumPanel::finish(job.sums + j * ranks + (begin - r0) * panel, factor, into,
                       out.block(begin, count, c0 + j, smaller(panel, columns - j)));
    }
  };
  if (!s.of_many()) return finish(r0, ranks);
  for (Index g = g0; g < g0 + groups; ++g) {
    if (!idle(g)) finish(s.rank_begin(g), s.rank_count(g));
  }
}

}  // namespace detail
}  // namespace cpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
