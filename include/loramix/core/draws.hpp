/// Random draws as pure functions of (seed, site, step, purpose, global token, column): nothing is stored, nothing
/// depends on threads, tiles or devices, and backward makes the forward's mask again.
///
/// Computes:    Philox4x32-10 (Salmon et al. 2011) with key = fold(fold(seed, site), step) and
///              counter = (block, purpose, token low, token high); MATH.md section 1.
/// Determinism: the same bits on every device.
/// Example:     lm::Key{.seed = 42, .site = lm::site("layers.0.mlp.up_proj"), .step = 3}
#pragma once
#include <cstdint>

#include <loramix/core/check.hpp>
#include <loramix/core/views.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {

/// FNV-1a-64 of a name. Modules that read one input get one name, and so one mask. `hash` continues another name's.
constexpr std::uint64_t site(const char* name, std::uint64_t hash = 0xcbf29ce484222325u) {
  for (; *name != '\0'; ++name) hash = (hash ^ static_cast<unsigned char>(*name)) * 0x100000001b3u;
  return hash;
}

/// What the caller says about a call's draws. `first_token` is the global id of row 0: micro-batches and ranks that
/// give it draw the same masks as one large batch.
struct Key {
  std::uint64_t seed = 0;
  std::uint64_t site = 0;
  std::uint64_t step = 0;
  std::uint64_t first_token = 0;
  bool on = true;
};

/// No draws: dropout and noise are off, as in inference.
inline constexpr Key no_draws{.on = false};

/// Which stream of a token a draw comes from.
enum class Purpose : std::uint32_t { dropout = 0, router_noise = 1, jitter = 2, initialisation = 3, sampling = 4 };

/// A counter, or what it is turned into.
struct PhiloxWords {
  std::uint32_t word[4];
};

namespace detail {
LORAMIX_HD constexpr std::uint64_t splitmix64(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}
LORAMIX_HD constexpr std::uint64_t fold(std::uint64_t k, std::uint64_t v) { return splitmix64(k ^ splitmix64(v)); }
}  // namespace detail

/// The 64-bit Philox key of a call.
LORAMIX_HD constexpr std::uint64_t philox_key(const Key& key) {
  return detail::fold(detail::fold(key.seed, key.site), key.step);
}

/// One Philox4x32-10 block.
LORAMIX_HD constexpr PhiloxWords philox(std::uint64_t key, PhiloxWords counter) {
  std::uint32_t k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t{0xd2511f53u} * counter.word[0];
    const std::uint64_t p1 = std::uint64_t{0xcd9e8d57u} * counter.word[2];
    counter = {{static_cast<std::uint32_t>(p1 >> 32) ^ counter.word[1] ^ k0, static_cast<std::uint32_t>(p1),
                static_cast<std::uint32_t>(p0 >> 32) ^ counter.word[3] ^ k1, static_cast<std::uint32_t>(p0)}};
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  return counter;
}

/// Block `block` of the stream that belongs to a token (or row) and a purpose.
LORAMIX_HD constexpr PhiloxWords draw_block(std::uint64_t key, Purpose purpose, std::uint64_t token,
                                            std::uint32_t block) {
  return philox(key, {{block, static_cast<std::uint32_t>(purpose), static_cast<std::uint32_t>(token),
                       static_cast<std::uint32_t>(token >> 32)}});
}

/// Uniform in (0, 1): column i of a row, for purposes 1 to 4.
LORAMIX_HD constexpr double draw_uniform(std::uint64_t key, Purpose purpose, std::uint64_t row, Index column) {
  const PhiloxWords words = draw_block(key, purpose, row, static_cast<std::uint32_t>(column / 4));
  return (words.word[column % 4] + 0.5) * 0x1p-32;
}

/// The dropout of one call: keep ⇔ draw16 ≥ p16; kept values are multiplied by 1/(1 − p̄), p̄ = p16 / 65536.
struct Dropout {
  std::uint64_t key = 0;
  std::uint64_t first_token = 0;
  std::uint32_t p16 = 0;
  const std::uint8_t* mask =
      nullptr;            // bits that were drawn before (ops/draw_mask.hpp); null: they are drawn when asked for
  Index mask_stride = 0;  // bytes from row to row

  LORAMIX_HD constexpr bool on() const { return p16 != 0; }
  LORAMIX_HD constexpr double kept_scale() const { return 65536.0 / (65536.0 - p16); }
  /// Bit b says whether column 8 · block + b of row t is kept.
  LORAMIX_HD constexpr std::uint32_t keep8(Index t, Index block) const {
    if (mask != nullptr) return mask[t * mask_stride + block];
    const PhiloxWords words = draw_block(key, Purpose::dropout, first_token + static_cast<std::uint64_t>(t),
                                         static_cast<std::uint32_t>(block));
    std::uint32_t bits = 0;
    for (int w = 0; w < 4; ++w) {
      bits |= static_cast<std::uint32_t>((words.word[w] & 0xffffu) >= p16) << (2 * w);
      bits |= static_cast<std::uint32_t>((words.word[w] >> 16) >= p16) << (2 * w + 1);
    }
    return bits;
  }
  LORAMIX_HD constexpr bool keep(Index t, Index column) const { return keep8(t, column / 8) >> (column % 8) & 1u; }
};

/// Bytes of a row of a mask kept as bits: a multiple of 64.
LORAMIX_HD constexpr Index mask_bytes(Index columns) { return (columns + 511) / 512 * 64; }

/// round(65536 p), refusing p outside [0, 1) and p that rounds to 1.
inline std::uint32_t dropout_p16(const char* op, double p) {
  if (!(p >= 0.0 && p < 1.0) || p * 65536.0 >= 65535.5) {
    fail(check::detail::about(ErrorCode::value, op, "dropout") << " must be in [0, 1) and below 65535.5/65536");
  }
  const std::uint32_t floor = static_cast<std::uint32_t>(p * 65536.0);
  return floor + (p * 65536.0 - floor >= 0.5 ? 1 : 0);
}

/// The dropout of a call; off where the key is.
inline Dropout make_dropout(const char* op, double p, const Key& key) {
  const std::uint32_t p16 = dropout_p16(op, p);
  if (!key.on) return {};
  return {philox_key(key), key.first_token, p16, nullptr, 0};
}

}  // namespace LORAMIX_ABI
}  // namespace loramix
