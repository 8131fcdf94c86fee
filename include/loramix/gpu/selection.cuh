/// Which ranks a tile of tokens has open anywhere: what the kernels leave out where a gate closes most of them.
///
/// Computes:    from the ids (or prefixes) of a gate's normal form, tile by tile, on the device: the steps of 16 ranks of 64 tokens
///              (expand), the slices of 32 ranks (shrink), the tiles of tokens of 64 ranks (sums over tokens). What is left
///              out would have been multiplied by zeros. Tokens stay where they are, nothing is planned or gathered: one
///              expert per segment, or few tokens, leave out most of the work; tokens that choose at random among many
///              experts leave out little.
/// Errors:      bad ids are open nowhere.
/// Cost:        a few loads per token and block; no launch, no host read.
/// Determinism: sums in the order that they have without it, so the same bits for finite weights.
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

}  // namespace detail
}  // namespace gpu
}  // namespace LORAMIX_ABI
}  // namespace loramix
