/// What the CPU backend may be told about how to work; every number here has a reason, and a caller can replace it.
///
/// Computes:    the class of a number of tokens, on which kernels and summation order depend (MATH.md section 6).
/// Parameters:  Tuning, a member of cpu::Backend.
/// Errors:      none.
/// Cost:        none.
/// Determinism: the order of an element's sum depends on shapes, scalars, gate, class and Tuning; never on data, on the
///              number of threads, on the number of tokens inside a class. Which of two kernels with the same bits runs may.
/// Example:     docs/how-to/tune.md
#pragma once
#include <loramix/core/views.hpp>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace cpu {

/// Which implementation of the product runs.
enum class Path {
  automatic,  // fused where there is a kernel for the scalars, else composed
  composed    // library products around the gate, for every scalar
};

/// In which order an element's products are summed.
enum class Order {
  by_class,  // the fastest order of each class of T
  fixed      // one order at every T, that of the large class: decode and prefill agree bitwise
};

/// Where a gate closes most experts for a token.
enum class Grouping {
  automatic,  // by the cost model
  dense,      // compute all ranks, select after
  grouped     // compute the open ranks only
};

/// Replace what a measurement contradicts: `./dev tune` measures a machine and prints such a value.
struct Tuning {
  Path path = Path::automatic;
  Order order = Order::by_class;
  Grouping grouping = Grouping::automatic;
  Index sweep = 1024;  // columns of x or y in one sweep over few tokens, or over those of an expert; of a piece of dY
  Index weights = 128 * 1024;  // values of a block of packed weights, which stays in L2 during its sweep
  Index tokens_per_sum =
      96;  // tokens added to dA, dB before sums leave the registers; a third where x is read in place
  Index serial_bytes = 1 << 17;  // T ≤ 4: weights below which other threads are not worth waking
};

namespace detail {

constexpr Index blocks_of(Index n, Index block) { return (n + block - 1) / block; }
constexpr Index smaller(Index a, Index b) { return a < b ? a : b; }
constexpr Index larger(Index a, Index b) { return a > b ? a : b; }
constexpr Index round_up(Index n, Index to) { return blocks_of(n, to) * to; }
/// a · b; where that is more than any memory, a number whose bytes overflow, and three of which fit in Index.
constexpr Index elements(Index a, Index b) {
  constexpr Index most = INT64_MAX / 4;
  Index out;
  return __builtin_mul_overflow(a, b, &out) || out > most ? most : out;
}

/// Classes of T.
enum class TokenClass { few, some, many };
constexpr Index few_tokens = 4, some_tokens = 64;

constexpr TokenClass class_of(const Tuning& tuning, Index tokens) {
  if (tuning.order == Order::fixed || tokens > some_tokens) return TokenClass::many;
  return tokens > few_tokens ? TokenClass::some : TokenClass::few;
}

/// Columns of a sweep: whole packets, whole blocks of dropout.
constexpr Index sweep_of(const Tuning& tuning) { return larger(64, tuning.sweep / 64 * 64); }
/// Columns of a sweep on packed weights [ranks, columns]: rows of x and y are gone along as far as the weights stay in L2.
constexpr Index packed_sweep_of(const Tuning& tuning, Index ranks, Index columns) {
  return larger(64, smaller(tuning.weights / larger(1, ranks) / 64, blocks_of(columns, 64)) * 64);
}

/// The cost model of grouping: computing the open ranks only runs at about half the speed of a dense product, for its tiles
/// are smaller and its rows lie apart; it pays where at most half of the ranks of more than a packet or two are open.
/// `chosen` = 0: prefixes, which reach half-way on average.
constexpr bool grouping_pays(Index chosen, Index experts, Index ranks) {
  if (chosen == 0) return ranks > 16;
  return ranks >= 16 && 2 * chosen <= experts;
}

/// How n pieces of work are cut for `lanes`, evenly: at most `most` pieces in a job, multiples of `step` but for the last one.
struct Cut {
  Index n, step, jobs;
  constexpr Cut(Index n_, Index lanes, Index most, Index step_) : n(n_), step(step_) {
    const Index rounds = larger(1, blocks_of(n, larger(1, lanes) * most));
    jobs = smaller(rounds * larger(1, lanes), blocks_of(n, step));
  }
  constexpr Index begin(Index job) const { return smaller(n, blocks_of(n, step) * job / larger(1, jobs) * step); }
  constexpr Index count(Index job) const { return begin(job + 1) - begin(job); }
};

}  // namespace detail
}  // namespace cpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
