/// One step of a product: 64 × 32 sums += left [64, 16] · right [16, 32], by one warp, from shared memory.
///
///   left    LeftTile<E>         elements as they are stored: x, dy
///           LeftRows<E>         the same, of which a list of rows is wanted
///           LeftRanks           float values of rank space, [token, rank]: ũ, dU
///           LeftTokens          the same, transposed: ranks are the rows, tokens are summed over
///   right   RightRows<E>        rows are columns of the result: A in x Aᵀ
///           RightColumns<E>     columns are columns of the result: A in dU A, x in dUᵀ x
///
///   Tensor<bfloat16>, Tensor<half>    mma.sync m16n8k16. Stored elements enter as they are. Floats of rank space enter as a
///                                     sum of terms that holds all of their bits (bfloat16: three truncated terms, exact;
///                                     half: two TF32 terms, exact to 2⁻²³), so that nothing is rounded to 16 bits on the
///                                     way. With terms = 1 they are rounded once, as PyTorch does.
///   Tensor<float>                     mma.sync m16n8k8 in TF32: both operands rounded to 11 bits. Opt-in.
///   Fma<X, W>                         FFMA: exact products, every mix of float, bfloat16 and half.
///
/// Computes:    sums in float; tensor cores round inside a step as their hardware does. An infinite value of rank space becomes NaN
///              where it is split into terms.
/// Errors:      none.
/// Cost:        tensor cores: 4096·terms flop per 16 × 8 tile and step (half in terms: four TF32 products of half the size).
/// Determinism: one order per instruction set; a sum does not depend on the rows beside it.
/// Example:     gpu/shrink.cuh
#pragma once
#include <loramix/gpu/pipeline.cuh>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace gpu {
namespace detail {

template <class E>
struct LeftTile {
  SharedTile<E> tile;  // [m, k]
  __device__ float operator()(int m, int k) const { return as_float(tile(m, k)); }
};
/// The same for a list of rows: row m of the product is row rows[m] of the tile; of those from `count` on, nothing is wanted.
template <class E>
struct LeftRows {
  SharedTile<E> tile;
  const unsigned char* rows;  // in shared memory
  int count;
  __device__ float operator()(int m, int k) const { return as_float(tile(rows[m], k)); }
};
struct LeftRanks {
  const float* data;  // [m, k], rows `pitch` apart
  int pitch;
  __device__ float operator()(int m, int k) const { return data[m * pitch + k]; }
};
struct LeftTokens {
  const float* data;  // [k, m]
  int pitch;
  __device__ float operator()(int m, int k) const { return data[k * pitch + m]; }
};
template <class E>
struct RightRows {
  SharedTile<E> tile;  // [n, k]
  __device__ float operator()(int k, int n) const { return as_float(tile(n, k)); }
};
template <class E>
struct RightColumns {
  SharedTile<E> tile;  // [k, n]
  int first = 0;       // column of the tile that is n = 0
  __device__ float operator()(int k, int n) const { return as_float(tile(k, first + n)); }
};

// ---- instructions ----------------------------------------------------------------------------------------------------

using Words4 = std::uint32_t[4];
using Words2 = std::uint32_t[2];

__device__ inline void load_matrices(Words4& to, unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}
__device__ inline void load_matrices(Words2& to, unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(to[0]), "=r"(to[1])
               : "r"(address)
               : "memory");
}
__device__ inline void load_transposed(Words4& to, unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}
__device__ inline void mma(float (&d)[4], const Words4& a, const Words2& b, bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void mma(float (&d)[4], const Words4& a, const Words2& b, half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
/// TF32, half the depth.
__device__ inline void mma(float (&d)[4], const Words4& a, const Words2& b, float) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline std::uint32_t round_to_tf32(float v) {
  std::uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return bits;
}

// ---- fragments -------------------------------------------------------------------------------------------------------

/// Rows [row, row + 16) and chunks [chunk, chunk + 2) of a tile, as the left operand of mma.sync has them.
template <class E>
__device__ void load_left(const Lane& lane, const LeftTile<E>& left, int row, int chunk, Words4& a) {
  load_matrices(a, left.tile.address(row + lane.id % 16, chunk + lane.id / 16));
}
template <class E>
__device__ void load_left(const Lane& lane, const LeftRows<E>& left, int row, int chunk, Words4& a) {
  const unsigned address = left.tile.address(left.rows[row + lane.id % 8 + lane.id / 16 * 8], chunk + lane.id / 8 % 2);
  if (row + 8 < left.count) {
    Words4 r;
    load_matrices(r, address);
    a[0] = r[0], a[1] = r[2], a[2] = r[1], a[3] = r[3];
  } else {  // eight rows or fewer
    Words2 r;
    load_matrices(r, address);
    a[0] = r[0], a[1] = 0, a[2] = r[1], a[3] = 0;
  }
}

/// Four floats of two rows: (m, k), (m, k + 1), … as a 16 × 16 left operand holds them, pair by pair.
struct Pairs {
  float v[4][2];  // [row g or g + 8, columns 2t or 2t + 8][column]
};
template <class Left>
__device__ Pairs load_pairs(const Lane& lane, const Left& left, int row, int k) {
  Pairs p;
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const int m = row + lane.g + q % 2 * 8, at = k + 2 * lane.t + q / 2 * 8;
    p.v[q][0] = left(m, at);
    p.v[q][1] = left(m, at + 1);
  }
  return p;
}
/// Ranks lie side by side: one load of eight bytes per pair.
__device__ inline Pairs load_pairs(const Lane& lane, const LeftRanks& left, int row, int k) {
  Pairs p;
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const int m = row + lane.g + q % 2 * 8, at = k + 2 * lane.t + q / 2 * 8;
    const float2 pair = *reinterpret_cast<const float2*>(left.data + m * left.pitch + at);
    p.v[q][0] = pair.x;
    p.v[q][1] = pair.y;
  }
  return p;
}

/// The right operand of two neighbouring 8-column tiles, 16 deep, of 16-bit elements.
template <class E>
__device__ void load_right(const Lane& lane, const RightRows<E>& right, int k, int col, Words2& b0, Words2& b1) {
  Words4 r;
  load_matrices(r, right.tile.address(col + lane.id % 8 + lane.id / 16 * 8, k / per_chunk<E> + lane.id / 8 % 2));
  b0[0] = r[0], b0[1] = r[1], b1[0] = r[2], b1[1] = r[3];
}
template <class E>
__device__ void load_right(const Lane& lane, const RightColumns<E>& right, int k, int col, Words2& b0, Words2& b1) {
  Words4 r;
  load_transposed(r, right.tile.address(k + lane.id % 16, (right.first + col) / per_chunk<E> + lane.id / 16));
  b0[0] = r[0], b0[1] = r[1], b1[0] = r[2], b1[1] = r[3];
}

// ---- tensor cores, 16 bits -------------------------------------------------------------------------------------------

/// `terms` truncated pieces of eight bits: their sum is the float. One term is rounded to nearest instead.
template <int terms>
struct SplitFragment {
  Words4 a[terms];
};
template <int terms>
__device__ void split(const Pairs& p, SplitFragment<terms>& f, bfloat16) {
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    float lo = p.v[q][0], hi = p.v[q][1];
    if constexpr (terms == 1) {
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(f.a[0][q]) : "f"(hi), "f"(lo));
    } else {
#pragma unroll
      for (int s = 0; s < terms; ++s) {
        const std::uint32_t l = __float_as_uint(lo), h = __float_as_uint(hi);
        f.a[s][q] = __byte_perm(l, h, 0x7632);  // the upper halves of both
        if (s + 1 == terms) continue;
        lo -= __uint_as_float(l & 0xffff0000u);
        hi -= __uint_as_float(h & 0xffff0000u);
      }
    }
  }
}

template <class E, int terms>
__device__ void multiply(float (&d)[4], const SplitFragment<terms>& f, const Words2& b, E type) {
#pragma unroll
  for (int s = terms; s-- > 0;) mma(d, f.a[s], b, type);  // small terms first
}

/// For half: two TF32 terms of each of the two 16 × 8 operands that make 16 × 16. Slot t of an operand is column 2t, slot t + 4 is
/// column 2t + 1: the order in which half has its pairs.
struct WideFragment {
  Words4 a[2][2];  // [columns 0 to 7, 8 to 15][term]
};
__device__ inline void split(const Pairs& p, WideFragment& f) {
#pragma unroll
  for (int q = 0; q < 4; ++q) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const std::uint32_t first = round_to_tf32(p.v[q][c]);
      f.a[q / 2][0][q % 2 + 2 * c] = first;
      f.a[q / 2][1][q % 2 + 2 * c] = round_to_tf32(p.v[q][c] - __uint_as_float(first));
    }
  }
}
__device__ inline void multiply(float (&d)[4], const WideFragment& f, const Words2& b, half) {
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const std::uint32_t pair = b[part];
    const half low{static_cast<std::uint16_t>(pair)}, high{static_cast<std::uint16_t>(pair >> 16)};
    const Words2 wide = {__float_as_uint(as_float(low)), __float_as_uint(as_float(high))};
    mma(d, f.a[part][1], wide, float{});
    mma(d, f.a[part][0], wide, float{});
  }
}

/// bfloat16 or half. `terms`: how floats of rank space enter; 3 is exact.
template <class E, int terms = 3>
struct Tensor {
  using Left = E;
  using Right = E;
  static constexpr int pad_ranks = 8;   // of a row of LeftRanks, in floats, beyond a multiple of 32: no bank conflicts
  static constexpr int pad_tokens = 4;  // of a row of LeftTokens, beyond a multiple of 16
  static constexpr int token_warps = 16;  // of a block that sums over tokens: as many as registers allow
  static constexpr int strip_warps = 9;   // of one that expands: 15 blocks read the ranks for 4096 columns, not 16

  template <class R>
  __device__ static void step(const Lane& lane, Accumulator& acc, const LeftTile<E>& left, const R& right, int k,
                              const Extent& extent) {
    stored_step(lane, acc, left, right, k, extent);
  }
  template <class R>
  __device__ static void step(const Lane& lane, Accumulator& acc, const LeftRows<E>& left, const R& right, int k,
                              const Extent& extent) {
    stored_step(lane, acc, left, right, k, extent);
  }
  /// Values of rank space on the left.
  template <class L, class R>
  __device__ static void step(const Lane& lane, Accumulator& acc, const L& left, const R& right, int k,
                              const Extent& extent) {
    using Fragment = std::conditional_t<std::is_same_v<E, half> && terms != 1, WideFragment, SplitFragment<terms>>;
    Words2 b[4];
    load_right(lane, right, k, 0, b[0], b[1]);
    load_right(lane, right, k, 16, b[2], b[3]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < extent.first || i >= extent.rows) continue;
      Fragment f;
      take(load_pairs(lane, left, 16 * i, k), f);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (j >= extent.from && j < extent.to) multiply(acc.sum[i][j], f, b[j], E{});
      }
    }
  }

 private:
  template <class L, class R>
  __device__ static void stored_step(const Lane& lane, Accumulator& acc, const L& left, const R& right, int k,
                                     const Extent& extent) {
    Words2 b[4];
    load_right(lane, right, k, 0, b[0], b[1]);
    load_right(lane, right, k, 16, b[2], b[3]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < extent.first || i >= extent.rows) continue;
      Words4 a;
      load_left(lane, left, 16 * i, k / per_chunk<E>, a);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (j >= extent.from && j < extent.to) mma(acc.sum[i][j], a, b[j], E{});
      }
    }
  }
  __device__ static void take(const Pairs& p, WideFragment& f) { split(p, f); }
  __device__ static void take(const Pairs& p, SplitFragment<terms>& f) {
    if constexpr (std::is_same_v<E, half>) {
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(f.a[0][q]) : "f"(p.v[q][1]), "f"(p.v[q][0]));
      }
    } else {
      split(p, f, E{});
    }
  }
};

// ---- tensor cores, TF32 ----------------------------------------------------------------------------------------------

template <int terms>
struct Tensor<float, terms> {
  using Left = float;
  using Right = float;
  static constexpr int pad_ranks = 4;
  static constexpr int pad_tokens = 8;
  static constexpr int token_warps = 9;  // as strip_warps of 16 bits
  static constexpr int strip_warps = 8;

  template <class L, class R>
  __device__ static void step(const Lane& lane, Accumulator& acc, const L& left, const R& right, int k,
                              const Extent& extent) {
#pragma unroll
    for (int half_step = 0; half_step < 2; ++half_step) {
      const int at = k + 8 * half_step;
      Words2 b[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        b[j][0] = round_to_tf32(right(at + lane.t, 8 * j + lane.g));
        b[j][1] = round_to_tf32(right(at + lane.t + 4, 8 * j + lane.g));
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i < extent.first || i >= extent.rows) continue;
        const int m = 16 * i + lane.g;
        const Words4 a = {round_to_tf32(left(m, at + lane.t)), round_to_tf32(left(m + 8, at + lane.t)),
                          round_to_tf32(left(m, at + lane.t + 4)), round_to_tf32(left(m + 8, at + lane.t + 4))};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (j >= extent.from && j < extent.to) mma(acc.sum[i][j], a, b[j], float{});
        }
      }
    }
  }
};

// ---- FFMA ------------------------------------------------------------------------------------------------------------

template <class X, class W>
struct Fma {
  using Left = X;
  using Right = W;
  static constexpr int pad_ranks = 4;
  static constexpr int pad_tokens = 4;
  static constexpr int token_warps = 9;  // as strip_warps of 16 bits
  static constexpr int strip_warps = 8;

  template <class L, class R>
  __device__ static void step(const Lane& lane, Accumulator& acc, const L& left, const R& right, int k,
                              const Extent& extent) {
#pragma unroll 4
    for (int depth = 0; depth < tile_step; ++depth) {
      float b[4][2];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (j < extent.from || j >= extent.to) continue;
        b[j][0] = right(k + depth, 8 * j + 2 * lane.t);
        b[j][1] = right(k + depth, 8 * j + 2 * lane.t + 1);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i < extent.first || i >= extent.rows) continue;
        const float a0 = left(16 * i + lane.g, k + depth), a1 = left(16 * i + lane.g + 8, k + depth);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (j < extent.from || j >= extent.to) continue;
          float(&d)[4] = acc.sum[i][j];
          d[0] = __fmaf_rn(a0, b[j][0], d[0]);
          d[1] = __fmaf_rn(a0, b[j][1], d[1]);
          d[2] = __fmaf_rn(a1, b[j][0], d[2]);
          d[3] = __fmaf_rn(a1, b[j][1], d[3]);
        }
      }
    }
  }
};

}  // namespace detail
}  // namespace gpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
