/// The matrix tiles of some x86 processors (AMX) for bfloat16: shrink, expand and the two products of backward that are
/// like them. Opt-in: include this header and ask for the tiles once per process,
///
///     if (lm::cpu::request_amx()) …                             // false: the machine or its kernel has none
///     lm::cpu::AmxBackend be{executor};                         // where it is false: what lm::cpu::Backend does
///
/// Computes:    the products of ops/shrink.hpp and ops/expand.hpp with bfloat16 activations and weights, B rank-major, T > 64,
///              but for the sums over tokens dA and dB; everything else is cpu::Backend's. What leaves rank space is split
///              into two bfloat16 parts: 2⁻¹⁸ of it is lost (storing y loses 2⁻⁹ of y).
/// Reads:       as the ops.
/// Writes:      as the ops.
/// Errors:      the ops'. request_amx() fails on nothing: it says no.
/// Cost:        weights and ranks are padded to 32; expand does its multiply-adds twice.
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

/// Two tiles of W for ranks [r, r + 32) × columns [k, k + 32), in pairs of columns: to[tile][k / 2][rank][2].
inline void pack_tiles(MatrixView<const bfloat16> w, Index r, Index k, bfloat16* to) {
  if (r + 32 <= w.rows && k + 32 <= w.cols) {
    for (Index i = 0; i < 32; ++i) {
      bfloat16* const column = to + i / 16 * 512 + 2 * (i % 16);
      const bfloat16* const from = w.row(r + i) + k;
      for (Index j = 0; j < 16; ++j) std::memcpy(static_cast<void*>(column + j * 32), from + 2 * j, 4);
    }
    return;
  }
  for (Index tile = 0; tile < 2; ++tile) {
    for (Index i = 0; i < 16; ++i) {
      const Index rank = r + 16 * tile + i;
      for (Index j = 0; j < 32; ++j) {
        const bool inside = rank < w.rows && k + j < w.cols;
        to[tile * 512 + j / 2 * 32 + 2 * i + j % 2] = inside ? w(rank, k + j) : bfloat16{0};
      }
    }
  }
}
/// The same for weights whose ranks are summed over: ranks [r, r + 32) × columns [c, c + 32): to[tile][rank / 2][column][2].
inline void pack_rank_tiles(MatrixView<const bfloat16> w, Index r, Index c, bfloat16* to) {
  if (r + 32 <= w.rows && c + 32 <= w.cols) {
    for (Index j = 0; j < 16; ++j) {
      const bfloat16* const even = w.row(r + 2 * j) + c;
      const bfloat16* const odd = w.row(r + 2 * j + 1) + c;
      for (Index i = 0; i < 32; ++i) {
        to[i / 16 * 512 + j * 32 + 2 * (i % 16)] = even[i];
        to[i / 16 * 512 + j * 32 + 2 * (i % 16) + 1] = odd[i];
      }
    }
    return;
  }
  for (Index j = 0; j < 32; j += 2) {
    for (Index i = 0; i < 32; ++i) {
      for (Index odd = 0; odd < 2; ++odd) {
        const bool inside = r + j + odd < w.rows && c + i < w.cols;
        to[i / 16 * 512 + j / 2 * 32 + 2 * (i % 16) + odd] = inside ? w(r + j + odd, c + i) : bfloat16{0};
      }
    }
  }
}

/// out [T, R] = scale · x̂ Wᵀ.
struct TileContraction {
  Input<bfloat16> x;
  MatrixView<const bfloat16> w;  // [R, d]
  float scale;
  MatrixView<float> out;

  static constexpr Index sweep = 512;  // columns
  static constexpr Index pitch = sweep + 32;
  static Index padded(Index ranks) { return round_up(ranks, TileBlock::columns); }
  /// Floats that all jobs share: the packed weights.
  static Index shared(Index ranks, Index depth) { return elements(padded(ranks), round_up(depth, 32)) / 2 + 16; }
  static Index scratch(Index ranks) { return 32 * padded(ranks) + 32 * pitch / 2; }

  void pack(Index k32, bfloat16* packed) const {
    for (Index r = 0; r < w.rows; r += 32) pack_tiles(w, r, k32 * 32, packed + (k32 * padded(w.rows) + r) * 32);
  }
  /// 32 tokens from t on.
  void run(Index t, const bfloat16* packed, float* scratch) const {
    const Index ranks = padded(w.rows), n = smaller(32, out.rows - t);
    float* const sums = scratch;
    bfloat16* const block = reinterpret_cast<bfloat16*>(sums + 32 * ranks);
    for (Index k = 0; k < w.cols; k += sweep) {
      const Index columns = smaller(sweep, w.cols - k), wide = round_up(columns, 32);
      for (Index i = 0; i < 32; ++i) copy_row(t + i, i < n, k, columns, wide, block + i * pitch);
      for (Index r = 0; r < ranks; r += 32) {
        if (k == 0)
          TileBlock::clear();
        else
          TileBlock::load_sums(sums + r, ranks);
        for (Index j = 0; j < wide; j += 32) {
          TileBlock::load_rows(block + j, pitch);
          TileBlock::load_columns(packed + ((k + j) / 32 * ranks + r) * 32);
          TileBlock::multiply();
        }
        TileBlock::store_sums(sums + r, ranks);
      }
    }
    const float factor = x.dropout.on() ? scale * static_cast<float>(x.dropout.kept_scale()) : scale;
    for (Index i = 0; i < n; ++i) {
      for (Index j = 0; j < out.cols; ++j) out(t + i, j) = factor * sums[i * ranks + j];
    }
  }

 private:
  void copy_row(Index t, bool inside, Index k, Index columns, Index wide, bfloat16* to) const {
    if (!inside) {
      std::memset(static_cast<void*>(to), 0, static_cast<std::size_t>(wide) * 2);
      return;
    }
    if (x.dropout.on()) {  // kept values are not scaled, nor rounded again: the sums are
      drop(t, k, columns, to);
    } else {
      std::memcpy(static_cast<void*>(to), x.rows.row(t) + k, static_cast<std::size_t>(columns) * 2);
    }
    for (Index j = columns; j < wide; ++j) to[j] = bfloat16{0};
  }
  void drop(Index t, Index k, Index n, bfloat16* to) const {
    std::uint8_t bits[sweep / 8 + width];
    keep_bits(x.dropout, t, k, n, bits);
    const bfloat16* const from = x.rows.row(t) + k;
    for (Index j = 0; j < n; ++j) to[j] = (bits[j / 8] >> (j % 8) & 1) != 0 ? from[j] : bfloat16{0};
  }
};

/// p = v, rounded to nearest: by one instruction where the compiler was told of it.
[[gnu::always_inline]] inline void store_rounded(bfloat16* p, Packet v) {
  if constexpr (loramix::detail::has_bfloat16_rounding && width == 16) {
    const auto narrow = loramix::detail::round_to_bfloat16(v);
    std::memcpy(static_cast<void*>(p), &narrow, sizeof(narrow));
  } else {
    store(p, v);
  }
}

/// y [T, d] (+)= scale · left W, and a second pair of factors behind the first one's dropout.
struct TileSpread {
  const Spread<bfloat16, bfloat16, Major::row>* all;

  static constexpr Index sweep = 256;  // columns
  static Index padded(Index ranks) { return round_up(ranks, 32); }
  static Index shared(Index ranks, Index depth) { return elements(padded(ranks), round_up(depth, 32)) / 2 + 16; }
  static Index scratch(Index ranks, Index side) {
    return 32 * sweep + 32 * (padded(ranks) + padded(side)) + 32 * keep_pitch / 4;
  }

  /// 32 ranks of all columns of one block: packed[r / 32][c / 32] two tiles each.
  static void pack(MatrixView<const bfloat16> w, Index r, bfloat16* packed) {
    const Index blocks = blocks_of(w.cols, 32);
    for (Index c = 0; c < blocks; ++c) pack_rank_tiles(w, r, 32 * c, packed + (r / 32 * blocks + c) * 1024);
  }
  /// 32 tokens from t on.
  void run(Index t, const bfloat16* packed, const bfloat16* packed_side, float* scratch) const {
    const auto& s = *all;
    const Index n = smaller(32, s.y.rows - t), side = padded(s.second.w.rows), ranks = padded(s.first.w.rows);
    float* const sums = scratch;  // [32, sweep]
    bfloat16* const parts = reinterpret_cast<bfloat16*>(sums + 32 * sweep);
    bfloat16* const side_parts = parts + 2 * 32 * ranks;
    std::uint8_t* const keep = reinterpret_cast<std::uint8_t*>(sums + 32 * sweep + 32 * (ranks + side));
    split(s.first.left, t, n, ranks, parts);
    split(s.second.left, t, n, side, side_parts);
    for (Index c = 0; c < s.y.cols; c += sweep) {
      const Index columns = smaller(sweep, s.y.cols - c);
      product(s.first.w, ranks, c, columns, packed, parts, sums, false);
      if (side != 0) {
        scale(t, n, c, columns, keep, sums);
        product(s.second.w, side, c, columns, packed_side, side_parts, sums, true);
        write(t, n, c, columns, splat(1), nullptr, sums);
      } else {
        if (s.dropout.on()) draw(t, n, c, columns, keep);
        write(t, n, c, columns, splat(factor()), s.dropout.on() ? keep : nullptr, sums);
      }
    }
  }

 private:
  /// parts[0] + parts[1] = left, to 16 bits of mantissa: [2][32][padded].
  static void split(MatrixView<const float> left, Index t, Index n, Index padded, bfloat16* parts) {
    bfloat16* const low = parts + 32 * padded;
    for (Index i = 0; i < 32; ++i) {
      for (Index j = 0; j < padded; ++j) {
        const float v = i < n && j < left.cols ? left(t + i, j) : 0.f;
        const bfloat16 high = narrow<bfloat16>(v);
        parts[i * padded + j] = high;
        low[i * padded + j] = is_finite(high) ? narrow<bfloat16>(v - widen<float>(high)) : bfloat16{0};
      }
    }
  }
  static void product(MatrixView<const bfloat16> w, Index ranks, Index c, Index columns, const bfloat16* packed,
                      const bfloat16* parts, float* sums, bool add) {
    const Index blocks = blocks_of(w.cols, 32);
    for (Index j = 0; j < columns; j += 32) {
      if (add)
        TileBlock::load_sums(sums + j, sweep);
      else
        TileBlock::clear();
      for (Index r = 0; r < ranks; r += 32) {
        TileBlock::load_columns(packed + (r / 32 * blocks + (c + j) / 32) * 1024);
        for (Index part = 0; part < 2; ++part) {
          TileBlock::load_rows(parts + part * 32 * ranks + r, ranks);
          TileBlock::multiply();
        }
      }
      TileBlock::store_sums(sums + j, sweep);
    }
  }
  static constexpr Index keep_pitch = sweep / 8 + width;
  float factor() const {
    return all->dropout.on() ? all->scale * static_cast<float>(all->dropout.kept_scale()) : all->scale;
  }
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

/// Memory of a contraction by tiles, and its run.
struct TileShrink {
  bfloat16* packed;
  MatrixView<float> lanes;

  template <class E>
  TileShrink(Arena<>& arena, const Backend<E>& be, MatrixView<const bfloat16> w)
      : packed(reinterpret_cast<bfloat16*>(arena.take<float>(TileContraction::shared(w.rows, w.cols)))),
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
      : packed(reinterpret_cast<bfloat16*>(arena.take<float>(TileSpread::shared(ranks, columns)))),
        packed_side(reinterpret_cast<bfloat16*>(arena.take<float>(TileSpread::shared(side, columns)))),
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

/// The tiles compute every rank.
template <class E, class Score>
bool wants_selection_impl(const AmxBackend<E>& be, const GateForm<Score>& form, Index columns) {
  return !be.tiles(form.tokens) && wants_selection_impl(be.packets(), form, columns);
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

/// dX by tiles, sums over tokens by packets.
template <class E, class G>
Index scratch_impl(const AmxBackend<E>& be, const detail::TileShrinkBackwardOp<G>& op) {
  return detail::tile_scratch(
      be, op, op.x.rows, [&](Arena<>& arena) { detail::TileExpand(arena, be, op.A.rows, op.side.rows, op.A.cols); });
}
template <class E, class G>
void execute_impl(const AmxBackend<E>& be, detail::TileShrinkBackwardOp<G> op, Arena<> work) {
  using namespace detail;
  if (!be.tiles(op.x.rows)) return execute_impl(be.packets(), op, work);
  if (op.dx.data != nullptr) {
    Arena<> scratch = work;
    const Spread<bfloat16, bfloat16, Major::row> dx{{op.du, op.A}, {op.dh, op.side}, op.dropout, 1.f, op.input, op.dx};
    TileExpand(scratch, be, op.A.rows, op.side.rows, op.A.cols).run(be, dx);
    op.dx = {};
  }
  execute_impl(be.packets(), op, work);
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
  const auto left = gated_ranks(be, op.u, op.gate, gated, idle);
  const Spread<bfloat16, bfloat16, Major::row> out{{left, op.B.transposed()}, {}, {}, op.scale, op.into, op.y, idle};
  TileExpand(work, be, op.B.cols, 0, op.B.rows).run(be, out);
}

/// s dY B by tiles, all else by packets.
template <class E, class G>
Index scratch_impl(const AmxBackend<E>& be, const detail::TileExpandBackwardOp<G>& op) {
  using namespace detail;
  return tile_scratch(be, op, op.u.rows, [&](Arena<>& arena) {
    FusedExpandBackward<bfloat16, bfloat16, G, Major::column>(arena, be.packets(), op);
    TileShrink(arena, be, op.B.transposed());
  });
}
template <class E, class G>
void execute_impl(const AmxBackend<E>& be, const detail::TileExpandBackwardOp<G>& op, Arena<> work) {
  using namespace detail;
  if (!be.tiles(op.u.rows)) return execute_impl(be.packets(), op, work);
  const FusedExpandBackward<bfloat16, bfloat16, G, Major::column> packets(work, be.packets(), op);
  const TileShrink tiles(work, be, op.B.transposed());
  packets.run(be.packets(), op, [&](MatrixView<float> out) {
    tiles.run(be, {{op.dy}, op.B.transposed(), op.scale, out});
  });
}

}  // namespace cpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
