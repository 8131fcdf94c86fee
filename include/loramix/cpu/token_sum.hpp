/// Sums over tokens: the gradients of A and B, in their own order.
///
/// Computes:    out[r, c] (+)= scale · Σ_t left[t, r] · x̂[t, c]
/// Reads:       left [T, R], x [T, d] (for few ranks where it lies, else block by block: widened, dropped, or copied).
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

/// The lines of a panel that comes soon, to be asked for row by row while another is added up.
struct ComingPanel {
  const char* lines = nullptr;  // of the first row
  Index stride = 0, bytes = 0;  // from row to row, of each

  ComingPanel() = default;
  template <class X>
  ComingPanel(const X* first, Index stride_, Index columns)
      : lines(reinterpret_cast<const char*>(first)),
        stride(stride_ * Index{sizeof(X)}),
        bytes(columns * Index{sizeof(X)}) {}

  [[gnu::always_inline]] void ask(Index k) const {
    if (lines == nullptr) return;
    const char* const line = lines + k * stride;
    prefetch(line);
    prefetch(line + 64);
    prefetch(line + (bytes > 128 ? 128 : 64));
  }
};

/// Where a tile leaves the registers for the gradient; nowhere: it stays in the sums.
struct GradientTile {
  float* out = nullptr;
  Index stride = 0;
  float scale = 1;
  Into into = Into::add;

  GradientTile below(Index ranks) const {
    return {out == nullptr ? nullptr : out + ranks * stride, stride, scale, into};
  }
};

/// Where sums over tokens are added up, and what they are made of: panels of columns.
struct SumPanel {
  static constexpr int packets = RegisterTile::sum_packets;
  static constexpr int rows = RegisterTile::sum_rows;
  static constexpr Index columns = packets * width;
  static constexpr Index step =
      columns % 8 == 0 ? columns : 2 * columns;                    // of jobs: whole panels, whole blocks of dropout
  static constexpr Index few_ranks = RegisterTile::many ? 32 : 8;  // up to here x may be read where it lies
  static constexpr Index rows_ahead = 4;                           // of a copy, asked for

  /// Columns of whole panels.
  static constexpr Index whole(Index n) { return round_up(n, columns); }

  /// block[c / columns][i][c mod columns] = x̂[token(i), c0 + c] for i < n, c < wide; zeros behind the last column. `room`: for
  /// a row of so many columns and 8 packets.
  template <class X, class F>
  static void copy(const Input<X>& x, const F& token, Index n, Index c0, Index wide, float* block, float* room) {
    for (Index i = 0; wide != 0 && i < n; ++i, block += columns) {
      const float* const from = x.row(token(i), c0, wide, room);
      Index c = 0;
      const X* const later = x.rows.row(token(smaller(i + rows_ahead, n - 1))) + c0;
      for (; c + columns <= wide; c += columns)
        unroll<packets>([&](int j) __attribute__((always_inline)) {
          store(block + c * n + j * width, load(from + c + j * width));
          prefetch(later + c + j * width);
        });
      if (c == wide) continue;
      for (Index j = 0; j < columns; j += width) store(block + c * n + j, splat(0));
      over_packets(
          wide - c, [&](Index j, auto lanes)
                        __attribute__((always_inline)) { lanes.store(block + c * n + j, lanes.load(from + c + j)); });
    }
  }

  /// How much further a tile's operands are than those of the tile before.
  struct Step {
    Index x = 0, left = 0, sums = 0;  // x = 0: the same panel, other ranks; else the next panel, the same ranks
  };
  /// `count` tiles one after the other: sums [R, panel] (+)= Σ_k left[k, i] · x(k), `left` and `sums` as they lie in blocks.
  template <int R, class B>
  [[gnu::flatten, gnu::noinline]] static void tiles(Index count, bool first, Index n, const float* left, B x,
                                                    float* sums, const Step by, ComingPanel coming,
                                                    GradientTile leave) {
    for (; count > 0; --count, x.move(by.x), left += by.left, sums += by.sums) {
      tile<R>(first, n, left, x, sums, coming, leave);
      if (leave.out != nullptr) leave.out += by.x == 0 ? R * leave.stride : columns;
      if (by.x == 0)
        coming = {};  // once is enough
      else if (coming.lines != nullptr)
        coming.lines += coming.bytes;
    }
  }
  /// All ranks of one panel of x. `lefts`: [ranks / rows][n or more: of_lefts][rows].
  template <class B>
  static void add_ranks(Index ranks, bool first, Index n, const float* lefts, Index of_lefts, const B& x, float* sums,
                        ComingPanel coming, const GradientTile& leave = {}) {
    in_runs<rows>(ranks, [&](auto m, Index r, Index count) {
      tiles<m>(count, first, n, lefts + r / rows * rows * of_lefts + r % rows, x, sums + r * columns,
               {0, rows * of_lefts, rows * columns}, coming, leave.below(r));
      coming = {};
    });
  }
  /// All ranks of `count` panels of x, whose sums are `of_panel` apart.
  template <class B>
  static void add_panels(Index count, Index ranks, bool first, Index n, const float* lefts, Index of_lefts, const B& x,
                         float* sums, Index of_panel, const ComingPanel& coming, const GradientTile& leave = {}) {
    in_steps<rows>(ranks, [&](auto m, Index r) {
      tiles<m>(count, first, n, lefts + r / rows * rows * of_lefts + r % rows, x, sums + r * columns,
               {columns, 0, of_panel}, coming, leave.below(r));
    });
  }

  /// out (+)= scale · sums, for [ranks, wide] of one panel.
  template <class G>
  static void finish(const float* sums, float scale, Into into, const MatrixView<G>& out) {
    const Packet factor = splat(scale);
    for (Index r = 0; r < out.rows; ++r, sums += columns) {
      over_packets(
          out.cols, [&](Index c, auto lanes) __attribute__((always_inline)) {
            add_or_set(out.row(r) + c, load(sums + c), factor, into, lanes);
          });
    }
  }
  template <class G>
  static void finish(const float* sums, float scale, Into into, const MatrixView<G, Space::host, Major::column>& out) {
    const Packet factor = splat(scale);
    for (Index c = 0; c < out.cols; c += width) {
      over_packets(
          out.rows, [&](Index r, auto lanes) __attribute__((always_inline)) {
            Packet block[width];
            unroll<width>([&](int i) __attribute__((always_inline)) {
              block[i] = r + i < out.rows ? load(sums + (r + i) * columns + c) : splat(0);
            });
            transpose(block);
            unroll<width>([&](int j) __attribute__((always_inline)) {
              if (c + j < out.cols) add_or_set(&out(r, c + j), block[j], factor, into, lanes);
            });
          });
    }
  }

 private:
  template <int R, class B>
  [[gnu::always_inline]] static void tile(bool first, Index n, const float* left, const B& x, float* sums,
                                          const ComingPanel& coming, const GradientTile& leave) {
    Tile<R, packets> sum;
    // The gradient is not in L2 where it is larger: its lines come while sums are added up.
    if (leave.out != nullptr)
      unroll<R>([&](int i) __attribute__((always_inline)) {
        unroll<packets>([&](int j)
                            __attribute__((always_inline)) { prefetch(leave.out + i * leave.stride + j * width); });
      });
    if (first)
      sum.clear();
    else
      sum.load_from(sums, columns);
    outer(
        n, Columns{left, rows}, x, sum, [&](Index k) __attribute__((always_inline)) { coming.ask(k); });
    if (leave.out == nullptr) return sum.store_to(sums, columns);
    const Packet factor = splat(leave.scale);
    float* const to = leave.out;
    const Index stride = leave.stride;
    const Into into = leave.into;
    sum.each([&](int i, int j, Packet v) __attribute__((always_inline)) {
      add_or_set(to + i * stride + j * width, v, factor, into, WholePacket{});
    });
  }
};

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

  static constexpr int rows = SumPanel::rows;
  static constexpr Index panel = SumPanel::columns;
  static constexpr Index ranks_of_job = 256;

  static Index ranks_of(Index ranks) { return round_up(smaller(ranks, ranks_of_job), rows); }
  /// Whether rows of x are read where they lie, but for the last columns. `direct`: x.direct_under_bits().
  static bool in_place(Index ranks, bool direct) { return direct && ranks <= SumPanel::few_ranks; }
  /// Columns of a job: as many as keep its sums in L2, and of what is copied those of a page.
  static Index sweep_of(const Tuning& tuning, Index ranks, Index columns, bool direct) {
    const Index sums = tuning.weights / larger(1, ranks_of(ranks));
    const Index most = in_place(ranks, direct) ? sums : smaller(sums, 1024);
    return larger(1, smaller(most, round_up(columns, SumPanel::step)) / SumPanel::step) * SumPanel::step;
  }
  /// Tokens whose products are added up in registers. Rows of x that are read where they lie share few sets of L1.
  static Index tokens_of(const Tuning& tuning, Index ranks) {
    const Index tokens = larger(1, tuning.tokens_per_sum);
    return ranks > SumPanel::few_ranks ? tokens : larger(1, tokens / 3);
  }
  static Index scratch(const Tuning& tuning, Index ranks, Index columns, bool direct) {
    const Index sweep = sweep_of(tuning, ranks, columns, direct), most = ranks_of(ranks);
    const bool lies = in_place(ranks, direct);
    const Index bits = lies ? tokens_of(tuning, ranks) * (keep_bytes(sweep) / 4 + 1) : 0;
    const Index tokens = larger(1, tuning.tokens_per_sum);
    return most * sweep + tokens * (most + (lies ? panel : sweep)) + sweep + 8 * width + bits;
  }
  Index sweep() const { return sweep_of(tuning, ranks(), out.cols, x.direct_under_bits()); }

  /// Ranks [r0, r0 + ranks) × columns [c0, c0 + columns), at most one job's. `before(t, n)` is called when tokens
  /// [t, t + n) come, and reads the same columns of their rows.
  template <class Before = NoHint>
  void run(Index r0, Index ranks, Index c0, Index columns, float* scratch, const Before& before = {}) const;

 private:
  float factor() const { return factor_of(x.dropout, scale); }
  /// to[i][j] = left(t + i, r + j): what a tile reads lies together; zeros behind the last rank.
  void gather(Index t, Index n, Index r, Index ranks, float* to) const {
    if (ranks == rows && r + rows <= out.rows) {
      for (Index i = 0; i < n; ++i, to += rows) std::copy_n(left.row(t + i) + r, rows, to);
      return;
    }
    const Index here = smaller(ranks, larger(0, out.rows - r));
    for (Index i = 0; i < n; ++i, to += rows) {
      if (here > 0) std::copy_n(left.row(t + i) + r, here, to);
      if (here < ranks) std::copy_n(second_left.row(t + i) + (r + here - out.rows), ranks - here, to + here);
      std::fill_n(to + ranks, rows - ranks, 0.f);
    }
  }
  /// Whether a panel's tiles go from registers into the gradient: no tile is in both of them, none is cut.
  bool whole_tiles_leave(Index wide) const {
    if (M != Major::row || !std::is_same_v<G, float>) return false;
    return wide == panel && (second.rows == 0 || out.rows % rows == 0);
  }
  GradientTile leave(Index r, Index c) const {
    if constexpr (M == Major::row && std::is_same_v<G, float>) {
      const bool here = r < out.rows;
      return {here ? &out(r, c) : &second(r - out.rows, c), here ? out.stride : second.stride, factor(), into};
    }
    return {};
  }
  /// Sums of ranks [r0, r0 + ranks) in one panel's columns.
  void finish(Index r0, Index ranks, Index c, Index wide, const float* sums) const {
    const Index first = smaller(ranks, larger(0, out.rows - r0));
    if (first > 0) SumPanel::finish(sums, factor(), into, out.block(r0, first, c, wide));
    if (first < ranks)
      SumPanel::finish(sums + first * panel, factor(), into,
                       second.block(r0 + first - out.rows, ranks - first, c, wide));
  }
};

template <class X, class G, Major M>
template <class Before>
void TokenSum<X, G, M>::run(Index r0, Index ranks, Index c0, Index columns, float* scratch,
                            const Before& before) const {
  constexpr bool in_cache = !std::is_same_v<Before, NoHint>;  // what `before` has read
  const Index tokens = left.rows, step = tokens_of(tuning, ranks), of_panel = round_up(ranks, rows) * panel;
  // A tile that lacks one rank is a wide one, with zeros: narrow ones would read x several times. Where sums stay, that is.
  const Index padded = ranks % rows == rows - 1 && tokens > step ? round_up(ranks, rows) : ranks;
  // Columns before are read in place.
  const Index copied = in_place(this->ranks(), x.direct_under_bits()) ? columns / panel * panel : 0;
  const bool under_bits = copied != 0 && x.dropout.on();
  float* const sums = scratch;  // [columns / panel][ranks][panel]
  float* const lefts = sums + blocks_of(columns, panel) * of_panel;
  float* const block = lefts + round_up(ranks, rows) * step;
  float* const row = block + (SumPanel::whole(columns) - copied) * step;
  std::uint8_t* const bits = reinterpret_cast<std::uint8_t*>(row + columns + 8 * width);  // [step, pitch_of_bits]
  const Index pitch_of_bits = keep_bytes(columns);
  for (Index t = 0; t == 0 || t < tokens; t += step) {
    const Index n = smaller(step, tokens - t);
    if constexpr (in_cache) before(t, n);
    for (Index r = 0; r < ranks; r += rows) gather(t, n, r0 + r, smaller(rows, ranks - r), lefts + r * n);
    SumPanel::copy(
        x, [t](Index i) { return t + i; }, n, c0 + copied, columns - copied, block, row);
    for (Index i = 0; under_bits && i < n; ++i) keep_bits(x.dropout, t + i, c0, columns, bits + i * pitch_of_bits);
    const bool last = t + n >= tokens;
    const auto leaves = [&](Index wide) { return last && padded == ranks && whole_tiles_leave(wide); };
    // f(ranks [begin, end), where their tiles leave): all, or, where they leave for two gradients, those of each.
    const auto each_gradient = [&](Index c, Index wide, const auto& f) {
      if (!leaves(wide)) return f(0, padded, GradientTile{});
      const Index border = smaller(padded, larger(0, out.rows - r0));
      if (border > 0) f(0, border, leave(r0, c0 + c));
      if (border < padded) f(border, padded, leave(r0 + border, c0 + c));
    };
    const auto finish_at = [&](Index c, Index wide) {
      if (last && !leaves(wide)) finish(r0, ranks, c0 + c, wide, sums + c / panel * of_panel);
    };
    const auto next_step = [&](Index c) {
      return t + n < tokens ? ComingPanel{x.rows.row(t + n) + c0 + c, x.rows.stride, panel} : ComingPanel{};
    };
    // What is read in place is asked for two panels ahead, what is copied or in a cache a step ahead.
    if constexpr (std::is_same_v<X, float>) {
      const auto add_up = [&](const auto& from) {
        each_gradient(0, panel, [&](Index begin, Index end, const GradientTile& leave) {
          SumPanel::add_panels(copied / panel, end - begin, t == 0, n, lefts + begin * n, n, from, sums + begin * panel,
                               of_panel, in_cache ? next_step(0) : ComingPanel{from.p + 2 * panel, from.step, panel},
                               leave);
        });
      };
      if (copied != 0 && n != 0) {
        const Panel<float> rows_of_x{x.rows.row(t) + c0, x.rows.stride};
        if (!under_bits)
          add_up(rows_of_x);
        else if constexpr (keeps_while_loading)
          add_up(KeptPanel{rows_of_x.p, rows_of_x.step, bits, pitch_of_bits});
        for (Index c = 0; c < copied; c += panel) finish_at(c, panel);
      }
    }
    for (Index c = n == 0 ? 0 : copied; c < columns; c += panel) {
      const Index wide = smaller(panel, columns - c);
      const ComingPanel coming = copied == 0 ? next_step(c) : ComingPanel{};
      each_gradient(c, wide, [&](Index begin, Index end, const GradientTile& leave) {
        SumPanel::add_ranks(end - begin, t == 0, n, lefts + begin * n, n, Panel<float>{block + (c - copied) * n, panel},
                            sums + c / panel * of_panel + begin * panel, begin == 0 ? coming : ComingPanel{}, leave);
      });
      finish_at(c, wide);
    }
  }
}

}  // namespace detail
}  // namespace cpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
