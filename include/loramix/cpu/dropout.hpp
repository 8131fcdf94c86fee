/// Dropout masks, many columns at a time.
///
/// Computes:    the bits of Dropout::keep8 (core/draws.hpp) for whole rows, 8 · width columns in one run of Philox; and what
///              they do to values: x ∘ keep, whose 1 / (1 − p̄) goes into the scale of the sums that are made of it.
/// Reads:       a Dropout; a row's bits [n / 8].
/// Writes:      bits [keep_bytes(n)]; values [n].
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

/// Philox4x32-10 on width / 2 blocks: a word in the low half of each lane; what the high halves hold is never looked at.
class PhiloxLanes {
 public:
  PhiloxLanes() = default;
  [[gnu::always_inline]] PhiloxLanes(Bits64 block, std::uint32_t purpose, std::uint64_t token)
      : w0_(block), w1_(Bits64{} + purpose), w2_(Bits64{} + token), w3_(Bits64{} + (token >> 32)) {}

  [[gnu::always_inline]] void round(std::uint32_t k0, std::uint32_t k1) {
    const Bits64 p0 = loramix::detail::multiply_low_halves(w0_, Bits64{} + 0xd2511f53u);
    const Bits64 p1 = loramix::detail::multiply_low_halves(w2_, Bits64{} + 0xcd9e8d57u);
    w0_ = high(p1) ^ w1_ ^ (Bits64{} + k0);
    w1_ = p1;
    w2_ = high(p0) ^ w3_ ^ (Bits64{} + k1);
    w3_ = p0;
  }
  /// Word i of these blocks and of others, in turn.
  template <int I>
  [[gnu::always_inline]] Bits32 with(const PhiloxLanes& odd) const {
    return (Bits32)((word<I>() & 0xffffffffu) | odd.template word<I>() << 32);
  }

 private:
  /// The high halves where the low ones were: a shuffle, for shifts share a port with multiplications.
  template <int... I>
  [[gnu::always_inline]] static Bits64 swap(Bits32 v, std::integer_sequence<int, I...>) {
    return (Bits64)__builtin_shufflevector(v, v, (I | 1)...);
  }
  [[gnu::always_inline]] static Bits64 high(Bits64 v) {
    return swap((Bits32)v, std::make_integer_sequence<int, width>{});
  }
  template <int I>
  [[gnu::always_inline]] Bits64 word() const {
    return I == 0 ? w0_ : I == 1 ? w1_ : I == 2 ? w2_ : w3_;
  }
  Bits64 w0_, w1_, w2_, w3_;
};

/// Columns that a run of Philox serves.
inline constexpr Index columns_of_run = 8 * width;
/// How many runs go side by side where there are columns for them: a round waits for the one before it.
inline constexpr int most_runs = registers >= 32 ? 2 : 1;
/// Room for the bits of so many columns. A row of a saved mask (mask_bytes) is that and more.
constexpr Index keep_bytes(Index columns) { return (columns + columns_of_run - 1) / columns_of_run * width; }
static_assert(512 % columns_of_run == 0, "rows of a mask are multiples of 64 bytes");

/// The bits of `Runs` runs from `block` on: a bit is set where 16 bits of the draw reach p16.
template <int Runs>
[[gnu::always_inline]] inline void draw_runs(const Dropout& dropout, std::uint64_t token, std::uint64_t block,
                                             std::uint8_t* bits) {
  Bits64 even_blocks;
  for (int i = 0; i < width / 2; ++i) even_blocks[i] = static_cast<unsigned>(2 * i);
  PhiloxLanes lanes[2 * Runs];  // of a run's even blocks, of its odd ones, of the next run's
  unroll<2 * Runs>([&](int i) {
    lanes[i] = {even_blocks + (block + static_cast<std::uint64_t>(i / 2 * width + i % 2)),
                static_cast<std::uint32_t>(Purpose::dropout), token};
  });
  std::uint32_t k0 = static_cast<std::uint32_t>(dropout.key), k1 = static_cast<std::uint32_t>(dropout.key >> 32);
  unroll<10>([&](int) {
    unroll<2 * Runs>([&](int i) { lanes[i].round(k0, k1); });
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  });
  typedef std::uint16_t Halves __attribute__((vector_size(4 * width)));
  const Halves threshold = Halves{} + static_cast<std::uint16_t>(dropout.p16);
  // Word i: its low half is column 2i of the block, its high half column 2i + 1.
  const auto halves = [threshold](Bits32 w, std::uint32_t bits_of_word) {
    return (Bits32)((Halves)w >= threshold) & bits_of_word;
  };
  unroll<Runs>([&](int run) {
    const PhiloxLanes &even = lanes[2 * run], &odd = lanes[2 * run + 1];
    const Bits32 kept = halves(even.with<0>(odd), 0x00020001u) | halves(even.with<1>(odd), 0x00080004u) |
                        halves(even.with<2>(odd), 0x00200010u) | halves(even.with<3>(odd), 0x00800040u);
    const Bits32 keep = kept | kept >> 16;
    typedef std::uint8_t Bytes __attribute__((vector_size(width)));
    const Bytes bytes = __builtin_convertvector(keep, Bytes);
    std::memcpy(bits + run * width, &bytes, sizeof(bytes));
  });
}

/// bits[i / 8] for columns [c0, c0 + n) of row t, up to keep_bytes(n) of them; c0 is a multiple of 8.
inline void keep_bits(const Dropout& dropout, Index t, Index c0, Index n, std::uint8_t* bits) {
  if (dropout.mask != nullptr) {  // drawn before
    std::memcpy(bits, dropout.mask + t * dropout.mask_stride + c0 / 8, static_cast<std::size_t>((n + 7) / 8));
    return;
  }
  const std::uint64_t token = dropout.first_token + static_cast<std::uint64_t>(t);
  const std::uint64_t block = static_cast<std::uint64_t>(c0 / 8);
  Index run = 0;
  const Index runs = keep_bytes(n) / width;
  for (; run + most_runs <= runs; run += most_runs)
    draw_runs<most_runs>(dropout, token, block + static_cast<std::uint64_t>(run * width), bits + run * width);
  for (; run < runs; ++run)
    draw_runs<1>(dropout, token, block + static_cast<std::uint64_t>(run * width), bits + run * width);
}

/// Whether a load may keep the lanes that bits say at no cost.
inline constexpr bool keeps_while_loading = loramix::detail::has_mask_registers && width == 16;

/// v where the bits of columns [c, c + width) say keep, else 0; c is a multiple of width.
[[gnu::always_inline]] inline Packet keep_lanes(Packet v, const std::uint8_t* bits, Index c) {
  constexpr int bytes = width < 8 ? 1 : width / 8;
  std::uint32_t word = 0;
  std::memcpy(&word, bits + c / 8, bytes);
  if constexpr (keeps_while_loading) {
    return loramix::detail::keep_lanes_by_mask(v, static_cast<unsigned short>(word));
  }
  Bits32 lane;
  unroll<width>([&](int i) { lane[i] = 1u << i; });
  const Bits32 kept = (Bits32)(((Bits32{} + (word >> c % 8)) & lane) != 0u);
  return from_bits(to_bits(v) & kept);
}

/// Rows as they lie, under their bits, for `outer` and `dot` (cpu/kernels.hpp); what is dropped is 0.
struct KeptPanel {
  const float* p;
  Index step;
  const std::uint8_t* bits;
  Index bits_step;
  [[gnu::always_inline]] Packet packet(Index k, Index n) const {
    return keep_lanes(load(p + k * step + n * width), bits + k * bits_step, n * width);
  }
  [[gnu::always_inline]] void move(Index columns) { p += columns, bits += columns / 8; }
};
template <int M>
struct KeptRows {
  const float* p[M];
  const std::uint8_t* bits[M];
  template <class Lanes>
  [[gnu::always_inline]] Packet packet(int m, Index k, const Lanes& lanes) const {
    return keep_lanes(lanes.load(p[m] + k), bits[m], k);
  }
};

/// What sums over x ∘ keep are multiplied by.
inline float factor_of(const Dropout& dropout, float scale) {
  return dropout.on() ? scale * static_cast<float>(dropout.kept_scale()) : scale;
}

/// out[i] = x[i] where column c0 + i of row t is kept, else 0, for i in [0, n); c0 is a multiple of 8.
template <class X>
void drop(const Dropout& dropout, Index t, Index c0, Index n, const X* x, float* out) {
  constexpr Index step = most_runs * columns_of_run;
  for (Index c = 0; c < n; c += step) {
    const Index columns = n - c < step ? n - c : step;
    std::uint8_t drawn[keep_bytes(step)];
    const std::uint8_t* bits = drawn;
    if (dropout.mask != nullptr) {
      bits = dropout.mask + t * dropout.mask_stride + (c0 + c) / 8;
      prefetch(bits + 64);
    } else {
      keep_bits(dropout, t, c0 + c, columns, drawn);
    }
    Index i = 0;
    for (; i + width <= columns; i += width) store(out + c + i, keep_lanes(load(x + c + i), bits, i));
    if (i < columns) {
      store_part(out + c + i, keep_lanes(load_part(x + c + i, columns - i), bits, i), columns - i);
    }
  }
}

}  // namespace detail
}  // namespace cpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
