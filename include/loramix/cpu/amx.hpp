/// The matrix tiles of some x86 processors (AMX) for bfloat16: shrink, expand and their backward. Opt-in: include this
/// header and ask for the tiles once per process,
///
///     if (lm::cpu::request_amx()) …                             // false: the machine or its kernel has none
///     lm::cpu::AmxBackend be{executor};                         // where it is false: what lm::cpu::Backend does
///
/// Computes:    the products of ops/shrink.hpp and ops/expand.hpp with bfloat16 activations and weights, B rank-major, T > 64,
///              all ranks of a gate that chooses experts; everything else is cpu::Backend's. Values of rank space are split
///              into two bfloat16 parts: 2⁻¹⁷ of them is lost (storing y loses 2⁻⁹ of y).
/// Reads:       as the ops.
/// Writes:      as the ops.
/// Errors:      the ops'. request_amx() fails on nothing: it says no.
/// Cost:        weights and ranks are padded to 32; expand (above 16 ranks) and sums over tokens multiply twice.
/// Determinism: as cpu/tuning.hpp; bits differ from the packet path's.
/// Example:     tests/cpu/amx.cpp
#pragma once
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>

#include <loramix/cpu/product.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace cpu {

/// Asks the system for this process's use of tiles. True where there are tiles for bfloat16 and they may be used.
inline bool request_amx() {
  static const bool granted = [] {
    std::FILE* const file = std::fopen("/proc/cpuinfo", "r");
    if (file == nullptr) return false;
    char line[8192];
    bool there = false;
    while (!there && std::fgets(line, sizeof(line), file) != nullptr) there = std::strstr(line, " amx_bf16") != nullptr;
    std::fclose(file);
    constexpr long arch_prctl = 158, request_permission = 0x1023, tile_data = 18;
    return loramix::detail::has_x86_assembly && there && ::syscall(arch_prctl, request_permission, tile_data) == 0;
  }();
  return granted;
}

namespace detail {

/// The eight tiles, by number. Written as assembly: neither compiler flags nor intrinsics are needed, and an object without
/// a call holds none of it.
struct Tiles {
  static constexpr Index rows = 16, depth = 32;  // of a tile: 16 rows of 32 bfloat16, or of 16 float

  /// All tiles 16 rows of 64 bytes. Other libraries release tiles: configured at the start of every job.
  template <bool Here = loramix::detail::has_x86_assembly>
  static void configure() {
    struct alignas(64) {
      std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
      std::uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      std::uint8_t rows_of[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    if constexpr (Here) asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
  }
  template <bool Here = loramix::detail::has_x86_assembly>
  static void release() {
    if constexpr (Here) asm volatile("tilerelease" ::: "memory");
  }

  template <int Tile, bool Here = loramix::detail::has_x86_assembly>
  [[gnu::always_inline]] static void zero() {
    if constexpr (Here) asm volatile("tilezero %%tmm%c0" ::"i"(Tile));
  }
  template <int Tile, bool Here = loramix::detail::has_x86_assembly>
  [[gnu::always_inline]] static void load(const void* p, Index bytes_between_rows) {
    if constexpr (Here)
      asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(bytes_between_rows), "i"(Tile) : "memory");
  }
  template <int Tile, bool Here = loramix::detail::has_x86_assembly>
  [[gnu::always_inline]] static void store(void* p, Index bytes_between_rows) {
    if constexpr (Here)
      asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(bytes_between_rows), "i"(Tile) : "memory");
  }
  /// C += A · B: A [16, 32] in rows, B [32, 16] in pairs of rows.
  template <int C, int A, int B, bool Here = loramix::detail::has_x86_assembly>
  [[gnu::always_inline]] static void multiply() {
    if constexpr (Here) asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
};

/// 32 tokens × 32 columns: tiles 0 to 3; their factors 4, 5 (rows) and 6, 7 (columns).
struct TileBlock {
  static constexpr Index rows = 32, columns = 32;

  [[gnu::always_inline]] static void clear() {
    unroll<4>([](auto i) { Tiles::zero<i>(); });
  }
  [[gnu::always_inline]] static void load_rows(const bfloat16* p, Index stride) {
    Tiles::load<4>(p, 2 * stride);
    Tiles::load<5>(p + Tiles::rows * stride, 2 * stride);
  }
  /// Two tiles of weights, one behind the other.
  [[gnu::always_inline]] static void load_columns(const bfloat16* p) {
    Tiles::load<6>(p, 64);
    Tiles::load<7>(p + Tiles::rows * Tiles::depth, 64);
  }
  [[gnu::always_inline]] static void multiply() {
    Tiles::multiply<0, 4, 6>();
    Tiles::multiply<1, 4, 7>();
    Tiles::multiply<2, 5, 6>();
    Tiles::multiply<3, 5, 7>();
  }
  /// The first 16 columns only.
  [[gnu::always_inline]] static void multiply_half(const bfloat16* p) {
    Tiles::load<6>(p, 64);
    Tiles::multiply<0, 4, 6>();
    Tiles::multiply<2, 5, 6>();
  }
  [[gnu::always_inline]] static void load_sums(const float* p, Index stride) {
    Tiles::load<0>(p, 4 * stride);
    Tiles::load<1>(p + 16, 4 * stride);
    Tiles::load<2>(p + 16 * stride, 4 * stride);
    Tiles::load<3>(p + 16 * stride + 16, 4 * stride);
  }
  [[gnu::always_inline]] static void store_sums(float* p, Index stride) {
    Tiles::store<0>(p, 4 * stride);
    Tiles::store<1>(p + 16, 4 * stride);
    Tiles::store<2>(p + 16 * stride, 4 * stride);
    Tiles::store<3>(p + 16 * stride + 16, 4 * stride);
  }
};

/// 16 tokens × 64 columns: tiles 0 to 3; their factors 4 (rows) and 5 to 7 (columns, 16 after 16).
struct TileStrip {
  static constexpr Index rows = 16;

  [[gnu::always_inline]] static void multiply(const bfloat16* p, Index stride, const bfloat16* columns) {
    constexpr Index tile = Tiles::rows * Tiles::depth;
    Tiles::load<4>(p, 2 * stride);
    Tiles::load<5>(columns, 64);
    Tiles::multiply<0, 4, 5>();
    Tiles::load<6>(columns + tile, 64);
    Tiles::multiply<1, 4, 6>();
    Tiles::load<7>(columns + 2 * tile, 64);
    Tiles::multiply<2, 4, 7>();
    Tiles::load<5>(columns + 3 * tile, 64);
    Tiles::multiply<3, 4, 5>();
  }
  [[gnu::always_inline]] static void store_sums(float* p, Index stride) {
    Tiles::store<0>(p, 4 * stride);
    Tiles::store<1>(p + 16, 4 * stride);
    Tiles::store<2>(p + 32, 4 * stride);
    Tiles::store<3>(p + 48, 4 * stride);
  }
};

/// A row of 16 pairs: even[0], odd[0], even[1], odd[1], …
struct PairOfRows {
  typedef std::uint16_t Row __attribute__((vector_size(64)));
  Row low, high;  // of columns [0, 16) and [16, 32)

  [[gnu::always_inline]] PairOfRows(const bfloat16* even, const bfloat16* odd) {
    Row a, b;
    std::memcpy(&a, even, sizeof(a));
    std::memcpy(&b, odd, sizeof(b));
    low = __builtin_shufflevector(a, b, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42,
                                  11, 43, 12, 44, 13, 45, 14, 46, 15, 47);
    high = __builtin_shufflevector(a, b, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57,
                                   26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63);
  }
  /// Row j of two tiles, one behind the other.
  [[gnu::always_inline]] void store(Index j, bfloat16* tiles) const {
    std::memcpy(static_cast<void*>(tiles + j * 32), &low, sizeof(low));
    std::memcpy(static_cast<void*>(tiles + 512 + j * 32), &high, sizeof(high));
  }
};

/// A block of 32 rows × 32 columns, with zeros outside of w.
inline void copy_block(MatrixView<const bfloat16> w, Index r, Index c, bfloat16 (&block)[32][32]) {
  for (Index i = 0; i < 32; ++i) {
    for (Index j = 0; j < 32; ++j) {
      block[i][j] = r + i < w.rows && c + j < w.cols ? w(r + i, c + j) : bfloat16{0};
    }
  }
}

/// Two tiles of W for ranks [r, r + 32) × columns [k, k + 32), in pairs of columns: to[tile][k / 2][rank][2].
inline void pack_tiles(MatrixView<const bfloat16> w, Index r, Index k, bfloat16* to) {
  bfloat16 block[32][32];
  const bool inside = r + 32 <= w.rows && k + 32 <= w.cols;
  if (!inside) copy_block(w, r, k, block);
  const bfloat16* const from = inside ? &w(r, k) : block[0];
  const Index stride = inside ? w.stride : 32;
  for (Index tile = 0; tile < 2; ++tile, to += 512) {
    const bfloat16* const rows = from + tile * 16 * stride;
    if constexpr (width == 16) {  // a pair of columns is as wide as a float
      Packet pairs[width];
      unroll<width>([&](int i) { std::memcpy(&pairs[i], rows + i * stride, sizeof(Packet)); });
      transpose(pairs);
      unroll<width>([&](int j) { std::memcpy(static_cast<void*>(to + j * 32), &pairs[j], sizeof(Packet)); });
    } else {
      for (Index i = 0; i < 16; ++i) {
        for (Index j = 0; j < 16; ++j)
          std::memcpy(static_cast<void*>(to + j * 32 + 2 * i), rows + i * stride + 2 * j, 4);
      }
    }
  }
}
/// Two tiles of rows [r, r + 32) × columns [c, c + 32), whose rows are summed
/// over: to[tile][row / 2][column][2].
inline void pack_row_tiles(MatrixView<const bfloat16> w, Index r, Index c, bfloat16* to) {
  bfloat16 block[32][32];
  const bool inside = r + 32 <= w.rows && c + 32 <= w.cols;
  if (!inside) copy_block(w, r, c, block);
  const bfloat16* from = inside ? &w(r, c) : block[0];
  const Index stride = inside ? w.stride : 32;
  for (Index j = 0; j < 16; ++j, from += 2 * stride) PairOfRows(from, from + stride).store(j, to);
}

/// p = v, rounded to nearest: by one instruction where the compiler was told of it.
[[gnu::always_inline]] inline void store_rounded(bfloat16* p, Packet v) {
  if constexpr (loramix::detail::has_bfloat16_rounding && width == 16) {
    const auto narrow = loramix::detail::round_to_bfloat16(v);
    std::memcpy(static_cast<void*>(p), &narrow, sizeof(narrow));
  } else {
    store(p, v);
  }
}

/// high + low = v, to 16 bits of mantissa; low is 0 where high is not finite.
/// Zeros from n to `padded`.
inline void split_row(const float* v, Index n, Index padded, bfloat16* high, bfloat16* low) {
  for (Index j = 0; j < padded; j += width) {
    const Index rest = n - j;
    const Packet whole = rest >= width ? load(v + j) : rest > 0 ? load_part(v + j, rest) : splat(0);
    store_rounded(high + j, whole);
    const Packet rounded = load(high + j);
    const Bits32 finite = (Bits32)((to_bits(rounded) & 0x7f800000u) != 0x7f800000u);
    store_rounded(low + j, from_bits(to_bits(sub(whole, rounded)) & finite));
  }
}

/// Row t of x, columns [k, k + n), and zeros up to `wide`, at most 512 columns. What is kept of a row with dropout is not
/// scaled, nor rounded again: the sums are.
inline void copy_row(const Input<bfloat16>& x, Index t, Index k, Index n, Index wide, bfloat16* to) {
  const bfloat16* const from = x.rows.row(t) + k;
  Index j = 0;
  if (x.dropout.on()) {
    std::uint8_t bits[keep_bytes(512)];
    keep_bits(x.dropout, t, k, n, bits);
    for (; j < n; ++j) to[j] = (bits[j / 8] >> (j % 8) & 1) != 0 ? from[j] : bfloat16{0};
  } else {
    for (; j + 32 <= n; j += 32) std::memcpy(static_cast<void*>(to + j), from + j, 64);
    for (; j < n; ++j) to[j] = from[j];
  }
  for (; j < wide; ++j) to[j] = bfloat16{0};
}

/// What is read behind n tokens from t on, columns [c, c + sweep): the same tokens' next columns, or the next tokens' first.
inline RowWalk behind(MatrixView<const bfloat16> rows, Index t, Index n, Index c, Index sweep) {
  c += sweep;
  if (c >= rows.cols) t += n, c = 0;
  return {rows.row(t) + c, rows.stride, smaller(32, rows.rows - t), smaller(sweep, rows.cols - c)};
}
/// Pairs of its lines per product of two blocks: all are asked for while `ranks` go through tiles.
constexpr Index pairs_per_block(Index ranks) { return blocks_of(16, larger(1, ranks / 32)); }

/// Ranks or tokens, rounded up to whole blocks of tiles.
constexpr Index whole_tiles(Index n) { return round_up(n, TileBlock::columns); }
/// Floats that all jobs share: packed weights [ranks, depth].
inline Index packed_floats(Index ranks, Index depth) {
  return elements(whole_tiles(ranks), round_up(depth, 32)) / 2 + 16;
}

/// out [T, R] = scale · x̂ Wᵀ.
struct TileContraction {
  Input<bfloat16> x;
  MatrixView<const bfloat16> w;  // [R, d]
  float scale;
  MatrixView<float> out;

  static constexpr Index sweep = 192;  // columns
  static constexpr Index pitch = sweep + 32;
  static Index scratch(Index ranks) { return 32 * whole_tiles(ranks) + 32 * pitch / 2; }

  void pack(Index k32, bfloat16* packed) const {
    for (Index r = 0; r < w.rows; r += 32) pack_tiles(w, r, k32 * 32, packed + (k32 * whole_tiles(w.rows) + r) * 32);
  }
  /// 32 tokens from t on.
  void run(Index t, const bfloat16* packed, float* scratch) const {
    const Index ranks = whole_tiles(w.rows), n = smaller(32, out.rows - t);
    float* const sums = scratch;
    bfloat16* const block = reinterpret_cast<bfloat16*>(sums + 32 * ranks);
    if (ranks <= 64 && n == 32 && !x.dropout.on())
      read_in_place(t, packed, sums, block);
    else
      copy_and_read(t, n, packed, sums, block);
    const float factor = factor_of(x.dropout, scale);
    for (Index i = 0; i < n; ++i) {
      float* const to = out.row(t + i);
      over_packets(out.cols,
                   [&](Index j, auto lanes) { lanes.store(to + j, mul(splat(factor), load(sums + i * ranks + j))); });
    }
  }

 private:
  /// Rows of x go into tiles as they lie and the sums stay there, in the order of copy_and_read.
  void read_in_place(Index t, const bfloat16* packed, float* sums, bfloat16* block) const {
    const Index ranks = whole_tiles(w.rows), whole = w.cols / 32 * 32;
    if (whole < w.cols) {
      for (Index i = 0; i < 32; ++i) copy_row(x, t + i, whole, w.cols - whole, 32, block + i * pitch);
    }
    const auto over_columns = [&](Index first_row, const auto& step) __attribute__((always_inline)) {
      const bfloat16* columns = packed;
      for (Index k = 0; k < whole; k += 32, columns += 32 * ranks)
        step(x.rows.row(t + first_row) + k, x.rows.stride, columns);
      if (whole < w.cols) step(block + first_row * pitch, pitch, columns);
    };
    if (ranks > 32) {
      for (Index i = 0; i < 32; i += TileStrip::rows) {
        TileBlock::clear();
        over_columns(i, [](const bfloat16* rows, Index stride, const bfloat16* columns) {
          TileStrip::multiply(rows, stride, columns);
        });
        TileStrip::store_sums(sums + i * ranks, ranks);
      }
      return;
    }
    TileBlock::clear();
    over_columns(0, [half = w.rows <= 16](const bfloat16* rows, Index stride, const bfloat16* columns) {
      TileBlock::load_rows(rows, stride);
      if (half) return TileBlock::multiply_half(columns);
      TileBlock::load_columns(columns);
      TileBlock::multiply();
    });
    TileBlock::store_sums(sums, ranks);
  }
  /// With dropout, of fewer tokens, and of more ranks, which read a row many times.
  void copy_and_read(Index t, Index n, const bfloat16* packed, float* sums, bfloat16* block) const {
    const Index ranks = whole_tiles(w.rows), pairs = pairs_per_block(ranks);
    for (Index k = 0; k < w.cols; k += sweep) {
      const Index columns = smaller(sweep, w.cols - k), wide = round_up(columns, 32);
      for (Index i = 0; i < n; ++i) copy_row(x, t + i, k, columns, wide, block + i * pitch);
      std::fill(block + n * pitch, block + 32 * pitch, bfloat16{0});
      RowWalk next = behind(x.rows, t, n, k, sweep);
      for (Index r = 0; r < ranks; r += 32) {
        if (k == 0)
          TileBlock::clear();
        else
          TileBlock::load_sums(sums + r, ranks);
        for (Index j = 0; j < wide; j += 32) {
          for (Index i = 0; i < pairs; ++i) next.step<1>(0);
          TileBlock::load_rows(block + j, pitch);
          TileBlock::load_columns(packed + ((k + j) / 32 * ranks + r) * 32);
          TileBlock::multiply();
        }
        TileBlock::store_sums(sums + r, ranks);
      }
    }
  }
};

/// y [T, d] (+)= scale · left W, and a second pair of factors behind the first one's dropout.
struct TileSpread {
  const Spread<bfloat16, bfloat16, Major::row>* all;

  static constexpr Index sweep = 128;  // columns
  static Index scratch(Index ranks, Index side) {
    return 32 * sweep + 32 * (whole_tiles(ranks) + whole_tiles(side)) + 32 * keep_pitch / 4;
  }

  /// Up to 16 ranks: both parts fit side by side into the 32 that a tile sums over, and the weights below themselves.
  static bool fits_twice(Index ranks) { return ranks <= 16; }
  /// 32 ranks of all columns of one block: packed[r / 32][c / 32] two tiles each.
  static void pack(MatrixView<const bfloat16> w, Index r, bfloat16* packed) {
    const Index blocks = blocks_of(w.cols, 32);
    packed += r / 32 * blocks * 1024;
    for (Index c = 0; c < blocks; ++c, packed += 1024) {
      if (!fits_twice(w.rows)) {
        pack_row_tiles(w, r, 32 * c, packed);
        continue;
      }
      bfloat16 block[32][32] = {};
      for (Index i = 0; i < w.rows; ++i) {
        for (Index j = 0; j < smaller(32, w.cols - 32 * c); ++j) block[i][j] = block[16 + i][j] = w(i, 32 * c + j);
      }
      pack_row_tiles({block[0], 32, 32}, 0, 0, packed);
    }
  }
  /// 32 tokens from t on.
  void run(Index t, const bfloat16* packed, const bfloat16* packed_side, float* scratch) const {
    const auto& s = *all;
    const Index n = smaller(32, s.y.rows - t), side = whole_tiles(s.second.w.rows), ranks = whole_tiles(s.first.w.rows);
    float* const sums = scratch;  // [32, sweep]
    bfloat16* const parts = reinterpret_cast<bfloat16*>(sums + 32 * sweep);
    bfloat16* const side_parts = parts + 2 * 32 * ranks;
    std::uint8_t* const keep = reinterpret_cast<std::uint8_t*>(sums + 32 * sweep + 32 * (ranks + side));
    split(s.first.left, t, n, ranks, parts);
    split(s.second.left, t, n, side, side_parts);
    for (Index c = 0; c < s.y.cols; c += sweep) {
      const Index columns = smaller(sweep, s.y.cols - c);
      RowWalk next = behind(s.y, t, n, c, sweep);
      product(s.first.w, ranks, c, columns, packed, parts, sums, false, next);
      if (side != 0) {
        scale(t, n, c, columns, keep, sums);
        product(s.second.w, side, c, columns, packed_side, side_parts, sums, true, next);
        write(t, n, c, columns, splat(1), nullptr, sums);
      } else {
        if (s.dropout.on()) draw(t, n, c, columns, keep);
        write(t, n, c, columns, splat(factor()), s.dropout.on() ? keep : nullptr, sums);
      }
    }
  }

 private:
  /// parts[0] + parts[1] = left: [2][32][padded], or [32][2][16].
  static void split(MatrixView<const float> left, Index t, Index n, Index padded, bfloat16* parts) {
    const bool twice = fits_twice(left.cols);
    bfloat16* const low = parts + (twice ? 16 : 32 * padded);
    for (Index i = 0; i < n; ++i)
      split_row(left.row(t + i), left.cols, twice ? 16 : padded, parts + i * padded, low + i * padded);
    std::fill(parts + n * padded, parts + 32 * padded, bfloat16{0});
    if (!twice) std::fill(low + n * padded, low + 32 * padded, bfloat16{0});
  }
  static void product(MatrixView<const bfloat16> w, Index ranks, Index c, Index columns, const bfloat16* packed,
                      const bfloat16* parts, float* sums, bool add, RowWalk& next) {
    const Index blocks = blocks_of(w.cols, 32), pairs = pairs_per_block(ranks);
    const bool once = fits_twice(w.rows);
    if (once) TileBlock::load_rows(parts, ranks);  // once for all columns
    for (Index j = 0; j < columns; j += 32) {
      if (add)
        TileBlock::load_sums(sums + j, sweep);
      else
        TileBlock::clear();
      for (Index r = 0; r < ranks; r += 32) {
        TileBlock::load_columns(packed + (r / 32 * blocks + (c + j) / 32) * 1024);
        for (Index i = 0; i < pairs; ++i) next.step<1>(0);
        if (once) TileBlock::multiply();
        for (Index part = 0; !once && part < 2; ++part) {
          TileBlock::load_rows(parts + part * 32 * ranks + r, ranks);
          TileBlock::multiply();
        }
      }
      TileBlock::store_sums(sums + j, sweep);
    }
  }
  static constexpr Index keep_pitch = keep_bytes(sweep);
  float factor() const { return factor_of(all->dropout, all->scale); }
  void draw(Index t, Index n, Index c, Index columns, std::uint8_t* keep) const {
    for (Index i = 0; i < n; ++i) keep_bits(all->dropout, t + i, c, columns, keep + i * keep_pitch);
  }
  /// What the first product's scale and dropout make of its sums, where a second one follows.
  void scale(Index t, Index n, Index c, Index columns, std::uint8_t* keep, float* sums) const {
    if (all->dropout.on()) draw(t, n, c, columns, keep);
    for (Index i = 0; i < n; ++i) {
      for (Index j = 0; j < columns; j += width) {
        const Packet v = mul(splat(factor()), load(sums + i * sweep + j));
        store(sums + i * sweep + j, all->dropout.on() ? keep_lanes(v, keep + i * keep_pitch, j) : v);
      }
    }
  }
  void write(Index t, Index n, Index c, Index columns, Packet factor, const std::uint8_t* keep,
             const float* sums) const {
    for (Index i = 0; i < n; ++i) {
      if (all->idle != nullptr && all->idle[t + i] != 0) continue;
      const std::uint8_t* const bits = keep == nullptr ? nullptr : keep + i * keep_pitch;
      if (all->into == Into::add)
        write_row<true>(all->y.row(t + i) + c, columns, factor, bits, sums + i * sweep);
      else
        write_row<false>(all->y.row(t + i) + c, columns, factor, bits, sums + i * sweep);
    }
  }
  template <bool Add>
  static void write_row(bfloat16* to, Index columns, Packet factor, const std::uint8_t* bits, const float* from) {
    const auto row = [&](const auto& value) {
      Index j = 0;
      for (; j + width <= columns; j += width) store_rounded(to + j, Add ? add(load(to + j), value(j)) : value(j));
      const Index rest = columns - j;
      if (rest > 0) store_part(to + j, Add ? add(load_part(to + j, rest), value(j)) : value(j), rest);
    };
    if (bits == nullptr)
      row([&](Index j) { return mul(factor, load(from + j)); });
    else
      row([&](Index j) { return keep_lanes(mul(factor, load(from + j)), bits, j); });
  }
};

/// out [R, d] (+)= scale · Σ_t left[t, r] · x̂[t, c], left in two parts of 16 bits.
template <class G>
struct TileTokenSum {
  MatrixView<const float> left;  // [T, R]
  Input<bfloat16> x;
  float scale;
  Into into;
  MatrixView<G> out;

  static constexpr Index sweep = 512;  // columns of a job
  static constexpr Index chunk = 256;  // tokens whose tiles lie together
  static constexpr Index ranks_of_job = 256;
  /// Floats that all jobs share: both parts of leftᵀ.
  static Index shared(Index tokens, Index ranks) { return elements(whole_tiles(tokens), whole_tiles(ranks)) + 16; }
  static Index scratch(Index ranks) {
    return (chunk + 32) * sweep / 2 + sweep * smaller(whole_tiles(ranks), ranks_of_job);
  }

  /// 32 tokens: packed[t / 32][r / 32][part] = [rank][token].
  void pack(Index t, bfloat16* packed) const {
    const Index ranks = whole_tiles(left.cols);
    packed += t * 2 * ranks;
    for (Index r = 0; r < ranks; r += 32, packed += 2 * 1024) {
      float block[32 * 32];
      const Index n = smaller(32, left.cols - r);
      for (Index i = 0; i < 32; i += width) pack_packet(left, t + i, r, n, block + i, 32);
      std::fill(block + n * 32, block + 32 * 32, 0.f);
      for (Index i = 0; i < 32 * 32; i += 32) split_row(block + i, 32, 32, packed + i, packed + 1024 + i);
    }
  }
  /// Ranks [r0, r0 + ranks) × columns [c0, c0 + columns), at most one job's.
  void run(Index r0, Index ranks, Index c0, Index columns, const bfloat16* packed, float* scratch) const {
    const Index blocks = blocks_of(columns, 32), all_ranks = whole_tiles(left.cols), here = whole_tiles(ranks);
    float* const sums = scratch;  // [ranks, sweep]
    bfloat16* const tiles = reinterpret_cast<bfloat16*>(sums + here * sweep);
    bfloat16* const dropped = tiles + chunk * sweep;  // [32, sweep]
    for (Index t0 = 0; t0 == 0 || t0 < left.rows; t0 += chunk) {
      const Index n = smaller(chunk, left.rows - t0), pairs = pairs_per_block(here);
      for (Index t = 0; t < n; t += 32) copy_tokens(t0 + t, c0, columns, tiles + t * blocks * 32, dropped);
      RowWalk next{x.rows.row(t0 + n) + c0, x.rows.stride, smaller(chunk, left.rows - t0 - n), columns};
      for (Index r = 0; r < here; r += 32) {
        for (Index c = 0; c < blocks; ++c) {
          float* const sum = sums + r * sweep + c * 32;
          if (t0 == 0)
            TileBlock::clear();
          else
            TileBlock::load_sums(sum, sweep);
          for (Index t = 0; t < n; t += 32) {
            for (Index i = 0; i < pairs; ++i) next.template step<1>(0);
            TileBlock::load_columns(tiles + (t * blocks + c * 32) * 32);
            for (Index part = 0; part < 2; ++part) {
              TileBlock::load_rows(packed + (t0 + t) * 2 * all_ranks + (2 * (r0 + r) + 32 * part) * 32, 32);
              TileBlock::multiply();
            }
          }
          TileBlock::store_sums(sum, sweep);
        }
      }
    }
    const float factor = factor_of(x.dropout, scale);
    for (Index r = 0; r < ranks; ++r) {
      G* const to = out.row(r0 + r) + c0;
      over_packets(columns, [&](Index j, auto lanes) {
        const Packet v = load(sums + r * sweep + j);
        lanes.store(to + j, into == Into::add ? fma(splat(factor), v, lanes.load(to + j)) : mul(splat(factor), v));
      });
    }
  }

 private:
  /// 32 tokens: tiles[c / 32], two each.
  void copy_tokens(Index t, Index c0, Index columns, bfloat16* tiles, bfloat16* dropped) const {
    MatrixView<const bfloat16> rows = x.rows;
    Index first_row = t, first_column = c0;
    if (x.dropout.on()) {
      const Index n = smaller(32, left.rows - t);
      for (Index i = 0; i < n; ++i) copy_row(x, t + i, c0, columns, columns, dropped + i * sweep);
      rows = {dropped, n, columns, sweep};
      first_row = first_column = 0;
    }
    for (Index c = 0; c < columns; c += 32) pack_row_tiles(rows, first_row, first_column + c, tiles + c * 32);
  }
};

/// Memory of a contraction by tiles, and its run.
struct TileShrink {
  bfloat16* packed;
  MatrixView<float> lanes;

  template <class E>
  TileShrink(Arena<>& arena, const Backend<E>& be, MatrixView<const bfloat16> w)
      : packed(reinterpret_cast<bfloat16*>(arena.take<float>(packed_floats(w.rows, w.cols)))),
        lanes(carve_lanes(arena, be.lanes(), TileContraction::scratch(w.rows))) {}

  template <class E>
  void run(const Backend<E>& be, const TileContraction& c) const {
    if (c.w.rows == 0 || c.out.rows == 0) return;
    if (c.w.cols == 0) return set_zero(be, c.out);
    be.run(blocks_of(c.w.cols, 32), [&](Index k, Index) { c.pack(k, packed); });
    be.run(blocks_of(c.out.rows, 32), [&](Index i, Index lane) {
      Tiles::configure();
      c.run(32 * i, packed, lanes.row(lane));
      Tiles::release();
    });
  }
};

/// The same of a spread.
struct TileExpand {
  bfloat16 *packed, *packed_side;
  MatrixView<float> lanes;

  template <class E>
  TileExpand(Arena<>& arena, const Backend<E>& be, Index ranks, Index side, Index columns)
      : packed(reinterpret_cast<bfloat16*>(arena.take<float>(packed_floats(ranks, columns)))),
        packed_side(reinterpret_cast<bfloat16*>(arena.take<float>(packed_floats(side, columns)))),
        lanes(carve_lanes(arena, be.lanes(), TileSpread::scratch(ranks, side))) {}

  template <class E>
  void run(const Backend<E>& be, const Spread<bfloat16, bfloat16, Major::row>& spread) const {
    if (spread.y.empty()) return;
    const auto pack = [&](MatrixView<const bfloat16> w, bfloat16* to) {
      be.run(blocks_of(w.rows, 32), [&](Index i, Index) { TileSpread::pack(w, 32 * i, to); });
    };
    pack(spread.first.w, packed);
    pack(spread.second.w, packed_side);
    be.run(blocks_of(spread.y.rows, 32), [&](Index i, Index lane) {
      Tiles::configure();
      TileSpread{&spread}.run(32 * i, packed, packed_side, lanes.row(lane));
      Tiles::release();
    });
  }
};

/// The same of a sum over tokens.
template <class G>
struct TileSum {
  bfloat16* packed;
  MatrixView<float> lanes;

  template <class E>
  TileSum(Arena<>& arena, const Backend<E>& be, Index tokens, Index ranks)
      : packed(reinterpret_cast<bfloat16*>(arena.take<float>(TileTokenSum<G>::shared(tokens, ranks)))),
        lanes(carve_lanes(arena, be.lanes(), TileTokenSum<G>::scratch(ranks))) {}

  template <class E>
  void run(const Backend<E>& be, const TileTokenSum<G>& sum) const {
    if (sum.out.data == nullptr || sum.out.empty()) return;
    be.run(blocks_of(sum.left.rows, 32), [&](Index i, Index) { sum.pack(32 * i, packed); });
    const Cut columns(sum.out.cols, be.lanes(), sum.sweep, 32), ranks(sum.out.rows, 1, sum.ranks_of_job, 32);
    be.run(columns.jobs * ranks.jobs, [&](Index i, Index lane) {
      const Index c = i % columns.jobs, r = i / columns.jobs;
      Tiles::configure();
      sum.run(ranks.begin(r), ranks.count(r), columns.begin(c), columns.count(c), packed, lanes.row(lane));
      Tiles::release();
    });
  }
};

}  // namespace detail

/// The CPU backend with tiles for bfloat16, where request_amx() is granted.
template <Executor E = SerialExecutor>
struct AmxBackend : Backend<E> {
  bool granted = request_amx();

  AmxBackend() = default;
  explicit AmxBackend(E e, const Tuning& t = {}) : Backend<E>{e, t} {}
  const Backend<E>& packets() const { return *this; }
  /// Whether an op of so many tokens takes the tiles.
  bool tiles(Index tokens) const {
    return granted && this->tuning.path != Path::composed &&
           detail::class_of(this->tuning, tokens) == detail::TokenClass::many;
  }
};
template <class E>
AmxBackend(E) -> AmxBackend<E>;
AmxBackend()->AmxBackend<SerialExecutor>;

/// As of packets, at any number of tokens: memory for many serves few. The tiles compute every rank.
template <class E, class Score>
bool wants_selection_impl(const AmxBackend<E>& be, const GateForm<Score>& form, Index columns) {
  return wants_selection_impl(be.packets(), form, columns);
}

/// What explain() prints.
template <class E, class Acc, class W, class Y, class Score, Major M>
PathFacts path_of(const AmxBackend<E>& be, const Expand<Acc, W, Y, Score, Space::host, M>& op) {
  constexpr bool possible = std::is_same_v<Y, bfloat16> && std::is_same_v<W, bfloat16> && M == Major::column;
  if (!possible || !be.tiles(op.u.rows)) return path_of(be.packets(), op);
  return {"cpu tiles (AMX), all ranks", "bfloat16, more than 64 tokens, and the system lends the tiles", 32,
          "matrix tiles, weights packed in pairs"};
}

namespace detail {

using TileShrinkOp = Shrink<bfloat16, bfloat16, float, float, Space::host>;
template <class G>
using TileShrinkBackwardOp = ShrinkBackward<bfloat16, bfloat16, float, float, G, Space::host>;
using TileExpandOp = Expand<float, bfloat16, bfloat16, float, Space::host, Major::column>;
template <class G>
using TileExpandBackwardOp = ExpandBackward<float, bfloat16, bfloat16, float, G, Space::host, Major::column>;

template <class E, class Op, class Carve>
Index tile_scratch(const AmxBackend<E>& be, const Op& op, Index tokens, const Carve& carve) {
  const Index packets = scratch_impl(be.packets(), op);
  return be.tiles(tokens) ? larger(packets, carved_bytes<Space::host>(carve)) : packets;
}

}  // namespace detail

template <class E>
Index scratch_impl(const AmxBackend<E>& be, const detail::TileShrinkOp& op) {
  return detail::tile_scratch(be, op, op.x.rows, [&](Arena<>& arena) {
    detail::TileShrink(arena, be, op.A);
    detail::TileShrink(arena, be, op.side);
  });
}
template <class E>
void execute_impl(const AmxBackend<E>& be, const detail::TileShrinkOp& op, Arena<> work) {
  using namespace detail;
  if (!be.tiles(op.x.rows)) return execute_impl(be.packets(), op, work);
  TileShrink(work, be, op.A).run(be, {{op.x, op.dropout}, op.A, 1.f, op.u});
  TileShrink(work, be, op.side).run(be, {{op.x}, op.side, 1.f, op.h});
}

template <class E, class G>
Index scratch_impl(const AmxBackend<E>& be, const detail::TileShrinkBackwardOp<G>& op) {
  using namespace detail;
  return tile_scratch(be, op, op.x.rows, [&](Arena<>& arena) {
    TileExpand(arena, be, op.A.rows, op.side.rows, op.A.cols);
    TileSum<G>(arena, be, op.x.rows, op.A.rows);
    TileSum<G>(arena, be, op.x.rows, op.side.rows);
  });
}
template <class E, class G>
void execute_impl(const AmxBackend<E>& be, const detail::TileShrinkBackwardOp<G>& op, Arena<> work) {
  using namespace detail;
  if (!be.tiles(op.x.rows)) return execute_impl(be.packets(), op, work);
  const TileExpand back(work, be, op.A.rows, op.side.rows, op.A.cols);
  const TileSum<G> sum(work, be, op.x.rows, op.A.rows), side_sum(work, be, op.x.rows, op.side.rows);
  sum.run(be, {op.du, {op.x, op.dropout}, 1.f, op.parameters, op.dA});
  side_sum.run(be, {op.dh, {op.x}, 1.f, op.parameters, op.dside});
  if (op.dx.data != nullptr) back.run(be, {{op.du, op.A}, {op.dh, op.side}, op.dropout, 1.f, op.input, op.dx});
}

template <class E>
Index scratch_impl(const AmxBackend<E>& be, const detail::TileExpandOp& op) {
  return detail::tile_scratch(be, op, op.u.rows, [&](Arena<>& arena) {
    arena.matrix<float>(op.u.rows, op.B.cols);
    detail::carve_idle(arena, op);
    detail::TileExpand(arena, be, op.B.cols, 0, op.B.rows);
  });
}
template <class E>
void execute_impl(const AmxBackend<E>& be, const detail::TileExpandOp& op, Arena<> work) {
  using namespace detail;
  if (!be.tiles(op.u.rows)) return execute_impl(be.packets(), op, work);
  const auto gated = work.matrix<float>(op.u.rows, op.B.cols);
  std::uint8_t* const idle = carve_idle(work, op);
  const auto left = gated_ranks(be, op.u, op.gate, false, gated, idle);
  const Spread<bfloat16, bfloat16, Major::row> out{{left, op.B.transposed()}, {}, {}, op.scale, op.into, op.y, idle};
  TileExpand(work, be, op.B.cols, 0, op.B.rows).run(be, out);
}

/// Gates by packets, all else by tiles.
template <class E, class G>
Index scratch_impl(const AmxBackend<E>& be, const detail::TileExpandBackwardOp<G>& op) {
  using namespace detail;
  return tile_scratch(be, op, op.u.rows, [&](Arena<>& arena) {
    FusedExpandBackward<bfloat16, bfloat16, G, Major::column>(arena, be.packets(), op);
    TileShrink(arena, be, op.B.transposed());
    TileSum<G>(arena, be, op.u.rows, op.B.cols);
  });
}
template <class E, class G>
void execute_impl(const AmxBackend<E>& be, const detail::TileExpandBackwardOp<G>& op, Arena<> work) {
  using namespace detail;
  if (!be.tiles(op.u.rows)) return execute_impl(be.packets(), op, work);
  const FusedExpandBackward<bfloat16, bfloat16, G, Major::column> packets(work, be.packets(), op);
  const TileShrink tiles(work, be, op.B.transposed());
  const TileSum<G> sum(work, be, op.u.rows, op.B.cols);
  auto ranks = op;
  ranks.dB = {};
  packets.run(be.packets(), ranks, [&](MatrixView<float> out) {
    tiles.run(be, {{op.dy}, op.B.transposed(), op.scale, out});
  });
  if (op.dB.data == nullptr || op.dB.empty()) return;
  const auto left = gated_ranks(be.packets(), op.u, op.gate, false, packets.gated);
  sum.run(be, {left, {op.dy}, op.scale, op.parameters, op.dB.transposed()});
}

}  // namespace cpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
