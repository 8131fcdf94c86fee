/// Which ranks tokens have open: how the kernels group tokens by expert where a gate closes most ranks.
///
/// Computes:    from the ids (or prefixes) of a gate's normal form, block by block, on the device: of a tile of 64 tokens the rows
///              that have one of 32 ranks open (shrink), those that have a unit of ranks open (expand), and of a chunk the tokens that
///              have one of 64 ranks open (sums over tokens). Only those are multiplied, sixteen at a time; what is left out would have
///              been multiplied by zeros. Token-major: y is moved once, and x but where experts lie in other blocks; nothing is planned,
///              and no launch is added.
/// Errors:      bad ids are open nowhere.
/// Cost:        a few loads per token and block; no launch, no host read. Weights once per tile of 64 tokens that has them open.
/// Determinism: a token's sums run over its own units in order, whatever others choose; sums over tokens run over those listed, in
///              order.
/// Example:     gpu/expand.cuh
#pragma once
#include <loramix/gpu/ranks.cuh>
#include <loramix/gpu/tuning.cuh>

namespace loramix {
inline namespace LORAMIX_ABI {
namespace gpu {
namespace detail {

inline constexpr int selection_units = 1024;  // bits, and as many entries of a list
inline constexpr Index selection_bytes = selection_units / 8 + selection_units * Index{sizeof(std::uint16_t)};

/// Whether it pays to ask: more ranks than are dense, or ids that come in segments and are known beforehand.
template <class Score>
bool is_sparse(const Tuning& tuning, const GateForm<Score, Space::device>& gate) {
  if (gate.tokens == 0 || ceil_div(gate.ranks, tile_step) > selection_units) return false;
  if (gate.ids.cols == 0 && gate.prefix.size == 0) return false;
  const bool segments = gate.ids.cols == 1 && !gate.id_groups.per_token() && !gate.computed;
  return segments || gate.ranks > tuning.dense_ranks;
}

/// f(begin, end) for ranges of ranks outside of which token t has none open.
template <class Score, class F>
__device__ void each_open_range(const GateForm<Score, Space::device>& gate, Index t, const F& f) {
  const GateRow<float, Score, Space::device> row(gate, t);
  if (!row.covered()) return;
  const Index limit = row.limit() < gate.ranks ? row.limit() : gate.ranks;
  if (gate.ids.data == nullptr) {
    if (limit > 0) f(0, static_cast<int>(limit));
    return;
  }
  for (Index k = 0; k < gate.ids.cols; ++k) {
    const Index e = row.expert_at(k);
    if (e < 0) continue;
    const Index begin = gate.expert_begin(e), end = gate.expert_begin(e + 1);
    if (begin < end && begin < limit) f(static_cast<int>(begin), static_cast<int>(end < limit ? end : limit));
  }
}

/// A set of up to selection_units numbers in shared memory, then a list of them; every thread of the block takes part.
class Listed {
 public:
  __device__ explicit Listed(unsigned char* shared)
      : bits_(reinterpret_cast<unsigned*>(shared)),
        list_(reinterpret_cast<std::uint16_t*>(shared + selection_units / 8)) {}

  __device__ void clear(int units) const {
    for (int i = static_cast<int>(threadIdx.x); i < (units + 31) / 32; i += static_cast<int>(blockDim.x)) bits_[i] = 0;
    __syncthreads();
  }
  /// By any thread, between clear and finish.
  __device__ void add(int unit) const { atomicOr(bits_ + unit / 32, 1u << unit % 32); }
  /// How many there are.
  __device__ int finish(int units) const {
    __syncthreads();
    const int lane = static_cast<int>(threadIdx.x) % warp_width;
    if (threadIdx.x < warp_width) {
      int count = 0;
      for (int first = 0; first < units; first += warp_width) {
        const unsigned word = bits_[first / 32];
        if (word >> lane & 1u)
          list_[count + __popc(word & ((1u << lane) - 1))] = static_cast<std::uint16_t>(first + lane);
        count += __popc(word);
      }
      __syncwarp();
      if (lane == 0) bits_[0] = static_cast<unsigned>(count);
    }
    __syncthreads();
    return static_cast<int>(bits_[0]);
  }
  __device__ int operator[](int i) const { return list_[i]; }

 private:
  unsigned* bits_;
  std::uint16_t* list_;
};

/// Rows of a tile, bit by bit.
using RowSet = unsigned long long;

/// Units of ranks that a tile of 64 tokens has open anywhere, and for each of them which rows have: sets in shared memory, then a list.
class Units {
 public:
  /// Of `units` units.
  LORAMIX_HD static constexpr int bytes(int units) { return round_of_16(units * 10 + 12); }

  __device__ Units(unsigned char* shared, int units)
      : rows_(reinterpret_cast<unsigned*>(shared)),
        list_(reinterpret_cast<std::uint16_t*>(rows_ + 2 * units + 3)),
        units_(units) {}

  /// Every thread of the block takes part here and in finish.
  __device__ void clear() const {
    for (int i = static_cast<int>(threadIdx.x); i < 2 * units_ + 2; i += static_cast<int>(blockDim.x)) rows_[i] = 0;
    __syncthreads();
  }
  /// By any thread, in between.
  __device__ void add(int unit, int row) const {
    atomicOr(rows_ + 2 * unit + row / 32, 1u << row % 32);
    atomicOr(rows_ + 2 * units_ + row / 32, 1u << row % 32);
  }
  /// How many units there are.
  __device__ int finish() const {
    __syncthreads();
    const int lane = static_cast<int>(threadIdx.x) % warp_width;
    if (threadIdx.x < warp_width) {
      int count = 0;
      for (int first = 0; first < units_; first += warp_width) {
        const int unit = first + lane;
        const bool open = unit < units_ && (rows_[2 * unit] | rows_[2 * unit + 1]) != 0;
        const unsigned word = __ballot_sync(whole_warp, open);
        if (open) list_[count + __popc(word & ((1u << lane) - 1))] = static_cast<std::uint16_t>(unit);
        count += __popc(word);
      }
      if (lane == 0) rows_[2 * units_ + 2] = static_cast<unsigned>(count);
    }
    __syncthreads();
    return static_cast<int>(rows_[2 * units_ + 2]);
  }
  /// The i-th unit.
  __device__ int operator[](int i) const { return list_[i]; }
  /// Whether a row has any unit open.
  __device__ bool has(int row) const { return (rows_[2 * units_ + row / 32] >> row % 32 & 1u) != 0; }
  /// The rows that have the i-th unit open.
  __device__ RowSet rows(int i) const {
    const unsigned* const words = rows_ + 2 * list_[i];
    return RowSet{words[1]} << 32 | words[0];
  }
  /// Which they are, in whole sixteens, 64 where there is none; by one warp. Rows 0, 1, … without a gap in this order; others dealt out to
  /// fours in the order of row mod 4: the sums of rows with the same remainder lie in the same banks, and few fours have two of them.
  __device__ void list_rows(int i, unsigned char* to) const {
    const int lane = static_cast<int>(threadIdx.x) % warp_width;
    const RowSet set = rows(i);
    const bool gapless = (set & (set + 1)) == 0;
    const int fours = (__popcll(set) + 3) / 4;
    for (int row = lane; row < 64; row += warp_width) to[row] = 64;
    __syncwarp();
    for (int row = lane; row < 64; row += warp_width) {
      if ((set >> row & 1u) == 0) continue;
      constexpr RowSet same = 0x1111111111111111u;
      const RowSet before = same * ((1u << row % 4) - 1), beside = same << row % 4 & ((RowSet{1} << row) - 1);
      const int place = __popcll(set & (before | beside));
      to[gapless ? row : place % fours * 4 + place / fours] = static_cast<unsigned char>(row);
    }
  }

 private:
  LORAMIX_HD static constexpr int round_of_16(int n) { return (n + 15) / 16 * 16; }
  unsigned* rows_;       // [units, 2] 64 bits each; then 64 of any unit, and how many are listed
  std::uint16_t* list_;  // [units]
  int units_;
};

/// How many steps of 16 ranks tokens have open together: those of an expert, where experts have whole steps.
template <class Score>
int steps_of_unit(const GateForm<Score, Space::device>& gate) {
  const Index rank = gate.experts == 0 ? 0 : gate.ranks / gate.experts;
  if (gate.ids.data == nullptr || gate.rank_offsets != nullptr || rank == 0 || rank % tile_step != 0) return 1;
  const Index steps = rank / tile_step;
  return static_cast<int>(steps <= 4 ? steps : steps % 4 == 0 ? 4 : steps % 3 == 0 ? 3 : steps % 2 == 0 ? 2 : 1);
}

}  // namespace detail
}  // namespace gpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
