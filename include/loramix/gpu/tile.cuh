/// What a warp multiplies: tiles in shared memory, and 64 × 32 sums in registers.
///
///   Accumulator      64 × 32 sums in the layout of mma.sync: lane 4g + t holds, of rows 16i + g and 16i + g + 8, the
///                    columns 8j + 2t and 8j + 2t + 1. Every kernel of this room has this share per warp: 64 tokens × 32
///                    ranks (shrink), 64 tokens × 32 columns (expand), 64 ranks × 32 columns (sums over tokens).
///   SharedTile<E>    rows of 16-byte chunks; chunk c of eight consecutive rows lies in eight different groups of banks.
///   Extent           which of the 16-row and 8-column tiles of an Accumulator are wanted; the rest costs nothing.
///   as_float, as     widen<float> and narrow by the instructions that a device has for 16 bits.
///
/// Computes:    where elements lie; moves between lanes of a quad.
/// Errors:      none.
/// Cost:        64 registers per lane.
/// Determinism: nothing is summed here.
/// Example:     gpu/math.cuh
#pragma once
#include <cuda_runtime.h>

#include <cassert>

#include <loramix/core/scalars.hpp>
#include <loramix/core/views.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace gpu {
namespace detail {

inline constexpr int tile_rows = 64;  // of an Accumulator
inline constexpr int tile_cols = 32;
inline constexpr int tile_step = 16;  // how far one step of a product goes along the contracted axis

/// widen<float>(v); a half in one instruction.
template <class E>
__device__ float as_float(E v) {
  if constexpr (std::is_same_v<E, half>) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(v.bits));
    return wide;
  } else {
    return widen<float>(v);
  }
}
/// narrow<E>(v), in one instruction; of a NaN, which one.
template <class E>
__device__ E as(float v) {
  E out;
  if constexpr (std::is_same_v<E, half>)
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(v));
  else if constexpr (std::is_same_v<E, bfloat16>)
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(v));
  else
    out = narrow<E>(v);
  return out;
}

/// Elements in 16 bytes.
template <class E>
inline constexpr int per_chunk = 16 / static_cast<int>(sizeof(E));

struct Extent {
  int first = 0;  // 16-row tiles [first, rows)
  int rows = 4;
  int from = 0;  // 8-column tiles [from, to)
  int to = 4;
};

struct Accumulator {
  float sum[4][4][4];  // [16-row tile][8-column tile][row g: 2 columns, row g + 8: 2 columns]

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int v = 0; v < 4; ++v) sum[i][j][v] = 0;
      }
    }
  }
};

/// Which lane of its warp, and where in the quads of mma.sync's layouts.
struct Lane {
  int id = static_cast<int>(threadIdx.x) % 32;
  int g = id / 4;
  int t = id % 4;
};

/// Byte offset of chunk `chunk` in a row of `chunks`, a power of two of at least 2. Rows of 128 bytes and more are permuted by
/// their number mod 8, such that rows 2 apart differ by 2: what TF32 fragments read.
__device__ inline int swizzled(int row, int chunk, int chunks) {
  int by;
  if (chunks >= 8)
    by = (row & 3) << 1 | (row >> 2 & 1);
  else
    by = chunks == 4 ? row >> 1 & 3 : row >> 2 & 1;
  return (row * chunks + (chunk ^ by)) * 16;
}

template <class E>
struct SharedTile {
  unsigned char* base;  // in shared memory, 128-byte aligned
  int chunks;           // per row

  __device__ E* chunk(int row, int c) const { return reinterpret_cast<E*>(base + swizzled(row, c, chunks)); }
  __device__ const E& operator()(int row, int col) const { return chunk(row, col / per_chunk<E>)[col % per_chunk<E>]; }
  /// The address that ldmatrix takes.
  __device__ unsigned address(int row, int c) const {
    return static_cast<unsigned>(__cvta_generic_to_shared(chunk(row, c)));
  }
  __device__ SharedTile rows_from(int row) const { return {base + row * chunks * 16, chunks}; }
};

/// Bytes of a SharedTile.
template <class E>
LORAMIX_HD constexpr int tile_bytes(int rows, int cols) {
  return rows * cols * static_cast<int>(sizeof(E));
}

/// n neighbouring values as one access of 4, 8 or 16 bytes, at an address that is a multiple of that: loaded from any memory,
/// stored to global memory.
template <int bytes>
using Bits = std::conditional_t<bytes == 4, std::uint32_t, std::conditional_t<bytes == 8, uint2, uint4>>;
template <int n, class E>
struct alignas(n * sizeof(E)) Vector {
  E v[n];

  __device__ static Vector load(const E* from) {
    Vector out;
    *reinterpret_cast<Bits<n * sizeof(E)>*>(out.v) = *reinterpret_cast<const Bits<n * sizeof(E)>*>(from);
    return out;
  }
  __device__ void store(E* to) const {
    // An instruction of its own, of global addresses only: a plain store may be taken apart again.
    assert(__isGlobal(to));
    __stwb(reinterpret_cast<Bits<n * sizeof(E)>*>(to), *reinterpret_cast<const Bits<n * sizeof(E)>*>(v));
  }
};

/// Eight columns or fewer of x ∘ keep, in shared memory.
template <class E>
__device__ void drop_chunk(const E* from, E* to, std::uint32_t keep) {
  constexpr int n = per_chunk<E>;
  auto chunk = Vector<n, E>::load(from);
#pragma unroll
  for (int i = 0; i < n; ++i) chunk.v[i] = keep >> i & 1u ? chunk.v[i] : E{};
  *reinterpret_cast<Bits<sizeof(chunk)>*>(to) = *reinterpret_cast<const Bits<sizeof(chunk)>*>(chunk.v);
}

/// Transposes among the four lanes of a quad: lane t gives pairs of columns 2t, 2t + 1 of four tiles j, and gets the eight columns of
/// tile t. 16-bit rows are then read and written 16 bytes at a time.
__device__ inline void quad_transpose(const Lane& lane, const float (&give)[4][2], float (&get)[8]) {
  constexpr unsigned all = 0xffffffffu;
  const bool high = (lane.t & 2) != 0, odd = (lane.t & 1) != 0;
  float mine[2][2], theirs[2][2];  // [tile][column]: from this lane, from lane t ^ 2
#pragma unroll
  for (int j = 0; j < 2; ++j) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      mine[j][c] = high ? give[j + 2][c] : give[j][c];
      theirs[j][c] = __shfl_xor_sync(all, high ? give[j][c] : give[j + 2][c], 2);
    }
  }
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const float here = odd ? mine[1][c] : mine[0][c], far = odd ? theirs[1][c] : theirs[0][c];
    const float beside = __shfl_xor_sync(all, odd ? mine[0][c] : mine[1][c], 1);
    const float across = __shfl_xor_sync(all, odd ? theirs[0][c] : theirs[1][c], 1);
    // `here` and `beside` come from this half of the quad, `far` and `across` from the other.
    const float even_here = odd ? beside : here, odd_here = odd ? here : beside;
    const float even_far = odd ? across : far, odd_far = odd ? far : across;
    get[c] = high ? even_far : even_here;
    get[2 + c] = high ? odd_far : odd_here;
    get[4 + c] = high ? even_here : even_far;
    get[6 + c] = high ? odd_here : odd_far;
  }
}

}  // namespace detail
}  // namespace gpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
