/// Dropout masks, many columns at a time.
///
/// Computes:    the bits of Dropout::keep8 (core/draws.hpp) for whole rows, 8 · width columns in one run of Philox; and what
///              they do to values: x ∘ keep / (1 − p̄).
/// Reads:       a Dropout; a row's bits [n / 8].
/// Writes:      bits [n rounded up to 8 · width, / 8]; values [n] in place.
/// Errors:      none.
/// Cost:        about a cycle per column for the bits.
/// Determinism: the bits of core/draws.hpp.
/// Example:     cpu/contract.hpp
#pragma once
#include <loramix/core/draws.hpp>
#include <loramix/cpu/packet.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace cpu {
namespace detail {

typedef unsigned long long Bits64 __attribute__((vector_size(4 * width)));

/// The halves of the 64-bit products of each lane with m.
[[gnu::always_inline]] inline void multiply(Bits32 v, std::uint32_t m, Bits32& high, Bits32& low) {
  const Bits64 wide = loramix::detail::bit_cast<Bits64>(v), factor = Bits64{} + m;
  const Bits64 even = loramix::detail::multiply_low_halves(wide, factor);
  const Bits64 odd = loramix::detail::multiply_low_halves(wide >> 32, factor);
  low = loramix::detail::bit_cast<Bits32>((even & 0xffffffffu) | odd << 32);
  high = loramix::detail::bit_cast<Bits32>(even >> 32 | (odd & ~std::uint64_t{0xffffffffu}));
}

/// bits[i / 8] for columns [c0, c0 + n) of row t; c0 is a multiple of 8. Room for a multiple of `width` bytes.
inline void keep_bits(const Dropout& dropout, Index t, Index c0, Index n, std::uint8_t* bits) {
  const std::uint64_t token = dropout.first_token + static_cast<std::uint64_t>(t);
  Bits32 lane;
  for (int i = 0; i < width; ++i) lane[i] = static_cast<std::uint32_t>(i);
  const Bits32 threshold = Bits32{} + dropout.p16;
  for (Index c = 0; c < n; c += 8 * width) {
    Bits32 w0 = lane + static_cast<std::uint32_t>((c0 + c) / 8);
    Bits32 w1 = Bits32{} + static_cast<std::uint32_t>(Purpose::dropout), w2 = Bits32{} + static_cast<std::uint32_t>(token),
           w3 = Bits32{} + static_cast<std::uint32_t>(token >> 32);
    std::uint32_t k0 = static_cast<std::uint32_t>(dropout.key), k1 = static_cast<std::uint32_t>(dropout.key >> 32);
    for (int round = 0; round < 10; ++round) {
      Bits32 high0, low0, high1, low1;
      multiply(w0, 0xd2511f53u, high0, low0);
      multiply(w2, 0xcd9e8d57u, high1, low1);
      w0 = high1 ^ w1 ^ k0;
      w1 = low1;
      w2 = high0 ^ w3 ^ k1;
      w3 = low0;
      k0 += 0x9e3779b9u;
      k1 += 0xbb67ae85u;
    }
    const auto two = [threshold](Bits32 w) {
      return ((Bits32)((w & 0xffffu) >= threshold) & 1u) | ((Bits32)((w >> 16) >= threshold) & 2u);
    };
    const Bits32 keep = two(w0) | two(w1) << 2 | two(w2) << 4 | two(w3) << 6;
    typedef std::uint8_t Bytes __attribute__((vector_size(width)));
    const Bytes bytes = __builtin_convertvector(keep, Bytes);
    std::memcpy(bits, &bytes, sizeof(bytes));
    bits += width;
  }
}

/// v where the bits of columns [c, c + width) say keep, else 0; c is a multiple of width.
[[gnu::always_inline]] inline Packet keep_lanes(Packet v, const std::uint8_t* bits, Index c) {
  constexpr int bytes = width < 8 ? 1 : width / 8;
  std::uint32_t word = 0;
  std::memcpy(&word, bits + c / 8, bytes);
  Bits32 lane;
  unroll<width>([&](auto i) { lane[int{i}] = 1u << i; });
  const Bits32 kept = (Bits32)(((Bits32{} + (word >> c % 8)) & lane) != 0u);
  return from_bits(to_bits(v) & kept);
}

/// values[i] = values[i] · scale where column c0 + i of row t is kept, else 0, for i in [0, n); c0 is a multiple of 8.
inline void drop(const Dropout& dropout, Index t, Index c0, Index n, float* values) {
  const Packet scale = splat(static_cast<float>(dropout.kept_scale()));
  for (Index c = 0; c < n; c += 8 * width) {
    const Index columns = n - c < 8 * width ? n - c : 8 * width;
    std::uint8_t drawn[width];
    const std::uint8_t* bits = drawn;
    if (dropout.mask != nullptr)
      bits = dropout.mask + t * dropout.mask_stride + (c0 + c) / 8;
    else
      keep_bits(dropout, t, c0 + c, columns, drawn);
    Index i = 0;
    for (; i + width <= columns; i += width) store(values + c + i, keep_lanes(mul(load(values + c + i), scale), bits, i));
    if (i < columns) {
      const Packet rest = keep_lanes(mul(load_part(values + c + i, columns - i), scale), bits, i);
      store_part(values + c + i, rest, columns - i);
    }
  }
}

}  // namespace detail
}  // namespace cpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
