/// The register tiles of the fused path: two ways to multiply, from which all five products of a step are made.
///
///   outer   c[m, :] += Σ_k a(m, k) · panel[k, :]    vectors along the panel's columns; k ascends, one chain per element
///   dot     c[m, r] += Σ_k x[m, k] · w[r, k]        vectors along k; for few ranks, and weights in their own order
///
/// Computes:    M × N packets (outer) or M × N sums (dot), held in registers; which M and N, `RegisterTile` says.
/// Parameters:  a: rows of numbers, consecutive in k (Rows3, RowList) or in m (Columns); panel: K rows of N packets (Panel,
///              PacketPanel); x: M rows [K] (DotRows), w: N rows (WeightRows, WovenRows).
/// Errors:      none.
/// Cost:        M·N multiply-adds and M + N loads per k (outer) or per `width` k (dot).
/// Determinism: an element's sum does not depend on M, N or on its place in the tile.
/// Example:     cpu/contract.hpp, cpu/spread.hpp
#pragma once
#include <loramix/cpu/packet.hpp>
#include <loramix/cpu/tuning.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace cpu {
namespace detail {

/// What fits into the registers: M rows × N packets beside N packets of the panel and one of a.
struct RegisterTile {
  static constexpr bool many = registers >= 32;
  static constexpr int wide = many ? 4 : 2;    // packets of the widest panel
  static constexpr int rows_of(int packets) {  // rows beside so many packets
    return packets == 4 ? 6 : packets == 2 && many ? 12 : packets == 2 ? 6 : many ? 12 : 8;
  }
  static constexpr int sum_rows = many ? 8 : 4, sum_packets = 3;  // of a sum over tokens
  static constexpr int dot_rows = many ? 3 : 2, dot_columns = many ? 8 : 4;
};

template <int M, int N>
struct Tile {
  Packet c[M][N];

  // Values go in and out of f, never their addresses: a tile whose address is taken leaves the registers.
  template <class F>
  [[gnu::always_inline]] void each(F&& f) const {
    unroll<M>([&](int m) __attribute__((always_inline)) {
      unroll<N>([&](int n) __attribute__((always_inline)) { f(m, n, c[m][n]); });
    });
  }
  template <class F>
  [[gnu::always_inline]] void set(F&& f) {
    unroll<M>([&](int m) __attribute__((always_inline)) {
      unroll<N>([&](int n) __attribute__((always_inline)) { c[m][n] = f(m, n, c[m][n]); });
    });
  }
  [[gnu::always_inline]] void clear() {
    set([](int, int, Packet) __attribute__((always_inline)) { return splat(0); });
  }
  [[gnu::always_inline]] void load_from(const float* p, Index stride) {
    set([&](int m, int n, Packet) __attribute__((always_inline)) { return load(p + m * stride + n * width); });
  }
  [[gnu::always_inline]] void store_to(float* p, Index stride) const {
    each([&](int m, int n, Packet v) __attribute__((always_inline)) { store(p + m * stride + n * width, v); });
  }
  /// f(m, n, sums): lane i < min(N, width) of `sums` is the sum of c[m][n + i]'s lanes; n = 0, width, ….
  template <class F>
  [[gnu::always_inline]] void each_sums(F&& f) const {
    constexpr int together = N < width ? N : width;
    unroll<M>([&](int m) __attribute__((always_inline)) {
      unroll<N / together>([&](int group) __attribute__((always_inline)) {
        Packet p[together];
        unroll<together>([&](int i) __attribute__((always_inline)) { p[i] = c[m][group * together + i]; });
        f(m, group * together, lane_sums(p));
      });
    });
  }
  /// p[m, n] (+)= factor · the sum of c[m][n]'s lanes, for n < `columns`.
  template <class T>
  [[gnu::always_inline]] void sum_to(T* p, Index stride, Index columns, float factor, Into into) const {
    each_sums([&](int m, int n, Packet sums) __attribute__((always_inline)) {
      if (n < columns)
        add_or_set(p + m * stride + n, sums, splat(factor), into,
                   PartOfPacket{smaller(columns - n, smaller(N, width))});
    });
  }
};

/// a(m, k) = base[m · stride + k]. One pointer serves three rows: x86 addresses it with factors 0, 1 and 2.
template <int M>
struct Rows3 {
  const float* p[(M + 2) / 3];
  Index stride;
  [[gnu::always_inline]] Rows3(const float* base, Index stride_) : stride(stride_) {
    unroll<(M + 2) / 3>([&](int g) __attribute__((always_inline)) { p[g] = base + 3 * g * stride; });
  }
  [[gnu::always_inline]] float at(int m, Index k) const { return p[m / 3][(m % 3) * stride + k]; }
};
/// a(m, k) = row[m][k].
template <int M>
struct RowList {
  const float* p[M];
  /// f(m): the address of row m.
  template <class F>
  [[gnu::always_inline]] explicit RowList(const F& f) {
    unroll<M>([&](int m) __attribute__((always_inline)) { p[m] = f(m); });
  }
  [[gnu::always_inline]] float at(int m, Index k) const { return p[m][k]; }
};
/// a(m, k) = base[k · stride + m].
struct Columns {
  const float* p;
  Index stride;
  [[gnu::always_inline]] float at(int m, Index k) const { return p[k * stride + m]; }
};

/// Packet n of row k of a panel: rows `step` apart, packets side by side.
template <class W>
struct Panel {
  const W* p;
  Index step;
  [[gnu::always_inline]] Packet packet(Index k, Index n) const { return load(p + k * step + n * width); }
  [[gnu::always_inline]] void move(Index columns) { p += columns; }
};
/// The same of packets that lie `between` apart, each with its own rows together.
struct PacketPanel {
  const float* p;
  Index between;
  [[gnu::always_inline]] Packet packet(Index k, Index n) const { return load(p + k * width + n * between); }
};

struct NoHint {
  void operator()(Index) const {}
};
/// Asks for what lies so many floats behind.
struct Ahead {
  Index floats;
  [[gnu::always_inline]] void operator()(const float* p) const { prefetch(p + floats); }
};

/// tile += a · panel. `hint(k)` comes before each step: prefetches.
template <int M, int N, class A, class B, class Hint = NoHint>
[[gnu::always_inline]] inline void outer(Index depth, const A& a, const B& panel, Tile<M, N>& tile, Hint&& hint = {}) {
#pragma GCC unroll 4
  for (Index k = 0; k < depth; ++k) {
    hint(k);
    Packet b[N];
    unroll<N>([&](int n) __attribute__((always_inline)) { b[n] = panel.packet(k, n); });
    unroll<M>([&](int m) __attribute__((always_inline)) {
      const Packet v = splat(a.at(m, k));
      unroll<N>([&](int n) __attribute__((always_inline)) { tile.c[m][n] = fma(v, b[n], tile.c[m][n]); });
    });
  }
}

/// Packet k / width of row m of x, for `dot`.
template <class X, int M>
struct DotRows {
  const X* p[M];
  template <class Lanes>
  [[gnu::always_inline]] Packet packet(int m, Index k, const Lanes& lanes) const {
    return lanes.load(p[m] + k);
  }
};

/// Packet k / width of row n of w as it lies, for `dot`.
template <class W>
struct WeightRows {
  static constexpr bool woven = false;
  const W* p;
  Index stride;
  template <class Lanes>
  [[gnu::always_inline]] Packet packet(Index n, Index k, const Lanes& lanes) const {
    return lanes.load(p + n * stride + k);
  }
  WeightRows from(Index n) const { return {p + n * stride, stride}; }
};
/// The same of `rows` rows, packet beside packet: one stream in memory. Zeros behind the last column.
struct WovenRows {
  static constexpr bool woven = true;
  const float* p;
  Index rows;
  template <class Lanes>
  [[gnu::always_inline]] Packet packet(Index n, Index k, const Lanes&) const {
    return load(p + k * rows + n * width);
  }
  WovenRows from(Index n) const { return {p + n * width, rows}; }
};

/// tile[m][r] += x[m][k…] ∘ w[r, k…], lane by lane; what is behind the last whole packet is padded with zeros.
/// `hint(k)` comes before each step: prefetches.
template <int M, int N, class Rows, class Weights, class Hint = NoHint>
[[gnu::always_inline]] inline void dot(Index depth, const Rows& x, const Weights& w, Tile<M, N>& tile,
                                       Hint&& hint = {}) {
  // U packets of a row of w together where one row of x meets it as it lies: a line of one row at a time leaves L2 waiting.
  const auto step = [&](auto packets, Index k, const auto& lanes) __attribute__((always_inline)) {
    constexpr int U = packets;
    Packet a[M][U];
    unroll<U>([&](int u) __attribute__((always_inline)) {
      hint(k + u * width);
      unroll<M>([&](int m) __attribute__((always_inline)) { a[m][u] = x.packet(m, k + u * width, lanes); });
    });
    unroll<N>([&](int n) __attribute__((always_inline)) {
      unroll<U>([&](int u) __attribute__((always_inline)) {
        Packet b = w.packet(n, k + u * width, lanes);
        if constexpr (M > 1) loramix::detail::keep_in_register(b);
        unroll<M>([&](int m) __attribute__((always_inline)) { tile.c[m][n] = fma(a[m][u], b, tile.c[m][n]); });
      });
    });
  };
  constexpr int together = M == 1 && !Weights::woven ? 4 : 1;
  Index k = 0;
  for (; k + together * width <= depth; k += together * width)
    step(std::integral_constant<int, together>{}, k, WholePacket{});
  constexpr std::integral_constant<int, 1> one;
  for (; together > 1 && k + width <= depth; k += width) step(one, k, WholePacket{});
  if (k < depth) step(one, k, PartOfPacket{depth - k});
}

/// Asks for rows one after the other, line by line, while something else is computed: the prefetcher of the machine follows a
/// row, and does not follow the columns of a panel.
struct RowWalk {
  const char* row = nullptr;
  Index stride = 0, rows = 0, bytes = 0;  // from row to row, how many, of each
  Index at = 0;

  RowWalk() = default;
  template <class X>
  RowWalk(const X* first, Index stride_, Index rows_, Index columns)
      : row(reinterpret_cast<const char*>(first)),
        stride(stride_ * Index{sizeof(X)}),
        rows(rows_),
        bytes(columns * Index{sizeof(X)}) {}

  /// To be called at every k: acts at every `Every`-th, on two lines, so that they come as fast as they are used, not faster.
  template <int Every>
  [[gnu::always_inline]] void step(Index k) {
    if (k % Every != 0 || rows <= 0) return;
    prefetch(row + at);
    prefetch(row + at + 64);
    at += 128;
    if (at < bytes) return;
    at = 0;
    row += stride;
    --rows;
  }
};

/// The next smaller number of rows that there is a tile for.
constexpr int fewer_rows(int m) { return m > 8 ? 8 : m > 4 ? 4 : m > 2 ? 2 : 1; }

/// Runs f<M>(i) over [0, n) in steps of `Most`, then of fewer for what is left.
template <int Most, class F>
[[gnu::always_inline]] inline void in_steps(Index n, F&& f, Index i = 0) {
  for (; i + Most <= n; i += Most) f(std::integral_constant<int, Most>{}, i);
  if constexpr (Most > 1) {
    if (i < n) in_steps<fewer_rows(Most)>(n, f, i);
  }
}

/// The same with all whole steps at once, so that one call serves them: f<M>(i, count of steps from i on).
template <int Most, class F>
[[gnu::always_inline]] inline void in_runs(Index n, F&& f) {
  const Index whole = n / Most;
  if (whole > 0) f(std::integral_constant<int, Most>{}, Index{0}, whole);
  if constexpr (Most > 1) {
    in_steps<fewer_rows(Most)>(
        n, [&](auto m, Index i) { f(m, i, Index{1}); }, whole * Most);
  }
}

}  // namespace detail
}  // namespace cpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
