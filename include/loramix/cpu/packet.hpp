/// The one place that names Eigen's packets: what the fused kernels are written in, for whatever instruction set the
/// compiler was told. `Eigen::internal` is not a stable interface; nothing but this file and cpu/gemm.hpp names it.
///
/// Computes:    float arithmetic on `width` lanes; load and store convert bfloat16 and half with the bits of
///              core/scalars.hpp; fma rounds once where the machine can.
/// Reads:       p [width] (load), p [n] with n < width (load_part; zeros in the other lanes).
/// Writes:      p [width] (store), p [n] (store_part); nothing behind them.
/// Errors:      none.
/// Cost:        an instruction or a few each.
/// Determinism: lanes are independent; `lane_sums` adds them in one fixed order.
/// Example:     cpu/kernels.hpp
#pragma once
#include <Eigen/Core>
#include <cstring>
#include <utility>

#include <loramix/core/scalars.hpp>
#include <loramix/core/views.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace cpu {
namespace detail {

using Packet = Eigen::internal::packet_traits<float>::type;
inline constexpr int width = Eigen::internal::packet_traits<float>::size;
/// Vector registers of the machine: what a register tile may fill.
inline constexpr int registers = EIGEN_ARCH_DEFAULT_NUMBER_OF_REGISTERS;

// Integers beside a packet, in the compiler's own vectors: Eigen has no widening of 16 bits and no comparison of bits.
typedef std::uint16_t Bits16 __attribute__((vector_size(2 * width)));
typedef std::uint32_t Bits32 __attribute__((vector_size(4 * width)));

/// Whether there are `load` and `store` for it.
template <class T>
inline constexpr bool is_stored = std::is_same_v<T, float> || is_16bit<T>;

/// f(0), f(1), …, f(N − 1), the index a constant: arrays of packets then live in registers.
template <class F, int... I>
[[gnu::always_inline]] inline void unroll(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
[[gnu::always_inline]] inline void unroll(F&& f) {
  unroll(f, std::make_integer_sequence<int, N>{});
}

[[gnu::always_inline]] inline Packet splat(float v) { return Eigen::internal::pset1<Packet>(v); }
[[gnu::always_inline]] inline Packet fma(Packet a, Packet b, Packet c) { return Eigen::internal::pmadd(a, b, c); }
[[gnu::always_inline]] inline Packet add(Packet a, Packet b) { return Eigen::internal::padd(a, b); }
[[gnu::always_inline]] inline Packet mul(Packet a, Packet b) { return Eigen::internal::pmul(a, b); }
[[gnu::always_inline]] inline Packet sub(Packet a, Packet b) { return Eigen::internal::psub(a, b); }
/// 1 / (1 + exp(−a)), to a few units in the last place; below −88 something under 10⁻³⁸.
[[gnu::always_inline]] inline Packet sigmoid(Packet a) {
  namespace packets = Eigen::internal;
  return packets::pdiv(splat(1), add(splat(1), packets::pexp(packets::pnegate(a))));
}
/// Lane l is v[l] + v[l ^ Distance], of v = a where bit `Distance` of l is clear, of v = b elsewhere.
template <int Distance, int... Lane>
[[gnu::always_inline]] inline Packet add_lanes(Packet a, Packet b, std::integer_sequence<int, Lane...>) {
  return add(__builtin_shufflevector(a, b, (Lane & Distance ? width + (Lane ^ Distance) : Lane)...),
             __builtin_shufflevector(a, b, (Lane & Distance ? width + Lane : Lane ^ Distance)...));
}
/// Lane l is the sum of all lanes of p[l mod N], N a power of two, at most `width`: one order of additions for every N.
template <int N, int Distance = 1>
[[gnu::always_inline]] inline Packet lane_sums(const Packet (&p)[N]) {
  constexpr std::make_integer_sequence<int, width> lanes;
  if constexpr (Distance == width) {
    return p[0];
  } else {
    constexpr int left = N > 1 ? N / 2 : 1;
    Packet pairs[left];
    unroll<left>([&](int i) __attribute__((always_inline)) {
      pairs[i] = add_lanes<Distance>(p[N > 1 ? 2 * i : 0], p[N > 1 ? 2 * i + 1 : 0], lanes);
    });
    return lane_sums<left, 2 * Distance>(pairs);
  }
}
[[gnu::always_inline]] inline float sum(Packet a) { return Eigen::internal::pfirst(lane_sums({a})); }
// The packet of some machines carries attributes that do not matter here.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"
/// Rows become columns.
[[gnu::always_inline]] inline void transpose(Packet (&rows)[width]) {
  Eigen::internal::PacketBlock<Packet, width> block;
  unroll<width>([&](int i) __attribute__((always_inline)) { block.packet[i] = rows[i]; });
  Eigen::internal::ptranspose(block);
  unroll<width>([&](int i) __attribute__((always_inline)) { rows[i] = block.packet[i]; });
}
/// Whether the machine can load and store some lanes of floats only.
inline constexpr bool has_masks = Eigen::internal::unpacket_traits<Packet>::masked_load_available != 0 &&
                                  Eigen::internal::unpacket_traits<Packet>::masked_store_available != 0;
#pragma GCC diagnostic pop

[[gnu::always_inline]] inline Packet from_bits(Bits32 v) { return loramix::detail::bit_cast<Packet>(v); }
[[gnu::always_inline]] inline Bits32 to_bits(Packet v) { return loramix::detail::bit_cast<Bits32>(v); }
/// a where the mask (all ones or all zeros in a lane) says so, else b.
[[gnu::always_inline]] inline Bits32 select(Bits32 mask, Bits32 a, Bits32 b) { return (a & mask) | (b & ~mask); }

[[gnu::always_inline]] inline Packet load(const float* p) { return Eigen::internal::ploadu<Packet>(p); }
[[gnu::always_inline]] inline void store(float* p, Packet v) { Eigen::internal::pstoreu(p, v); }
[[gnu::always_inline]] inline Bits32 load_bits(const void* p) {
  Bits16 narrow;
  std::memcpy(&narrow, p, sizeof(narrow));
  return __builtin_convertvector(narrow, Bits32);
}
[[gnu::always_inline]] inline void store_bits(void* p, Bits32 v) {
  const Bits16 narrow = __builtin_convertvector(v, Bits16);
  std::memcpy(p, &narrow, sizeof(narrow));
}

[[gnu::always_inline]] inline Packet load(const bfloat16* p) { return from_bits(load_bits(p) << 16); }
[[gnu::always_inline]] inline void store(bfloat16* p, Packet v) {
  const Bits32 u = to_bits(v), nan = (Bits32)((u & 0x7fffffffu) > 0x7f800000u);
  store_bits(p, select(nan, u >> 16 | 0x40u, (u + 0x7fffu + (u >> 16 & 1u)) >> 16));
}

[[gnu::always_inline]] inline Packet load(const half* p) {
  const Bits32 h = load_bits(p), magnitude = h & 0x7fffu, special = (Bits32)(magnitude >= 0x7c00u);
  // Times 2^112: the exponent's bias, and subnormals become normal, exactly.
  const Packet scaled = mul(from_bits(magnitude << 13), splat(5.192296858534828e33f));
  return from_bits(select(special, magnitude << 13 | 0x7f800000u, to_bits(scaled)) | (h & 0x8000u) << 16);
}
[[gnu::always_inline]] inline void store(half* p, Packet v) {
  const Bits32 u = to_bits(v), m = u & 0x7fffffffu;
  // As round_to(float, half): adding 0.5 rounds subnormals, adding a half of the last place the others.
  const Bits32 small = to_bits(add(from_bits(m), splat(0.5f))) - 0x3f000000u;
  const Bits32 normal = (m + 0xfffu + (m >> 13 & 1u) - (112u << 23)) >> 13;
  Bits32 h = select((Bits32)(m < 0x38800000u), small, normal);
  h = select((Bits32)(m >= 0x477ff000u), Bits32{} + 0x7c00u, h);
  h = select((Bits32)(m > 0x7f800000u), 0x7e00u | (m >> 13 & 0x3ffu), h);
  store_bits(p, h | (u >> 16 & 0x8000u));
}

/// Asks for the line of p; any address is legal.
[[gnu::always_inline]] inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

[[gnu::always_inline]] inline auto first_lanes(Index n) {
  return static_cast<std::conditional_t<width == 16, std::uint16_t, std::uint8_t>>((1u << n) - 1u);
}
/// The first n < width lanes; zeros in the others.
template <class T>
inline Packet load_part(const T* p, Index n) {
  if constexpr (std::is_same_v<T, float> && has_masks) {
    return Eigen::internal::ploadu<Packet>(p, first_lanes(n));
  } else {
    T lanes[width] = {};
    for (Index i = 0; i < n; ++i) lanes[i] = p[i];
    return load(lanes);
  }
}
template <class T>
inline void store_part(T* p, Packet v, Index n) {
  if constexpr (std::is_same_v<T, float> && has_masks) {
    Eigen::internal::pstoreu(p, v, first_lanes(n));
  } else {
    T lanes[width];
    store(lanes, v);
    for (Index i = 0; i < n; ++i) p[i] = lanes[i];
  }
}

/// f(c, lanes) for c = 0, width, …: lanes.load and lanes.store touch the columns below n.
struct WholePacket {
  template <class T>
  static Packet load(const T* p) {
    return detail::load(p);
  }
  template <class T>
  static void store(T* p, Packet v) {
    detail::store(p, v);
  }
};
struct PartOfPacket {
  Index n;
  template <class T>
  Packet load(const T* p) const {
    return load_part(p, n);
  }
  template <class T>
  void store(T* p, Packet v) const {
    store_part(p, v, n);
  }
};
template <class F>
[[gnu::always_inline]] inline void over_packets(Index n, const F& f) {
  Index c = 0;
  for (; c + width <= n; c += width) f(c, WholePacket{});
  if (c < n) f(c, PartOfPacket{n - c});
}

/// to[i] = from[i], widened, for i in [0, n), and zeros up to a whole packet.
template <class T>
[[gnu::always_inline]] inline void widen_row(const T* from, Index n, float* to) {
  over_packets(
      n, [&](Index i, auto lanes) __attribute__((always_inline)) { store(to + i, lanes.load(from + i)); });
}
/// to (+)= v.
template <class T, class Lanes>
[[gnu::always_inline]] inline void add_or_set(T* to, Packet v, Into into, const Lanes& lanes) {
  lanes.store(to, into == Into::add ? add(lanes.load(to), v) : v);
}
/// to (+)= factor · v.
template <class T, class Lanes>
[[gnu::always_inline]] inline void add_or_set(T* to, Packet v, Packet factor, Into into, const Lanes& lanes) {
  lanes.store(to, into == Into::add ? fma(factor, v, lanes.load(to)) : mul(factor, v));
}

}  // namespace detail
}  // namespace cpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
